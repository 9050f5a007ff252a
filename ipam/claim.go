package ipam

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"margay/datastore"
)

// errTaken says that a block is another node's.
var errTaken = errors.New("block belongs to another node")

// claimError says why no block of a pool can be claimed; it is final, trying again does not help.
type claimError struct{ pool, reason string }

func (e *claimError) Error() string { return "pool " + e.pool + ": " + e.reason }

// claimAny claims a block of the pool for this node: one whose claim was begun and not finished, or a new one.
func (a *Allocator) claimAny(ctx context.Context, v *view, pool *poolView) (*stored, error) {
	refuse := func(format string, args ...any) error {
		return &claimError{pool.name(), fmt.Sprintf(format, args...)}
	}
	for _, cidr := range v.ownIn(pool, func(o ownAffinity) bool { return !o.deleted }) {
		own := v.affinities[cidr]
		if v.done[cidr] || (own.state != statePending && own.state != stateConfirmed) {
			continue // full, or being released
		}
		// Its block is not there, or it would have been used: meanwhile another node may have claimed one of another size.
		taken, err := a.overlapped(ctx, cidr)
		if err != nil {
			return nil, err
		}
		if taken {
			continue
		}
		b, err := a.claim(ctx, v, cidr)
		if errors.Is(err, errTaken) {
			continue
		}
		return b, err
	}
	if why := a.claimRefusal(v); why != "" {
		return nil, refuse("%s", why)
	}
	b, err := a.search(ctx, v, pool)
	if err == errFull {
		return nil, refuse("all %d blocks of %s are taken", newWalk(pool.prefix, pool.Spec.BlockSize, a.node).total, pool.prefix)
	}
	if err == nil {
		a.log.Info("block claimed", "block", b.cidr, "pool", pool.name())
	}
	return b, err
}

// claimRefusal says why this node may not have one more block; empty if it may.
func (a *Allocator) claimRefusal(v *view) string {
	if !v.config.AutoAllocateBlocks {
		return fmt.Sprintf("the blocks of node %s are full, and auto_allocate_blocks is off", a.node)
	}
	if limit := v.config.MaxBlocksPerHost; limit > 0 && len(v.affinities) >= limit {
		return fmt.Sprintf("the blocks of node %s are full, and it has as many as maxBlocksPerHost allows (%d)", a.node, limit)
	}
	return ""
}

// claim makes a block this node's: affinity pending, then the block, then affinity confirmed. Each step finds what an
// earlier, interrupted claim left and goes on from there. errTaken if the block is another node's; then no affinity of
// ours is left.
func (a *Allocator) claim(ctx context.Context, v *view, cidr netip.Prefix) (*stored, error) {
	key := affinityKey(a.node, cidr)
	own, begun := v.affinities[cidr]
	if !begun || own.state != statePending {
		own.affinity.state, own.affinity.deleted = statePending, false
		value, err := own.affinity.encode()
		if err != nil {
			return nil, err
		}
		// Another allocator of this node (an old agent not yet gone) may have claimed a block since we looked; then start
		// over and use that one.
		prefix := strings.TrimSuffix(key, keyCIDR(cidr))
		ops := []datastore.Op{datastore.OpCreate(key, value), datastore.OpUnchanged(prefix, v.revision)}
		if begun {
			ops = []datastore.Op{datastore.OpUpdate(key, value, own.revision)}
		}
		ops = append(ops, datastore.OpCheck(datastore.ClusterInformations.Key("default"), v.cluster))
		if own.revision, err = a.store.Txn(ctx, ops...); err != nil {
			return nil, err
		}
		v.affinities[cidr] = own
	}
	b, err := a.claimBlock(ctx, cidr, key, own.revision)
	if errors.Is(err, errTaken) {
		delete(v.affinities, cidr)
		if err := a.store.Delete(ctx, key, own.revision); err != nil {
			return nil, err
		}
		return nil, errTaken
	}
	if err != nil {
		return nil, err
	}
	own.affinity.state = stateConfirmed
	value, err := own.affinity.encode()
	if err != nil {
		return nil, err
	}
	own.revision, err = a.store.Txn(ctx, datastore.OpUpdate(key, value, own.revision), datastore.OpCheck(blockKey(cidr), b.revision))
	if err != nil {
		return nil, err
	}
	v.affinities[cidr] = own
	return b, nil
}

// claimBlock creates the block, or finds it made by an earlier claim of ours.
func (a *Allocator) claimBlock(ctx context.Context, cidr netip.Prefix, affinityKey string, affinityRev int64) (*stored, error) {
	// The time is a sequence that no earlier block of this range, deleted since, can have reached.
	fresh := newBlock(cidr, a.owner(), uint64(a.now().UnixNano()))
	value, err := fresh.encode()
	if err != nil {
		return nil, err
	}
	rev, err := a.store.Txn(ctx, datastore.OpCreate(blockKey(cidr), value), datastore.OpCheck(affinityKey, affinityRev))
	if err == nil {
		b := &stored{fresh, rev}
		a.cache[cidr] = b
		return b, nil
	}
	if !errors.Is(err, datastore.ErrExists) {
		return nil, err
	}
	b, err := a.load(ctx, cidr)
	if err != nil {
		return nil, err
	}
	if b.affinity != a.owner() {
		delete(a.cache, cidr)
		return nil, errTaken
	}
	return b, nil
}

// ConfirmedBlocks lists the IPv4 blocks that are this node's, in order: what it announces. A block whose claim is not
// finished is not among them.
func (a *Allocator) ConfirmedBlocks(ctx context.Context) ([]netip.Prefix, error) {
	kvs, _, err := a.store.List(ctx, AffinityPrefix(a.node))
	if err != nil {
		return nil, err
	}
	own := a.decodeAffinities(kvs)
	maps.DeleteFunc(own, func(_ netip.Prefix, o ownAffinity) bool { return o.state != stateConfirmed || o.deleted })
	return slices.SortedFunc(maps.Keys(own), netip.Prefix.Compare), nil
}
