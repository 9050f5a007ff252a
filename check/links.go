package check

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
)

// overhead is the outer header's size in bytes (RFC 2003).
const overhead = 20

// foreignTunnel looks for the kernel's own IP-in-IP device in use: it takes packets of protocol 4 as the vRouter does.
func (n *Node) foreignTunnel() Result {
	const name = "other tunnels"
	links, err := dump.Links(dump.Here)
	if err != nil {
		return unknown(name, err)
	}
	if l := tunnelUp(links); l != nil {
		addrs, err := dump.Addrs(dump.Here, l, unix.AF_INET)
		if err != nil {
			return unknown(name, err)
		}
		routes, err := dump.Routes(dump.Here, l, unix.AF_INET)
		if err != nil {
			return unknown(name, err)
		}
		return tunnelTaken(name, l.Attrs().Name, len(addrs), len(routes))
	}
	return ok(name, "no IP-in-IP device of the kernel's is up")
}

// tunnelUp returns an IP-in-IP device of the kernel's that is up, nil if there is none.
func tunnelUp(links []netlink.Link) netlink.Link {
	for _, l := range links {
		if l.Type() == "ipip" && l.Attrs().Flags&net.FlagUp != 0 {
			return l
		}
	}
	return nil
}

func tunnelTaken(name, device string, addresses, routes int) Result {
	return Result{name, Fail, fmt.Sprintf("%s, an IP-in-IP device of the kernel's, is up with %d addresses and %d routes: it takes the same packets as the vRouter", device, addresses, routes),
		"stop what has set it up (Calico, Felix), then: ip link set " + device + " down"}
}

// routeProtocolBIRD marks routes that BIRD has made (rtnetlink's RTPROT_BIRD).
const routeProtocolBIRD = unix.RTPROT_BIRD

// foreignBGP looks for another BGP speaker on the node, or what one has left.
func (n *Node) foreignBGP() Result {
	const name = "other BGP speakers"
	up, err := n.running("bird", "bird6", "bgpd", "gobgpd", "calico-node", "calico-felix", "confd", "kube-router", "cilium-agent")
	if err != nil {
		return unknown(name, err)
	}
	owner, err := n.listens(179)
	if err != nil {
		return unknown(name, err)
	}
	routes, err := dump.RoutesLike(dump.Here, unix.AF_INET, &netlink.Route{Protocol: routeProtocolBIRD}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return unknown(name, err)
	}
	switch {
	case owner && !n.Agent:
		return Result{name, Fail, "TCP port 179 is taken and margay-agent does not run" + listed(up),
			"stop the other speaker, or give margay-agent another --bgp-port on every node"}
	case len(routes) > 0:
		return Result{name, Warn, fmt.Sprintf("%d routes of BIRD's in the kernel, %s among them%s", len(routes), destination(routes[0]), listed(up)),
			"stop BIRD (calico-node), and flush what is left: ip route flush proto bird"}
	case len(up) > 0:
		return Result{name, Warn, strings.Join(up, ", ") + " run on this machine", "stop them, unless they are another network's: two owners of the pods' routes remove each other's"}
	}
	return ok(name, "none")
}

func listed(up []string) string {
	if len(up) == 0 {
		return ""
	}
	return "; " + strings.Join(up, ", ") + " run"
}

func destination(r netlink.Route) string {
	if r.Dst == nil {
		return "default"
	}
	return r.Dst.String()
}

// listens reports whether a TCP socket of this network namespace listens on port.
func (n *Node) listens(port uint16) (bool, error) {
	// Each line: number, local address:port, remote address:port, state (0A: listening), … all in hexadecimal.
	for _, file := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
		b, err := os.ReadFile(n.path(file))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, err
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 4 || f[3] != "0A" {
				continue
			}
			_, p, _ := strings.Cut(f[1], ":")
			if v, err := strconv.ParseUint(p, 16, 16); err == nil && uint16(v) == port {
				return true, nil
			}
		}
	}
	return false, nil
}

// mtu compares the underlay's, vr0's and the pods'.
func (n *Node) mtu() Result {
	const name = "MTU"
	underlay := n.Underlay
	if underlay == "" {
		var err error
		if underlay, err = defaultInterface(); err != nil {
			r := unknown(name, err)
			r.Do = "name the interface to the other nodes with --underlay"
			return r
		}
	}
	under, err := netlink.LinkByName(underlay)
	if err != nil {
		return unknown(name, fmt.Errorf("interface %s: %w", underlay, err))
	}
	room := under.Attrs().MTU - overhead
	vr, err := netlink.LinkByName(n.Tunnel)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return ok(name, "%s has %d: %s and the pods will get %d; %s is not there yet", underlay, under.Attrs().MTU, n.Tunnel, room, n.Tunnel)
	}
	if err != nil {
		return unknown(name, err)
	}
	if got := vr.Attrs().MTU; got > room {
		return Result{name, Fail, fmt.Sprintf("%s has %d, which leaves %d for packets in the tunnel, and %s has %d: longer packets are lost", underlay, under.Attrs().MTU, room, n.Tunnel, got),
			fmt.Sprintf("leave %s to margay-agent (restart it), or: ip link set %s mtu %d", n.Tunnel, n.Tunnel, room)}
	}
	links, err := dump.Links(dump.Here)
	if err != nil {
		return unknown(name, err)
	}
	var large []string
	pods := 0
	for _, l := range links {
		a := l.Attrs()
		if !strings.HasPrefix(a.Name, "cali") || l.Type() != "veth" {
			continue
		}
		pods++
		if a.MTU > vr.Attrs().MTU {
			large = append(large, fmt.Sprintf("%s (%d)", a.Name, a.MTU))
		}
	}
	if len(large) > 0 {
		return Result{name, Warn, fmt.Sprintf("%d of %d pods have more than %s's %d, %s among them: their long packets are answered with ICMP, and lost where that is filtered", len(large), pods, n.Tunnel, vr.Attrs().MTU, large[0]),
			"restart those pods: a pod keeps the MTU of the time it was made"}
	}
	return ok(name, "%s %d, %s %d, %d pods no larger", underlay, under.Attrs().MTU, n.Tunnel, vr.Attrs().MTU, pods)
}

// defaultInterface returns that of the IPv4 default route.
func defaultInterface() (string, error) {
	routes, err := dump.RoutesLike(dump.Here, unix.AF_INET, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return "", err
	}
	for _, r := range routes {
		if (r.Dst == nil || r.Dst.IP.IsUnspecified() && ones(r.Dst) == 0) && r.LinkIndex > 0 {
			l, err := netlink.LinkByIndex(r.LinkIndex)
			if err != nil {
				return "", err
			}
			return l.Attrs().Name, nil
		}
	}
	return "", errors.New("there is no default route, and margay-agent does not say which interface leads to the other nodes")
}

func ones(n *net.IPNet) int {
	bits, _ := n.Mask.Size()
	return bits
}
