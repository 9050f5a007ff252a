package ipam

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"margay/datastore"
)

// ReleaseHandle frees all addresses that a handle holds, on whichever node's blocks, and forgets the handle, all in one
// transaction. It returns what it freed; a handle that holds nothing is not an error.
func (a *Allocator) ReleaseHandle(ctx context.Context, id string) ([]netip.Addr, error) {
	if err := validateHandle(id); err != nil {
		return nil, err
	}
	var released []netip.Addr
	err := a.retry(ctx, func() (err error) {
		released, err = a.release(ctx, id)
		return err
	})
	if err != nil {
		return nil, err
	}
	return released, nil
}

// release is one attempt.
func (a *Allocator) release(ctx context.Context, id string) ([]netip.Addr, error) {
	lists, _, err := a.store.ListMany(ctx, handleKey(id), configKey, configResource)
	if err != nil || len(lists[0]) == 0 {
		return nil, err
	}
	h, err := decodeHandle(lists[0][0].Value)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", lists[0][0].Key, err)
	}
	config, err := decodeConfig(lists[1], lists[2])
	if err != nil {
		return nil, err
	}
	rev := lists[0][0].Revision
	var (
		released []netip.Addr
		ops      = []datastore.Op{datastore.OpDelete(handleKey(id), rev)}
		changed  []*block
	)
	for _, cidr := range slices.SortedFunc(maps.Keys(h.blocks), netip.Prefix.Compare) {
		b := a.cache[cidr]
		if b == nil {
			if b, err = a.load(ctx, cidr); errors.Is(err, datastore.ErrNotFound) {
				continue // deleted with all that was in it
			} else if err != nil {
				return nil, err
			}
		}
		next := b.clone()
		addrs, err := next.retireHandle(id, a.now(), config.cooldown())
		if err != nil {
			return nil, err
		}
		if len(addrs) == 0 {
			// The handle says the block holds something: make sure that it is not only our memory that disagrees.
			ops = append(ops, datastore.OpCheck(blockKey(cidr), b.revision))
			continue
		}
		released = append(released, addrs...)
		write, err := a.blockOps(b, next)
		if err != nil {
			return nil, err
		}
		ops = append(ops, write...)
		changed = append(changed, next)
		delete(a.cache, cidr)
	}
	written, err := a.store.Txn(ctx, ops...)
	if err != nil {
		return nil, err
	}
	for _, b := range changed {
		if b.affinity == a.owner() {
			a.cache[b.cidr] = &stored{b, written}
		}
	}
	return released, nil
}

// readHandle reads a handle; revision 0 if there is none.
func (a *Allocator) readHandle(ctx context.Context, id string) (handle, int64, error) {
	kv, err := a.store.Get(ctx, handleKey(id))
	if errors.Is(err, datastore.ErrNotFound) {
		return handle{}, 0, nil
	}
	if err != nil {
		return handle{}, 0, err
	}
	h, err := decodeHandle(kv.Value)
	if err != nil {
		return handle{}, 0, fmt.Errorf("%s: %w", kv.Key, err)
	}
	return h, kv.Revision, nil
}

// HandleAddresses lists the addresses that a handle holds, in order; none is not an error.
func (a *Allocator) HandleAddresses(ctx context.Context, id string) ([]netip.Addr, error) {
	if err := validateHandle(id); err != nil {
		return nil, err
	}
	h, _, err := a.readHandle(ctx, id)
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for cidr := range h.blocks {
		kv, err := a.store.Get(ctx, blockKey(cidr))
		if errors.Is(err, datastore.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		b, err := decodeBlock(kv.Value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", kv.Key, err)
		}
		out = append(out, b.held(id)...)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out, nil
}
