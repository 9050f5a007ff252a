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

// Why the programs leave a packet alone, or to the kernel. What they ask of their maps is asked of the same maps here, in the same
// order; that the answers are the same is what TestShortcutDeparts, TestShortcutArrives and TestClassify hold this to.

// Taken implements vrouter.Steering.
func (d *Direct) Taken() *vrouter.Pods { return d.next.Load().pods }

// LeavesToKernel implements vrouter.Steering.
func (d *Direct) LeavesToKernel(b []byte) string {
	p := d.pods
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.freed {
		return "the vRouter stops"
	}
	return p.steering.leaves(b)
}

// leaves says why classify leaves the packet of a pod whose interface is taken to the kernel, "" if it does not.
func (s *steering) leaves(b []byte) string {
	v, fault := packet.ParseIPv4(b)
	if fault != packet.FaultNone {
		return "" // the ladder says what is wrong with it
	}
	_, why := plainHeader(v)
	if why == "" {
		why = s.leavesFlow(v)
	}
	if why != "" {
		return why
	}
	if _, owned := s.wayTo(v.Dst()); !owned {
		return fmt.Sprintf("no tunnel leads to %s, and it is no pod of this node whose interface the vRouter has", v.Dst())
	}
	return ""
}

// wayTo returns the way that owned has for an address; false if it is not owned.
func (s *steering) wayTo(a netip.Addr) (way uint32, owned bool) {
	key := make([]byte, 8)
	binary.NativeEndian.PutUint32(key, 32)
	copy(key[4:], a.AsSlice())
	err := s.owned.Lookup(key, &way)
	return way, err == nil
}

// HasPrograms implements vrouter.Programs.
func (d *Direct) HasPrograms() bool { return d.pods.plan != nil }

// LeavesAlone implements vrouter.Programs.
func (d *Direct) LeavesAlone(direction vrouter.Direction, b []byte) (why string, inside bool) {
	if direction == vrouter.Decap {
		return d.pods.plan.leavesArriving(b)
	}
	return d.pods.plan.leavesDeparting(b)
}

// leavesDeparting says why depart leaves a pod's packet alone, "" if it does not; inside, that the pod that it is for gets it on
// its own side.
func (p *shortcutPlan) leavesDeparting(b []byte) (why string, inside bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return "the vRouter stops", false
	}
	v, why := plainHeader(b)
	if why == "" {
		why = p.steering.leavesFlow(v)
	}
	if why != "" {
		return why, false
	}
	hop, known := p.hopOfAddress(v.Dst())
	pod, isPod := p.hopOfAddress(v.Src())
	clamped := hop.flags&hopClamp != 0 && v.Protocol() == packet.ProtocolTCP
	switch {
	case atomic.LoadUint32(&p.rule.off) != 0:
		return "a capture runs, which has to see it", false
	case !isPod || pod.flags&hopPod == 0:
		return fmt.Sprintf("%s is the address of no pod whose interface they are at", v.Src()), false
	case !known:
		return fmt.Sprintf("for them there is no one way to %s: a route that leads elsewhere or by several gateways, or none", v.Dst()), false
	case hop.flags&hopSend == 0:
		return "they do not know the hardware address of the next hop yet", false
	case clamped && (len(v.Payload()) <= tcpFlagsAt || v.Payload()[tcpFlagsAt]&tcpFlagSYN != 0):
		return "it opens a TCP connection, whose MSS is to be clamped", false
	}
	return leavesInner(v, hop), hop.flags&hopPeer != 0
}

// leavesArriving is leavesDeparting for arrive, and a packet from the underlay.
func (p *shortcutPlan) leavesArriving(b []byte) (why string, inside bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return "the vRouter stops", false
	}
	outer, why := plainHeader(b)
	switch {
	case why != "":
		return "of the outer header, " + why, false
	case atomic.LoadUint32(&p.rule.arrive) == 0:
		return "they are not at the underlay's interface", false
	case atomic.LoadUint32(&p.rule.off) != 0:
		return "a capture runs, which has to see it", false
	case outer.Protocol() != packet.ProtocolIPIP || rawAddress(outer.Dst()) != atomic.LoadUint32(&p.rule.address):
		return "it is no IP-in-IP for this node", false
	}
	v, why := plainHeader(outer.Payload())
	if why != "" {
		return why, false
	}
	differs := outer.TOS() ^ v.TOS()
	switch {
	case differs&3 != 0 && outer.TOS()&3 != 0:
		return "its ECN field is to be changed", false
	case differs&^3 != 0 && atomic.LoadUint32(&p.rule.uniform) != 0:
		return "its DSCP is to be changed", false
	}
	if why := p.steering.leavesFlow(v); why != "" {
		return why, false
	}
	back, _ := p.hopOfAddress(v.Src())
	hop, _ := p.hopOfAddress(v.Dst())
	switch {
	case back.flags&hopNode == 0 || back.gateway != rawAddress(outer.Src()):
		return fmt.Sprintf("for them the one way back to %s does not lead to %s", v.Src(), outer.Src()), false
	case hop.flags&hopLocal == 0:
		return fmt.Sprintf("%s is no pod whose interface they are at", v.Dst()), false
	}
	return leavesInner(v, hop), hop.flags&hopPeer != 0
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
func (s *steering) leavesFlow(v packet.IPv4) string {
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
		if s.flows.Lookup(key[:], &is) == nil {
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
	way, owned := p.steering.wayTo(a)
	if !owned || way == 0 {
		return tcHop{}, false
	}
	number := atomic.LoadUint32(&p.turn[2*way])
	return p.store[number], number != 0
}
