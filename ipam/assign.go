package ipam

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"margay/datastore"
)

// Errors of this room, to be tested with errors.Is; the error itself names handle, pool, address or node.
var (
	// ErrHandleInUse says that the handle holds an address already.
	ErrHandleInUse = errors.New("handle holds an address already")
	// ErrNoAddress says that there is no free address: the error names the pools that were tried, and why each gave none.
	ErrNoAddress = errors.New("no free address")
	// ErrAddressInUse says that the address asked for is held, or in a block of another node.
	ErrAddressInUse = errors.New("address not available")
	// ErrLocked says that clusterinformations/default forbids changes (spec.datastoreReady is false).
	ErrLocked = errors.New("datastore is locked: spec.datastoreReady of clusterinformation default is false")
)

// tries bounds how often an operation starts over after losing against other writers.
const tries = 20

// Allocator gives out addresses on one node. It is safe for concurrent use: operations of one Allocator wait for each
// other, so that they do not lose compare-and-swaps against themselves. Several allocators, in other processes too, may
// work for the same node.
type Allocator struct {
	store *datastore.Store
	node  string
	log   *slog.Logger

	turn  chan struct{} // a mutex that can be waited for with a context
	cache map[netip.Prefix]*stored
	now   func() time.Time
}

// stored is a block as it was at a revision. The block is never changed in place.
type stored struct {
	*block
	revision int64
}

// New makes the allocator of a node. A nil log means none.
func New(s *datastore.Store, node string, log *slog.Logger) *Allocator {
	if log == nil {
		log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return &Allocator{store: s, node: node, log: log, turn: make(chan struct{}, 1), cache: map[netip.Prefix]*stored{}, now: time.Now}
}

// Request says for whom an address is, and where from.
type Request struct {
	Handle string            // who holds it: "<network>.<containerID>", "ipip-tunnel-addr-<node>"
	Attrs  map[string]string // written beside it for people to read; node and, for a workload, timestamp are added
	Use    string            // datastore.UseWorkload (the default) or datastore.UseTunnel
	Pools  []string          // if not empty: only from these pools, by name or CIDR
	IP     netip.Addr        // if valid: this address and no other
}

// Assignment is an address that was given out.
type Assignment struct {
	Addr  netip.Addr
	Block netip.Prefix
	Pool  string
}

// Assign gives an IPv4 address to a handle that holds none (else ErrHandleInUse). When it fails with
// datastore.ErrUnreachable, or because ctx was done, the address may have been assigned all the same: release the handle.
func (a *Allocator) Assign(ctx context.Context, req Request) (Assignment, error) {
	if err := validateHandle(req.Handle); err != nil {
		return Assignment{}, err
	}
	if req.IP.IsValid() && !req.IP.Is4() {
		return Assignment{}, fmt.Errorf("address %s: expected IPv4", req.IP)
	}
	if req.Use == "" {
		req.Use = datastore.UseWorkload
	}
	var out Assignment
	err := a.retry(ctx, func() (err error) {
		out, err = a.assign(ctx, req)
		return err
	})
	return out, err
}

// retry runs an operation in turn, and again from the start while it loses against other writers.
func (a *Allocator) retry(ctx context.Context, operation func() error) error {
	select {
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for try := 0; ; try++ {
		err := operation()
		if err == nil {
			return nil
		}
		clear(a.cache) // whatever went wrong, what we remember may be out of date
		if !contended(err) || try == tries-1 {
			return err
		}
		if err := datastore.Backoff(ctx, try); err != nil {
			return err
		}
	}
}

// view is what an assignment needs to know, all of one revision.
type view struct {
	revision   int64
	cluster    int64 // revision of clusterinformations/default, 0 without one
	pools      []*datastore.IPPool
	config     Config
	reserved   []netip.Prefix // what an IPReservation keeps from being given out unasked
	now        time.Time
	affinities map[netip.Prefix]ownAffinity
	handle     handle
	handleRev  int64                 // 0 without one
	done       map[netip.Prefix]bool // own blocks found unable to serve this request
}

type ownAffinity struct {
	affinity
	revision int64
}

func (a *Allocator) read(ctx context.Context, handleID string) (*view, error) {
	lists, rev, err := a.store.ListMany(ctx, datastore.ClusterInformations.Key("default"), datastore.IPPools.Prefix(),
		configKey, configResource, reservationPrefix, AffinityPrefix(a.node), handleKey(handleID))
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
	for _, kv := range lists[1] {
		pool, err := datastore.Decode[datastore.IPPool](kv)
		if err != nil {
			a.log.Warn("pool ignored", "err", err)
			continue
		}
		pool.Default()
		v.pools = append(v.pools, pool)
	}
	if v.config, err = decodeConfig(lists[2], lists[3]); err != nil {
		return nil, err
	}
	v.reserved = a.decodeReservations(lists[4])
	v.affinities = a.decodeAffinities(lists[5])
	for _, kv := range lists[6] {
		if v.handle, err = decodeHandle(kv.Value); err != nil {
			return nil, fmt.Errorf("%s: %w", kv.Key, err)
		}
		v.handleRev = kv.Revision
	}
	return v, nil
}

// decodeAffinities reads this node's affinities; one that cannot be understood is left out, and so is its block.
func (a *Allocator) decodeAffinities(kvs []datastore.KV) map[netip.Prefix]ownAffinity {
	out := make(map[netip.Prefix]ownAffinity, len(kvs))
	for _, kv := range kvs {
		cidr, err := parseKeyCIDR(strings.TrimPrefix(kv.Key, AffinityPrefix(a.node)))
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

// assign is one attempt.
func (a *Allocator) assign(ctx context.Context, req Request) (Assignment, error) {
	v, err := a.read(ctx, req.Handle)
	if err != nil {
		return Assignment{}, err
	}
	if len(v.handle.blocks) > 0 {
		return Assignment{}, fmt.Errorf("handle %s: %w", req.Handle, ErrHandleInUse)
	}
	pools, err := choosePools(v.pools, req)
	if err != nil {
		return Assignment{}, err
	}
	if req.IP.IsValid() {
		return a.assignFixed(ctx, v, pools, req)
	}
	for _, pool := range pools {
		if out, err := a.fromOwnBlocks(ctx, v, pool, req); err != errFull {
			return out, err
		}
	}
	// Only now claim: an address that is free in a block of any pool is better than one more block. And only when nothing
	// can be claimed, borrow: a block of one's own is one route, each borrowed address another.
	var why []string
	for _, pool := range pools {
		out, reasons, err := a.fromNewBlock(ctx, v, pool, req)
		if err != errFull {
			return out, err
		}
		why = append(why, reasons...)
	}
	for _, pool := range pools {
		out, reasons, err := a.fromOthers(ctx, v, pool, req)
		if err != errFull {
			return out, err
		}
		why = append(why, reasons...)
	}
	return Assignment{}, fmt.Errorf("%w: %s", ErrNoAddress, strings.Join(why, "; "))
}

// newBlocks bounds how many blocks one assignment may claim because the ones before had nothing to give.
const newBlocks = 3

// fromNewBlock claims a block of the pool and takes an address from it; errFull, and why, if that cannot be.
func (a *Allocator) fromNewBlock(ctx context.Context, v *view, pool *datastore.IPPool, req Request) (Assignment, []string, error) {
	for range newBlocks {
		b, err := a.claimAny(ctx, v, pool)
		if refusal := (*claimError)(nil); errors.As(err, &refusal) {
			return Assignment{}, []string{refusal.Error()}, errFull
		}
		if err != nil {
			return Assignment{}, nil, err
		}
		if out, err := a.take(ctx, v, b, pool, req); err != errFull {
			return out, nil, err
		}
		v.done[b.cidr] = true
	}
	return Assignment{}, []string{fmt.Sprintf("pool %s: the blocks claimed are full", pool.Metadata.Name)}, errFull
}

// errMalformed says that a stored block cannot be understood.
var errMalformed = errors.New("malformed block")

// errFull says that a block (or all blocks looked at) had no free address.
var errFull = errors.New("full")

// fromOwnBlocks takes an address from a block that this node has in the pool: first from those remembered as having one,
// then, as somebody may have released one behind our back, from the others, read afresh.
func (a *Allocator) fromOwnBlocks(ctx context.Context, v *view, pool *datastore.IPPool, req Request) (Assignment, error) {
	own := v.confirmedIn(pool)
	for _, cidr := range own {
		if b := a.cache[cidr]; b != nil && b.affinity == a.owner() && v.serves(b) {
			return a.take(ctx, v, b, pool, req)
		}
	}
	for _, cidr := range own {
		b, err := a.load(ctx, cidr)
		switch {
		case errors.Is(err, datastore.ErrNotFound):
			// The affinity says confirmed, but the block is gone: claiming anew repairs it.
			continue
		case errors.Is(err, errMalformed):
			a.log.Error("block not usable", "err", err)
			v.done[cidr] = true
			continue
		case err != nil:
			return Assignment{}, err
		case b.affinity != a.owner():
			// Claiming it will find that out again, and then drop the affinity.
			a.log.Warn("affinity ignored: the block is another's", "block", cidr, "affinity", b.affinity)
			continue
		case !v.serves(b):
			v.done[cidr] = true
			continue
		}
		return a.take(ctx, v, b, pool, req)
	}
	return Assignment{}, errFull
}

// serves says whether a block has an address to give.
func (v *view) serves(b *stored) bool { return b.spare(v.now, v.config.cooldown(), v.allowed) }

// confirmedIn lists the node's confirmed blocks in a pool, in order.
func (v *view) confirmedIn(pool *datastore.IPPool) []netip.Prefix {
	return v.ownIn(pool, func(o ownAffinity) bool { return o.state == stateConfirmed && !o.deleted })
}

func (v *view) ownIn(pool *datastore.IPPool, want func(ownAffinity) bool) []netip.Prefix {
	prefix, err := pool.Prefix()
	if err != nil {
		return nil
	}
	var out []netip.Prefix
	for cidr, own := range v.affinities {
		if want(own) && prefix.Contains(cidr.Addr()) {
			out = append(out, cidr)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

func (a *Allocator) owner() string { return "host:" + a.node }

// load reads a block and remembers it.
func (a *Allocator) load(ctx context.Context, cidr netip.Prefix) (*stored, error) {
	kv, err := a.store.Get(ctx, blockKey(cidr))
	if err != nil {
		return nil, err
	}
	b, err := decodeBlock(kv.Value)
	if err == nil && b.cidr != cidr {
		err = fmt.Errorf("cidr %s: expected the key's %s", b.cidr, cidr)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", kv.Key, errMalformed, err)
	}
	out := &stored{b, kv.Revision}
	a.cache[cidr] = out
	return out, nil
}

// take assigns an address of b, and writes block and handle in one transaction.
func (a *Allocator) take(ctx context.Context, v *view, b *stored, pool *datastore.IPPool, req Request) (Assignment, error) {
	next, owner := b.clone(), a.attribute(req)
	next.collect(v.now, v.config.cooldown())
	addr := req.IP
	if addr.IsValid() {
		if !next.assignAddr(addr, owner) {
			return Assignment{}, fmt.Errorf("address %s: %w: it is held already", addr, ErrAddressInUse)
		}
	} else {
		var ok bool
		if addr, ok = next.assignAllowed(owner, v.allowed); !ok {
			return Assignment{}, errFull
		}
	}
	next.sequence++
	value, err := next.encode()
	if err != nil {
		return Assignment{}, err
	}
	h := handle{blocks: map[netip.Prefix]int{b.cidr: 1}, extra: v.handle.extra}
	handleValue, err := h.encode()
	if err != nil {
		return Assignment{}, err
	}
	handleOp := datastore.OpCreate(handleKey(req.Handle), handleValue)
	if v.handleRev != 0 {
		handleOp = datastore.OpUpdate(handleKey(req.Handle), handleValue, v.handleRev)
	}
	rev, err := a.store.Txn(ctx, datastore.OpUpdate(blockKey(b.cidr), value, b.revision), handleOp,
		datastore.OpCheck(datastore.ClusterInformations.Key("default"), v.cluster))
	if err != nil {
		return Assignment{}, err
	}
	a.cache[b.cidr] = &stored{next, rev}
	return Assignment{Addr: addr, Block: b.cidr, Pool: pool.Metadata.Name}, nil
}

// attribute is what the block says about the owner.
func (a *Allocator) attribute(req Request) attribute {
	attrs := maps.Clone(req.Attrs)
	if attrs == nil {
		attrs = map[string]string{}
	}
	if attrs["node"] == "" {
		attrs["node"] = a.node
	}
	if req.Use == datastore.UseWorkload && attrs["timestamp"] == "" {
		attrs["timestamp"] = a.now().UTC().String()
	}
	return attribute{handle: req.Handle, hasHandle: true, secondary: attrs}
}
