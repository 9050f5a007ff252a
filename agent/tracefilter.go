package agent

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/agent/netfilter"
	"margay/vrouter/packet"
	"margay/vrouter/rpc"
)

// filters are the packet filters of one network namespace, the node's or a pod's, as a trace asks them.
type filters struct {
	rules *netfilter.Ruleset
	pkt   netfilter.Packet
	nl    *netlink.Handle
}

// loadFilters reads the filters of the calling thread's namespace. Margay's own table is left out: the rungs that are about
// anti-spoofing and masquerade ask it by themselves. state and reply are what the connection tracker there takes the packet for.
func loadFilters(nl *netlink.Handle, state uint32, reply bool) (*filters, error) {
	rules, err := netfilter.Load("inet margay")
	if err != nil {
		return nil, err
	}
	f := &filters{rules: rules, nl: nl}
	f.pkt.AddrType = f.kindOf
	f.pkt.State, f.pkt.Reply = state, reply
	return f, nil
}

// kindOf says what an address is to this namespace.
func (f *filters) kindOf(a netip.Addr) (int, error) {
	routes, err := f.nl.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		return 0, fmt.Errorf("no route to %s", a)
	}
	return routes[0].Type, nil
}

// link describes an interface to the rules; none for the empty name.
func (f *filters) link(name string) netfilter.Link {
	if name == "" {
		return netfilter.Link{}
	}
	l, err := f.nl.LinkByName(name)
	if err != nil {
		return netfilter.Link{Name: name}
	}
	kinds := map[string]uint16{"loopback": unix.ARPHRD_LOOPBACK, "none": unix.ARPHRD_NONE}
	kind, ok := kinds[l.Attrs().EncapType]
	if !ok {
		kind = unix.ARPHRD_ETHER
	}
	return netfilter.Link{Name: name, Index: l.Attrs().Index, Type: kind, Group: l.Attrs().Group}
}

// filtered carries the packet through the filters of a hook; by and place say whose they are, in and out are interfaces, where
// there are any. It is false when the packet ends there.
func (t *tracer) filtered(f *filters, by, place string, h netfilter.Hook, in, out string) bool {
	f.pkt.In, f.pkt.Out = f.link(in), f.link(out)
	f.pkt.IP = slices.Clone(t.pkt)
	o := f.rules.Hook(h, &f.pkt)
	name := fmt.Sprintf("packet filter, %s%s", h, place)
	switch o.Verdict {
	case netfilter.Drop:
		t.drop(by, name, "filtered", "it is dropped by "+o.Where, o.Fix)
		return false
	case netfilter.CannotTell:
		t.doubt(by, name, "filter", "it may be dropped by "+o.Where+", which depends on what a trace does not know ("+o.Why+")",
			"find out with --probe, which sends a real packet")
	default:
		if n := f.rules.Chains(h); n > 0 {
			t.pass(by, name, fmt.Sprintf("%d chains of other software let it pass", n))
		}
	}
	t.pkt = packet.IPv4(f.pkt.IP)
	switch {
	case o.Destination.IsValid():
		t.pass(by, "destination rewritten", fmt.Sprintf("to %s, by %s", o.Destination, o.Rewriter))
	case o.Source.IsValid():
		t.pass(by, "source rewritten", fmt.Sprintf("to %s, by %s", o.Source, o.Rewriter))
	case o.Masqueraded:
		if t.masquerade(f.nl, out) {
			t.pass(by, "source rewritten", fmt.Sprintf("to %s, by %s", t.pkt.Src(), o.Rewriter))
		}
	case o.Redirected:
		t.pass(by, "destination rewritten", "to this host itself, by "+o.Rewriter)
		t.redirected = true
	}
	return true
}

// masquerade gives the packet the source that a packet of the namespace's own would have that leaves by out. It is false where
// there is none.
func (t *tracer) masquerade(nl *netlink.Handle, out string) bool {
	routes, err := nl.RouteGetWithOptions(t.pkt.Dst().AsSlice(), &netlink.RouteGetOptions{Oif: out})
	if err != nil || len(routes) == 0 {
		return false
	}
	source, ok := netip.AddrFromSlice(routes[0].Src)
	if ok {
		t.pkt = withSource(t.pkt, source.Unmap())
	}
	return ok
}

// nodeFilters are this node's own. They are read once for a trace; nil, with the trace ended, where they cannot be.
func (t *tracer) nodeFilters() *filters {
	if t.node != nil {
		return t.node
	}
	state, reply := tracked(t.pkt, t.state, t.question)
	f, err := loadFilters(t.kernel.nl, state, reply)
	if err != nil {
		t.unknown("kernel", "packet filter", err)
		return nil
	}
	t.node = f
	return f
}

// nodeHook asks the node's filters at a hook.
func (t *tracer) nodeHook(h netfilter.Hook, in, out string) bool {
	f := t.nodeFilters()
	return f != nil && t.filtered(f, "kernel", "", h, in, out)
}

// atInterface asks the filters at an interface that the vRouter itself reads (h is Ingress) or sends by (Egress). By AF_XDP
// packets pass beside them; where it is not known whether by that, they leave a doubt.
func (t *tracer) atInterface(h netfilter.Hook, device string) bool {
	in, out := device, ""
	if h == netfilter.Egress {
		in, out = "", device
	}
	st, _ := t.plane.status()
	switch {
	case st.IO == rpc.IOXDP && device == t.underlayName():
		return true
	case st.IO == rpc.IOXDP, st.IO == "": // some pods' interfaces may not be had by AF_XDP; an older vRouter does not tell
	default:
		return t.nodeHook(h, in, out)
	}
	f := t.nodeFilters()
	if f == nil {
		return false
	}
	if o := f.look(t, h, in, out); o.Verdict != netfilter.Pass {
		t.doubt("kernel", "packet filter, "+h.String(), "filter", fmt.Sprintf("it may be dropped by %s, unless the vRouter has %s by AF_XDP, and it does not tell", o.Where, device),
			"find out with --probe, or upgrade the vRouter, if it is an older one")
	}
	return true
}

// look asks the filters of a hook about the packet, and changes nothing about it.
func (f *filters) look(t *tracer, h netfilter.Hook, in, out string) netfilter.Outcome {
	p := f.pkt
	p.In, p.Out, p.IP = f.link(in), f.link(out), slices.Clone(t.pkt)
	return f.rules.Hook(h, &p)
}

// outerFilters are the filters that a packet of the vRouter's own meets. It leaves by a packet socket, which none but those at
// the interface's egress see, or, until the next hop's hardware address is known, by a raw one, which all see.
func (t *tracer) outerFilters(device string, resolved bool) bool {
	if st, _ := t.plane.status(); st.IO == rpc.IOXDP {
		return true
	}
	if !resolved {
		return t.nodeHook(netfilter.Output, "", device) && t.nodeHook(netfilter.Postrouting, "", device) && t.nodeHook(netfilter.Egress, "", device)
	}
	f := t.nodeFilters()
	if f == nil {
		return false
	}
	for _, h := range []netfilter.Hook{netfilter.Output, netfilter.Postrouting} {
		if o := f.look(t, h, "", device); o.Verdict != netfilter.Pass {
			t.caveat("%s: %s would drop IP-in-IP: a packet socket gets past it, and the first packet after a neighbour has been lost does not", t.cfg.Node, o.Where)
			break
		}
	}
	return t.atInterface(netfilter.Egress, device)
}
