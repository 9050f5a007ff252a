package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
)

// What a trace asks of the kernel: RTM_GETROUTE, which runs the code that routes packets, the input side's checks of the
// source included.

// kernelAnswer is what the kernel would do with a packet.
type kernelAnswer struct {
	local   bool
	device  string
	mtu     int        // of the route, or of the device, in bytes
	gateway netip.Addr // the next hop; the destination itself on a link
	source  netip.Addr // that the kernel gives to a packet of its own
	route   string     // the route that was taken, as `ip route` writes it
	reason  string     // why it goes nowhere: see refusals; empty: it goes
	detail  string
}

// askRoute asks where a packet goes that comes in by an interface, or, where in is empty, that the node itself sends.
func (k *kernelTable) askRoute(src, dst netip.Addr, in string) (kernelAnswer, error) {
	options := &netlink.RouteGetOptions{Iif: in}
	if src.IsValid() && !src.IsUnspecified() {
		options.SrcAddr = src.AsSlice()
	}
	routes, err := k.nl.RouteGetWithOptions(dst.AsSlice(), options)
	if err != nil {
		return k.refusal(err, src, dst, in)
	}
	if len(routes) == 0 {
		return kernelAnswer{}, fmt.Errorf("the kernel gave no route to %s", dst)
	}
	r := routes[0]
	a := kernelAnswer{local: r.Type == unix.RTN_LOCAL, mtu: r.MTU, gateway: dst, route: k.matched(dst, options)}
	if gw, ok := netip.AddrFromSlice(r.Gw); ok {
		a.gateway = gw.Unmap()
	}
	if source, ok := netip.AddrFromSlice(r.Src); ok {
		a.source = source.Unmap()
	}
	if a.local {
		return a, nil
	}
	link, err := k.nl.LinkByIndex(r.LinkIndex)
	if err != nil {
		return a, fmt.Errorf("the route's interface %d: %w", r.LinkIndex, err)
	}
	if a.device = link.Attrs().Name; a.mtu == 0 {
		a.mtu = link.Attrs().MTU
	}
	return a, nil
}

// matched names the entry of the table that a look-up hits.
func (k *kernelTable) matched(dst netip.Addr, options *netlink.RouteGetOptions) string {
	match := *options
	match.FIBMatch = true
	routes, err := k.nl.RouteGetWithOptions(dst.AsSlice(), &match)
	if err != nil || len(routes) == 0 {
		return ""
	}
	return routeText(routes[0], k.nl)
}

func routeText(r netlink.Route, nl *netlink.Handle) string {
	var b strings.Builder
	if r.Type != unix.RTN_UNICAST {
		fmt.Fprintf(&b, "%s ", routeTypes[r.Type])
	}
	if p, ok := prefixOf(r.Dst); ok && p.Bits() > 0 {
		b.WriteString(p.String())
	} else {
		b.WriteString("default")
	}
	if r.Gw != nil {
		fmt.Fprintf(&b, " via %s", r.Gw)
	}
	if link, err := nl.LinkByIndex(r.LinkIndex); err == nil {
		fmt.Fprintf(&b, " dev %s", link.Attrs().Name)
	}
	if r.Protocol != 0 {
		fmt.Fprintf(&b, " proto %d", r.Protocol)
	}
	if r.Priority != 0 {
		fmt.Fprintf(&b, " metric %d", r.Priority)
	}
	return b.String()
}

var routeTypes = map[int]string{unix.RTN_LOCAL: "local", unix.RTN_BROADCAST: "broadcast", unix.RTN_MULTICAST: "multicast",
	unix.RTN_BLACKHOLE: "blackhole", unix.RTN_UNREACHABLE: "unreachable", unix.RTN_PROHIBIT: "prohibit", unix.RTN_THROW: "throw"}

// strict reports whether the reverse path filter of an interface refuses a source: rp_filter is 1 and the route to the source
// leads elsewhere, or 2 and there is none (RFC 3704; Linux takes the greater of the interface's value and all's).
func (k *kernelTable) strict(src netip.Addr, in string) bool {
	mode := max(sysctl("all/rp_filter"), sysctl(in+"/rp_filter"))
	if mode == 0 {
		return false
	}
	routes, err := k.nl.RouteGet(src.AsSlice())
	if err != nil || len(routes) == 0 {
		return true
	}
	link, err := k.nl.LinkByIndex(routes[0].LinkIndex)
	return routes[0].Type == unix.RTN_UNICAST && mode == 1 && err == nil && link.Attrs().Name != in
}

func (k *kernelTable) reversePath(src netip.Addr, in string) kernelAnswer {
	_, way := k.longest(src)
	return kernelAnswer{reason: "rp_filter", detail: fmt.Sprintf("the way back to %s is not by %s: %s", src, in, orText(way, "there is no route"))}
}

// sysctl reads a number below net/ipv4/conf; 0 for what is not there.
func sysctl(name string) int {
	b, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + name)
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	return n
}

// refusal reads the kernel's error. What the error leaves open is looked up: the kernel has EINVAL for a blackhole, for an
// address that cannot be, and, in newer releases, for the reverse path filter.
func (k *kernelTable) refusal(err error, src, dst netip.Addr, in string) (kernelAnswer, error) {
	best, text := k.longest(dst)
	if rule := k.refusingRule(err, src, dst, in); rule != "" {
		return kernelAnswer{reason: "policy_rule", detail: rule, route: rule}, nil
	}
	switch {
	case errors.Is(err, unix.EXDEV):
		return k.reversePath(src, in), nil
	case errors.Is(err, unix.EACCES):
		return kernelAnswer{reason: "prohibited", detail: text, route: text}, nil
	case errors.Is(err, unix.EINVAL) && best == unix.RTN_BLACKHOLE:
		return kernelAnswer{reason: "blackhole", detail: text, route: text}, nil
	case errors.Is(err, unix.EINVAL) && in != "" && k.strict(src, in):
		return k.reversePath(src, in), nil // older kernels said EXDEV, 6.18 says EINVAL
	case errors.Is(err, unix.EINVAL) && in != "":
		return kernelAnswer{reason: "martian", detail: fmt.Sprintf("%s to %s cannot come from %s: one of the two is the node's own, a loopback, multicast or reserved address", src, dst, in)}, nil
	case errors.Is(err, unix.EINVAL):
		return kernelAnswer{reason: "martian", detail: fmt.Sprintf("the node cannot send from %s", src)}, nil
	case errors.Is(err, unix.EHOSTUNREACH) && in != "" && sysctl(in+"/forwarding") == 0:
		return kernelAnswer{reason: "forwarding_off", detail: "net.ipv4.conf." + in + ".forwarding is 0"}, nil
	case errors.Is(err, unix.EHOSTUNREACH) && best == unix.RTN_UNREACHABLE:
		return kernelAnswer{reason: "unreachable", detail: text, route: text}, nil
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		return kernelAnswer{reason: "no_kernel_route", detail: "no route to " + dst.String()}, nil
	case errors.As(err, new(netlink.LinkNotFoundError)), errors.Is(err, unix.ENODEV):
		return kernelAnswer{reason: "no_interface", detail: "there is no interface " + in}, nil
	}
	return kernelAnswer{}, fmt.Errorf("ask the kernel for the route from %s to %s: %w", src, dst, err)
}

// refusingRule finds the policy rule that refuses a packet before the main table is asked, "" if there is none; err, the
// kernel's, tells the kinds apart.
func (k *kernelTable) refusingRule(err error, src, dst netip.Addr, in string) string {
	var kind string
	switch {
	case errors.Is(err, unix.EINVAL):
		kind = "blackhole"
	case errors.Is(err, unix.EACCES):
		kind = "prohibit"
	case errors.Is(err, unix.ENETUNREACH):
		kind = "unreachable"
	default:
		return ""
	}
	rules, listErr := dump.Rules(k.nl, unix.AF_INET)
	if listErr != nil {
		return ""
	}
	slices.SortStableFunc(rules, func(a, b netlink.Rule) int { return a.Priority - b.Priority })
	covers := func(n *net.IPNet, a netip.Addr) bool {
		p, ok := prefixOf(n)
		return n == nil || ok && p.Contains(a)
	}
	for _, r := range rules {
		switch refuses := r.Table == 0 && r.Goto < 0; { // it names no table to ask
		case r.Table == unix.RT_TABLE_MAIN:
			return ""
		case !refuses, r.Invert, r.Mark != 0, r.Tos != 0, r.IPProto != 0, r.Sport != nil, r.Dport != nil, r.UIDRange != nil, r.OifName != "",
			r.IifName != "" && r.IifName != in, !covers(r.Src, src), !covers(r.Dst, dst):
			continue
		}
		text := fmt.Sprintf("pref %d", r.Priority)
		if r.Src != nil {
			text += " from " + r.Src.String()
		}
		if r.Dst != nil {
			text += " to " + r.Dst.String()
		}
		if r.IifName != "" {
			text += " iif " + r.IifName
		}
		return text + " " + kind
	}
	return ""
}

// longest finds the entry of the main table that a look-up for dst hits, with its type; it serves to name what the kernel
// refuses without saying by which entry.
func (k *kernelTable) longest(dst netip.Addr) (kind int, text string) {
	routes, err := dump.RoutesLike(k.nl, unix.AF_INET, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return 0, ""
	}
	bits, metric := -1, 0
	for _, r := range routes {
		p := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if r.Dst != nil {
			var ok bool
			if p, ok = prefixOf(r.Dst); !ok {
				continue
			}
		}
		if p.Contains(dst) && (p.Bits() > bits || p.Bits() == bits && r.Priority < metric) {
			bits, metric, kind, text = p.Bits(), r.Priority, r.Type, routeText(r, k.nl)
		}
	}
	return kind, text
}

// linkState says what is wrong with an interface; "" when packets can leave by it. reader is set for a device behind which
// a process has to stand, such as a TUN.
func (k *kernelTable) linkState(name string) (mtu int, wrong string, err error) {
	link, err := k.nl.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return 0, "there is no interface " + name, nil
	}
	if err != nil {
		return 0, "", fmt.Errorf("interface %s: %w", name, err)
	}
	switch a := link.Attrs(); {
	case a.Flags&net.FlagUp == 0:
		return a.MTU, name + " is down", nil
	case a.RawFlags&unix.IFF_LOWER_UP == 0:
		return a.MTU, name + " has no carrier", nil
	default:
		return a.MTU, "", nil
	}
}

func orText(s, other string) string {
	if s == "" {
		return other
	}
	return s
}
