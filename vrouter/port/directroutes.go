package port

import (
	"net/netip"
	"slices"

	"margay/vrouter"
)

// routeChange is one prefix, and the route that it has now.
type routeChange struct {
	prefix netip.Prefix
	there  bool
	hop    vrouter.NextHop
}

// lastChanges returns the last change of each prefix: what is there from the longest prefix to the shortest, and then
// what is not, from the shortest to the longest. So no shorter prefix comes to light for a moment.
func lastChanges(changes []routeChange) []routeChange {
	if len(changes) < 2 {
		return changes
	}
	last := make(map[netip.Prefix]int, len(changes))
	for i, c := range changes {
		last[c.prefix] = i
	}
	kept := make([]routeChange, 0, len(last))
	for i, c := range changes {
		if last[c.prefix] == i {
			kept = append(kept, c)
		}
	}
	slices.SortFunc(kept, func(a, b routeChange) int {
		switch {
		case a.there != b.there && a.there:
			return -1
		case a.there != b.there:
			return 1
		case a.there:
			return b.prefix.Bits() - a.prefix.Bits()
		}
		return a.prefix.Bits() - b.prefix.Bits()
	})
	return kept
}

// SetRoutes tells the port of changes of the routes, as vrouter.Router.OnRoutes does: what tunnels lead to is the
// vRouter's.
func (d *Direct) SetRoutes(set []vrouter.Route, del []netip.Prefix) {
	p := d.pods
	p.mu.Lock()
	for _, prefix := range del {
		p.routes = append(p.routes, routeChange{prefix: prefix})
	}
	for _, r := range set {
		p.routes = append(p.routes, routeChange{r.Prefix, true, r.NextHop})
	}
	p.mu.Unlock()
	p.poke()
}

// route takes a change of the routes over.
func (p *directPods) route(r routeChange) error {
	if p.plan != nil {
		return p.plan.route(r)
	}
	return p.steering.own(r.prefix, ownedRoute, r.there && r.hop.Kind == vrouter.KindTunnel, 0)
}
