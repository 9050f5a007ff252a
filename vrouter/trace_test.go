package vrouter

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"margay/vrouter/packet"
)

// TestTraceIsTheLadder sends the same packets through a worker and through Trace, and expects the same end.
func TestTraceIsTheLadder(t *testing.T) {
	big := make([]byte, 1500)
	packets := map[Direction][][]byte{
		Encap: {
			ip(ownPod, pod2, 17, []byte("x"), setDF), ip(ownPod, pod3, 17, nil), ip(ownPod, ownPod.Next(), 17, nil), ip(ownPod, pod2, 17, big, dontFragment),
			ip(ownPod, netip.MustParseAddr("10.244.4.1"), 17, nil), ip(ownPod, netip.MustParseAddr("10.244.5.1"), 17, nil),
			ip(ownPod, netip.MustParseAddr("192.0.2.1"), 17, nil), {0x60}, {0x45, 0}, corrupt(ip(ownPod, pod2, 17, nil)),
		},
		Decap: {
			ip(node2, self, 4, ip(pod2, ownPod, 17, []byte("x"))), ip(node3, self, 4, ip(pod2, ownPod, 17, nil)),
			ip(node2, node3, 4, ip(pod2, ownPod, 17, nil)), ip(node2, self, 17, nil), ip(netip.MustParseAddr("192.0.2.1"), self, 4, nil),
			ip(node2, self, 4, ip(pod2, pod3, 17, nil)), ip(node2, self, 4, ip(pod2, ownPod, 4, nil)), {},
		},
	}
	for d, list := range packets {
		for i, b := range list {
			r := testRouter(t)
			out, reason := walk(t, r, d, slices.Clone(b), Offload{})
			if len(b) == 0 {
				continue
			}
			before := r.Counters()
			got, err := r.Trace(d, b)
			if err != nil {
				t.Fatal(err)
			}
			if got.Reason != reason || (got.Verdict == VerdictForward) != (reason == ReasonNotSet) {
				t.Errorf("%v %d: trace says %v %v, the worker %v", d, i, got.Verdict, got.Reason, reason)
			}
			if out != nil && !slices.Equal(got.Packet, out) {
				t.Errorf("%v %d: trace sends % x, the worker % x", d, i, got.Packet, out)
			}
			last := got.Rungs[len(got.Rungs)-1]
			if last.Passed != (got.Verdict == VerdictForward) || slices.ContainsFunc(got.Rungs[:len(got.Rungs)-1], func(r Rung) bool { return !r.Passed }) {
				t.Errorf("%v %d: rungs %+v", d, i, got.Rungs)
			}
			if last.Name == "the ladder" {
				t.Errorf("%v %d: no rung knows %v", d, i, got.Reason)
			}
			if !slices.Equal(before, r.Counters()) {
				t.Errorf("%v %d: the trace was counted", d, i)
			}
		}
	}
}

// TestRungsAreInTheLaddersOrder: a packet with two faults ends at the rung that the table has first.
func TestRungsAreInTheLaddersOrder(t *testing.T) {
	r := testRouter(t)
	stranger := netip.MustParseAddr("192.0.2.1")
	for _, tt := range []struct {
		d    Direction
		b    []byte
		want Reason
		over Reason // would follow
	}{
		{Encap, corrupt(ip(ownPod, stranger, 17, nil)), ReasonBadChecksum, ReasonNoRoute},
		{Encap, ip(ownPod, stranger, 17, make([]byte, 2000), dontFragment), ReasonNoRoute, ReasonPacketTooBig},
		{Decap, corrupt(ip(stranger, node3, 4, nil)), ReasonOuterMalformed, ReasonOuterNotForUs},
		{Decap, ip(stranger, node3, 4, nil), ReasonOuterNotForUs, ReasonOuterSourceNode},
		{Decap, ip(stranger, self, 4, []byte{1}), ReasonOuterSourceNode, ReasonInnerMalformed},
		{Decap, ip(node2, self, 4, ip(pod3, ownPod, 4, nil)), ReasonNestedTunnel, ReasonInnerSource},
		{Decap, ip(node2, self, 4, ip(pod3, pod2, 17, nil)), ReasonInnerSource, ReasonInnerDestination},
	} {
		got, err := r.Trace(tt.d, tt.b)
		if err != nil || got.Reason != tt.want {
			t.Errorf("%v: %v, %v: expected %v", tt.d, got.Reason, err, tt.want)
		}
		at := func(reason Reason) int {
			return slices.IndexFunc(ladders[tt.d], func(r rung) bool { return slices.Contains(r.reasons, reason) })
		}
		if at(tt.want) < 0 || at(tt.want) >= at(tt.over) {
			t.Errorf("%v: the table has %v at %d and %v at %d", tt.d, tt.want, at(tt.want), tt.over, at(tt.over))
		}
	}
	if _, err := r.Trace(Direction(9), []byte{1}); err == nil {
		t.Error("an unknown direction was accepted")
	}
	if _, err := r.Trace(Encap, nil); err == nil {
		t.Error("an empty packet was accepted")
	}
	if got, err := New().Trace(Encap, []byte{0x45}); err != nil || got.Reason != ReasonNotConfigured || len(got.Rungs) != 1 {
		t.Errorf("not configured: %+v, %v", got, err)
	}
}

func TestTraceNamesTheRoutes(t *testing.T) {
	r := testRouter(t)
	got, err := r.Trace(Decap, ip(node2, self, 4, ip(pod2, ownPod, 17, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if got.Route.Prefix.String() != "10.244.1.0/26" || got.Back.Prefix.String() != "10.244.2.0/26" || got.Back.NextHop.Gateway != node2 {
		t.Errorf("%+v", got)
	}
}

// TestTraceWithinASwitch: where the vRouter has the pods' interfaces, a packet from a pod is asked about there.
func TestTraceWithinASwitch(t *testing.T) {
	r := testRouter(t)
	if _, err := r.Trace(Transit, ip(ownPod, neighbourPod, 17, nil)); !errors.Is(err, ErrNoSwitch) {
		t.Errorf("without a switch: %v", err)
	}
	if err := r.Update(Update{AddPods: []Pod{{neighbourPod, "cali2"}, {ownPod, "cali1"}}}); err != nil {
		t.Fatal(err)
	}
	r.NewSwitch(&switched{pods: testPods()})
	for _, tt := range []struct {
		d    Direction
		b    []byte
		out  Out
		name string
	}{
		{Transit, ip(ownPod, neighbourPod, 17, nil), OutPod, "cali2"},
		{Transit, ip(ownPod, pod2, 17, nil), OutUnderlay, ""},
		{Transit, ip(ownPod, netip.MustParseAddr("192.0.2.1"), 17, nil), OutHost, ""},
		{Encap, ip(ownPod, pod2, 17, nil), OutUnderlay, ""},
		{Decap, ip(node2, self, 4, ip(pod2, neighbourPod, 17, nil)), OutPod, "cali2"},
		{Decap, ip(node2, self, 4, ip(pod2, netip.MustParseAddr("10.244.1.60"), 17, nil)), OutHost, ""},
	} {
		got, err := r.Trace(tt.d, tt.b)
		if err != nil || got.Verdict != VerdictForward || got.Out != tt.out || got.OutInterface != tt.name {
			t.Errorf("%v % x: %+v, %v: expected out by %s %s", tt.d, tt.b, got, err, tt.out, tt.name)
		}
	}
	if _, err := r.Trace(Transit, ip(pod2, ownPod, 17, nil)); !errors.Is(err, ErrNoSwitch) {
		t.Errorf("a source that is no pod's: %v", err)
	}
}

// steered is a port that has the interface of one of two pods, and leaves UDP to the kernel.
type steered struct{ switched }

func (s *steered) Taken() *Pods { return s.pods }

func (s *steered) LeavesToKernel(b []byte) string {
	if packet.IPv4(b).Protocol() == packet.ProtocolUDP {
		return "it is UDP"
	}
	return ""
}

// TestTraceOfWhatTheKernelHas: what no worker sees is said to be the kernel's, and only pods whose interfaces the port has count.
func TestTraceOfWhatTheKernelHas(t *testing.T) {
	r := testRouter(t)
	if err := r.Update(Update{AddPods: []Pod{{neighbourPod, "cali2"}, {ownPod, "cali1"}}}); err != nil {
		t.Fatal(err)
	}
	r.NewSwitch(&steered{switched{pods: NewPods([]netip.Addr{ownPod}, nil)}})
	for _, tt := range []struct {
		d       Direction
		b       []byte
		carrier Carrier
		out     Out
	}{
		{Transit, ip(ownPod, pod2, 17, nil), CarrierKernel, OutHost},
		{Transit, ip(ownPod, pod2, 47, nil), CarrierWorker, OutUnderlay},
		{Encap, ip(ownPod, pod2, 17, nil), CarrierWorker, OutUnderlay},
		{Decap, ip(node2, self, 4, ip(pod2, ownPod, 47, nil)), CarrierWorker, OutPod},
		{Decap, ip(node2, self, 4, ip(pod2, neighbourPod, 47, nil)), CarrierWorker, OutHost},
	} {
		got, err := r.Trace(tt.d, tt.b)
		if err != nil || got.Verdict != VerdictForward || got.Out != tt.out || got.Carrier != tt.carrier || (got.LeftAlone != "") != (tt.carrier == CarrierKernel) {
			t.Errorf("%v % x: %+v, %v: expected out by %s, by %s", tt.d, tt.b, got, err, tt.out, tt.carrier)
		}
	}
	if _, err := r.Trace(Transit, ip(neighbourPod, ownPod, 47, nil)); !errors.Is(err, ErrNoSwitch) {
		t.Errorf("a pod whose interface the port has not: %v", err)
	}
}

func dontFragment(b []byte) { b[6] |= 0x40 }

// TestTraceOfWhatIsTooLong: in pieces, or answered.
func TestTraceOfWhatIsTooLong(t *testing.T) {
	r := testRouter(t)
	r.NewWorker(Encap, &queue{}, &queue{}).SetReply(&queue{})
	long := ip(ownPod, pod2, 17, make([]byte, 65000))
	got, err := r.Trace(Encap, long)
	if err != nil || got.Verdict != VerdictForward || got.Pieces != 45 || len(got.Packet) > 1500 || got.Packet[9] != 4 {
		t.Errorf("%v, %v: %d pieces, the first of %d bytes", got.Verdict, err, got.Pieces, len(got.Packet))
	}
	got, err = r.Trace(Encap, ip(ownPod, pod2, 17, make([]byte, 1500), dontFragment))
	if err != nil || got.Reason != ReasonPacketTooBig || len(got.Answer) < 28 || got.Answer[20] != 3 || got.Answer[21] != 4 ||
		binary.BigEndian.Uint16(got.Answer[26:]) != 1480 {
		t.Errorf("%v, %v: answer % x: expected fragmentation needed, MTU 1480", got.Reason, err, got.Answer)
	}
}
