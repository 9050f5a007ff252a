package ipam

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"margay/datastore"
)

// view is what an assignment needs to know, all of one revision. It may serve the next assignment as well: every write
// carries guards, conditions that hold as long as nothing in it has changed.
type view struct {
	revision   int64
	cluster    int64 // revision of clusterinformations/default, 0 without one
	pools      []*poolView
	config     Config
	reserved   []netip.Prefix    // what an IPReservation keeps from being given out unasked
	labels     map[string]string // of the Node
	affinities map[netip.Prefix]ownAffinity
	guards     []datastore.Op
	lasting    bool // the guards cover everything

	// What belongs to one assignment.
	now       time.Time
	handle    handle
	handleRev int64                 // 0 without one
	done      map[netip.Prefix]bool // own blocks found unable to serve this request
}

type ownAffinity struct {
	affinity
	revision int64
}

// maxGuards leaves room for the writes in what etcd takes in one transaction (128 operations).
const maxGuards = 100

// read reads a view for an assignment to a handle, in one round trip.
func (a *Allocator) read(ctx context.Context, handleID string) (*view, error) {
	names := []string{datastore.ClusterInformations.Key("default"), configKey, configResource, datastore.Nodes.Key(a.node),
		datastore.IPPools.Prefix(), reservationPrefix, AffinityRoot(a.node), handleKey(handleID)}
	if a.node == "" {
		return nil, fmt.Errorf("node: expected the name of the node that addresses are for")
	}
	lists, rev, err := a.store.ListMany(ctx, names...)
	if err != nil {
		return nil, err
	}
	v := &view{revision: rev, now: a.now(), done: map[netip.Prefix]bool{}}
	for _, kv := range lists[0] {
		info, err := datastore.Decode[datastore.ClusterInformation](kv)
		if err != nil {
			return nil, err
		}
		if !info.Ready() {
			return nil, ErrLocked
		}
		v.cluster = kv.Revision
	}
	if v.config, err = decodeConfig(lists[1], lists[2]); err != nil {
		return nil, err
	}
	for _, kv := range lists[3] {
		node, err := datastore.Decode[datastore.Node](kv)
		if err != nil {
			a.log.Warn("labels of this node ignored", "err", err)
			continue
		}
		v.labels = node.Metadata.Labels
	}
	for _, kv := range lists[4] {
		v.pools = append(v.pools, a.decodePool(kv, v.labels))
	}
	v.pools = slices.DeleteFunc(v.pools, func(p *poolView) bool { return p == nil })
	v.reserved = a.decodeReservations(lists[5])
	v.affinities = a.decodeAffinities(lists[6])
	for _, kv := range lists[7] {
		if v.handle, err = decodeHandle(kv.Value); err != nil {
			return nil, fmt.Errorf("%s: %w", kv.Key, err)
		}
		v.handleRev = kv.Revision
	}
	v.guard(names, lists)
	return v, nil
}

// guard makes the conditions under which the view holds: the single keys as they were, or absent, and of the lists each
// key as it was and none new. The node's affinities need none: who has a block is written in the block.
func (v *view) guard(names []string, lists [][]datastore.KV) {
	for i, name := range names[:4] {
		if i == 3 && !v.selective() {
			continue // whatever the labels are
		}
		rev := int64(0)
		if len(lists[i]) > 0 {
			rev = lists[i][0].Revision
		}
		v.guards = append(v.guards, datastore.OpCheck(name, rev))
	}
	lasting := slices.Clone(v.guards)
	for i := 4; i <= 5; i++ {
		lasting = append(lasting, datastore.OpUnchanged(names[i], v.revision))
		for _, kv := range lists[i] {
			lasting = append(lasting, datastore.OpCheck(kv.Key, kv.Revision))
		}
	}
	if len(lasting) <= maxGuards {
		v.guards, v.lasting = lasting, true
	}
}

// selective says whether some pool asks for the node's labels.
func (v *view) selective() bool {
	return slices.ContainsFunc(v.pools, func(p *poolView) bool { return p.selective })
}

// remember keeps a view for the next assignment, without what was the last one's own.
func (a *Allocator) remember(v *view) {
	if !v.lasting {
		a.known = nil
		return
	}
	v.handle, v.handleRev = handle{}, 0
	clear(v.done)
	a.known = v
}

// decodeAffinities reads this node's affinities; one that cannot be understood is left out, and so is its block.
func (a *Allocator) decodeAffinities(kvs []datastore.KV) map[netip.Prefix]ownAffinity {
	out := make(map[netip.Prefix]ownAffinity, len(kvs))
	for _, kv := range kvs {
		cidr, err := parseKeyCIDR(kv.Key[strings.LastIndexByte(kv.Key, '/')+1:])
		if err == nil && kv.Key != affinityKey(a.node, cidr) {
			err = fmt.Errorf("key %s: expected %s", kv.Key, affinityKey(a.node, cidr))
		}
		if err != nil {
			a.log.Warn("affinity ignored", "err", err)
			continue
		}
		value, err := decodeAffinity(kv.Value)
		if err != nil {
			a.log.Warn("affinity ignored", "key", kv.Key, "err", err)
			continue
		}
		out[cidr] = ownAffinity{value, kv.Revision}
	}
	return out
}

// serves says whether a block has an address to give.
func (v *view) serves(b *stored) bool { return b.spare(v.now, v.config.cooldown(), v.allowed) }

// confirmedIn lists the node's confirmed blocks in a pool, in order.
func (v *view) confirmedIn(pool *poolView) []netip.Prefix {
	return v.ownIn(pool, func(o ownAffinity) bool { return o.state == stateConfirmed && !o.deleted })
}

func (v *view) ownIn(pool *poolView, want func(ownAffinity) bool) []netip.Prefix {
	var out []netip.Prefix
	for cidr, own := range v.affinities {
		if want(own) && pool.prefix.Contains(cidr.Addr()) {
			out = append(out, cidr)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}
