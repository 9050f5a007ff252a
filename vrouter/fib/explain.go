package fib

import "net/netip"

// Match returns the route that Lookup's answer for a comes from: the longest prefix that contains a; false when none does.
// It is for explanations: it waits for writers.
func (t *Table) Match(a netip.Addr) (Route, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !a.IsValid() {
		return Route{}, false
	}
	p := netip.PrefixFrom(a, a.BitLen())
	if !a.Is4() {
		prefix, n, ok := t.v6.LookupPrefixLPM(p)
		return Route{prefix, n}, ok
	}
	prefix, h, ok := t.v4.LookupPrefixLPM(p)
	return Route{prefix, nextHop(h, t.groups.all)}, ok
}
