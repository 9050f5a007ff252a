package vrouter

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"slices"
	"testing"

	"margay/vrouter/packet"
)

// queue is a port of packets that are waiting, for one turn at a time.
type queue struct {
	in   [][]byte
	meta Offload
	out  [][]byte
	fail Reason
}

func (q *queue) Name() string { return "queue" }

func (q *queue) Recv(batch []*Packet) (int, error) {
	if len(q.in) == 0 {
		return 0, ErrStopped
	}
	n := min(len(batch), len(q.in))
	for i, b := range q.in[:n] {
		batch[i].Len = copy(batch[i].Buf[batch[i].Off:], b)
		batch[i].Offload = q.meta
	}
	q.in = q.in[n:]
	return n, nil
}

func (q *queue) Send(batch []*Packet) {
	for _, p := range batch {
		if p.Drop = q.fail; p.Drop == ReasonNotSet {
			p.Sent = 1
			if q.out != nil {
				q.out = append(q.out, slices.Clone(p.Bytes()))
			}
		}
	}
}

func (q *queue) Counters() []Counter { return []Counter{{Name: "kernel_queue", Packets: 7}} }
func (q *queue) Stop()               {}
func (q *queue) Close() error        { return nil }

var (
	self   = netip.MustParseAddr("198.18.0.1")
	node2  = netip.MustParseAddr("198.18.0.2")
	node3  = netip.MustParseAddr("198.18.0.3")
	ownPod = netip.MustParseAddr("10.244.1.5")
	pod2   = netip.MustParseAddr("10.244.2.5")
	pod3   = netip.MustParseAddr("10.244.3.5") // reached without encapsulation
)

// testUpdate describes node 1 of three.
func testUpdate() Update {
	pfx := netip.MustParsePrefix
	return Update{
		Config:   &Config{NodeAddress: self, Underlay: "eth0", MTU: 1480},
		AddNodes: []netip.Addr{self, node2, node3},
		AddPods:  []Pod{{ownPod, "cali1"}},
		Set: []Route{
			{Prefix: pfx("10.244.1.0/26"), NextHop: NextHop{Kind: KindLocal}},
			{Prefix: pfx("10.244.2.0/26"), NextHop: NextHop{Kind: KindTunnel, Gateway: node2}},
			{Prefix: pfx("10.244.3.0/26"), NextHop: NextHop{Kind: KindDirect, Gateway: node3}},
			{Prefix: pfx("10.244.4.0/26"), NextHop: NextHop{Kind: KindTunnel, Gateway: self}},
			{Prefix: pfx("10.244.5.0/26")},
		},
	}
}

func testRouter(t testing.TB) *Router {
	t.Helper()
	r := New()
	if err := r.Update(testUpdate()); err != nil {
		t.Fatal(err)
	}
	return r
}

// ip builds an IPv4 packet with a valid header; change, if any, is made before the checksum.
func ip(src, dst netip.Addr, protocol byte, payload []byte, change ...func([]byte)) []byte {
	b := make([]byte, 20, 20+len(payload))
	b[0], b[8], b[9] = 0x45, 63, protocol
	b = append(b, payload...)
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	for _, f := range change {
		f(b)
	}
	binary.BigEndian.PutUint16(b[10:], packet.Checksum(b[:20], 0))
	return b
}

func corrupt(b []byte) []byte {
	b[10] ^= 0xff
	return b
}

// walk sends one packet through one ladder and returns what came out, or the reason of the drop.
func walk(t *testing.T, r *Router, d Direction, b []byte, o Offload) ([]byte, Reason) {
	t.Helper()
	in, out := &queue{in: [][]byte{b}, meta: o}, &queue{out: [][]byte{}}
	w := r.NewWorker(d, in, out)
	if err := w.turn(); err != nil {
		t.Fatal(err)
	}
	if len(out.out) == 1 {
		if got := w.tallies.forwarded[d].packets.Load(); got != 1 {
			t.Errorf("forwarded counts %d", got)
		}
		return out.out[0], ReasonNotSet
	}
	for i := range w.tallies.dropped {
		if w.tallies.dropped[i].packets.Load() == 1 {
			if got := w.tallies.dropped[i].bytes.Load(); got != uint64(len(b)) {
				t.Errorf("drop counts %d bytes of %d", got, len(b))
			}
			if Reason(i) == ReasonNotSet {
				t.Error("dropped without a reason")
			}
			return nil, Reason(i)
		}
	}
	t.Fatal("neither forwarded nor counted")
	return nil, 0
}

func TestEncapDrops(t *testing.T) {
	r := testRouter(t)
	other := netip.MustParseAddr("192.0.2.1")
	tests := []struct {
		name string
		b    []byte
		want Reason
	}{
		{"empty", nil, ReasonNotIPv4},
		{"IPv6", append([]byte{0x60}, make([]byte, 60)...), ReasonNotIPv4},
		{"short", []byte{0x45, 0, 0, 20}, ReasonMalformed},
		{"total length past the end", ip(ownPod, pod2, 17, nil, func(b []byte) { b[3]++ }), ReasonMalformed},
		{"checksum", corrupt(ip(ownPod, pod2, 17, nil)), ReasonBadChecksum},
		{"no route", ip(ownPod, other, 17, nil), ReasonNoRoute},
		{"no pod", ip(ownPod, ownPod.Next(), 17, nil), ReasonNoPod},
		{"direct", ip(ownPod, pod3, 17, nil), ReasonDirectRoute},
		{"to ourselves", ip(ownPod, netip.MustParseAddr("10.244.4.1"), 17, nil), ReasonGatewaySelf},
		{"blackhole", ip(ownPod, netip.MustParseAddr("10.244.5.1"), 17, nil), ReasonBlackhole},
		{"too big", ip(ownPod, pod2, 17, make([]byte, 1461), func(b []byte) { b[6] = 0x40 }), ReasonPacketTooBig},
		{"a tunnel of the pod's", ip(ownPod, pod2, 4, ip(ownPod, pod2, 17, nil)), ReasonNestedTunnel},
	}
	for _, test := range tests {
		if _, got := walk(t, r, Encap, test.b, Offload{}); got != test.want {
			t.Errorf("%s: %v: expected %v", test.name, got, test.want)
		}
		if _, got := walk(t, New(), Encap, test.b, Offload{}); got != ReasonNotConfigured {
			t.Errorf("%s, not configured: %v", test.name, got)
		}
	}
}

func TestEncap(t *testing.T) {
	r := testRouter(t)
	inner := ip(ownPod, pod2, 17, make([]byte, 1460), func(b []byte) { b[1], b[6] = 0x2e|2, 0x40 })
	// Bytes behind the total length are padding, and stay behind.
	got, reason := walk(t, r, Encap, append(slices.Clone(inner), 1, 2, 3), Offload{})
	if reason != ReasonNotSet {
		t.Fatal(reason)
	}
	outer, fault := packet.ParseIPv4(got)
	if fault != 0 || len(outer) != len(got) {
		t.Fatalf("outer header: %v", fault)
	}
	if outer.Src() != self || outer.Dst() != node2 || outer.Protocol() != 4 || outer.TTL() != 64 || !outer.DF() || outer.TOS() != inner[1] {
		t.Errorf("outer header % x", got[:20])
	}
	if !bytes.Equal(got[20:], inner) {
		t.Error("the inner packet has changed")
	}
}

// TestEncapSuperpacket: what counts is the length of the segments, and each of them gets an identification.
func TestEncapSuperpacket(t *testing.T) {
	tcp := make([]byte, 20+10000)
	tcp[12] = 5 << 4
	df := func(b []byte) { b[6] = 0x40 }
	b := ip(ownPod, pod2, 6, tcp, df)
	mayFragment := ip(ownPod, pod2, 6, tcp)
	super := func(size uint16) Offload {
		return Offload{Segmentation: SegmentTCPv4, NeedsChecksum: true, ChecksumStart: 20, ChecksumOffset: 16, Size: size}
	}
	r := testRouter(t)
	for _, test := range []struct {
		name string
		b    []byte
		o    Offload
		want Reason
	}{
		{"segments that fit", b, super(1440), ReasonNotSet},
		{"segments too big", b, super(1441), ReasonPacketTooBig},
		{"one segment, too big", b, super(20000), ReasonPacketTooBig},
		{"no size", b, super(0), ReasonMalformed},
		{"UDP that is TCP", b, Offload{Segmentation: SegmentUDP, Size: 1000}, ReasonMalformed},
		{"unknown", b, Offload{Segmentation: SegmentUnsupported, Size: 1000}, ReasonOffloadUnsupported},
	} {
		if _, got := walk(t, r, Encap, test.b, test.o); got != test.want {
			t.Errorf("%s: %v: expected %v", test.name, got, test.want)
		}
	}
	v := view{routes: r.table.Forwarding(), state: r.state.Load()}
	o := outer{counter: 9}
	o.begin(v.state)
	p := NewPacket()
	p.Len, p.Offload = copy(p.Buf[p.Off:], mayFragment), super(1000)
	inner, reason := v.encapParse(p)
	if reason != ReasonNotSet {
		t.Fatal(reason)
	}
	if verdict, reason := v.encap(p, inner, v.routes.Lookup(inner.DstU32()), &o); verdict != VerdictForward || p.Offload.ChecksumStart != 40 ||
		packet.IPv4(p.Bytes()).ID() != 10 || o.counter != 19 {
		t.Errorf("%v, %+v, identification %d, then %d", reason, p.Offload, packet.IPv4(p.Bytes()).ID(), o.counter)
	}
}

func TestDecapDrops(t *testing.T) {
	r := testRouter(t)
	inner := ip(pod2, ownPod, 17, []byte("x"))
	wrap := func(inner []byte, change ...func([]byte)) []byte { return ip(node2, self, 4, inner, change...) }
	tests := []struct {
		name string
		b    []byte
		o    Offload
		want Reason
	}{
		{"empty", nil, Offload{}, ReasonOuterMalformed},
		{"outer checksum", corrupt(wrap(inner)), Offload{}, ReasonOuterMalformed},
		{"not protocol 4", ip(node2, self, 17, inner), Offload{}, ReasonOuterMalformed},
		{"for another node", ip(node2, node3, 4, inner), Offload{}, ReasonOuterNotForUs},
		{"first fragment", wrap(inner, func(b []byte) { b[6] = 0x20 }), Offload{}, ReasonOuterFragment},
		{"last fragment", wrap(inner, func(b []byte) { b[7] = 1 }), Offload{}, ReasonOuterFragment},
		{"no node", ip(netip.MustParseAddr("198.18.0.9"), self, 4, inner), Offload{}, ReasonOuterSourceNode},
		{"ourselves", ip(self, self, 4, inner), Offload{}, ReasonOuterSourceNode},
		{"no inner", wrap(nil), Offload{}, ReasonInnerMalformed},
		{"inner checksum", wrap(corrupt(ip(pod2, ownPod, 17, nil))), Offload{}, ReasonInnerMalformed},
		{"congestion", wrap(inner, func(b []byte) { b[1] = 3 }), Offload{}, ReasonECNIllegal},
		{"IP-in-IP inside", wrap(ip(pod2, ownPod, 4, inner)), Offload{}, ReasonNestedTunnel},
		{"IPv6 inside", wrap(ip(pod2, ownPod, 41, nil)), Offload{}, ReasonNestedTunnel},
		{"source of another node", wrap(ip(pod3, ownPod, 17, nil)), Offload{}, ReasonInnerSource},
		{"source of ours", wrap(ip(ownPod, ownPod, 17, nil)), Offload{}, ReasonInnerSource},
		{"source unknown", wrap(ip(netip.MustParseAddr("192.0.2.1"), ownPod, 17, nil)), Offload{}, ReasonInnerSource},
		{"destination of another node", wrap(ip(pod2, pod3, 17, nil)), Offload{}, ReasonInnerDestination},
		{"destination unknown", wrap(ip(pod2, netip.MustParseAddr("192.0.2.1"), 17, nil)), Offload{}, ReasonInnerDestination},
		{"destination this node", wrap(ip(pod2, self, 17, nil)), Offload{}, ReasonInnerDestination},
		{"checksum of the outer header left to us", wrap(inner), Offload{NeedsChecksum: true, ChecksumStart: 10}, ReasonInnerMalformed},
		{"unknown superpacket", wrap(inner), Offload{Segmentation: SegmentUnsupported}, ReasonOffloadUnsupported},
	}
	for _, test := range tests {
		if _, got := walk(t, r, Decap, test.b, test.o); got != test.want {
			t.Errorf("%s: %v: expected %v", test.name, got, test.want)
		}
		if _, got := walk(t, New(), Decap, test.b, test.o); got != ReasonNotConfigured {
			t.Errorf("%s, not configured: %v", test.name, got)
		}
	}
}

func TestDecap(t *testing.T) {
	r := testRouter(t)
	for source, from := range map[netip.Addr]netip.Addr{pod2: node2, pod3: node3} {
		inner := ip(source, ownPod, 17, []byte("hello"))
		// 26 bytes of padding, as Ethernet adds them to short frames.
		got, reason := walk(t, r, Decap, append(ip(from, self, 4, inner), make([]byte, 26)...), Offload{})
		if reason != ReasonNotSet || !bytes.Equal(got, inner) {
			t.Errorf("from %v: %v, % x", from, reason, got)
		}
	}
}

// TestUnexpectedECN: what RFC 6040, 4.2, has the exit of the tunnel take note of goes on, and is counted; what is refused for
// another reason is not.
func TestUnexpectedECN(t *testing.T) {
	tos := func(n byte) func([]byte) { return func(b []byte) { b[1] = n } }
	for _, c := range []struct {
		inner, outer byte
		src          netip.Addr
		want         uint64
	}{{0, 2, pod2, 1}, {0, 1, pod2, 1}, {3, 1, pod2, 1}, {1, 2, pod2, 1}, {2, 2, pod2, 0}, {2, 3, pod2, 0}, {3, 2, pod2, 0}, {2, 0, pod2, 0}, {0, 2, pod3, 0}} {
		r := testRouter(t)
		walk(t, r, Decap, ip(node2, self, 4, ip(c.src, ownPod, 17, nil, tos(c.inner)), tos(c.outer)), Offload{})
		for _, n := range r.Counters() {
			if n.Name == "ecn_unexpected" && n.Packets != c.want {
				t.Errorf("ECN %d in %d, from %v: counted %d times", c.inner, c.outer, c.src, n.Packets)
			}
		}
	}
}

// wholeDecap walks both halves of the ladder.
func wholeDecap(v *view, p *Packet) (Verdict, Reason) {
	inner, reason := v.decapParse(p)
	if inner == nil {
		return VerdictDrop, reason
	}
	return v.decap(p, p.Bytes(), inner, v.routes.Lookup(inner.SrcU32()), v.routes.Lookup(inner.DstU32()))
}

func TestDecapMovesChecksumStart(t *testing.T) {
	v := view{routes: testRouter(t).table.Forwarding(), state: testRouter(t).state.Load()}
	p := NewPacket()
	p.Len = copy(p.Buf[p.Off:], ip(node2, self, 4, ip(pod2, ownPod, 17, make([]byte, 8))))
	p.Offload = Offload{NeedsChecksum: true, ChecksumStart: 40, ChecksumOffset: 6}
	if verdict, reason := wholeDecap(&v, p); verdict != VerdictForward || p.Offload.ChecksumStart != 20 {
		t.Errorf("%v, %v, checksum start %d: expected 20", verdict, reason, p.Offload.ChecksumStart)
	}
}

// TestSendFailureIsCounted checks that what a port cannot send is a drop under the port's reason.
func TestSendFailureIsCounted(t *testing.T) {
	r := testRouter(t)
	in, out := &queue{in: [][]byte{ip(ownPod, pod2, 17, nil)}}, &queue{fail: ReasonSendTooBig}
	w := r.NewWorker(Encap, in, out)
	if err := w.Run(); err != nil {
		t.Fatal(err)
	}
	counters := map[string]uint64{}
	for _, c := range r.Counters() {
		counters[c.Name] += c.Packets
	}
	if counters["forwarded_encap"] != 0 || counters["drop_send_emsgsize"] != 1 || counters["kernel_queue"] != 14 {
		t.Errorf("counters %v", counters)
	}
}

// TestNoAllocations: between Recv and Send nothing is allocated, in both directions.
func TestNoAllocations(t *testing.T) {
	r := testRouter(t)
	packets := map[Direction][]byte{
		Encap: ip(ownPod, pod2, 17, make([]byte, 100)),
		Decap: ip(node2, self, 4, ip(pod2, ownPod, 17, make([]byte, 100))),
	}
	for d, b := range packets {
		batch := slices.Repeat([][]byte{b, corrupt(slices.Clone(b))}, 16)
		in, out := &queue{}, &queue{}
		w := r.NewWorker(d, in, out)
		if n := testing.AllocsPerRun(100, func() {
			in.in = batch
			if err := w.turn(); err != nil {
				t.Error(err)
			}
		}); n != 0 {
			t.Errorf("%v: %v allocations a turn", d, n)
		}
		if got := w.tallies.forwarded[d].packets.Load(); got != 16*101 {
			t.Errorf("%v: forwarded %d", d, got)
		}
	}
}

// TestCountersAreDocumented: docs/operations.md says of every counter what it tells an operator.
func TestCountersAreDocumented(t *testing.T) {
	b, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range New().Counters() {
		if !bytes.Contains(b, []byte("`"+c.Name+"`")) {
			t.Errorf("%s is not in docs/operations.md", c.Name)
		}
	}
}

func TestReasonNames(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range Reasons() {
		if name := r.String(); name == "" || name == "unknown" || seen[name] {
			t.Errorf("reason %d: name %q is empty or taken", r, name)
		} else {
			seen[name] = true
		}
	}
	if Reason(250).String() != "unknown" {
		t.Error("a reason without a name")
	}
}

// FuzzDecap: whatever arrives, the ladder ends in a verdict, and what it lets through is for a pod of this node.
func FuzzDecap(f *testing.F) {
	f.Add(ip(node2, self, 4, ip(pod2, ownPod, 17, []byte("x"))), uint16(0))
	f.Add(ip(node2, self, 4, ip(pod3, ownPod, 6, nil)), uint16(40))
	f.Add([]byte{0x4f, 0}, uint16(1))
	r := testRouter(f)
	v := view{routes: r.table.Forwarding(), state: r.state.Load()}
	p := NewPacket()
	f.Fuzz(func(t *testing.T, b []byte, start uint16) {
		p.Reset()
		p.Len = copy(p.Buf[p.Off:p.Off+MaxPacket], b)
		p.Offload = Offload{NeedsChecksum: start != 0, ChecksumStart: start}
		verdict, reason := wholeDecap(&v, p)
		if verdict == VerdictDrop {
			if reason == ReasonNotSet {
				t.Fatal("dropped without a reason")
			}
			return
		}
		inner, fault := packet.ParseIPv4(p.Bytes())
		if fault != 0 || !netip.MustParsePrefix("10.244.1.0/26").Contains(inner.Dst()) {
			t.Fatalf("let through: %v, % x", fault, p.Bytes())
		}
	})
}
