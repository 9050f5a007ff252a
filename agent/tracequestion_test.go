package agent

import (
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"margay/agent/api"
	"margay/agent/netfilter"
	"margay/vrouter/packet"
	"margay/vrouter/rpc"
)

// TestTracked: what a connection tracker takes an answer for hangs on whether it has seen the question.
func TestTracked(t *testing.T) {
	icmp, tcp, udp := probeOf(unix.IPPROTO_ICMP, "10.0.0.1", "10.0.0.2"), probeOf(unix.IPPROTO_TCP, "10.0.0.1", "10.0.0.2"), probeOf(unix.IPPROTO_UDP, "10.0.0.1", "10.0.0.2")
	for _, c := range []struct {
		p        packet.IPv4
		state    api.ConnState
		question api.Carrier
		is       uint32
		reply    bool
	}{
		{udp, api.StateNew, api.CarrierUnknown, netfilter.StateNew, false},
		{udp, api.StateUnknown, api.CarrierUnknown, 0, false},
		{udp, api.StateEstablished, api.CarrierUnknown, netfilter.StateEstablished, true}, // an older margayctl, or agent
		{udp, api.StateEstablished, api.CarrierKernel, netfilter.StateEstablished, true},
		{udp, api.StateEstablished, api.CarrierVRouter, netfilter.StateNew, false},
		{icmp, api.StateEstablished, api.CarrierVRouter, netfilter.StateInvalid, false},
		{tcp, api.StateEstablished, api.CarrierVRouter, netfilter.StateInvalid, false},
	} {
		if is, reply := tracked(c.p, c.state, c.question); is != c.is || reply != c.reply {
			t.Errorf("protocol %d, %q, question %q: %d, %v: expected %d, %v", c.p.Protocol(), c.state, c.question, is, reply, c.is, c.reply)
		}
	}
}

// TestAfterQuestion: the vRouter's maps do not know yet what the question will write into them.
func TestAfterQuestion(t *testing.T) {
	udp, icmp := probeOf(unix.IPPROTO_UDP, "10.0.0.1", "10.0.0.2"), probeOf(unix.IPPROTO_ICMP, "10.0.0.1", "10.0.0.2")
	inside := rpc.Traced{Forwarded: true, ByTC: true, Handover: rpc.HandoverInside}
	worker := rpc.Traced{Forwarded: true, LeftAlone: "the kernel has a part in its flow"}
	kernel := rpc.Traced{LeftToKernel: "the kernel has a part in its flow"}
	fragment := rpc.Traced{LeftToKernel: "it is a fragment"}
	for name, c := range map[string]struct {
		question   api.Carrier
		p          packet.IPv4
		d          rpc.Direction
		said, want rpc.Traced
	}{
		"from another node":             {api.CarrierKernel, around(packet.ProtocolIPIP, "192.0.2.2", "192.0.2.1", udp...), rpc.Decap, inside, worker},
		"from a pod":                    {api.CarrierKernel, udp, rpc.Transit, inside, kernel},
		"from a pod, and the kernel's":  {api.CarrierKernel, udp, rpc.Transit, fragment, fragment},
		"the vRouter had the question":  {api.CarrierVRouter, udp, rpc.Transit, inside, inside},
		"a question":                    {api.CarrierUnknown, udp, rpc.Transit, inside, inside},
		"without ports":                 {api.CarrierKernel, icmp, rpc.Transit, inside, inside},
		"without ports, in the tunnel":  {api.CarrierKernel, around(packet.ProtocolIPIP, "192.0.2.2", "192.0.2.1", icmp...), rpc.Decap, inside, inside},
		"no packet in the tunnel":       {api.CarrierKernel, around(packet.ProtocolIPIP, "192.0.2.2", "192.0.2.1"), rpc.Decap, inside, inside},
		"from the kernel to the tunnel": {api.CarrierKernel, udp, rpc.Encap, inside, inside},
	} {
		tr := &tracer{pkt: c.p, question: c.question}
		if got := tr.afterQuestion(c.d, c.said); got.ByTC != c.want.ByTC || got.Handover != c.want.Handover || got.LeftAlone != c.want.LeftAlone ||
			got.LeftToKernel != c.want.LeftToKernel || got.Forwarded != c.want.Forwarded {
			t.Errorf("%s: %+v: expected %+v", name, got, c.want)
		}
	}
}

// TestTraceAtInterfaces: whether packets meet a filter at an interface that the vRouter has is only said where the vRouter
// tells how it reads; one that is a release older does not, and then the verdict is in doubt, not wrong.
func TestTraceAtInterfaces(t *testing.T) {
	nl := newNamespace(t)
	if out, err := exec.Command("nft", `table netdev foreign { chain in { type filter hook ingress device "eth0" priority 0; drop; }; chain on { type filter hook egress device "vr0" priority 0; drop; }; }`).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	const passes, drops, doubts = "passes", "drops", "doubts"
	for _, c := range []struct {
		io            rpc.IO
		underlay, pod string
	}{
		{rpc.IOPacket, drops, drops},
		{rpc.IOTC, drops, drops},
		{rpc.IOXDP, passes, doubts},
		{"", doubts, doubts},
	} {
		try := func(f func(*tracer) bool) string {
			a := &Agent{kernel: &kernelTable{nl: nl}, plane: &dataplane{last: rpc.Status{IO: c.io}}}
			a.underlay.Interface = "eth0"
			tr := &tracer{Agent: a, pkt: probeOf(unix.IPPROTO_UDP, "10.0.0.1", "10.0.0.2")}
			switch on := f(tr); {
			case !on && tr.seg.Outcome == api.Dropped && len(tr.seg.Doubts) == 0:
				return drops
			case on && len(tr.seg.Doubts) == 1 && strings.Contains(tr.seg.Doubts[0].Fix, "--probe"):
				return doubts
			case on && len(tr.seg.Doubts) == 0:
				return passes
			}
			t.Errorf("%q: %+v", c.io, tr.seg)
			return ""
		}
		for what, got := range map[string][2]string{
			"a filter at the underlay":      {try(func(tr *tracer) bool { return tr.atInterface(netfilter.Ingress, "eth0") }), c.underlay},
			"a filter at a pod's interface": {try(func(tr *tracer) bool { return tr.atInterface(netfilter.Egress, "vr0") }), c.pod},
		} {
			if got[0] != got[1] {
				t.Errorf("the vRouter reads by %q, and %s: %s, expected %s", c.io, what, got[0], got[1])
			}
		}
	}
}
