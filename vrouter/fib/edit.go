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
	if n := len(set) + len(del); n < wholeChanges || n < t.size()/wholeShare {
		t.inPlace(set, del)
		return
	}
	for _, p := range del {
		t.drop(p)
	}
	for _, r := range set {
		t.keep(r)
	}
	t.publish(t.remake4(), t.remake6())
}

// editWhole removes routes that exist, so that readers see it at once.
func (t *Table) editWhole(del []netip.Prefix) {
	t.snapshot = weak.Pointer[Snapshot]{}
	if len(del) < t.size()/wholeShare {
		now := t.forwarding.Load()
		f := t.change(Forwarding{now.v4.clone(), now.v6.clone()}, nil, del)
		t.publish(f.v4, f.v6)
		return
	}
	for _, p := range del {
		t.drop(p)
	}
	t.publish(t.remake4(), t.remake6())
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
	was := *t.forwarding.Load()
	if f := t.change(was, set, del); f != was {
		t.publish(f.v4, f.v6)
	}
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

// change sets and then deletes, in the table of routes and in f, and returns f. A trie that runs out of room is made anew
// from the routes, which at every step say the same, and published.
func (t *Table) change(f Forwarding, set []Route, del []netip.Prefix) Forwarding {
	for _, r := range set {
		h, changed := t.keep(r)
		if !changed {
			continue
		}
		if r.Prefix.Addr().Is4() {
			if !f.v4.insert(r.Prefix, h) {
				f.v4 = t.remake4()
			}
		} else if !f.v6.insert(r.Prefix, r.NextHop) {
			f.v6 = t.remake6()
		}
	}
	for _, p := range del {
		if !t.drop(p) {
			continue
		}
		if p.Addr().Is4() {
			parent, h, _ := t.v4.LookupPrefixLPM(p)
			if !f.v4.remove(p, parent, h) {
				f.v4 = t.remake4()
			}
			continue
		}
		parent, n, _ := t.v6.LookupPrefixLPM(p)
		if !f.v6.remove(p, parent, n) {
			f.v6 = t.remake6()
		}
	}
	return f
}

// keep adds or replaces one route, and reports whether that changed anything. The Hop is that of an IPv4 route.
func (t *Table) keep(r Route) (h Hop, changed bool) {
	delete(t.stale, r.Prefix)
	if !r.Prefix.Addr().Is4() {
		t.v6.Modify(r.Prefix, func(had NextHop, ok bool) (NextHop, bool) {
			changed = !ok || had != r.NextHop
			return r.NextHop, false
		})
		return 0, changed
	}
	h = t.groups.hop(r.NextHop)
	t.v4.Modify(r.Prefix, func(had Hop, ok bool) (Hop, bool) {
		changed = !ok || had != h
		t.groups.release(had)
		return h, false
	})
	return h, changed
}

// drop takes one route away, and reports whether there was one.
func (t *Table) drop(p netip.Prefix) (was bool) {
	delete(t.stale, p)
	if !p.Addr().Is4() {
		t.v6.Modify(p, func(had NextHop, ok bool) (NextHop, bool) {
			was = ok
			return had, true
		})
		return was
	}
	t.v4.Modify(p, func(had Hop, ok bool) (Hop, bool) {
		was = ok
		t.groups.release(had)
		return had, true
	})
	return was
}

// remake4 makes the IPv4 trie anew from the routes, without what nothing leads to any more.
func (t *Table) remake4() *trie4 {
	f := newTrie4(&t.groups)
	for p, h := range t.v4.All() {
		f.insert(p, h)
	}
	return f
}

// remake6 is the same for IPv6.
func (t *Table) remake6() *trie6 {
	f := newTrie6()
	for p, n := range t.v6.All() {
		f.insert(p, n)
	}
	return f
}

// publish hands the tries to the readers, as one.
func (t *Table) publish(v4 *trie4, v6 *trie6) {
	v4.ready()
	v6.ready()
	t.forwarding.Store(&Forwarding{v4, v6})
}
