package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"margay/datastore"
)

// assignFixed gives out the one address that was asked for.
func (a *Allocator) assignFixed(ctx context.Context, v *view, pools []*datastore.IPPool, req Request) (Assignment, error) {
	for _, pool := range pools {
		prefix, err := pool.Prefix()
		if err != nil || !prefix.Contains(req.IP) {
			continue
		}
		cidr, err := req.IP.Prefix(pool.Spec.BlockSize)
		if err != nil {
			return Assignment{}, fmt.Errorf("pool %s: spec.blockSize %d: %w", pool.Metadata.Name, pool.Spec.BlockSize, err)
		}
		b, err := a.ownBlock(ctx, v, cidr)
		if errors.Is(err, errTaken) {
			return a.borrowFixed(ctx, v, cidr, pool, req)
		}
		if err != nil {
			return Assignment{}, err
		}
		return a.take(ctx, v, b, pool, req)
	}
	return Assignment{}, fmt.Errorf("address %s: %w: it is in no pool that may be used", req.IP, ErrAddressInUse)
}

// borrowFixed gives out the address though its block is another node's, unless strict affinity forbids that.
func (a *Allocator) borrowFixed(ctx context.Context, v *view, cidr netip.Prefix, pool *datastore.IPPool, req Request) (Assignment, error) {
	if v.config.StrictAffinity {
		return Assignment{}, fmt.Errorf("address %s: %w: block %s belongs to another node, and strict affinity forbids to borrow",
			req.IP, ErrAddressInUse, cidr)
	}
	b, err := a.load(ctx, cidr)
	if err != nil {
		return Assignment{}, err
	}
	out, err := a.take(ctx, v, b, pool, req)
	delete(a.cache, cidr) // somebody else writes it
	return out, err
}

// ownBlock is that very block, claimed if this node may and it is not this node's yet; errTaken if it is another's.
func (a *Allocator) ownBlock(ctx context.Context, v *view, cidr netip.Prefix) (*stored, error) {
	if own, ok := v.affinities[cidr]; ok && own.state == stateConfirmed && !own.deleted {
		b, err := a.load(ctx, cidr)
		if err == nil && b.affinity == a.owner() {
			return b, nil
		}
		if err != nil && !errors.Is(err, datastore.ErrNotFound) {
			return nil, err
		}
	}
	if why := a.claimRefusal(v); why != "" {
		if _, err := a.load(ctx, cidr); err == nil {
			delete(a.cache, cidr)
			return nil, errTaken
		}
		return nil, fmt.Errorf("block %s: %w: it is nobody's, %s", cidr, ErrAddressInUse, why)
	}
	return a.claim(ctx, v, cidr)
}
