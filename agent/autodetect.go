package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"sort"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
)

// Underlay is the interface that carries tunnelled packets between the nodes.
type Underlay struct {
	Interface string
	Prefix    netip.Prefix // the node's address with its subnet's length
	MTU       int          // bytes
}

// ignoredInterfaces are never a node's own address under first-found: our devices, other networks' tunnels and
// container bridges (Calico's list, with vr0 added).
var ignoredInterfaces = regexp.MustCompile(`^(lo|vr[0-9]+|cali.*|tunl.*|docker.*|cbr.*|dummy.*|virbr.*|lxcbr.*|veth.*|podman.*|cni.*|flannel.*|vxlan\.calico|wireguard\.cali|kube-ipvs0|nodelocaldns)$`)

// candidate is one IPv4 address of one interface, as the kernel lists them.
type candidate struct {
	name   string
	index  int
	mtu    int
	up     bool
	prefix netip.Prefix
}

// DetectUnderlay finds the node's address by method: "first-found" (the first usable interface in the kernel's order),
// "interface=REGEXP[,REGEXP…]", "can-reach=ADDRESS" (the source the kernel would use), or "cidr=PREFIX[,PREFIX…]".
// These are the words of Calico's IP_AUTODETECTION_METHOD.
func DetectUnderlay(method string) (Underlay, error) {
	cands, err := listCandidates()
	if err != nil {
		return Underlay{}, err
	}
	var source netip.Addr
	if target, ok := strings.CutPrefix(method, "can-reach="); ok {
		if source, err = sourceToward(target); err != nil {
			return Underlay{}, err
		}
	}
	return choose(method, cands, source)
}

// choose applies an autodetection method to the candidates; source is the kernel's answer for can-reach.
func choose(method string, cands []candidate, source netip.Addr) (Underlay, error) {
	match, err := matcher(method, source)
	if err != nil {
		return Underlay{}, err
	}
	sort.SliceStable(cands, func(i, j int) bool { return cands[i].index < cands[j].index })
	for _, c := range cands {
		a := c.prefix.Addr()
		if c.up && !a.IsLoopback() && !a.IsLinkLocalUnicast() && match(c) {
			return Underlay{Interface: c.name, Prefix: c.prefix, MTU: c.mtu}, nil
		}
	}
	return Underlay{}, fmt.Errorf("ip autodetection method %q: no interface that is up has a matching IPv4 address", method)
}

func matcher(method string, source netip.Addr) (func(candidate) bool, error) {
	kind, arg, _ := strings.Cut(method, "=")
	switch kind {
	case "", "first-found":
		return func(c candidate) bool { return !ignoredInterfaces.MatchString(c.name) }, nil
	case "interface":
		var res []*regexp.Regexp
		for _, s := range strings.Split(arg, ",") {
			re, err := regexp.Compile("^(?:" + s + ")$")
			if err != nil || s == "" {
				return nil, fmt.Errorf("ip autodetection method %q: expected interface=REGEXP", method)
			}
			res = append(res, re)
		}
		return func(c candidate) bool {
			for _, re := range res {
				if re.MatchString(c.name) {
					return true
				}
			}
			return false
		}, nil
	case "can-reach":
		return func(c candidate) bool { return c.prefix.Addr() == source }, nil
	case "cidr":
		var prefixes []netip.Prefix
		for _, s := range strings.Split(arg, ",") {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				return nil, fmt.Errorf("ip autodetection method %q: expected cidr=PREFIX, such as cidr=192.0.2.0/24", method)
			}
			prefixes = append(prefixes, p)
		}
		return func(c candidate) bool {
			for _, p := range prefixes {
				if p.Contains(c.prefix.Addr()) {
					return true
				}
			}
			return false
		}, nil
	}
	return nil, fmt.Errorf("ip autodetection method %q: expected first-found, interface=REGEXP, can-reach=ADDRESS or cidr=PREFIX", method)
}

func listCandidates() ([]candidate, error) {
	links, err := dump.Links(dump.Here)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var out []candidate
	for _, l := range links {
		attrs := l.Attrs()
		addrs, err := dump.Addrs(dump.Here, l, unix.AF_INET)
		if err != nil {
			if errors.As(err, new(netlink.LinkNotFoundError)) {
				continue
			}
			return nil, fmt.Errorf("list addresses of %s: %w", attrs.Name, err)
		}
		for _, a := range addrs {
			p, ok := prefixOf(a.IPNet)
			if !ok || a.Flags&unix.IFA_F_SECONDARY != 0 {
				continue
			}
			out = append(out, candidate{name: attrs.Name, index: attrs.Index, mtu: attrs.MTU,
				up: attrs.Flags&net.FlagUp != 0, prefix: p})
		}
	}
	return out, nil
}

// sourceToward asks the kernel which of this node's addresses it would use toward target, a literal address or a name.
func sourceToward(target string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(target)
	if err != nil {
		ips, lookErr := net.LookupIP(target)
		if lookErr != nil || len(ips) == 0 {
			return netip.Addr{}, fmt.Errorf("ip autodetection method can-reach=%s: expected an address or a name that resolves", target)
		}
		ip, _ = netip.AddrFromSlice(ips[0])
		ip = ip.Unmap()
	}
	routes, err := netlink.RouteGet(ip.AsSlice())
	if err != nil || len(routes) == 0 {
		return netip.Addr{}, fmt.Errorf("ip autodetection method can-reach=%s: the kernel has no route to it", target)
	}
	src, ok := netip.AddrFromSlice(routes[0].Src)
	if !ok {
		return netip.Addr{}, fmt.Errorf("ip autodetection method can-reach=%s: the kernel names no source address", target)
	}
	return src.Unmap(), nil
}

// prefixOf converts the library's network form; false for anything that is not an IPv4 or IPv6 prefix.
func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	bits, size := n.Mask.Size()
	if size == 0 {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a.Unmap(), bits), true
}

// ipNet is prefixOf's inverse.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
