package vrouter

import (
	"margay/vrouter/fib"
	"margay/vrouter/packet"
)

// This file is the ladder of the `direct` attachment, in which the vRouter is the router between the pods' own interfaces
// and the other nodes. The kernel is behind it as the processor is behind a line card: what is not plain forwarding
// between pods is handed to it, whole and untouched, by the host interface, and it does with the packet what it does in
// the other attachments (masquerade, services, ICMP errors, fragments).
//
// A packet that the kernel has sent here (In is HostInterface) walks the ladder of encapsulation in ladder.go.

// transit is what a Transit worker decides by, beside the view.
type transit struct {
	view
	pods *Pods
	// kernel holds the flows of this node's pods to other nodes' that pass through the kernel, in the direction in which
	// they come back: what conntrack has rewritten on the way out it has to see on the way in.
	kernel *flowSets
}

// hostParse is encapParse, and notes what has to come back to the kernel.
func (t *transit) hostParse(p *Packet) (packet.IPv4, Reason) {
	inner, reason := t.encapParse(p)
	if inner != nil && t.pods.find(inner.SrcU32()) != noInterface {
		if f, ok := flowOf(inner); ok {
			t.kernel.own.add(f.reverse())
		}
	}
	return inner, reason
}

// podParse is the first half of what is decided about a packet from a pod:
//
//	1 this node is configured
//	2 an IPv4 packet with a valid header
//	3 the source is the pod's own address (RFC 2827)
func (t *transit) podParse(p *Packet) (packet.IPv4, Reason) {
	inner, reason := t.encapParse(p)
	if inner != nil && inner.SrcU32() != t.pods.address(p.In) {
		return nil, ReasonSpoofed
	}
	return inner, reason
}

// pod is the second half; hop is the answer for the destination:
//
//	4 to a pod of this node, or by a tunnel, and nothing about it that the kernel has to see: else to the kernel
//	5 it has time to live, and it fits; else the pod is told, or it is split (RFC 1812, 5.3.1 and 5.2.6)
//	6 one off the TTL
//	7 out by the other pod's interface, or pushed into the tunnel
//
// The order is the kernel's, so that what an ICMP error quotes has the TTL with which it came.
func (t *transit) pod(p *Packet, inner packet.IPv4, hop fib.Hop, o *outer) (Verdict, Reason) {
	p.Len = len(inner) // without the link layer's padding
	out := t.pods.find(inner.DstU32())
	if out == noInterface && hop.Kind() != fib.KindTunnel || !plain(inner) || out != noInterface && !t.fits(p, inner, out) {
		p.Out = HostInterface
		return VerdictForward, ReasonNotSet
	}
	if inner.TTL() <= 1 {
		return VerdictDrop, ReasonTTLExpired
	}
	verdict, reason := VerdictForward, ReasonNotSet
	if out != noInterface {
		p.Out = out
	} else {
		p.Out = UnderlayInterface
		verdict, reason = t.encap(p, inner, hop, o)
	}
	if verdict != VerdictDrop {
		packet.DecrementTTL(inner)
	}
	return verdict, reason
}

// arrived is what follows decap: the inner packet, which p now is, goes out by the pod's interface, or to the kernel.
func (t *transit) arrived(p *Packet, inner packet.IPv4) {
	p.Out = t.pods.find(inner.DstU32())
	if p.Out == noInterface {
		return
	}
	if f, ok := flowOf(inner); !plain(inner) || inner.TTL() <= 1 || !t.fits(p, inner, p.Out) || ok && t.kernel.has(f) {
		p.Out = HostInterface
		return
	}
	packet.DecrementTTL(inner)
}

// plain reports whether there is nothing about a packet that the kernel has to see: it is no fragment (a connection
// tracker wants them all), carries no options, and is no ICMP error (it may be about a flow that a connection tracker has
// rewritten).
func plain(inner packet.IPv4) bool {
	if inner.IsFragment() || inner.HeaderLen() != packet.IPv4MinLen {
		return false
	}
	return inner.Protocol() != protoICMP || len(inner) > packet.IPv4MinLen && !icmpError(inner[packet.IPv4MinLen])
}

// fits reports whether a packet fits a pod's interface as it is: the pods' MTU, and the interface's own where that is less.
func (t *transit) fits(p *Packet, inner packet.IPv4, at Interface) bool {
	length, _, reason := wireSize(inner, &p.Offload)
	return reason == ReasonNotSet && length <= t.state.config.MTU && t.pods.carries(at, length)
}

// icmpError reports whether an ICMP message of a type is about another packet (RFC 1122, 3.2.2).
func icmpError(t byte) bool {
	switch t {
	case 3, 4, 5, 11, 12:
		return true
	}
	return false
}
