package datastore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// ErrNotLocked says that the datastore is open for allocation, where it must not be.
var ErrNotLocked = errors.New("datastore is not locked")

// maxSplit is how many pools one transaction can make (etcd takes 128 operations).
const maxSplit = 64

// SplitPool replaces a pool by that many smaller ones of equal size, named split-<name>-<n>, which have everything else
// of it, all in one transaction. The blocks stay where they are, each in the part that it lies in. The datastore must be
// locked (else ErrNotLocked), so that nothing is assigned by the old pool meanwhile.
func SplitPool(ctx context.Context, s *Store, name string, parts int) ([]*IPPool, error) {
	info, err := GetResource[ClusterInformation](ctx, s, "default")
	if err != nil && !errors.Is(err, ErrNotFound) {
		return nil, err
	}
	if err != nil || info.Ready() {
		return nil, ErrNotLocked
	}
	lock, err := strconv.ParseInt(info.Metadata.ResourceVersion, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("metadata.resourceVersion %q: %w", info.Metadata.ResourceVersion, err)
	}
	old, err := GetResource[IPPool](ctx, s, name)
	if err != nil {
		return nil, err
	}
	old.Default()
	prefixes, err := old.split(parts)
	if err != nil {
		return nil, resourceError(IPPools, name, err)
	}
	rev, err := strconv.ParseInt(old.Metadata.ResourceVersion, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("metadata.resourceVersion %q: %w", old.Metadata.ResourceVersion, err)
	}
	ops := []Op{OpDelete(IPPools.Key(name), rev), OpCheck(ClusterInformations.Key("default"), lock)}
	var out []*IPPool
	now := time.Now().UTC().Truncate(time.Second)
	for i, prefix := range prefixes {
		part := *old
		// The name keeps room for its number, as Calico's does.
		part.Metadata = Metadata{Name: fmt.Sprintf("split-%s-%d", name[:min(len(name), 245)], i), UID: newUID(),
			CreationTimestamp: &now, Labels: old.Metadata.Labels, Annotations: old.Metadata.Annotations}
		part.Spec.CIDR, part.Spec.Disabled = prefix.String(), false
		if err := prepare(&part); err != nil {
			return nil, err
		}
		value, err := encode(&part)
		if err != nil {
			return nil, resourceError(IPPools, part.Metadata.Name, err)
		}
		ops = append(ops, OpCreate(IPPools.Key(part.Metadata.Name), value))
		out = append(out, &part)
	}
	if _, err := s.Txn(ctx, ops...); err != nil {
		return nil, resourceError(IPPools, name, err)
	}
	return out, nil
}

// split is the parts of the pool's range.
func (p *IPPool) split(parts int) ([]netip.Prefix, error) {
	whole, err := p.Prefix()
	if err != nil {
		return nil, err
	}
	if parts < 2 || parts > maxSplit || bits.OnesCount(uint(parts)) != 1 {
		return nil, fmt.Errorf("number of parts %d: expected a power of two from 2 to %d", parts, maxSplit)
	}
	length := whole.Bits() + bits.Len(uint(parts)) - 1
	if length > p.Spec.BlockSize {
		return nil, fmt.Errorf("spec.cidr %q: too small for %d parts: expected each to hold a block of /%d", p.Spec.CIDR, parts, p.Spec.BlockSize)
	}
	out := make([]netip.Prefix, parts)
	for i := range out {
		raw := whole.Addr().As16()
		shift := whole.Addr().BitLen() - length // the part's number stands above so many bits
		if shift >= 64 {
			high := binary.BigEndian.Uint64(raw[:8])
			binary.BigEndian.PutUint64(raw[:8], high|uint64(i)<<(shift-64))
		} else {
			high, low := binary.BigEndian.Uint64(raw[:8]), binary.BigEndian.Uint64(raw[8:])
			binary.BigEndian.PutUint64(raw[:8], high|uint64(i)>>(64-shift))
			binary.BigEndian.PutUint64(raw[8:], low|uint64(i)<<shift)
		}
		addr := netip.AddrFrom16(raw)
		if whole.Addr().Is4() {
			addr = addr.Unmap()
		}
		out[i] = netip.PrefixFrom(addr, length)
	}
	return out, nil
}

// FindPool is the pool of a name, or the one of exactly that CIDR.
func FindPool(ctx context.Context, s *Store, name, cidr string) (*IPPool, error) {
	if name != "" {
		return GetResource[IPPool](ctx, s, name)
	}
	pools, _, err := ListResources[IPPool](ctx, s)
	for _, p := range pools {
		if p.Spec.CIDR == strings.TrimSpace(cidr) {
			return p, nil
		}
	}
	if err != nil {
		return nil, err
	}
	return nil, &ResourceError{Kind: IPPools.Kind, Name: cidr, Err: ErrNotFound}
}
