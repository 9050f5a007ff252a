package port

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// Why the programs leave a packet alone. What they ask of their maps is asked of the same maps here, in the same order; that
// the answers are the same is what TestShortcutDeparts and TestShortcutArrives hold this to.

// HasPrograms implements vrouter.Programs.
func (d *Direct) HasPrograms() bool { return d.pods.plan != nil }

// LeavesAlone implements vrouter.Programs.
func (d *Direct) LeavesAlone(direction vrouter.Direction, b []byte) string {
	if direction == vrouter.Decap {
		return d.pods.plan.leavesArriving(b)
	}
	return d.pods.plan.leavesDeparting(b)
}

// leavesDeparting says why depart leaves a pod's packet alone, "" if it does not.
func (p *shortcutPlan) leavesDeparting(b []byte) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return "the vRouter stops"
	}
	v, why := plainHeader(b)
	if why == "" {
		why = p.leavesFlow(v)
	}
	if why != "" {
		return why
	}
	hop, known := p.hopOfAddress(v.Dst())
	pod, isPod := p.hopOfAddress(v.Src())
	clamped := hop.flags&hopClamp != 0 && v.Protocol() == packet.ProtocolTCP
	switch {
	case atomic.LoadUint32(&p.rule.off) != 0:
		return "a capture runs, which has to see it"
	case !isPod || pod.flags&hopPod == 0:
		return fmt.Sprintf("%s is the address of no pod whose interface they are at", v.Src())
	case !known:
		return fmt.Sprintf("for them there is no one way to %s: a route that leads elsewhere or by several gateways, or none", v.Dst())
	case hop.flags&hopSend == 0:
		return "they do not know the hardware address of the next hop yet"
	case clamped && (len(v.Payload()) <= tcpFlagsAt || v.Payload()[tcpFlagsAt]&tcpFlagSYN != 0):
		return "it opens a TCP connection, whose MSS is to be clamped"
	}
	return leavesInner(v, hop)
}

// leavesArriving says why arrive leaves a packet from the underlay alone, "" if it does not.
func (p *shortcutPlan) leavesArriving(b []byte) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return "the vRouter stops"
	}
	outer, why := plainHeader(b)
	switch {
	case why != "":
		return "of the outer header, " + why
	case atomic.LoadUint32(&p.rule.arrive) == 0:
		return "they are not at the underlay's interface"
	case atomic.LoadUint32(&p.rule.off) != 0:
		return "a capture runs, which has to see it"
	case outer.Protocol() != packet.ProtocolIPIP || rawAddress(outer.Dst()) != atomic.LoadUint32(&p.rule.address):
		return "it is no IP-in-IP for this node"
	}
	v, why := plainHeader(outer.Payload())
	if why != "" {
		return why
	}
	differs := outer.TOS() ^ v.TOS()
	switch {
	case differs&3 != 0 && outer.TOS()&3 != 0:
		return "its ECN field is to be changed"
	case differs&^3 != 0 && atomic.LoadUint32(&p.rule.uniform) != 0:
		return "its DSCP is to be changed"
	}
	if why := p.leavesFlow(v); why != "" {
		return why
	}
	back, _ := p.hopOfAddress(v.Src())
	hop, _ := p.hopOfAddress(v.Dst())
	switch {
	case back.flags&hopNode == 0 || back.gateway != rawAddress(outer.Src()):
		return fmt.Sprintf("for them the one way back to %s does not lead to %s", v.Src(), outer.Src())
	case hop.flags&hopLocal == 0:
		return fmt.Sprintf("%s is no pod whose interface they are at", v.Dst())
	}
	return leavesInner(v, hop)
}

// plainHeader reads a header as the programs do; why says what about it they leave alone.
func plainHeader(b []byte) (v packet.IPv4, why string) {
	v, fault := packet.ParseIPv4(b)
	switch {
	case fault != packet.FaultNone || len(v) != len(b):
		return v, "its header is not right"
	case v.HeaderLen() != packet.IPv4MinLen:
		return v, "it has IP options"
	case v.IsFragment():
		return v, "it is a fragment"
	}
	return v, ""
}

// leavesFlow is about what the kernel may have rewritten.
func (p *shortcutPlan) leavesFlow(v packet.IPv4) string {
	up := v.Payload()
	switch protocol := int32(v.Protocol()); {
	case protocol == unix.IPPROTO_ICMP && (len(up) == 0 || slices.Contains(icmpErrors, int32(up[0]))):
		return "it is an ICMP error"
	case slices.Contains(portProtocols, protocol):
		if len(up) < 4 {
			return "it has no ports"
		}
		key := vrouter.Flow{Source: netip.AddrPortFrom(v.Src(), binary.BigEndian.Uint16(up)),
			Destination: netip.AddrPortFrom(v.Dst(), binary.BigEndian.Uint16(up[2:])), Protocol: v.Protocol()}.Key()
		var is uint32
		if p.steering.flows.Lookup(key[:], &is) == nil {
			return "the kernel has a part in its flow"
		}
	}
	return ""
}

// leavesInner is about what is on its way to a hop.
func leavesInner(v packet.IPv4, hop tcHop) string {
	switch {
	case v.Protocol() == packet.ProtocolIPIP || v.Protocol() == packet.ProtocolIPv6:
		return "it is a tunnel's"
	case v.TTL() <= 1:
		return "its time to live ends here"
	case v.TotalLen() > int(hop.mtu):
		return fmt.Sprintf("its %d bytes do not fit the MTU %d", v.TotalLen(), hop.mtu)
	}
	return ""
}

// hopOfAddress returns the hop that the programs find for an address; false if they find none. p.mu is held.
func (p *shortcutPlan) hopOfAddress(a netip.Addr) (tcHop, bool) {
	key := make([]byte, 8)
	binary.NativeEndian.PutUint32(key, 32)
	copy(key[4:], a.AsSlice())
	var way uint32
	if p.steering.owned.Lookup(key, &way) != nil || way == 0 {
		return tcHop{}, false
	}
	number := atomic.LoadUint32(&p.turn[2*way])
	return p.store[number], number != 0
}
