package agent

import (
	"slices"

	"golang.org/x/sys/unix"

	"margay/agent/api"
	"margay/agent/netfilter"
	"margay/vrouter/packet"
	"margay/vrouter/rpc"
)

// What an answer meets at a node hangs on who has carried its question through it. In the attachment direct that may be the vRouter
// alone, and then the kernel's connection tracker has not seen it; or the kernel, and then the vRouter leaves the answer to it, as it
// may have rewritten the flow. A node is told by whoever asks which of them it has said itself of the question.

// flowProtocols have ports: only of their flows do the vRouter's programs remember that the kernel has a part in them.
var flowProtocols = []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP, unix.IPPROTO_UDPLITE}

// tracked is what a connection tracker takes the packet for, with what a trace says of its connection; question is who has carried
// the question where the tracker is.
func tracked(p packet.IPv4, state api.ConnState, question api.Carrier) (is uint32, reply bool) {
	switch {
	case state == api.StateNew:
		return netfilter.StateNew, false
	case state != api.StateEstablished:
		return 0, false
	case question != api.CarrierVRouter:
		return netfilter.StateEstablished, true
	case p.Protocol() == unix.IPPROTO_ICMP, p.Protocol() == unix.IPPROTO_TCP: // an echo reply and a SYN+ACK begin nothing
		return netfilter.StateInvalid, false
	}
	return netfilter.StateNew, false
}

// kernelsFlow reports whether the packet belongs to a flow that the question will have made the kernel's before the packet comes,
// which the vRouter's own maps do not know yet.
func (t *tracer) kernelsFlow(p packet.IPv4) bool {
	return t.question == api.CarrierKernel && slices.Contains(flowProtocols, p.Protocol())
}

// afterQuestion is what the vRouter will do with the packet once the question has passed. d is the direction in which it was asked.
func (t *tracer) afterQuestion(d rpc.Direction, traced rpc.Traced) rpc.Traced {
	const why = "the kernel has a part in its flow"
	inner := t.pkt
	if d == rpc.Decap {
		inner = innerOf(t.pkt)
	}
	switch {
	case inner == nil || !t.kernelsFlow(inner):
	case d == rpc.Transit && traced.LeftToKernel == "":
		return rpc.Traced{LeftToKernel: why}
	case d == rpc.Decap && traced.ByTC:
		traced.ByTC, traced.LeftAlone, traced.Handover = false, why, rpc.HandoverUnknown
	}
	return traced
}

// innerOf returns the packet that IP-in-IP carries; nil where there is none.
func innerOf(p packet.IPv4) packet.IPv4 {
	if p.Protocol() != packet.ProtocolIPIP {
		return nil
	}
	inner, fault := packet.ParseIPv4(p.Payload())
	if fault != packet.FaultNone {
		return nil
	}
	return inner
}
