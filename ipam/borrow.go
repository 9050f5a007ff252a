package ipam

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"
	"time"

	"margay/datastore"
)

// reclaimAge is how long a block stays with the node that claimed it, even if it is empty: the node may be about to use
// it.
const reclaimAge = time.Minute

// Other nodes' blocks are read in batches; once one to borrow from is known, only so many more are read in search of one
// to take over.
const (
	otherBatch = 16
	otherMany  = 8
)

// fromOthers takes an address out of the pool's blocks that are not this node's, when it has none of its own and no
// range is free: an empty block is taken over, else an address is borrowed; errFull, and why, if neither can be.
func (a *Allocator) fromOthers(ctx context.Context, v *view, pool *poolView, req Request) (pick, []string, error) {
	mayClaim := a.claimRefusal(v) == ""
	if v.config.StrictAffinity && !mayClaim {
		return pick{}, nil, errFull // why, the claim has said
	}
	blocks, err := a.othersIn(ctx, v, pool)
	if err != nil {
		return pick{}, nil, err
	}
	var lender *stored
	for n := 0; len(blocks) > 0 && (lender == nil || mayClaim && n < otherMany); n++ {
		batch := blocks[:min(otherBatch, len(blocks))]
		blocks = blocks[len(batch):]
		read, err := a.readBlocks(ctx, batch)
		if err != nil {
			return pick{}, nil, err
		}
		for _, b := range read {
			switch {
			case mayClaim && b.reclaimable(v.now, v.config.cooldown()):
				b, err := a.takeOver(ctx, v, b)
				if errors.Is(err, errTaken) {
					continue
				}
				if err != nil {
					return pick{}, nil, err
				}
				p, err := a.take(v, b, pool, req)
				return p, nil, err
			case lender == nil && !v.config.StrictAffinity && v.serves(b):
				lender = b
			}
		}
	}
	if lender != nil {
		p, err := a.take(v, lender, pool, req)
		return p, nil, err
	}
	if v.config.StrictAffinity {
		return pick{}, []string{fmt.Sprintf("pool %s: strict affinity forbids to borrow", pool.name())}, errFull
	}
	return pick{}, []string{fmt.Sprintf("pool %s: the other nodes' blocks are full too", pool.name())}, errFull
}

// othersIn lists the pool's blocks that are not this node's, in an order of this node's own: nodes in want do not all
// turn to the same lender.
func (a *Allocator) othersIn(ctx context.Context, v *view, pool *poolView) ([]netip.Prefix, error) {
	root := blockRoot(pool.family())
	kvs, _, err := a.store.Keys(ctx, root)
	if err != nil {
		return nil, err
	}
	order := map[netip.Prefix]uint64{}
	for _, kv := range kvs {
		cidr, err := parseKeyCIDR(strings.TrimPrefix(kv.Key, root))
		if err != nil || !pool.prefix.Contains(cidr.Addr()) || v.affinities[cidr].state == stateConfirmed || v.whollyReserved(cidr) {
			continue
		}
		h := fnv.New64a()
		_, _ = h.Write([]byte(a.node + kv.Key)) // a hash takes everything
		order[cidr] = h.Sum64()
	}
	out := make([]netip.Prefix, 0, len(order))
	for cidr := range order {
		out = append(out, cidr)
	}
	slices.SortFunc(out, func(x, y netip.Prefix) int {
		if order[x] < order[y] {
			return -1
		}
		return 1
	})
	return out, nil
}

// readBlocks reads some blocks at once, and leaves out what is gone or cannot be understood.
func (a *Allocator) readBlocks(ctx context.Context, cidrs []netip.Prefix) ([]*stored, error) {
	names := make([]string, len(cidrs))
	for i, cidr := range cidrs {
		names[i] = blockKey(cidr)
	}
	lists, _, err := a.store.ListMany(ctx, names...)
	if err != nil {
		return nil, err
	}
	var out []*stored
	for i, kvs := range lists {
		for _, kv := range kvs {
			b, err := decodeBlock(kv.Value)
			if err != nil || b.cidr != cidrs[i] {
				a.log.Error("block not usable", "key", kv.Key, "err", err)
				continue
			}
			out = append(out, &stored{b, kv.Revision})
		}
	}
	return out, nil
}

// reclaimable says whether a block may be taken from whoever has it: it is empty, nothing cools down in it, and it was
// claimed long enough ago. A block begins with the time as its sequence number, which only grows; one from the future
// (a clock has jumped) stays where it is.
func (b *block) reclaimable(now time.Time, cooldown time.Duration) bool {
	if !b.vacant(now, cooldown) {
		return false
	}
	if b.affinity == "" {
		return true
	}
	if !strings.HasPrefix(b.affinity, "host:") || b.sequence > uint64(now.UnixNano()) {
		return false
	}
	return uint64(now.UnixNano())-b.sequence > uint64(reclaimAge)
}

// vacant says whether nobody holds an address of the block, and none cools down.
func (b *block) vacant(now time.Time, cooldown time.Duration) bool {
	for ordinal, at := range b.allocations {
		if at != free && !b.cooled(ordinal, now, cooldown) {
			return false
		}
	}
	return true
}

// takeOver makes an empty block this node's: in one transaction it goes, with the affinity of the node that had it, if
// both are still what we saw; then it is claimed like any free one. errTaken if somebody was faster.
func (a *Allocator) takeOver(ctx context.Context, v *view, b *stored) (*stored, error) {
	ops := []datastore.Op{datastore.OpDelete(blockKey(b.cidr), b.revision),
		datastore.OpCheck(datastore.ClusterInformations.Key("default"), v.cluster)}
	if node, ok := strings.CutPrefix(b.affinity, "host:"); ok {
		key := affinityKey(node, b.cidr)
		kv, err := a.store.Get(ctx, key)
		switch {
		case err == nil:
			ops = append(ops, datastore.OpDelete(key, kv.Revision))
		case errors.Is(err, datastore.ErrNotFound):
			ops = append(ops, datastore.OpCheck(key, 0))
		default:
			return nil, err
		}
	}
	if _, err := a.store.Txn(ctx, ops...); err != nil {
		if contended(err) {
			return nil, errTaken
		}
		return nil, err
	}
	delete(a.cache, b.cidr)
	a.log.Info("empty block taken over", "block", b.cidr, "from", b.affinity)
	return a.claim(ctx, v, b.cidr)
}
