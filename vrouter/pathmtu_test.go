package vrouter

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"margay/vrouter/packet"
)

// outerOf sends inner, and returns the outer packet.
func outerOf(t *testing.T, r *Router, inner []byte) []byte {
	t.Helper()
	out, _, _ := told(t, r, Offload{}, inner)
	if len(out) != 1 {
		t.Fatalf("%d packets for one", len(out))
	}
	return out[0]
}

// fragNeeded is what a router on the way to node 2 says about the packet b, whose outer header is as it left.
func fragNeeded(mtu int, b []byte) []byte {
	dst := make([]byte, packet.MaxICMPError)
	e := packet.ICMPError{Type: packet.ICMPUnreachable, Code: packet.CodeFragNeeded, Rest: uint32(mtu)}
	return dst[:packet.PutICMPError(dst, packet.IPv4(b), e, [4]byte{198, 18, 9, 9}, 1)]
}

// from gives a packet another source.
func from(src netip.Addr, b []byte) []byte {
	copy(b[12:], src.AsSlice())
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], packet.Checksum(b[:20], 0))
	return b
}

func TestPathMTU(t *testing.T) {
	r := testRouter(t)
	now := time.Unix(1e9, 0)
	long := ip(ownPod, pod2, 17, make([]byte, 1460), setDF)
	out := [][]byte{outerOf(t, r, long)}
	for name, b := range map[string][]byte{
		"no node":       fragNeeded(1400, ip(self, unknown, 4, long, setDF)),
		"not from us":   fragNeeded(1400, ip(node3, node2, 4, long, setDF)),
		"not a tunnel":  fragNeeded(1400, ip(self, node2, 17, long, setDF)),
		"DF clear":      fragNeeded(1400, ip(self, node2, 4, long)),
		"no less":       fragNeeded(1500, out[0]),
		"not narrower":  fragNeeded(1500, ip(self, node2, 4, make([]byte, 1600), setDF)),
		"another thing": ip(node2, self, 1, []byte{8, 0, 0, 0}),
		"from a pod":    from(ownPod, fragNeeded(1400, out[0])),
		"another's pod": from(pod2, fragNeeded(1400, out[0])),
	} {
		if _, ok := r.LearnPathMTU(b, now); ok {
			t.Errorf("%s: believed", name)
		}
	}
	p, ok := r.LearnPathMTU(fragNeeded(1400, out[0]), now)
	if want := (PathMTU{Gateway: node2, MTU: 1400, Learned: now, Expires: now.Add(10 * time.Minute)}); !ok || p != want || !slices.Equal(r.PathMTUs(), []PathMTU{want}) {
		t.Fatalf("learned %+v, %v, %+v", p, ok, r.PathMTUs())
	}
	// RFC 2003, 5.1: the sender inside is told what is left to it.
	if _, replies, _ := told(t, r, Offload{}, long); len(replies) != 1 || binary.BigEndian.Uint32(replies[0][24:]) != 1380 {
		t.Errorf("answers % x", replies)
	}
	for size, want := range map[int]int{1360: 1, 1361: 0} {
		if out, _, _ := told(t, r, Offload{}, ip(ownPod, pod2, 17, make([]byte, size), setDF)); len(out) != want {
			t.Errorf("%d bytes: %d packets", size, len(out))
		}
	}
	if out, _, _ := told(t, r, Offload{}, ip(ownPod, pod2, 17, make([]byte, 1460))); len(out) != 2 {
		t.Errorf("DF clear: %d packets", len(out))
	}
	// Old routers tell no MTU; liars are not believed below a limit.
	shorter := outerOf(t, r, ip(ownPod, pod2, 17, make([]byte, 1260), setDF))
	if p, _ := r.LearnPathMTU(fragNeeded(0, shorter), now); p.MTU != 1006 {
		t.Errorf("plateau %d", p.MTU)
	}
	if p, _ := r.LearnPathMTU(fragNeeded(68, shorter), now); p.MTU != MinPathMTU {
		t.Errorf("least %d", p.MTU)
	}
	// RFC 1191, 6.3: ten minutes from when it was told, and telling the same again changes nothing.
	if _, ok := r.LearnPathMTU(fragNeeded(68, shorter), now.Add(time.Minute)); ok {
		t.Error("the same again is news")
	}
	if r.ExpirePathMTU(now.Add(10*time.Minute - 1)) {
		t.Error("forgotten too early")
	}
	if !r.ExpirePathMTU(now.Add(10*time.Minute)) || len(r.PathMTUs()) != 0 {
		t.Error("not forgotten")
	}
	if out, _, _ := told(t, r, Offload{}, long); len(out) != 1 {
		t.Error("the longer packet is not tried again")
	}
}

// TestForgedPathMTU: who has not seen a packet of ours cannot narrow the way, and does not get far with guessing.
func TestForgedPathMTU(t *testing.T) {
	r := testRouter(t)
	if err := r.Update(Update{Set: []Route{{Prefix: netip.MustParsePrefix("10.244.9.0/26"), NextHop: NextHop{Kind: KindTunnel, Gateway: node3}}}}); err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1e9, 0)
	long := func(dst netip.Addr) []byte {
		return ip(ownPod, dst, 17, make([]byte, 1460), setDF, func(b []byte) { b[4], b[5] = 0x12, 0x34 })
	}
	ours, other := outerOf(t, r, long(pod2)), outerOf(t, r, long(netip.MustParseAddr("10.244.9.5")))
	changed := func(b []byte, at int, by byte) []byte {
		b = slices.Clone(b)
		b[at] ^= by
		return b
	}
	for name, quoted := range map[string][]byte{
		"another identification":       changed(ours, 5, 1),
		"another inner identification": changed(ours, 20+4, 1),
		"the inner one has DF clear":   changed(ours, 20+6, 0x40),
		"another length inside":        changed(ours, 20+3, 1),
		"what is inside is not IPv4":   changed(ours, 20, 0x20),
		"another node's offset":        append(slices.Clone(other[:16]), ours[16:]...),
		"nothing quoted of the inner":  ours[:20],
		"too little quoted":            ours[:27],
	} {
		before := refused(r)
		if _, ok := r.LearnPathMTU(fragNeeded(1400, quoted), now); ok {
			t.Errorf("%s: believed", name)
		}
		if got := refused(r) - before; got != 1 {
			t.Errorf("%s: counted %d times", name, got)
		}
	}
	// The rest of the minute's share; then nobody is heard about this node, and whoever speaks about another one is.
	for range forgedLimit {
		r.LearnPathMTU(fragNeeded(1400, changed(ours, 5, 1)), now.Add(time.Second))
	}
	if _, ok := r.LearnPathMTU(fragNeeded(1400, ours), now.Add(forgedPeriod-1)); ok {
		t.Error("a forger may guess on and on")
	}
	if _, ok := r.LearnPathMTU(fragNeeded(1400, other), now.Add(forgedPeriod-1)); !ok {
		t.Error("the other node suffers")
	}
	// RFC 792: eight bytes of what the outer header has behind it are enough.
	if _, ok := r.LearnPathMTU(fragNeeded(1400, ours[:28]), now.Add(forgedPeriod)); !ok {
		t.Error("not believed again")
	}
	if got := r.OuterOffset(node2); packet.IPv4(ours).ID() != 0x1234+got {
		t.Errorf("identification %#x, offset %#x", packet.IPv4(ours).ID(), got)
	}
}

func refused(r *Router) uint64 {
	for _, c := range r.Counters() {
		if c.Name == "path_mtu_refused" {
			return c.Packets
		}
	}
	return ^uint64(0)
}

// TestQuotedSegments: what holds for a superpacket holds for each of its segments, whoever cuts it.
func TestQuotedSegments(t *testing.T) {
	r := testRouter(t)
	tcp := make([]byte, 20+20000)
	tcp[12] = 5 << 4
	super := ip(ownPod, pod2, 6, tcp, setDF, func(b []byte) { b[4], b[5] = 0xff, 0xfa })
	out, _, _ := told(t, r, Offload{Segmentation: SegmentTCPv4, NeedsChecksum: true, ChecksumStart: 20, ChecksumOffset: 16, Size: 1400}, super)
	if len(out) != 1 {
		t.Fatalf("%d packets", len(out))
	}
	var s packet.Splitter
	if fault := s.Start(out[0], packet.IPv4MinLen, packet.ProtocolTCP, 1400); fault != packet.FaultNone {
		t.Fatal(fault)
	}
	var header [packet.MaxHeaders]byte
	key, count := &r.state.Load().key, 0
	for n, _ := s.Next(header[:]); n > 0; n, _ = s.Next(header[:]) {
		if !key.sent(packet.IPv4(header[:n])) {
			t.Errorf("segment %d: % x", count, header[:n])
		}
		count++
	}
	if count != 15 {
		t.Errorf("%d segments", count)
	}
}

// TestIdentifications: RFC 6864, 4.3: those of packets that may be fragmented differ, also those of a superpacket's segments.
func TestIdentifications(t *testing.T) {
	o := outer{key: newOuterKey()}
	seen := map[uint16]bool{}
	for i := range 1000 {
		segments := i%7 + 1
		for first := o.next(segments); segments > 0; segments-- {
			if seen[first] {
				t.Fatalf("%d twice", first)
			}
			seen[first] = true
			first++
		}
	}
	// The cache of offsets says what the key says, of more gateways than it holds.
	for range 2 {
		for i := range uint32(1000) {
			gateway := 1 + i*37
			if got, want := o.offset(gateway), o.key.offset(gateway); got != want || want == 0 {
				t.Fatalf("gateway %d: %d, expected %d", gateway, got, want)
			}
		}
	}
}
