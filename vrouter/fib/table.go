package fib

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/gaissmai/bart"
)

// Snapshot is one state of the table. It never changes, and may be used by any number of goroutines for as long as
// they like.
type Snapshot struct {
	routes *bart.Fast[NextHop]
}

// Lookup returns the next hop of the longest prefix that contains a, false when none does. It does not allocate. An
// IPv4-mapped IPv6 address is an IPv6 address: it matches no IPv4 route.
func (s *Snapshot) Lookup(a netip.Addr) (NextHop, bool) { return s.routes.Lookup(a) }

// Get returns the next hop of the route for exactly p.
func (s *Snapshot) Get(p netip.Prefix) (NextHop, bool) { return s.routes.Get(p) }

// Len returns the number of routes.
func (s *Snapshot) Len() int { return s.routes.Size() }

// All yields every route: IPv4 before IPv6, then by address, then the shorter prefix first.
func (s *Snapshot) All() iter.Seq[Route] {
	return func(yield func(Route) bool) {
		for p, n := range s.routes.AllSorted() {
			if !yield(Route{p, n}) {
				return
			}
		}
	}
}

// Table holds the current snapshot and the stale marks. All methods may be called concurrently; writers wait for each
// other, readers for nobody. Create it with [New].
type Table struct {
	current atomic.Pointer[Snapshot]

	mu    sync.Mutex // serializes writers, and guards stale
	stale map[netip.Prefix]struct{}
}

// New returns an empty table.
func New() *Table {
	t := &Table{stale: make(map[netip.Prefix]struct{})}
	t.current.Store(&Snapshot{routes: new(bart.Fast[NextHop])})
	return t
}

// Load returns the current snapshot. The hot path calls it once per batch.
func (t *Table) Load() *Snapshot { return t.current.Load() }

// Update is one transaction: it removes the routes for exactly the prefixes in del, then adds or replaces those in
// set (of two for one prefix the later stays), and makes the result visible at once. A prefix in del that has no
// route is no error. A route in set is no longer stale, whether it is new, changed or as it was.
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
	e := t.edit(len(set) + len(del))
	for _, p := range del {
		e.remove(p)
		delete(t.stale, p)
	}
	for _, r := range set {
		e.insert(r)
		delete(t.stale, r.Prefix)
	}
	t.commit(e)
	return nil
}

// MarkStale marks every route that is in the table now. Forwarding is not affected.
func (t *Table) MarkStale() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for p := range t.Load().routes.All() {
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
	old := t.Load()
	swept := make([]Route, 0, len(t.stale))
	e := t.edit(len(t.stale))
	for p := range t.stale {
		n, _ := old.Get(p) // marks are only on routes that exist: Update takes both away
		swept = append(swept, Route{p, n})
		e.remove(p)
	}
	clear(t.stale)
	t.commit(e)
	slices.SortFunc(swept, func(a, b Route) int { return a.Prefix.Compare(b.Prefix) })
	return swept
}

// edit is the next snapshot in the making. Two ways lead there: copying the few nodes on the way to each changed
// prefix, or, when much changes, copying the whole table once and changing the copy in place.
type edit struct {
	routes *bart.Fast[NextHop]
	owned  bool // routes is our own copy
}

// cloneShare: with more changes than one in this many routes, a copy of the whole is the cheaper way.
const cloneShare = 8

func (t *Table) edit(changes int) *edit {
	routes := t.Load().routes
	if changes > routes.Size()/cloneShare {
		return &edit{routes: routes.Clone(), owned: true}
	}
	return &edit{routes: routes}
}

func (e *edit) insert(r Route) {
	switch have, ok := e.routes.Get(r.Prefix); {
	case ok && have == r.NextHop:
	case e.owned:
		e.routes.Insert(r.Prefix, r.NextHop)
	default:
		e.routes = e.routes.InsertPersist(r.Prefix, r.NextHop)
	}
}

func (e *edit) remove(p netip.Prefix) {
	if e.owned {
		e.routes.Delete(p)
		return
	}
	e.routes = e.routes.DeletePersist(p)
}

// commit makes the edit the current snapshot.
func (t *Table) commit(e *edit) { t.current.Store(&Snapshot{routes: e.routes}) }
