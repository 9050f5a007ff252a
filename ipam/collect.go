package ipam

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"margay/datastore"
)

// DefaultGrace is how long something must be nobody's before it is given back (Calico: leakGracePeriod, 15 minutes).
const DefaultGrace = 15 * time.Minute

// Collector gives back what no pod, node or tunnel owns any more: addresses and blocks of its own node, and in its turn
// what nodes left that are gone from the datastore. Nothing goes at first sight: it must be found unchanged once more
// when the grace period is over, and the release itself is refused if anything has changed since. It is not safe for
// concurrent use.
type Collector struct {
	alloc *Allocator
	grace time.Duration
	owned func(context.Context) (Owned, error)
	log   *slog.Logger
	now   func() time.Time

	looked   bool                  // once, everything
	suspects map[suspect]time.Time // since when, of what the last look has found
}

// Owned is what is in use on this node.
type Owned struct {
	Handles map[string]bool
	Addrs   map[netip.Addr]bool
}

// Collected is what one look has given back.
type Collected struct {
	Addresses []netip.Addr
	Blocks    []netip.Prefix // of this node
	Nodes     []string       // gone ones, with all they had
	Handles   []string       // that held nothing
	Suspects  int            // found, and not yet out of grace
}

// suspect is something that seems to be nobody's, as it was when it was seen. One of the groups of fields is set.
type suspect struct {
	addr     netip.Addr // an address, its handle and its sequence number
	sequence uint64
	handle   string
	block    netip.Prefix // a block or affinity of this node, and the revisions of both (0: not there)
	revision int64        // also of a handle that holds nothing
	affinity int64
	node     string // a node that is gone
	wide     bool   // found where only a look at the whole cluster finds it
}

// NewCollector makes the collector of the allocator's node. What owned returns is asked for anew at each look; a look
// that cannot learn it gives nothing back.
func NewCollector(a *Allocator, grace time.Duration, owned func(context.Context) (Owned, error)) *Collector {
	return &Collector{alloc: a, grace: grace, owned: owned, log: a.log, now: time.Now, suspects: map[suspect]time.Time{}}
}

// Period is the time between two looks.
func (c *Collector) Period() time.Duration { return max(c.grace/3, time.Second) }

// Look takes one look, and gives back what has been seen for long enough. While the datastore is locked nothing is. It
// goes on past errors of single items and returns them joined.
func (c *Collector) Look(ctx context.Context) (Collected, error) {
	var out Collected
	v, err := c.alloc.read(ctx, "none")
	if errors.Is(err, ErrLocked) {
		clear(c.suspects) // whoever locks may change anything
		return out, nil
	}
	if err != nil {
		return out, err
	}
	owned, err := c.owned(ctx)
	if err != nil {
		return out, fmt.Errorf("what this node's pods use: %w", err)
	}
	found := map[suspect]bool{}
	if err := c.lookAtOwn(ctx, v, owned, found); err != nil {
		return out, err
	}
	all, err := c.wantsAll(ctx)
	if err != nil {
		return out, err
	}
	if all {
		if err := c.lookAtAll(ctx, owned, found); err != nil {
			return out, err
		}
		c.looked = true
	}
	now := c.now()
	maps.DeleteFunc(c.suspects, func(s suspect, _ time.Time) bool { return !found[s] })
	var errs []error
	for _, s := range slices.SortedFunc(maps.Keys(found), suspect.compare) {
		since, seen := c.suspects[s]
		if !seen {
			c.suspects[s] = now
		}
		if !seen || now.Sub(since) < c.grace {
			out.Suspects++
			continue
		}
		delete(c.suspects, s)
		if err := c.giveBack(ctx, s, &out); err != nil {
			errs = append(errs, err)
		}
	}
	return out, errors.Join(errs...)
}

// compare orders suspects: single addresses first, nodes last.
func (s suspect) compare(o suspect) int {
	if s.node != o.node || s.block != o.block {
		return cmp.Or(strings.Compare(s.node, o.node), s.block.Compare(o.block))
	}
	return cmp.Or(s.addr.Compare(o.addr), strings.Compare(s.handle, o.handle))
}

// wantsAll says whether to look at the whole cluster: at the first look, for what this node may have left in others'
// blocks; for the second look at what was found there; and else when it is this node's turn.
func (c *Collector) wantsAll(ctx context.Context) (bool, error) {
	if !c.looked {
		return true, nil
	}
	for s := range c.suspects {
		if s.wide {
			return true, nil
		}
	}
	nodes, _, err := c.alloc.store.Keys(ctx, datastore.Nodes.Prefix())
	if err != nil {
		return false, err
	}
	names := make([]string, 0, len(nodes))
	for _, kv := range nodes {
		names = append(names, strings.TrimPrefix(kv.Key, datastore.Nodes.Prefix()))
	}
	return turn(names, c.now().Unix()/int64(c.Period().Seconds())) == c.alloc.node, nil
}

// turn says whose turn it is to look at the whole cluster in a period: another node's in each, and the same for everybody
// who asks.
func turn(names []string, period int64) (winner string) {
	var least uint64
	for _, name := range names {
		digest := sha256.Sum256(fmt.Appendf(nil, "%s %d", name, period))
		if sum := binary.BigEndian.Uint64(digest[:]); winner == "" || sum < least || sum == least && name < winner {
			winner, least = name, sum
		}
	}
	return winner
}

// lookAtOwn looks at this node's blocks and affinities.
func (c *Collector) lookAtOwn(ctx context.Context, v *view, owned Owned, found map[suspect]bool) error {
	cidrs := slices.SortedFunc(maps.Keys(v.affinities), netip.Prefix.Compare)
	blocks := map[netip.Prefix]*stored{}
	for batch := range slices.Chunk(cidrs, otherBatch) {
		read, err := c.alloc.readBlocks(ctx, batch)
		if err != nil {
			return err
		}
		for _, b := range read {
			blocks[b.cidr] = b
		}
	}
	kept := map[*poolView]bool{} // pools of which this node has a block with room in it
	for _, cidr := range cidrs {
		b := blocks[cidr]
		if b != nil && b.affinity == c.alloc.owner() {
			b.unowned(c.alloc.node, owned, found, false)
			if free := len(b.unallocated); free < len(b.allocations) && 4*free >= len(b.allocations) {
				kept[poolOf(v, cidr)] = true
			}
		}
	}
	for _, cidr := range cidrs {
		own, b := v.affinities[cidr], blocks[cidr]
		if c.unneeded(v, cidr, own, b, kept) {
			s := suspect{block: cidr, affinity: own.revision}
			if b != nil && b.affinity == c.alloc.owner() {
				s.revision = b.revision
			}
			found[s] = true
		}
	}
	return nil
}

// unneeded says whether a block of this node may go: a claim that nobody finished, a block in no pool that serves this
// node, and an empty one where another of the pool is kept.
func (c *Collector) unneeded(v *view, cidr netip.Prefix, own ownAffinity, b *stored, kept map[*poolView]bool) bool {
	if b == nil {
		// What cannot be read stays. What is not there is another thing, which giveBack makes sure of.
		return true
	}
	if b.affinity != c.alloc.owner() {
		return true
	}
	if !b.vacant(v.now, v.config.cooldown()) {
		return false
	}
	if own.state != stateConfirmed || own.deleted {
		return true
	}
	pool := poolOf(v, cidr)
	if pool == nil || pool.Spec.Disabled || pool.elsewhere != "" {
		return true
	}
	if !v.config.AutoAllocateBlocks {
		return false // whoever gave the node its blocks takes them away
	}
	another := kept[pool]
	kept[pool] = true
	return another
}

// poolOf is the pool that a block is of; nil if there is none.
func poolOf(v *view, cidr netip.Prefix) *poolView {
	i := slices.IndexFunc(v.pools, func(p *poolView) bool {
		return p.prefix.IsValid() && p.prefix.Contains(cidr.Addr()) && p.Spec.BlockSize == cidr.Bits()
	})
	if i < 0 {
		return nil
	}
	return v.pools[i]
}

// unowned finds the addresses that a node is said to hold, and does not.
func (b *stored) unowned(node string, owned Owned, found map[suspect]bool, wide bool) {
	for ordinal, at := range b.allocations {
		if at == free {
			continue
		}
		attr, addr := b.attributes[at], b.addr(ordinal)
		if b.holder(attr) != node || !attr.collectable() || owned.Handles[attr.handle] || owned.Addrs[addr] {
			continue
		}
		found[suspect{addr: addr, handle: attr.handle, sequence: b.given[ordinal], wide: wide}] = true
	}
}

// holder is the node whose pod or tunnel an attribute names.
func (b *block) holder(a attribute) string {
	if named := a.secondary["node"]; named != "" {
		return named
	}
	node, _ := strings.CutPrefix(b.affinity, "host:")
	return node
}

// collectable says whether an address is of a kind that an owner can be looked for: a pod's or a tunnel's. What has no
// handle was given out by hand, and of what else there may be (services, Windows' own) nothing is known here.
func (a attribute) collectable() bool {
	_, released := a.extra[releasedAt]
	kind := a.secondary["type"]
	return !released && a.hasHandle && a.handle != windowsReserved && validateHandle(a.handle) == nil && (kind == "" || strings.HasSuffix(kind, "TunnelAddress"))
}

// windowsReserved is the handle of what Windows nodes keep for themselves in each block.
const windowsReserved = "windows-reserved-ipam-handle"

// lookAtAll looks for what nodes have left that are gone, what this node has borrowed and does not use, and handles that
// hold nothing.
func (c *Collector) lookAtAll(ctx context.Context, owned Owned, found map[suspect]bool) error {
	store := c.alloc.store
	handles, _, err := store.List(ctx, handleRoot) // before the blocks: a handle comes with its address
	if err != nil {
		return err
	}
	blind := false
	held, holders := map[string]bool{}, map[string]bool{}
	for _, root := range []string{blockRootV4, blockRootV6} {
		kvs, _, err := store.List(ctx, root)
		if err != nil {
			return err
		}
		for _, kv := range kvs {
			b, err := decodeBlock(kv.Value)
			if err != nil {
				c.log.Error("block not usable", "key", kv.Key, "err", err)
				blind = true // it may hold anything
				continue
			}
			for _, at := range b.allocations {
				if at != free {
					held[b.attributes[at].handle] = true
					if attr := b.attributes[at]; attr.collectable() {
						holders[b.holder(attr)] = true
					}
				}
			}
			if b.affinity != c.alloc.owner() {
				(&stored{b, kv.Revision}).unowned(c.alloc.node, owned, found, true)
			}
		}
	}
	for _, kv := range handles {
		if id := strings.TrimPrefix(kv.Key, handleRoot); !blind && !held[id] && validateHandle(id) == nil {
			found[suspect{handle: id, revision: kv.Revision, wide: true}] = true
		}
	}
	affinities, _, err := store.Keys(ctx, hostRoot)
	if err != nil {
		return err
	}
	for _, kv := range affinities {
		node, _, _ := strings.Cut(strings.TrimPrefix(kv.Key, hostRoot), "/")
		holders[node] = true
	}
	vouched, err := vouchedNodes(ctx, store)
	if err != nil {
		return err
	}
	for node := range holders {
		if node != "" && node != c.alloc.node && !vouched[node] {
			found[suspect{node: node, wide: true}] = true
		}
	}
	return nil
}

// giveBack releases a suspect, if it is still what it was.
func (c *Collector) giveBack(ctx context.Context, s suspect, out *Collected) error {
	var err error
	switch {
	case s.node != "":
		var freed []netip.Addr
		freed, err = c.alloc.releaseNode(ctx, s.node, true)
		out.Addresses = append(out.Addresses, freed...)
		if err == nil {
			out.Nodes = append(out.Nodes, s.node)
			c.log.Warn("a node that is gone from the datastore had addresses or blocks: released", "node", s.node, "addresses", len(freed))
		}
	case s.block.IsValid():
		if err = c.alloc.releaseBlock(ctx, s); err == nil {
			out.Blocks = append(out.Blocks, s.block)
			c.log.Info("block released: this node does not need it", "block", s.block)
		}
	case s.addr.IsValid():
		if err = c.alloc.ReleaseAddress(ctx, Release{Addr: s.addr, Handle: s.handle, Sequence: &s.sequence}); err == nil {
			out.Addresses = append(out.Addresses, s.addr)
			c.log.Warn("address released: no pod or tunnel of this node has it", "address", s.addr, "handle", s.handle)
		}
	default:
		if err = DeleteHandle(ctx, c.alloc.store, s.handle, s.revision); err == nil {
			out.Handles = append(out.Handles, s.handle)
			c.log.Warn("handle deleted: it held no address", "handle", s.handle)
		}
	}
	if errors.Is(err, ErrNotAssigned) || errors.Is(err, ErrReassigned) || contended(err) {
		return nil // it has an owner again, or is gone
	}
	return err
}
