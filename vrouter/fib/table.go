package fib

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"weak"

	"github.com/gaissmai/bart"
)

// Snapshot is one state of the table, for the control plane. It never changes, and may be used by any number of
// goroutines for as long as they like.
type Snapshot struct {
	v4     *bart.Table[Hop]
	v6     *bart.Table[NextHop]
	groups []NextHop // what the numbers of groups in v4 stand for
}

// Lookup returns the next hop of the longest prefix that contains a, false when none does. It does not allocate. An
// IPv4-mapped IPv6 address is an IPv6 address: it matches no IPv4 route. Who forwards asks [Forwarding].
func (s *Snapshot) Lookup(a netip.Addr) (NextHop, bool) {
	if !a.Is4() {
		return s.v6.Lookup(a)
	}
	h, ok := s.v4.Lookup(a)
	return nextHop(h, s.groups), ok
}

// Get returns the next hop of the route for exactly p.
func (s *Snapshot) Get(p netip.Prefix) (NextHop, bool) {
	if !p.Addr().Is4() {
		return s.v6.Get(p)
	}
	h, ok := s.v4.Get(p)
	return nextHop(h, s.groups), ok
}

// Len returns the number of routes.
func (s *Snapshot) Len() int { return s.v4.Size() + s.v6.Size() }

// All yields every route: IPv4 before IPv6, then by address, then the shorter prefix first.
func (s *Snapshot) All() iter.Seq[Route] {
	return func(yield func(Route) bool) {
		for p, h := range s.v4.AllSorted4() {
			if !yield(Route{p, nextHop(h, s.groups)}) {
				return
			}
		}
		for p, n := range s.v6.AllSorted6() {
			if !yield(Route{p, n}) {
				return
			}
		}
	}
}

// Table holds the routes, the stale marks, and what workers forward by. All methods may be called concurrently;
// writers wait for each other, workers for nobody. Create it with [New].
type Table struct {
	forwarding atomic.Pointer[Forwarding]

	mu     sync.Mutex // serializes writers, and guards what follows
	v4     *bart.Table[Hop]
	v6     *bart.Table[NextHop]
	groups groups
	stale  map[netip.Prefix]struct{}
	// snapshot is a copy of the routes as they are, for as long as someone uses it.
	snapshot weak.Pointer[Snapshot]
	most     int // routes of a family
}

// New returns an empty table.
func New() *Table {
	t := &Table{v4: new(bart.Table[Hop]), v6: new(bart.Table[NextHop]), stale: make(map[netip.Prefix]struct{}), most: maxRoutes}
	t.publish(newTrie4(&t.groups), newTrie6())
	return t
}

// Forwarding returns the table that workers look addresses up in. The hot path calls it once per batch, and keeps
// it no longer.
func (t *Table) Forwarding() *Forwarding { return t.forwarding.Load() }

// Load returns the current snapshot. It copies the table, unless a snapshot of the present state is still in use.
func (t *Table) Load() *Snapshot {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.snapshot.Value(); s != nil {
		return s
	}
	s := &Snapshot{v4: t.v4.Clone(), v6: t.v6.Clone(), groups: slices.Clone(t.groups.all)}
	t.snapshot = weak.Make(s)
	return s
}

// Len returns the number of routes.
func (t *Table) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.size()
}

func (t *Table) size() int { return t.v4.Size() + t.v6.Size() }

// Size is how much a table holds.
type Size struct {
	IPv4, IPv6 int // routes
	Bytes      int // of what workers look addresses up in
}

// Size returns how much the table holds now.
func (t *Table) Size() Size {
	t.mu.Lock()
	defer t.mu.Unlock()
	return Size{IPv4: t.v4.Size(), IPv6: t.v6.Size(), Bytes: t.forwarding.Load().Bytes()}
}

// Update is one transaction: it removes the routes for exactly the prefixes in del, then adds or replaces those in
// set (of two for one prefix the later stays). A prefix in del that has no route is no error. A route in set is no
// longer stale, whether it is new, changed or as it was.
//
// A [Snapshot] has all of it or nothing. In [Forwarding] each lookup has the next hop from before the transaction or
// the one from after it; a transaction that changes much of the table is visible at once there too.
//
// On an error, which names the index, the field and what was expected, nothing has changed.
func (t *Table) Update(set []Route, del []netip.Prefix) error {
	for i, p := range del {
		if err := validatePrefix(p); err != nil {
			return fmt.Errorf("del[%d]: %w", i, err)
		}
	}
	for i, r := range set {
		if err := r.Validate(); err != nil {
			return fmt.Errorf("set[%d]: %w", i, err)
		}
	}

	t.mu.Lock()
	defer t.mu.Unlock()
	if had := max(t.v4.Size(), t.v6.Size()); had+len(set) > t.most {
		return fmt.Errorf("set: %d routes, and there are %d of a family: want at most %d", len(set), had, t.most)
	}
	t.edit(set, del)
	return nil
}

// MarkStale marks every route that is in the table now. Forwarding is not affected.
func (t *Table) MarkStale() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for p := range t.v4.All() {
		t.stale[p] = struct{}{}
	}
	for p := range t.v6.All() {
		t.stale[p] = struct{}{}
	}
}

// Stale returns the number of routes that are marked.
func (t *Table) Stale() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.stale)
}

// StaleAt reports whether the route for exactly p is marked.
func (t *Table) StaleAt(p netip.Prefix) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.stale[p]
	return ok
}

// Sweep removes the routes that are still marked, in one transaction, and returns them in the order of
// [Snapshot.All]; nil when there were none.
func (t *Table) Sweep() []Route {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.stale) == 0 {
		return nil
	}
	swept := make([]Route, 0, len(t.stale))
	del := make([]netip.Prefix, 0, len(t.stale))
	now := Snapshot{t.v4, t.v6, t.groups.all}
	for p := range t.stale {
		n, _ := now.Get(p) // marks are only on routes that exist: Update takes both away
		swept, del = append(swept, Route{p, n}), append(del, p)
	}
	t.editWhole(del)
	slices.SortFunc(swept, func(a, b Route) int { return a.Prefix.Compare(b.Prefix) })
	return swept
}
