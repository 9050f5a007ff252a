package check

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/agent/netfilter"
	"margay/internal/dump"
)

// protocolIPIP is IP-in-IP's number (IANA).
const protocolIPIP = 4

// protocol4 asks the packet filters in force what they would do with IP-in-IP where the vRouter's packets pass: at the underlay's
// ingress, which comes before its packet socket, and on the way out. What input and prerouting drop it has seen before.
func (n *Node) protocol4() Result {
	const name = "protocol 4"
	rules, err := netfilter.Load("inet " + ownTable)
	if err != nil {
		return unknown(name, err)
	}
	link, self, other := n.ends()
	var doubt *Result
	for _, at := range []struct {
		hook     netfilter.Hook
		in, out  netfilter.Link
		src, dst netip.Addr
	}{
		{netfilter.Ingress, link, netfilter.Link{}, other, self},
		{netfilter.Output, netfilter.Link{}, link, self, other},
		{netfilter.Postrouting, netfilter.Link{}, link, self, other},
		{netfilter.Egress, netfilter.Link{}, link, self, other},
	} {
		p := &netfilter.Packet{IP: outerPacket(at.src, at.dst), In: at.in, Out: at.out, State: netfilter.StateNew, AddrType: addressType}
		switch o := rules.Hook(at.hook, p); {
		case o.Verdict == netfilter.Drop:
			return Result{name, Fail, fmt.Sprintf("IP protocol 4 is dropped by %s", o.Where), o.Fix}
		case o.Verdict == netfilter.CannotTell && doubt == nil:
			doubt = &Result{name, Warn, fmt.Sprintf("IP protocol 4 may be dropped by %s, which depends on what a look at the rules does not tell (%s)", o.Where, o.Why),
				"accept protocol 4 between the nodes before it"}
		}
	}
	if doubt != nil {
		return *doubt
	}
	return ok(name, "no rule of this node's drops it")
}

// ends are the underlay, its address, and one that another node may have.
func (n *Node) ends() (link netfilter.Link, self, other netip.Addr) {
	// Of RFC 2544's range, where there is no underlay to be asked.
	self, other = netip.AddrFrom4([4]byte{198, 18, 0, 1}), netip.AddrFrom4([4]byte{198, 18, 0, 2})
	name := n.Underlay
	if name == "" {
		var err error
		if name, err = defaultInterface(); err != nil {
			return link, self, other
		}
	}
	link.Name = name
	l, err := netlink.LinkByName(name)
	if err != nil {
		return link, self, other
	}
	link.Index, link.Type, link.Group = l.Attrs().Index, unix.ARPHRD_ETHER, l.Attrs().Group
	addrs, err := dump.Addrs(dump.Here, l, unix.AF_INET)
	if err != nil || len(addrs) == 0 {
		return link, self, other
	}
	if a, ok := netip.AddrFromSlice(addrs[0].IP.To4()); ok {
		subnet := netip.PrefixFrom(a, ones(addrs[0].IPNet))
		if self, other = a, a.Next(); !subnet.Contains(other) {
			other = a.Prev()
		}
	}
	return link, self, other
}

// addressType says what an address is to the routing table, as rules ask it.
func addressType(a netip.Addr) (int, error) {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		return 0, fmt.Errorf("no route to %s", a)
	}
	return routes[0].Type, nil
}

// outerPacket is the shortest packet of the tunnel: two headers.
func outerPacket(src, dst netip.Addr) []byte {
	const header = 20
	b := make([]byte, 2*header)
	b[0], b[3], b[8], b[9] = 0x45, 2*header, 64, protocolIPIP
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	b[header], b[header+3], b[header+8], b[header+9] = 0x45, header, 64, unix.IPPROTO_UDP
	return b
}
