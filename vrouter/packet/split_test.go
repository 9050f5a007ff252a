package packet

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

// checkSplit holds the Splitter against SegmentTCP or SegmentUDP: headers, payload and finished checksums are the same
// bytes, in a tunnel and without one; and the superpacket is not changed.
func checkSplit(t fataler, pkt IPv4, protocol uint8, gso int) {
	t.Helper()
	var want [][]byte
	segment := SegmentTCP
	if protocol == ProtocolUDP {
		segment = SegmentUDP
	}
	if fault := segment(pkt, gso, make([]byte, MaxTotalLen), func(b []byte) { want = append(want, bytes.Clone(b)) }); fault != FaultNone {
		t.Fatalf("%v", fault)
	}
	tunnel := Outer{Src: nodeA, Dst: nodeB, TTL: 64, ID: 0xfffe}
	buf := append(make([]byte, IPv4MinLen), pkt...)
	outer, fault := PushIPIP(buf, IPv4MinLen, &tunnel)
	if fault != FaultNone {
		t.Fatalf("push: %v", fault)
	}
	for _, whole := range [][]byte{pkt, outer} {
		orig, added := bytes.Clone(whole), len(whole)-len(pkt)
		var s Splitter
		if fault := s.Start(whole, added, protocol, gso); fault != FaultNone {
			t.Fatalf("start: %v", fault)
		}
		if s.Count() != len(want) {
			t.Fatalf("%d segments announced, want %d", s.Count(), len(want))
		}
		for i, w := range want {
			header := make([]byte, MaxHeaders)
			n, payload := s.Next(header)
			got := append(header[:n], payload...)
			if !CompleteChecksum(got, s.ChecksumStart(), s.ChecksumOffset()) {
				t.Fatalf("segment %d: no checksum", i)
			}
			if !bytes.Equal(got[added:], w) {
				t.Fatalf("segment %d of %d:\n%x, want\n%x", i, len(want), got[added:], w)
			}
			if added == 0 {
				continue
			}
			// The outer header is the one that a push of this segment alone would have made.
			again := append(make([]byte, IPv4MinLen), w...)
			o := tunnel
			o.ID += uint16(i)
			if one, fault := PushIPIP(again, IPv4MinLen, &o); fault != FaultNone || !bytes.Equal(one, got) {
				t.Fatalf("segment %d: outer header %x, want %x", i, got[:20], one[:20])
			}
		}
		if n, payload := s.Next(make([]byte, MaxHeaders)); n != 0 || payload != nil {
			t.Fatalf("one segment too many")
		}
		if !bytes.Equal(whole, orig) {
			t.Fatalf("the superpacket was changed")
		}
	}
}

func TestSplitRandom(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 20000).Draw(t, "payload")
		gso := rapid.IntRange(1, 9000).Draw(t, "gso")
		flags := rapid.Uint8().Draw(t, "flags")
		options := make([]byte, 4*rapid.IntRange(0, 10).Draw(t, "option words"))
		checkSplit(t, superTCP(n, flags, options), ProtocolTCP, gso)
		checkSplit(t, superUDP(n), ProtocolUDP, gso)
	})
}

func TestSplitFaults(t *testing.T) {
	with := func(p IPv4, at int, v byte) IPv4 { p[at] = v; return p }
	for _, c := range []struct {
		name     string
		pkt      IPv4
		outer    int
		protocol uint8
		gso      int
		want     Fault
	}{
		{"gso 0", superTCP(3000, 0, nil), 0, ProtocolTCP, 0, FaultGSO},
		{"no packet", nil, 20, ProtocolTCP, 1000, FaultShort},
		{"an outer header with options", superTCP(3000, 0, nil), 24, ProtocolTCP, 1000, FaultShort},
		{"UDP as TCP", superUDP(3000), 0, ProtocolTCP, 1000, FaultProtocol},
		{"TCP as UDP", superTCP(3000, 0, nil), 0, ProtocolUDP, 1000, FaultProtocol},
		{"data offset past the end", with(superTCP(3, 0, nil), 32, 0xf0), 0, ProtocolTCP, 1000, FaultTransport},
		{"UDP length", with(superUDP(3000), 25, 0), 0, ProtocolUDP, 1000, FaultTransport},
		{"no protocol", superUDP(3000), 0, 0, 1000, FaultProtocol},
	} {
		var s Splitter
		if got := s.Start(c.pkt, c.outer, c.protocol, c.gso); got != c.want {
			t.Errorf("%s: fault %v, want %v", c.name, got, c.want)
		}
	}
}

func FuzzSplit(f *testing.F) {
	f.Add([]byte(superTCP(50, 0x99, nil)), 20)
	f.Add([]byte(superUDP(50)), 20)
	f.Fuzz(func(t *testing.T, b []byte, gso int) {
		if len(b) >= 20 && b[0] == 0x45 {
			fixHeader(b)
		}
		pkt, fault := ParseIPv4(b)
		if fault != FaultNone || len(pkt) > MaxTotalLen-IPv4MinLen {
			return
		}
		for _, protocol := range []uint8{ProtocolTCP, ProtocolUDP} {
			if _, fault := SegmentHeaders(pkt, protocol, gso); fault == FaultNone {
				checkSplit(t, pkt, protocol, gso)
			}
		}
	})
}
