package vrouter

import (
	"net/netip"
	"testing"

	"margay/vrouter/packet"
)

// FuzzWorker: whatever comes in by whichever interface, with whatever the kernel says it has left undone, a worker of each
// kind accounts for it, and what it sends is an IPv4 packet: in a tunnel of this node's where it goes to another.
func FuzzWorker(f *testing.F) {
	long := ip(ownPod, pod2, 17, make([]byte, 1600))
	f.Add(long, uint8(2), uint8(0), uint16(0), uint16(0))
	f.Add(ip(ownPod, unknown, 17, ports(1, 2)), uint8(0), uint8(0), uint16(20), uint16(0))
	f.Add(ip(node2, self, 4, ip(pod2, ownPod, 17, make([]byte, 1600))), uint8(1), uint8(0), uint16(40), uint16(0))
	f.Add(ip(ownPod, pod2, 6, append([]byte{12: 5 << 4}, make([]byte, 4000)...)), uint8(2), uint8(SegmentTCPv4), uint16(20), uint16(1500))
	f.Add(ip(ownPod, pod2, 17, append([]byte{4: 0xf, 5: 0xa8, 7: 0}, make([]byte, 4000)...)), uint8(2), uint8(SegmentUDP), uint16(20), uint16(9))
	// The workers are made once: their buffers are large.
	r := testRouter(f)
	reply := &queue{}
	host, decap := &queue{}, &queue{}
	pods := &switched{pods: testPods()}
	workers := []*Worker{r.NewWorker(Encap, host, host), r.NewWorker(Decap, decap, decap), r.NewSwitch(pods)}
	for _, w := range workers {
		w.SetReply(reply)
	}
	var count [3]int
	f.Fuzz(func(t *testing.T, b []byte, from, segmentation uint8, start, size uint16) {
		if len(b) > MaxPacket {
			return
		}
		mendHeaders(b)
		o := Offload{Segmentation: Segmentation(segmentation % 4), NeedsChecksum: start != 0, ChecksumStart: start, ChecksumOffset: start % 17, Size: size}
		if err := r.SetOptions(Options{ClampMSS: true, NestedTunnels: size%2 == 0, ICMPRate: 1000, DSCP: DSCP{Mode: DSCPMode(from % 3)},
			AcceptSources: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}); err != nil {
			t.Fatal(err)
		}
		kind := min(int(from%6), 2)
		q := []*queue{host, decap, &pods.queue}[kind]
		*q, reply.out = queue{in: [][]byte{b}, meta: o, out: [][]byte{}}, [][]byte{}
		pods.from = Interface(max(int(from%6)-2, 0))
		w := workers[kind]
		count[kind]++
		if err := w.Run(); err != nil {
			t.Fatal(err)
		}
		balanced(t, w, count[kind])
		if w.tallies.dropped[ReasonNotSet].packets.Load() != 0 {
			t.Error("dropped without a reason")
		}
		for _, sent := range append(q.out, reply.out...) {
			p, fault := packet.ParseIPv4(sent)
			if fault != packet.FaultNone {
				t.Fatalf("sent % x: %v", sent[:min(len(sent), 60)], fault)
			}
			if p.Protocol() == packet.ProtocolIPIP && p.Src() == self {
				if _, fault := packet.PopIPIP(p); fault != packet.FaultNone {
					t.Fatalf("sent a tunnel that cannot be opened: %v", fault)
				}
			}
		}
	})
}

// mendHeaders makes the checksums of the outer and the inner header right, which a fuzzer cannot guess.
func mendHeaders(b []byte) {
	for range 2 {
		if len(b) < 20 || int(b[0]&15)*4 < 20 || int(b[0]&15)*4 > len(b) {
			return
		}
		hl := int(b[0]&15) * 4
		b[10], b[11] = 0, 0
		sum := packet.Checksum(b[:hl], 0)
		b[10], b[11] = byte(sum>>8), byte(sum)
		b = b[hl:]
	}
}
