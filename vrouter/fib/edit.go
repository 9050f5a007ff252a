package fib

import (
	"net/netip"
	"slices"
	"weak"
)

// Which transactions are made on a new Forwarding, and so seen at once: those that have this many changes, and at least
// one for this many routes. To make it anew costs about as much as to change an eighth of it in place.
const (
	wholeChanges = 1024
	wholeShare   = 8
)

// edit makes a valid transaction, in the way that suits its size.
func (t *Table) edit(set []Route, del []netip.Prefix) {
	t.snapshot = weak.Pointer[Snapshot]{}
	if n := len(set) + len(del); n < wholeChanges || n < t.v4.Size()/wholeShare {
		t.inPlace(set, del)
		return
	}
	for _, p := range del {
		t.drop(p)
	}
	for _, r := range set {
		t.keep(r)
	}
	t.remake()
}

// editWhole removes routes that exist, so that readers see it at once.
func (t *Table) editWhole(del []netip.Prefix) {
	t.snapshot = weak.Pointer[Snapshot]{}
	if len(del) < t.v4.Size()/wholeShare {
		f := t.forwarding.Load().clone()
		t.change(f, nil, del)
		f.publish(&t.forwarding)
		return
	}
	for _, p := range del {
		t.drop(p)
	}
	t.remake()
}

// inPlace makes a transaction under the readers' eyes.
//
// An address must go from the hop it had to the one it gets without a third between them, although it may be under
// several of the prefixes that change. So routes are set before others are deleted, the longest first: the first that
// reaches the address' leaf is the one that stays, and shorter ones leave it alone. Then the deletions, the shortest
// first: when the route that the address has goes, no shorter one that is to go can come to light. A route that is
// both deleted and set is only set, and of two for one prefix only the later is.
func (t *Table) inPlace(set []Route, del []netip.Prefix) {
	if len(set) > 1 {
		set = lastOfEach(set)
		slices.SortStableFunc(set, func(a, b Route) int { return b.Prefix.Bits() - a.Prefix.Bits() })
	}
	if len(del) > 0 && len(set) > 0 {
		stays := make(map[netip.Prefix]struct{}, len(set))
		for _, r := range set {
			stays[r.Prefix] = struct{}{}
		}
		del = slices.DeleteFunc(slices.Clone(del), func(p netip.Prefix) bool { _, ok := stays[p]; return ok })
	}
	if len(del) > 1 {
		del = slices.SortedStableFunc(slices.Values(del), func(a, b netip.Prefix) int { return a.Bits() - b.Bits() })
	}
	t.change(t.forwarding.Load(), set, del)
}

// lastOfEach returns a copy of set in which no prefix is twice: the last one stays.
func lastOfEach(set []Route) []Route {
	seen := make(map[netip.Prefix]struct{}, len(set))
	last := make([]Route, 0, len(set))
	for _, r := range slices.Backward(set) {
		if _, ok := seen[r.Prefix]; !ok {
			seen[r.Prefix] = struct{}{}
			last = append(last, r)
		}
	}
	return last
}

// change sets and then deletes, in the table of routes and in f. Where f runs out of room, it is made anew from the
// routes, which at every step say the same.
func (t *Table) change(f *Forwarding, set []Route, del []netip.Prefix) {
	for _, r := range set {
		if !t.keep(r) || !r.Prefix.Addr().Is4() {
			continue
		}
		if !f.insert(r.Prefix, hopOf(r.NextHop)) {
			f = t.remake()
		}
	}
	for _, p := range del {
		if !t.drop(p) || !p.Addr().Is4() {
			continue
		}
		parent, h, _ := t.v4.LookupPrefixLPM(p)
		if !f.remove(p, parent, h) {
			f = t.remake()
		}
	}
}

// keep adds or replaces one route, and reports whether that changed anything.
func (t *Table) keep(r Route) bool {
	delete(t.stale, r.Prefix)
	if !r.Prefix.Addr().Is4() {
		t.v6.Insert(r.Prefix, r.NextHop)
		return true
	}
	changed := false
	t.v4.Modify(r.Prefix, func(had Hop, ok bool) (Hop, bool) {
		h := hopOf(r.NextHop)
		changed = !ok || had != h
		return h, false
	})
	return changed
}

// drop takes one route away, and reports whether there was one.
func (t *Table) drop(p netip.Prefix) bool {
	delete(t.stale, p)
	n := t.v4.Size() + t.v6.Size()
	if p.Addr().Is4() {
		t.v4.Delete(p)
	} else {
		t.v6.Delete(p)
	}
	return t.v4.Size()+t.v6.Size() < n
}

// remake makes the forwarding table anew from the routes, without what nothing leads to any more, and publishes it.
func (t *Table) remake() *Forwarding {
	f := newForwarding()
	for p, h := range t.v4.All() {
		f.insert(p, h)
	}
	f.publish(&t.forwarding)
	return f
}
