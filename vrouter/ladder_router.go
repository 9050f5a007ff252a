package vrouter

import (
	"margay/vrouter/fib"
	"margay/vrouter/packet"
)

// The rungs that the vRouter adds where it is the router (RFC 1812): in the attachment `direct`, for what pods send and
// for what comes out of the tunnel to them. Where the kernel routes to vr0, the kernel has done all this.

// admit is what a router asks of a packet with a valid header before it looks for a way:
//
//	1 a source that can be a host's (RFC 1812, 5.3.7)
//	2 a destination that can be a host's; no multicast and no broadcast, which nobody here routes
//	3 options that are well formed and no source route (RFC 1812, 5.2.4; RFC 7126)
func (v *view) admit(inner packet.IPv4) Reason {
	if !packet.Unicast(inner.SrcU32()) {
		return ReasonMartianSource
	}
	if dst := inner.DstU32(); !packet.Unicast(dst) {
		if first := dst >> 24; first >= 224 && first < 240 || dst == ^uint32(0) {
			return ReasonMulticast
		}
		return ReasonMartianDestination
	}
	if inner.HeaderLen() > packet.IPv4MinLen {
		switch _, fault := packet.CheckOptions(inner); fault {
		case packet.FaultNone:
		case packet.FaultSourceRoute:
			return ReasonSourceRoute
		default:
			return ReasonBadOptions
		}
	}
	return ReasonNotSet
}

// encapTransit is encap for the router: the packet has to live longer than this hop, and is one hop older then. The
// order is the kernel's: no way, no time, no room; what an ICMP error quotes has the TTL with which it came.
func (v *view) encapTransit(p *Packet, inner packet.IPv4, hop fib.Hop, o *packet.Outer) (Verdict, Reason) {
	if hop.Kind() == fib.KindTunnel && inner.TTL() <= 1 {
		return VerdictDrop, ReasonTTLExpired
	}
	verdict, reason := v.encap(p, inner, hop, o)
	if verdict != VerdictDrop {
		packet.DecrementTTL(inner)
	}
	return verdict, reason
}

// transit is what the router does with a packet for an interface of this node that carries mtu bytes: TTL, and size. A
// packet to split is already one hop older.
func (v *view) transit(p *Packet, inner packet.IPv4, mtu int) (Verdict, Reason) {
	if inner.TTL() <= 1 {
		return VerdictDrop, ReasonTTLExpired
	}
	length, _, reason := wireSize(inner, &p.Offload)
	if reason != ReasonNotSet {
		return VerdictDrop, reason
	}
	verdict := VerdictForward
	if length > mtu {
		if inner.DF() {
			return VerdictDrop, ReasonPacketTooBig
		}
		verdict, reason = VerdictSplit, ReasonPacketTooBig
	}
	packet.DecrementTTL(inner)
	return verdict, reason
}
