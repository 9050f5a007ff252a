package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
	"margay/vrouter/rpc"
)

// routeProtocol marks the kernel routes that the agent owns (rtm_protocol); it touches no others. The pods' /32
// routes belong to cni/server under a number of their own.
const routeProtocol = 81

// kernelTable drives the main routing table to the desired routes.
type kernelTable struct {
	nl *netlink.Handle
}

// kernelKey is what makes a route one route to the kernel.
type kernelKey struct {
	prefix netip.Prefix
	metric int
}

// Apply installs and changes routes, and, when sweep is set, removes those of ours that are no longer desired. It goes
// on past single failures and returns them joined.
func (k *kernelTable) Apply(want []KernelRoute, sweep bool) error {
	have, err := k.list()
	if err != nil {
		return err
	}
	links := make(map[string]int)
	var errs []error
	wanted := make(map[kernelKey]bool, len(want))
	for _, w := range want {
		key := kernelKey{w.Prefix, w.Metric}
		wanted[key] = true
		route, err := k.toNetlink(w, links)
		if err != nil {
			errs = append(errs, err)
			if route.Gw == nil && route.MultiPath == nil { // none of its gateways can be reached
				continue
			}
		}
		old, ours := have[key]
		switch {
		case ours && sameRoute(old, route):
		case ours:
			err = k.nl.RouteReplace(&route)
		default:
			// Not replace: the kernel would take anybody's route of that destination and metric for it.
			err = k.nl.RouteAdd(&route)
		}
		if w.Prefix.Addr().Is6() && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EACCES)) {
			continue // IPv6 is off: nothing can leave by it
		}
		if errors.Is(err, unix.EEXIST) {
			err = errors.New("somebody else's route is there already: remove one of the two")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("route %s: %w", w, err))
		}
	}
	if sweep {
		for key, r := range have {
			if !wanted[key] {
				if err := k.nl.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
					errs = append(errs, fmt.Errorf("remove route %s: %w", key.prefix, err))
				}
			}
		}
	}
	return errors.Join(errs...)
}

func (k *kernelTable) list() (map[kernelKey]netlink.Route, error) {
	var routes []netlink.Route
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := dump.RoutesLike(k.nl, family, &netlink.Route{Protocol: routeProtocol, Table: unix.RT_TABLE_MAIN},
			netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) { // a kernel without IPv6 has none
			return nil, fmt.Errorf("list kernel routes: %w", err)
		}
		routes = append(routes, list...)
	}
	out := make(map[kernelKey]netlink.Route, len(routes))
	for _, r := range routes {
		p := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if r.Dst != nil {
			var ok bool
			if p, ok = prefixOf(r.Dst); !ok {
				continue
			}
		}
		out[kernelKey{p, r.Priority}] = r
	}
	return out, nil
}

// toNetlink resolves the device, and a next hop that is not on the link through the kernel's own route to it.
func (k *kernelTable) toNetlink(w KernelRoute, links map[string]int) (netlink.Route, error) {
	r := netlink.Route{Dst: ipNet(w.Prefix), Protocol: routeProtocol, Table: unix.RT_TABLE_MAIN, Priority: w.Metric,
		Type: unix.RTN_UNICAST}
	if w.Blackhole {
		if r.Type = unix.RTN_BLACKHOLE; w.Prefix.Addr().Is6() {
			// No other node's IPv6 pods can be reached yet: who tries is told at once, and can go by IPv4.
			r.Type = unix.RTN_UNREACHABLE
		}
		return r, nil
	}
	index, ok := links[w.Device]
	if !ok {
		link, err := k.nl.LinkByName(w.Device)
		if err != nil {
			return r, fmt.Errorf("route %s: interface %s: %w", w, w.Device, err)
		}
		index = link.Attrs().Index
		links[w.Device] = index
	}
	r.LinkIndex = index
	if w.Source.IsValid() {
		r.Src = w.Source.AsSlice()
	}
	if !w.Gateway.IsValid() {
		r.Gw, r.Flags = tunnelGateway.AsSlice(), int(netlink.FLAG_ONLINK)
		return r, nil
	}
	gateways := w.gateways()
	hops := make([]*netlink.NexthopInfo, 0, len(gateways))
	var errs []error
	for _, gw := range gateways {
		hop, err := k.resolve(gw, index)
		if err != nil {
			errs = append(errs, fmt.Errorf("route %s: next hop %s is not reachable: %w", w, gw, err))
			continue
		}
		same := func(o *netlink.NexthopInfo) bool { return o.LinkIndex == hop.LinkIndex && o.Gw.Equal(hop.Gw) }
		if !slices.ContainsFunc(hops, same) { // two behind one router are one way
			hops = append(hops, hop)
		}
	}
	switch len(hops) {
	case 0:
	case 1:
		r.Gw, r.LinkIndex = hops[0].Gw, hops[0].LinkIndex
	default:
		r.LinkIndex, r.MultiPath = 0, hops
	}
	return r, errors.Join(errs...)
}

// resolve returns the hop on the link that leads to gw, which may be several hops away; index is the link's where the
// kernel does not say.
func (k *kernelTable) resolve(gw netip.Addr, index int) (*netlink.NexthopInfo, error) {
	hop := &netlink.NexthopInfo{LinkIndex: index, Gw: gw.AsSlice()}
	via, err := k.nl.RouteGet(gw.AsSlice())
	if err != nil {
		return nil, err
	}
	if i := slices.IndexFunc(via, func(v netlink.Route) bool { return v.Gw != nil }); i >= 0 {
		hop.Gw, hop.LinkIndex = via[i].Gw, via[i].LinkIndex
	} else if len(via) > 0 {
		hop.LinkIndex = via[0].LinkIndex
	}
	return hop, nil
}

func sameRoute(a, b netlink.Route) bool {
	if a.Type != b.Type {
		return false
	}
	return a.Type != unix.RTN_UNICAST || a.LinkIndex == b.LinkIndex && a.Gw.Equal(b.Gw) && a.Src.Equal(b.Src) &&
		slices.EqualFunc(a.MultiPath, b.MultiPath, func(a, b *netlink.NexthopInfo) bool {
			return a.LinkIndex == b.LinkIndex && a.Gw.Equal(b.Gw)
		})
}

// gateways returns all of them, sorted.
func (w KernelRoute) gateways() []netip.Addr {
	return rpc.NextHop{Gateway: w.Gateway, Others: w.Others}.Gateways()
}

// String is how `ip route` would write it.
func (w KernelRoute) String() string {
	if w.Blackhole && w.Prefix.Addr().Is6() {
		return fmt.Sprintf("unreachable %s metric %d", w.Prefix, w.Metric)
	}
	if w.Blackhole {
		return fmt.Sprintf("blackhole %s metric %d", w.Prefix, w.Metric)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s", w.Prefix)
	switch gateways := w.gateways(); len(gateways) {
	case 0:
		fmt.Fprintf(&b, " via %s dev %s", tunnelGateway, w.Device)
	case 1:
		fmt.Fprintf(&b, " via %s dev %s", w.Gateway, w.Device)
	default:
		for _, gw := range gateways {
			fmt.Fprintf(&b, " nexthop via %s dev %s", gw, w.Device)
		}
	}
	if w.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", w.Metric)
	}
	return b.String()
}
