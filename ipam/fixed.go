package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"margay/datastore"
)

// pickFixed picks the one address that was asked for.
func (a *Allocator) pickFixed(ctx context.Context, v *view, pools []*poolView, req Request, want netip.Addr) (pick, error) {
	for _, pool := range pools {
		if !pool.prefix.Contains(want) {
			continue
		}
		cidr, err := want.Prefix(pool.Spec.BlockSize)
		if err != nil {
			return pick{}, fmt.Errorf("pool %s: spec.blockSize %d: %w", pool.name(), pool.Spec.BlockSize, err)
		}
		at, _, err := findBlock(ctx, a.store, want)
		switch {
		case err == nil:
			cidr = at.cidr // of another size perhaps: the pool may have been another when it was claimed
		case !errors.Is(err, ErrNotAssigned):
			return pick{}, err
		default:
			taken, err := a.overlapped(ctx, cidr)
			if err != nil {
				return pick{}, err
			}
			if taken {
				return pick{}, fmt.Errorf("address %s: %w: block %s cannot be claimed, there are blocks of another size in its range", want, ErrAddressInUse, cidr)
			}
		}
		b, err := a.ownBlock(ctx, v, cidr)
		if errors.Is(err, errTaken) {
			// The block is another node's: borrow the address.
			if v.config.StrictAffinity {
				return pick{}, fmt.Errorf("address %s: %w: block %s belongs to another node, and strict affinity forbids to borrow",
					want, ErrAddressInUse, cidr)
			}
			b, err = a.load(ctx, cidr)
		}
		if err != nil {
			return pick{}, err
		}
		next := b.clone()
		next.collect(v.now, v.config.cooldown())
		if !next.assignAddr(want, a.attribute(req)) {
			delete(a.cache, cidr) // perhaps another's
			return pick{}, fmt.Errorf("address %s: %w: it is held already", want, ErrAddressInUse)
		}
		return pick{b, next, want, pool.name()}, nil
	}
	return pick{}, fmt.Errorf("address %s: %w: it is in no pool that may be used", want, ErrAddressInUse)
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
