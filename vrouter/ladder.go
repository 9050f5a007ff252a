package vrouter

import (
	"encoding/binary"

	"margay/vrouter/fib"
	"margay/vrouter/packet"
)

// Verdict is what a ladder decides about a packet. The zero verdict is drop.
type Verdict uint8

// The verdicts.
const (
	VerdictDrop    Verdict = iota // count it under its reason
	VerdictForward                // send it, as it now is, on the ladder's other port
	VerdictSplit                  // it is too long, and may be sent in pieces; whoever cannot drops it
)

// Direction says which ladder a worker walks.
type Direction uint8

// The directions.
const (
	Encap   Direction = iota // from vr0 to the underlay: push the outer header
	Decap                    // from the underlay to vr0: pop it
	Transit                  // among all interfaces of a SwitchPort: see transit.go
)

// String returns "encap", "decap" or "transit".
func (d Direction) String() string { return [...]string{"encap", "decap", "transit"}[d] }

// outerTTL is the TTL of the outer header (RFC 2003, 3.1: enough to reach the tunnel's far end).
const outerTTL = 64

// view is everything a ladder decides by, loaded once for a batch. Of the routes each lookup sees one transaction or
// the next; the state is immutable.
type view struct {
	routes *fib.Forwarding
	state  *state
}

// Both ladders come in two halves, with the table's answer between them, so that a worker can look up the addresses of
// a whole batch at once. The first half says which packet to go on with; nil means drop, for the reason it gives.

// encapParse is the first half of what is decided about a packet that the kernel routed to vr0:
//
//	1 this node is configured
//	2 an IPv4 packet with a valid header
func (v *view) encapParse(p *Packet) (packet.IPv4, Reason) {
	if !v.state.configured {
		return nil, ReasonNotConfigured
	}
	b := p.Bytes()
	inner, fault := packet.ParseIPv4(b)
	switch {
	case fault == packet.FaultNone:
		return inner, ReasonNotSet
	case len(b) == 0 || b[0]>>4 != 4:
		return nil, ReasonNotIPv4
	case fault == packet.FaultChecksum:
		return nil, ReasonBadChecksum
	}
	return nil, ReasonMalformed
}

// toward returns the hop that a packet takes of the answer for its destination: where that has several gateways, its
// flow's.
func (v *view) toward(hop fib.Hop, inner packet.IPv4) fib.Hop {
	if hop.IsGroup() {
		return v.oneOf(hop, inner)
	}
	return hop
}

//go:noinline
func (v *view) oneOf(group fib.Hop, inner packet.IPv4) fib.Hop {
	return v.routes.Select(group, packet.FlowHash(inner))
}

// encap is the second half; hop is the answer for the destination, one gateway of it. It pushes the outer header:
//
//	3 the longest match for the destination is a tunnel to another node
//	4 no tunnel within the tunnel
//	5 it fits, through the narrowest link that is known on the way; else its sender is told, or it is split
//	  (RFC 2003, 3.1 and 5.1)
//	6 push (RFC 2003, 3.1; RFC 6040, 4.1; RFC 2983, 3.1)
//
// o is scratch that the caller keeps from packet to packet, begun with the view's state.
func (v *view) encap(p *Packet, inner packet.IPv4, hop fib.Hop, o *outer) (Verdict, Reason) {
	if !hop.Found() {
		return VerdictDrop, ReasonNoRoute
	}
	switch hop.Kind() {
	case fib.KindTunnel:
	case fib.KindLocal:
		return VerdictDrop, ReasonNoPod
	case fib.KindDirect:
		return VerdictDrop, ReasonDirectRoute
	default:
		return VerdictDrop, ReasonBlackhole
	}
	if hop.Gateway() == v.state.address {
		return VerdictDrop, ReasonGatewaySelf
	}
	if isTunnel(inner) && !v.state.options.NestedTunnels {
		return VerdictDrop, ReasonNestedTunnel
	}
	length, segments := len(inner), 1
	if p.Offload.Segmentation != SegmentNone {
		var reason Reason
		if length, segments, reason = wireSize(inner, &p.Offload); reason != ReasonNotSet {
			return VerdictDrop, reason
		}
	}
	if length > v.state.narrowest && length > v.state.mtuTo(hop.Gateway()) {
		if inner.DF() {
			return VerdictDrop, ReasonPacketTooBig
		}
		return VerdictSplit, ReasonPacketTooBig
	}
	if v.state.options.ClampMSS {
		v.clamp(p, inner, hop)
	}
	binary.BigEndian.PutUint32(o.Dst[:], hop.Gateway())
	if inner.DF() {
		o.ID = inner.ID() + o.offset(hop.Gateway())
	} else {
		o.ID = o.next(segments)
	}
	out, fault := packet.PushIPIP(p.Buf, p.Off, &o.Outer)
	if fault != 0 {
		if segments > 1 {
			return VerdictSplit, ReasonPacketTooBig // its segments fit one by one
		}
		return VerdictDrop, ReasonPacketTooBig
	}
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

// decapParse is the first half of what is decided about a packet of protocol 4 from the underlay. It is no open door:
//
//	1 this node is configured
//	2 a valid outer header, of protocol 4, for this node, whole
//	3 from a node of this cluster
//	4 pop (RFC 2003, 3.6; RFC 6040, 4.2), a valid inner header, no tunnel within the tunnel
func (v *view) decapParse(p *Packet) (packet.IPv4, Reason) {
	if !v.state.configured {
		return nil, ReasonNotConfigured
	}
	if p.Offload.Segmentation == SegmentUnsupported {
		return nil, ReasonOffloadUnsupported
	}
	outer, fault := packet.ParseIPv4(p.Bytes())
	if fault != 0 || outer.Protocol() != packet.ProtocolIPIP {
		return nil, ReasonOuterMalformed
	}
	if outer.DstU32() != v.state.address || outer.HeaderLen() != packet.IPv4MinLen && packet.HasSourceRoute(outer) {
		return nil, ReasonOuterNotForUs
	}
	if outer.IsFragment() {
		return nil, ReasonOuterFragment
	}
	if outer.SrcU32() == v.state.address || !v.state.isNode(outer.Src()) {
		return nil, ReasonOuterSourceNode
	}
	inner, fault := packet.PopIPIP(outer)
	if fault != 0 {
		if fault == packet.FaultECN {
			return nil, ReasonECNIllegal
		}
		return nil, ReasonInnerMalformed
	}
	if isTunnel(inner) && !v.state.options.NestedTunnels {
		return nil, ReasonNestedTunnel
	}
	return inner, ReasonNotSet
}

// isTunnel reports whether another IP packet is inside inner.
func isTunnel(inner packet.IPv4) bool {
	proto := inner.Protocol()
	return proto == packet.ProtocolIPIP || proto == packet.ProtocolIPv6
}

// decap is the second half; outer is p as it came, back the answer for the source of the inner packet, here the one for its
// destination. It takes the outer header away:
//
//	5 the route back to the inner source leads to the node that sent it, or the operator has made an exception
//	6 the inner destination is this node's
//	7 DSCP as configured (RFC 2983, 3.1)
func (v *view) decap(p *Packet, outer, inner packet.IPv4, back, here fib.Hop) (Verdict, Reason) {
	if (!v.routes.LeadsTo(back, outer.SrcU32()) || (back.Kind() != fib.KindTunnel && back.Kind() != fib.KindDirect)) &&
		!v.state.accepts(inner, back) {
		return VerdictDrop, ReasonInnerSource
	}
	if here.Kind() != fib.KindLocal {
		return VerdictDrop, ReasonInnerDestination
	}
	shrunk := outer.HeaderLen()
	if p.Offload.NeedsChecksum {
		if int(p.Offload.ChecksumStart) < shrunk {
			return VerdictDrop, ReasonInnerMalformed
		}
		p.Offload.ChecksumStart -= uint16(shrunk)
	}
	if v.state.options.DSCP.Mode == DSCPUniform {
		packet.CopyDSCP(outer, inner)
	}
	p.Off += shrunk
	p.Len = len(inner)
	return VerdictForward, ReasonNotSet
}

// tooLong reports whether a packet out of the tunnel is to be split because vr0 does not carry it: the outer one was in
// fragments, and has brought more than the way from another node usually does. One with DF set is for the kernel to
// answer.
func (v *view) tooLong(p *Packet, inner packet.IPv4) bool {
	return len(inner) > v.state.config.MTU && p.Offload.Segmentation == SegmentNone && !inner.DF()
}
