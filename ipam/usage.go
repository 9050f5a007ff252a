package ipam

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"

	"margay/datastore"
)

// OrphanPool is the name under which Usage lists blocks that lie in no pool any more.
const OrphanPool = "orphaned allocation blocks"

// PoolUsage is how full a pool is. The counts are floating point because an IPv6 pool's do not fit into an integer.
type PoolUsage struct {
	Name   string       `json:"name"`
	CIDR   netip.Prefix `json:"cidr"`  // invalid for OrphanPool
	Total  float64      `json:"total"` // addresses, as are the next two
	InUse  float64      `json:"inUse"`
	Free   float64      `json:"free"`
	Blocks []BlockUsage `json:"blocks"` // in order
}

// BlockUsage is how full a block is.
type BlockUsage struct {
	CIDR     netip.Prefix `json:"cidr"`
	Total    int          `json:"total"`
	InUse    int          `json:"inUse"`
	Affinity string       `json:"affinity"` // the node's name, empty if nobody's
}

// Usage reports all pools, in the order of their CIDRs, with their blocks. A stored block or pool that cannot be
// understood is left out and named in the error; the rest of the report is good.
func Usage(ctx context.Context, s *datastore.Store) ([]PoolUsage, error) {
	pools, _, err := datastore.ListResources[datastore.IPPool](ctx, s)
	errs := []error{err}
	if errors.Is(err, datastore.ErrUnreachable) || ctx.Err() != nil {
		return nil, err
	}
	var out []PoolUsage
	for _, p := range pools {
		prefix, err := p.Prefix()
		if err != nil {
			errs = append(errs, fmt.Errorf("pool %s: %w", p.Metadata.Name, err))
			continue
		}
		out = append(out, PoolUsage{Name: p.Metadata.Name, CIDR: prefix, Total: math.Pow(2, float64(prefix.Addr().BitLen()-prefix.Bits()))})
	}
	slices.SortFunc(out, func(a, b PoolUsage) int { return a.CIDR.Compare(b.CIDR) })
	orphans := PoolUsage{Name: OrphanPool}
	for _, prefix := range []string{blockRootV4, blockRootV6} {
		kvs, _, err := s.List(ctx, prefix)
		if err != nil {
			return nil, err
		}
		for _, kv := range kvs {
			b, err := decodeBlock(kv.Value)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", kv.Key, err))
				continue
			}
			pool := &orphans
			for i := range out {
				if out[i].CIDR.Contains(b.cidr.Addr()) {
					pool = &out[i]
				}
			}
			pool.add(b)
		}
	}
	if len(orphans.Blocks) > 0 {
		out = append(out, orphans)
	}
	for i := range out {
		out[i].Free = out[i].Total - out[i].InUse
		slices.SortFunc(out[i].Blocks, func(a, b BlockUsage) int { return a.CIDR.Compare(b.CIDR) })
	}
	return out, errors.Join(errs...)
}

func (p *PoolUsage) add(b *block) {
	const host = "host:"
	u := BlockUsage{CIDR: b.cidr, Total: len(b.allocations), InUse: b.inUse()}
	if len(b.affinity) > len(host) && b.affinity[:len(host)] == host {
		u.Affinity = b.affinity[len(host):]
	}
	p.Blocks = append(p.Blocks, u)
	p.InUse += float64(u.InUse)
	if p.Name == OrphanPool {
		p.Total += float64(u.Total)
	}
}
