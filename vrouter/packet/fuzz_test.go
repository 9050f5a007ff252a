package packet

import (
	"bytes"
	"testing"
)

func FuzzParseIPv4(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(ipv4(0, 1, 0x4000, 64, 17, podA, podB, []byte("data")))
	f.Add([]byte(superTCP(100, 0x18, nil)))
	f.Add(append(ipv4(0xff, 1, 0x2000, 0, 1, podA, podB, nil), make([]byte, 26)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		orig := bytes.Clone(b)
		p, fault := ParseIPv4(b)
		if !bytes.Equal(b, orig) {
			t.Fatal("parsing changed the packet")
		}
		if fault != FaultNone {
			if p != nil || fault.String() == "unknown" {
				t.Fatalf("fault %v with a view of %d bytes", fault, len(p))
			}
			return
		}
		if len(p) != p.TotalLen() || len(p) > len(b) || p.HeaderLen() < 20 || p.HeaderLen() > len(p) || naiveSum(p[:p.HeaderLen()], 0) != 0xffff {
			t.Fatalf("accepted %x", b)
		}
		p.Payload()
		if p.TTL() > 0 {
			DecrementTTL(p)
			if _, fault := ParseIPv4(b); fault != FaultNone {
				t.Fatalf("after DecrementTTL: %v", fault)
			}
		}
	})
}

func FuzzPopIPIP(f *testing.F) {
	inner := ipv4(2, 1, 0x4000, 64, 17, podA, podB, []byte("data"))
	f.Add(ipv4(0, 1, 0, 64, 4, nodeA, nodeB, inner))
	f.Add(ipv4(3, 1, 0, 64, 4, nodeA, nodeB, inner))
	f.Add(ipv4(3, 1, 0, 64, 4, nodeA, nodeB, ipv4(0, 1, 0, 64, 6, podA, podB, nil)))
	f.Add(ipv4(0, 1, 0, 64, 4, nodeA, nodeB, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= 20 && b[0] == 0x45 { // get past the outer checksum, which a fuzzer cannot guess
			fixHeader(b)
		}
		outer, fault := ParseIPv4(b)
		if fault != FaultNone {
			return
		}
		orig := bytes.Clone(b)
		in, fault := PopIPIP(outer)
		if fault != FaultNone {
			if in != nil || !bytes.Equal(b, orig) {
				t.Fatalf("fault %v, and the packet was changed or handed out", fault)
			}
			return
		}
		if _, fault := ParseIPv4(in); fault != FaultNone {
			t.Fatalf("handed out an invalid inner packet: %v", fault)
		}
		// What came out goes in again and comes out the same.
		out, fault := PushIPIP(b, outer.HeaderLen(), &Outer{Src: nodeA, Dst: nodeB, TTL: 1})
		if fault != FaultNone {
			t.Fatalf("push: %v", fault)
		}
		want := bytes.Clone(in)
		p, fault := ParseIPv4(out)
		if fault != FaultNone {
			t.Fatalf("pushed an invalid packet: %v", fault)
		}
		if again, fault := PopIPIP(p); fault != FaultNone || !bytes.Equal(again, want) {
			t.Fatalf("fault %v\ngot  %x\nwant %x", fault, again, want)
		}
	})
}

func FuzzSegment(f *testing.F) {
	// Small seeds: the fuzzer minimizes what it finds interesting, which takes it minutes with packets of kilobytes.
	f.Add([]byte(superTCP(50, 0x99, nil)), 20, 4096)
	f.Add([]byte(superTCP(30, 0x11, []byte{1, 1, 1, 0})), 7, 64)
	f.Add([]byte(superUDP(50)), 20, 2000)
	f.Add([]byte(superUDP(0)), 1, 28)
	scratch := make([]byte, 1<<16)
	f.Fuzz(func(t *testing.T, b []byte, gso, space int) {
		if len(b) >= 20 && b[0] == 0x45 {
			fixHeader(b)
		}
		pkt, fault := ParseIPv4(b)
		if fault != FaultNone {
			return
		}
		s := scratch[:uint(space)%uint(len(scratch))]
		emit := func(b []byte) {
			if _, fault := ParseIPv4(b); fault != FaultNone {
				t.Fatalf("emitted an invalid packet: %v", fault)
			}
		}
		if SegmentTCP(pkt, gso, s, emit) == FaultNone {
			checkTCP(t, pkt, gso, s)
		}
		if SegmentUDP(pkt, gso, s, emit) == FaultNone {
			checkUDP(t, pkt, gso, s)
		}
		CompleteChecksum(b, gso, space)
	})
}
