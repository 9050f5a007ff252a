package ipam

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
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
	known *view // of the last assignment, if it may be used again
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

// UseClock has the allocator go by another clock than the machine's, before its first use: for simulations.
func (a *Allocator) UseClock(now func() time.Time) { a.now = now }

// Assign gives one address; of a request for both families the IPv4 one is returned.
func (a *Allocator) Assign(ctx context.Context, req Request) (Assignment, error) {
	out, err := a.AssignAll(ctx, req)
	if err != nil {
		return Assignment{}, err
	}
	if len(out) == 0 {
		return Assignment{}, fmt.Errorf("%w: no pool serves this node, and none is required", ErrNoAddress)
	}
	return out[0], nil
}

// AssignAll gives an address of each family wanted to a handle that holds none (else ErrHandleInUse), IPv4 first: all of
// them or, on an error, none. When it fails with datastore.ErrUnreachable, or because ctx was done, they may have been
// assigned all the same: release the handle.
//
// Where the node's own blocks have room, and nothing that matters has changed since the last assignment, it costs one
// transaction at etcd.
func (a *Allocator) AssignAll(ctx context.Context, req Request) ([]Assignment, error) {
	if err := validateHandle(req.Handle); err != nil {
		return nil, err
	}
	asks, err := req.asks()
	if err != nil {
		return nil, err
	}
	if req.Use == "" {
		req.Use = datastore.UseWorkload
	}
	var out []Assignment
	err = a.retry(ctx, func() (err error) {
		out, err = a.assign(ctx, req, asks)
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
		a.known = nil
		if !contended(err) || try == tries-1 {
			return err
		}
		if err := datastore.Backoff(ctx, try); err != nil {
			return err
		}
	}
}

// assign is one attempt.
func (a *Allocator) assign(ctx context.Context, req Request, asks []familyAsk) ([]Assignment, error) {
	if v := a.known; v != nil {
		v.now = a.now()
		if picks, ok := a.remembered(v, req, asks); ok {
			return a.commit(ctx, v, req, picks)
		}
	}
	v, err := a.read(ctx, req.Handle)
	if err != nil {
		return nil, err
	}
	if len(v.handle.blocks) > 0 {
		return nil, fmt.Errorf("handle %s: %w", req.Handle, ErrHandleInUse)
	}
	var picks []pick
	for _, ask := range asks {
		pools, err := v.choosePools(req, ask)
		if err != nil && ask.Want == IfPool && errors.Is(err, ErrNoAddress) {
			continue
		}
		if err != nil {
			return nil, err
		}
		p, err := a.pick(ctx, v, pools, req, ask)
		if err != nil {
			return nil, err
		}
		picks = append(picks, p)
	}
	return a.commit(ctx, v, req, picks)
}

// pick is an address that was chosen, and the block as it will be. Nothing of it is written yet.
type pick struct {
	from *stored
	next *block
	addr netip.Addr
	pool string
}

// remembered picks out of what is remembered; false if that does not do.
func (a *Allocator) remembered(v *view, req Request, asks []familyAsk) ([]pick, bool) {
	var picks []pick
	for _, ask := range asks {
		if ask.IP.IsValid() {
			return nil, false
		}
		pools, err := v.choosePools(req, ask)
		if err != nil && ask.Want == IfPool {
			continue
		}
		if err != nil {
			return nil, false
		}
		p, ok := pick{}, false
		for _, pool := range pools {
			if p, ok = a.fromCache(v, pool, req); ok {
				break
			}
		}
		if !ok {
			return nil, false
		}
		picks = append(picks, p)
	}
	return picks, true
}

// pick chooses an address of one family.
func (a *Allocator) pick(ctx context.Context, v *view, pools []*poolView, req Request, ask familyAsk) (pick, error) {
	if ask.IP.IsValid() {
		return a.pickFixed(ctx, v, pools, req, ask.IP)
	}
	for _, pool := range pools {
		if p, err := a.fromOwnBlocks(ctx, v, pool, req); err != errFull {
			return p, err
		}
	}
	// Only now claim: an address that is free in a block of any pool is better than one more block. And only when nothing
	// can be claimed, borrow: a block of one's own is one route, each borrowed address another.
	var why []string
	for _, pool := range pools {
		p, reasons, err := a.fromNewBlock(ctx, v, pool, req)
		if err != errFull {
			return p, err
		}
		why = append(why, reasons...)
	}
	for _, pool := range pools {
		p, reasons, err := a.fromOthers(ctx, v, pool, req)
		if err != errFull {
			return p, err
		}
		why = append(why, reasons...)
	}
	return pick{}, fmt.Errorf("%w: %s", ErrNoAddress, strings.Join(why, "; "))
}

// newBlocks bounds how many blocks one assignment may claim because the ones before had nothing to give.
const newBlocks = 3

// fromNewBlock claims a block of the pool and takes an address from it; errFull, and why, if that cannot be.
func (a *Allocator) fromNewBlock(ctx context.Context, v *view, pool *poolView, req Request) (pick, []string, error) {
	for range newBlocks {
		b, err := a.claimAny(ctx, v, pool)
		if refusal := (*claimError)(nil); errors.As(err, &refusal) {
			return pick{}, []string{refusal.Error()}, errFull
		}
		if err != nil {
			return pick{}, nil, err
		}
		if p, err := a.take(v, b, pool, req); err != errFull {
			return p, nil, err
		}
		v.done[b.cidr] = true
	}
	return pick{}, []string{fmt.Sprintf("pool %s: the blocks claimed are full", pool.Metadata.Name)}, errFull
}

// errMalformed says that a stored block cannot be understood.
var errMalformed = errors.New("malformed block")

// errFull says that a block (or all blocks looked at) had no free address.
var errFull = errors.New("full")

// fromCache picks an address from a block that this node has in the pool and remembers; false if none has one.
func (a *Allocator) fromCache(v *view, pool *poolView, req Request) (pick, bool) {
	for _, cidr := range v.confirmedIn(pool) {
		if b := a.cache[cidr]; b != nil && b.affinity == a.owner() && v.serves(b) {
			p, err := a.take(v, b, pool, req)
			return p, err == nil
		}
	}
	return pick{}, false
}

// fromOwnBlocks picks an address from a block that this node has in the pool: first from those remembered as having one,
// then, as somebody may have released one behind our back, from the others, read afresh.
func (a *Allocator) fromOwnBlocks(ctx context.Context, v *view, pool *poolView, req Request) (pick, error) {
	if p, ok := a.fromCache(v, pool, req); ok {
		return p, nil
	}
	for _, cidr := range v.confirmedIn(pool) {
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
			return pick{}, err
		case b.affinity != a.owner():
			// Claiming it will find that out again, and then drop the affinity.
			a.log.Warn("affinity ignored: the block is another's", "block", cidr, "affinity", b.affinity)
			continue
		case !v.serves(b):
			v.done[cidr] = true
			continue
		}
		return a.take(v, b, pool, req)
	}
	return pick{}, errFull
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

// take picks an address of b: the longest-free one that no reservation holds back.
func (a *Allocator) take(v *view, b *stored, pool *poolView, req Request) (pick, error) {
	next := b.clone()
	next.collect(v.now, v.config.cooldown())
	addr, ok := next.assignAllowed(a.attribute(req), v.allowed)
	if !ok {
		return pick{}, errFull
	}
	return pick{b, next, addr, pool.name()}, nil
}

// commit writes the blocks and the handle in one transaction, if all that was read is still so.
func (a *Allocator) commit(ctx context.Context, v *view, req Request, picks []pick) ([]Assignment, error) {
	if len(picks) == 0 {
		return nil, nil
	}
	h := handle{blocks: map[netip.Prefix]int{}, extra: v.handle.extra}
	ops := slices.Clone(v.guards)
	for _, p := range picks {
		p.next.sequence++
		value, err := p.next.encode()
		if err != nil {
			return nil, err
		}
		h.blocks[p.next.cidr] = 1
		ops = append(ops, datastore.OpUpdate(blockKey(p.next.cidr), value, p.from.revision))
	}
	value, err := h.encode()
	if err != nil {
		return nil, err
	}
	if v.handleRev != 0 {
		ops = append(ops, datastore.OpUpdate(handleKey(req.Handle), value, v.handleRev))
	} else {
		ops = append(ops, datastore.OpCreate(handleKey(req.Handle), value))
	}
	rev, err := a.store.Txn(ctx, ops...)
	if err != nil {
		return nil, err
	}
	var out []Assignment
	for _, p := range picks {
		if p.from.affinity == a.owner() {
			a.cache[p.next.cidr] = &stored{p.next, rev}
		} else {
			delete(a.cache, p.next.cidr) // somebody else writes it
			a.log.Info("address borrowed", "address", p.addr, "block", p.next.cidr, "affinity", p.from.affinity)
		}
		out = append(out, Assignment{Addr: p.addr, Block: p.next.cidr, Pool: p.pool})
	}
	a.remember(v)
	return out, nil
}
