package vrouter

import (
	"margay/vrouter/fib"
	"margay/vrouter/packet"
)

// Verdict is what a ladder decides about a packet. The zero verdict is drop.
type Verdict uint8

// The verdicts.
const (
	VerdictDrop    Verdict = iota // count it under its reason
	VerdictForward                // send it, as it now is, on the ladder's other port
)

// Direction says which ladder a worker walks.
type Direction uint8

// The directions.
const (
	Encap Direction = iota // from vr0 to the underlay: push the outer header
	Decap                  // from the underlay to vr0: pop it
)

// String returns "encap" or "decap".
func (d Direction) String() string {
	if d == Decap {
		return "decap"
	}
	return "encap"
}

// outerTTL is the TTL of the outer header (RFC 2003, 3.1: enough to reach the tunnel's far end).
const outerTTL = 64

const (
	protoIPIP = 4
	protoIPv6 = 41
)

// view is everything a ladder decides by, loaded once for a batch and immutable.
type view struct {
	routes *fib.Snapshot
	state  *state
}

// encap decides about a packet that the kernel routed to vr0, and pushes the outer header:
//
//	1 this node is configured
//	2 an IPv4 packet with a valid header
//	3 the longest match for its destination is a tunnel to another node
//	4 it fits
//	5 push (RFC 2003, 3.1; RFC 6040, 4.1)
//
// o is scratch that the caller keeps; its ID goes on from packet to packet.
func (v *view) encap(p *Packet, o *packet.Outer) (Verdict, Reason) {
	if !v.state.configured {
		return VerdictDrop, ReasonNotConfigured
	}
	b := p.Bytes()
	if len(b) == 0 || b[0]>>4 != 4 {
		return VerdictDrop, ReasonNotIPv4
	}
	inner, fault := packet.ParseIPv4(b)
	if fault != 0 {
		if fault == packet.FaultChecksum {
			return VerdictDrop, ReasonBadChecksum
		}
		return VerdictDrop, ReasonMalformed
	}
	hop, ok := v.routes.Lookup(inner.Dst())
	if !ok {
		return VerdictDrop, ReasonNoRoute
	}
	switch hop.Kind {
	case fib.KindTunnel:
	case fib.KindLocal:
		return VerdictDrop, ReasonNoPod
	case fib.KindDirect:
		return VerdictDrop, ReasonDirectRoute
	default:
		return VerdictDrop, ReasonBlackhole
	}
	if !hop.Gateway.Is4() {
		return VerdictDrop, ReasonGatewayNotIPv4
	}
	if hop.Gateway == v.state.config.NodeAddress {
		return VerdictDrop, ReasonGatewaySelf
	}
	length, segments, reason := wireSize(inner, &p.Offload)
	if reason != ReasonNotSet {
		return VerdictDrop, reason
	}
	// vr0's MTU keeps such packets away, and answers them; one that slips in while the MTU changes ends here.
	if length > v.state.config.MTU {
		return VerdictDrop, ReasonPacketTooBig
	}
	o.Src, o.Dst, o.TTL = v.state.source, hop.Gateway.As4(), outerTTL
	o.ID++
	out, fault := packet.PushIPIP(p.Buf[:p.Off+len(inner)], p.Off, o)
	if fault != 0 {
		return VerdictDrop, ReasonPacketTooBig
	}
	// Each segment will count the identification up, as whoever splits does (RFC 6864: they must differ).
	o.ID += uint16(segments - 1)
	grown := len(out) - len(inner)
	p.Off -= grown
	p.Len = len(out)
	p.Offload.ChecksumStart += uint16(grown)
	return VerdictForward, ReasonNotSet
}

// wireSize returns the length of the longest packet that inner becomes on the wire, and how many it becomes: itself, or
// the segments of a superpacket.
func wireSize(inner packet.IPv4, o *Offload) (length, segments int, reason Reason) {
	switch o.Segmentation {
	case SegmentNone:
		return len(inner), 1, ReasonNotSet
	case SegmentTCPv4, SegmentUDP:
		headers, fault := packet.SegmentHeaders(inner, o.Protocol(), int(o.Size))
		if fault != packet.FaultNone {
			return 0, 0, ReasonMalformed
		}
		size, payload := int(o.Size), len(inner)-headers
		return headers + min(size, payload), max(1, (payload+size-1)/size), ReasonNotSet
	}
	return 0, 0, ReasonOffloadUnsupported
}

// decap decides about a packet of protocol 4 from the underlay, and takes the outer header away. It is no open door:
//
//	1 this node is configured
//	2 a valid outer header, of protocol 4, for this node, whole
//	3 from a node of this cluster
//	4 pop (RFC 2003, 3.6; RFC 6040, 4.2), a valid inner header, no tunnel within the tunnel
//	5 the route back to the inner source leads to the node that sent it
//	6 the inner destination is this node's
func (v *view) decap(p *Packet) (Verdict, Reason) {
	if !v.state.configured {
		return VerdictDrop, ReasonNotConfigured
	}
	if p.Offload.Segmentation == SegmentUnsupported {
		return VerdictDrop, ReasonOffloadUnsupported
	}
	outer, fault := packet.ParseIPv4(p.Bytes())
	if fault != 0 || outer.Protocol() != protoIPIP {
		return VerdictDrop, ReasonOuterMalformed
	}
	source := outer.Src()
	if outer.Dst() != v.state.config.NodeAddress {
		return VerdictDrop, ReasonOuterNotForUs
	}
	if outer.IsFragment() {
		return VerdictDrop, ReasonOuterFragment
	}
	if source == v.state.config.NodeAddress || !v.state.isNode(source) {
		return VerdictDrop, ReasonOuterSourceNode
	}
	inner, fault := packet.PopIPIP(outer)
	if fault != 0 {
		if fault == packet.FaultECN {
			return VerdictDrop, ReasonECNIllegal
		}
		return VerdictDrop, ReasonInnerMalformed
	}
	if proto := inner.Protocol(); proto == protoIPIP || proto == protoIPv6 {
		return VerdictDrop, ReasonNestedTunnel
	}
	back, ok := v.routes.Lookup(inner.Src())
	if !ok || back.Gateway != source || (back.Kind != fib.KindTunnel && back.Kind != fib.KindDirect) {
		return VerdictDrop, ReasonInnerSource
	}
	if here, ok := v.routes.Lookup(inner.Dst()); !ok || here.Kind != fib.KindLocal {
		return VerdictDrop, ReasonInnerDestination
	}
	shrunk := outer.HeaderLen()
	if p.Offload.NeedsChecksum {
		if int(p.Offload.ChecksumStart) < shrunk {
			return VerdictDrop, ReasonInnerMalformed
		}
		p.Offload.ChecksumStart -= uint16(shrunk)
	}
	p.Off += shrunk
	p.Len = len(inner)
	return VerdictForward, ReasonNotSet
}
