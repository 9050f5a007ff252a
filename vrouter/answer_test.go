package vrouter

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"margay/vrouter/packet"
)

var (
	setDF   = func(b []byte) { b[6] = 0x40 }
	unknown = netip.MustParseAddr("192.0.2.1")
)

// told sends packets by the first ladder and returns what was forwarded, and what their sender was told.
func told(t *testing.T, r *Router, o Offload, in ...[]byte) (out, replies [][]byte, w *Worker) {
	t.Helper()
	from, to, reply := &queue{in: in, meta: o}, &queue{out: [][]byte{}}, &queue{out: [][]byte{}}
	w = r.NewWorker(Encap, from, to)
	w.SetReply(reply)
	if err := w.Run(); err != nil {
		t.Fatal(err)
	}
	balanced(t, w, len(in))
	return to.out, reply.out, w
}

// balanced checks that every packet is accounted for: in = out - pieces + split + dropped.
func balanced(t *testing.T, w *Worker, in int) {
	t.Helper()
	var sum uint64
	for i := range w.tallies.forwarded {
		sum += w.tallies.forwarded[i].packets.Load()
	}
	for i := range w.tallies.dropped {
		sum += w.tallies.dropped[i].packets.Load()
	}
	sum += w.tallies.more[moreSplit].packets.Load() - w.tallies.more[morePieces].packets.Load()
	if sum != uint64(in) {
		t.Errorf("%d packets came in, %d are accounted for", in, sum)
	}
}

func TestAnswers(t *testing.T) {
	r := testRouter(t)
	echo, unreachable := []byte{8, 0, 0, 0}, []byte{3, 0, 0, 0}
	for _, test := range []struct {
		name       string
		b          []byte
		typ, code  byte // 0, 0: no answer
		rest       uint32
		mayNotTell bool
	}{
		{"no route", ip(ownPod, unknown, 17, nil), 3, 0, 0, false},
		{"no pod", ip(ownPod, ownPod.Next(), 17, nil), 3, 1, 0, false},
		{"echo without a route", ip(ownPod, unknown, 1, echo), 3, 0, 0, false},
		{"too big", ip(ownPod, pod2, 17, make([]byte, 1461), setDF), 3, 4, 1480, false},
		{"a tunnel", ip(ownPod, pod2, 4, ip(ownPod, pod2, 17, nil)), 3, 13, 0, false},
		{"IPv6 in IPv4", ip(ownPod, pod2, 41, make([]byte, 40)), 3, 13, 0, false},
		{"blackhole", ip(ownPod, netip.MustParseAddr("10.244.5.1"), 17, nil), 0, 0, 0, true},
		{"bad checksum", corrupt(ip(ownPod, unknown, 17, nil)), 0, 0, 0, true},
		{"about an ICMP error", ip(ownPod, unknown, 1, unreachable), 0, 0, 0, true},
		{"about a later fragment", ip(ownPod, unknown, 17, nil, func(b []byte) { b[7] = 1 }), 0, 0, 0, true},
		{"about a first fragment", ip(ownPod, unknown, 17, nil, func(b []byte) { b[6] = 0x20 }), 3, 0, 0, false},
		{"to multicast", ip(ownPod, netip.MustParseAddr("224.0.0.5"), 17, nil), 0, 0, 0, true},
		{"from nobody", ip(netip.IPv4Unspecified(), unknown, 17, nil), 0, 0, 0, true},
		{"from loopback", ip(netip.MustParseAddr("127.0.0.1"), unknown, 17, nil), 0, 0, 0, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			out, replies, _ := told(t, r, Offload{}, test.b)
			if len(out) != 0 {
				t.Fatal("forwarded")
			}
			if test.mayNotTell {
				if len(replies) != 0 {
					t.Errorf("told % x", replies[0])
				}
				return
			}
			if len(replies) != 1 {
				t.Fatalf("%d answers", len(replies))
			}
			p, fault := packet.ParseIPv4(replies[0])
			icmp := p.Payload()
			if fault != 0 || p.Dst() != ownPod || icmp[0] != test.typ || icmp[1] != test.code ||
				binary.BigEndian.Uint32(icmp[4:]) != test.rest || !bytes.HasPrefix(test.b, icmp[8:]) {
				t.Errorf("%v: % x", fault, replies[0])
			}
		})
	}
}

// TestSplit: what is too long, and has DF clear, goes in fragments, each in a tunnel header of its own.
func TestSplit(t *testing.T) {
	r := testRouter(t)
	for _, size := range []int{1460, 1461, 1472, 1473, 5000, 65515} {
		b := ip(ownPod, pod2, 17, bytes.Repeat([]byte{1, 2, 3, 4, 5}, size)[:size])
		out, replies, w := told(t, r, Offload{}, b)
		if len(replies) != 0 {
			t.Errorf("%d bytes: told", size)
		}
		var payload []byte
		ids := map[uint16]bool{}
		for _, o := range out {
			outer, fault := packet.ParseIPv4(o)
			if fault != 0 || len(o) > 1500 || outer.IsFragment() || outer.DF() {
				t.Fatalf("%d bytes: outer %v, % x", size, fault, o[:20])
			}
			ids[outer.ID()] = true
			inner, fault := packet.ParseIPv4(outer.Payload())
			if fault != 0 || inner.FragOffset() != len(payload) {
				t.Fatalf("%d bytes: inner %v, offset %d of %d", size, fault, inner.FragOffset(), len(payload))
			}
			payload = append(payload, inner.Payload()...)
		}
		if !bytes.Equal(payload, b[20:]) || len(ids) != len(out) {
			t.Errorf("%d bytes: %d came out, with %d identifications in %d packets", size, len(payload), len(ids), len(out))
		}
		if n := w.tallies.more[moreSplit].packets.Load(); (n == 1) != (size > 1460) {
			t.Errorf("%d bytes: split counts %d", size, n)
		}
	}
}

// TestSplitSuperpacket: one whose segments fit goes in segments where the outer header has no room for its length; one
// whose segments do not fit goes in fragments of its segments, or its sender is told.
func TestSplitSuperpacket(t *testing.T) {
	r := testRouter(t)
	tcp := make([]byte, 65515)
	tcp[12] = 5 << 4
	super := func(size uint16) Offload {
		return Offload{Segmentation: SegmentTCPv4, NeedsChecksum: true, ChecksumStart: 20, ChecksumOffset: 16, Size: size}
	}
	for _, test := range []struct {
		name   string
		b      []byte
		size   uint16
		out    int
		told   int
		longer bool // some packets are fragments
	}{
		{"whole", ip(ownPod, pod2, 6, tcp[:1460*40], setDF), 1440, 1, 0, false},
		{"too long for the outer header", ip(ownPod, pod2, 6, tcp, setDF), 1440, 46, 0, false},
		{"segments too big, DF", ip(ownPod, pod2, 6, tcp[:20+3*1460], setDF), 1460, 0, 1, false},
		{"segments too big", ip(ownPod, pod2, 6, tcp[:20+3*1460]), 1460, 6, 0, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			out, replies, _ := told(t, r, super(test.size), test.b)
			if len(out) != test.out || len(replies) != test.told {
				t.Fatalf("%d packets and %d answers: expected %d and %d", len(out), len(replies), test.out, test.told)
			}
			fragments := 0
			for _, o := range out {
				if packet.IPv4(o[20:]).IsFragment() {
					fragments++
				}
			}
			if fragments > 0 != test.longer {
				t.Errorf("%d fragments", fragments)
			}
		})
	}
}

// TestSplitOutOfTheTunnel: what a reassembled outer packet has brought, and vr0 does not carry.
func TestSplitOutOfTheTunnel(t *testing.T) {
	r := testRouter(t)
	for _, df := range []bool{false, true} {
		in, out := &queue{in: [][]byte{ip(node2, self, 4, ip(pod2, ownPod, 17, make([]byte, 4000), func(b []byte) {
			if df {
				setDF(b)
			}
		}))}}, &queue{out: [][]byte{}}
		w := r.NewWorker(Decap, in, out)
		if err := w.Run(); err != nil {
			t.Fatal(err)
		}
		balanced(t, w, 1)
		if want := map[bool]int{false: 3, true: 1}[df]; len(out.out) != want {
			t.Errorf("DF %v: %d packets", df, len(out.out))
		}
		for _, b := range out.out {
			if p, fault := packet.ParseIPv4(b); fault != 0 || p.Src() != pod2 || len(p) > 1480 && !df {
				t.Errorf("DF %v: %v, %d bytes", df, fault, len(b))
			}
		}
	}
}

// TestPieces: more pieces than a worker has room for are sent all the same, and in order.
func TestPieces(t *testing.T) {
	r := testRouter(t)
	if err := r.Update(Update{Config: &Config{NodeAddress: self, Underlay: "eth0", MTU: 68}}); err != nil {
		t.Fatal(err)
	}
	b := ip(ownPod, pod2, 17, make([]byte, 65515))
	small := ip(ownPod, pod2, 17, nil)
	out, _, _ := told(t, r, Offload{}, small, b, small)
	if want := 2 + (65515+47)/48; len(out) != want {
		t.Fatalf("%d packets: expected %d", len(out), want)
	}
	for i, o := range out[1 : len(out)-1] {
		if got := packet.IPv4(o[20:]).FragOffset(); got != 48*i {
			t.Fatalf("piece %d has offset %d", i, got)
		}
	}
}

// TestAnswerRate: RFC 1812, 4.3.2.8: bursts are answered, floods are not, and one sender does not take it all.
func TestAnswerRate(t *testing.T) {
	now := 10 * time.Second
	a := newAnswerer()
	a.clock = func() time.Duration { return now }
	reply := NewPacket()
	send := func(n int, from netip.Addr) (sent int) {
		for range n {
			if ok, limited := a.answer(1000, ip(from, unknown, 17, nil), ReasonNoRoute, 0, [4]byte{}, reply); ok {
				sent++
			} else if !limited {
				t.Fatal("refused, but not for the rate")
			}
		}
		return sent
	}
	if got := send(1000, ownPod); got != 125 {
		t.Errorf("one sender's burst: %d answers", got)
	}
	if got := send(1000, pod2); got != 125 {
		t.Errorf("another's: %d answers", got)
	}
	now += time.Second
	if got := send(1000, ownPod); got != 125 {
		t.Errorf("a second later: %d answers", got)
	}
	total := 0
	for i := range byte(100) {
		total += send(100, netip.AddrFrom4([4]byte{10, 9, 8, i}))
	}
	if total != 375 {
		t.Errorf("a hundred senders' burst: %d answers", total)
	}
	if ok, limited := a.answer(0, ip(ownPod, unknown, 17, nil), ReasonNoRoute, 0, [4]byte{}, reply); ok || limited {
		t.Error("a rate of 0 is off")
	}
}

// TestOptions: what the operator can change about the ladders.
func TestOptions(t *testing.T) {
	set := func(o Options) *Router {
		r := testRouter(t)
		if err := r.SetOptions(o); err != nil {
			t.Fatal(err)
		}
		return r
	}
	tos := func(n byte) func([]byte) { return func(b []byte) { b[1] = n } }
	for _, test := range []struct {
		dscp             string
		outer, comesBack byte // of an inner 0xb9; of an inner 0x29 in an outer 0xbb
	}{
		{"inherit", 0xb9, 0x2b}, {"uniform", 0xb9, 0xbb}, {"pipe", 0x01, 0x2b}, {"pipe:46", 0xb9, 0x2b}, {"pipe:1", 0x05, 0x2b},
	} {
		d, err := ParseDSCP(test.dscp)
		if err != nil {
			t.Fatal(err)
		}
		r := set(Options{DSCP: d})
		out, _ := walk(t, r, Encap, ip(ownPod, pod2, 17, nil, tos(0xb9)), Offload{})
		if out[1] != test.outer || out[21] != 0xb9 {
			t.Errorf("%s: outer %#x, inner %#x", test.dscp, out[1], out[21])
		}
		back, _ := walk(t, r, Decap, ip(node2, self, 4, ip(pod2, ownPod, 17, nil, tos(0x29)), tos(0xbb)), Offload{})
		if p, fault := packet.ParseIPv4(back); fault != 0 || p.TOS() != test.comesBack {
			t.Errorf("%s: out of the tunnel %#x, %v", test.dscp, p.TOS(), fault)
		}
	}
	for _, bad := range []string{"", "pipe:64", "pipe:-1", "pipe:", "uniform:1", "copy"} {
		if _, err := ParseDSCP(bad); err == nil {
			t.Errorf("dscp %q accepted", bad)
		}
	}

	nested := ip(pod2, ownPod, 4, ip(pod2, ownPod, 17, nil))
	r := set(Options{NestedTunnels: true})
	if _, reason := walk(t, r, Decap, ip(node2, self, 4, nested), Offload{}); reason != ReasonNotSet {
		t.Errorf("nested tunnel in: %v", reason)
	}
	if _, reason := walk(t, r, Encap, ip(ownPod, pod2, 4, nested), Offload{}); reason != ReasonNotSet {
		t.Errorf("nested tunnel out: %v", reason)
	}

	r = set(Options{AcceptSources: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}})
	for source, want := range map[netip.Addr]Reason{
		unknown:                             ReasonNotSet,
		pod3:                                ReasonNotSet,
		ownPod:                              ReasonInnerSource,
		self:                                ReasonInnerSource,
		netip.MustParseAddr("127.0.0.1"):    ReasonInnerSource,
		netip.MustParseAddr("224.0.0.1"):    ReasonInnerSource,
		netip.MustParseAddr("0.0.0.0"):      ReasonInnerSource,
		netip.MustParseAddr("240.1.1.1"):    ReasonInnerSource,
		netip.MustParseAddr("255.255.1.1"):  ReasonInnerSource,
		netip.MustParseAddr("198.51.100.7"): ReasonNotSet,
	} {
		if _, reason := walk(t, r, Decap, ip(node2, self, 4, ip(source, ownPod, 17, nil)), Offload{}); reason != want {
			t.Errorf("from %v: %v: expected %v", source, reason, want)
		}
	}
	if _, reason := walk(t, r, Decap, ip(unknown, self, 4, ip(unknown, ownPod, 17, nil)), Offload{}); reason != ReasonOuterSourceNode {
		t.Errorf("a stranger: %v", reason)
	}

	syn := make([]byte, 24)
	syn[12], syn[13] = 6<<4, 2
	copy(syn[20:], []byte{2, 4, 0x23, 0})
	out, _ := walk(t, set(Options{ClampMSS: true}), Encap, ip(ownPod, pod2, 6, syn), Offload{})
	if got := binary.BigEndian.Uint16(out[62:]); got != 1440 {
		t.Errorf("MSS %d", got)
	}
	for _, o := range []Options{
		{ICMPRate: -1}, {ICMPRate: 2_000_000}, {DSCP: DSCP{Mode: 9}}, {DSCP: DSCP{Value: 64}},
		{AcceptSources: []netip.Prefix{{}}}, {AcceptSources: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")}},
		{AcceptSources: []netip.Prefix{netip.MustParsePrefix("fd00::/8")}},
	} {
		if err := New().SetOptions(o); err == nil {
			t.Errorf("%+v accepted", o)
		}
	}
}

// TestAnswersDoNotAllocate: a flood of what has to be answered, or split, costs no memory.
func TestAnswersDoNotAllocate(t *testing.T) {
	r := testRouter(t)
	in, out, reply := &queue{}, &queue{}, &queue{}
	w := r.NewWorker(Encap, in, out)
	w.SetReply(reply)
	batch := slices.Repeat([][]byte{ip(ownPod, unknown, 17, nil), ip(ownPod, pod2, 17, make([]byte, 3000))}, 16)
	turn := func() {
		in.in = batch
		if err := w.turn(); err != nil {
			t.Error(err)
		}
	}
	turn()
	if n := testing.AllocsPerRun(20, turn); n != 0 {
		t.Errorf("%v allocations a turn", n)
	}
}
