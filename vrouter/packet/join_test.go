package packet

import (
	"bytes"
	"encoding/binary"
	"testing"

	"pgregory.net/rapid"
)

// joinAll joins greedily and splits what came of it again: every packet must come back as it was. It returns how many
// superpackets or single packets the segments became.
func joinAll(t fataler, segments []IPv4, partial bool) int {
	t.Helper()
	want := make([][]byte, len(segments))
	for i, s := range segments {
		want[i] = bytes.Clone(s)
		if partial && len(s) >= 40 { // what is partial on the way in is complete on the way out
			CompleteChecksum(want[i], s.HeaderLen(), tcpOffChecksum)
		}
	}
	packets := 0
	for i := 0; i < len(segments); packets++ {
		var j Joiner
		if !j.Start(segments[i], partial) {
			i++
			continue
		}
		whole := []byte(segments[i])
		n := 1
		for ; i+n < len(segments); n++ {
			payload, ok := j.Add(segments[i+n], partial)
			if !ok {
				break
			}
			whole = append(whole[:len(whole):len(whole)], payload...)
		}
		if n > 1 {
			j.Finish()
			copy(whole, segments[i][:j.HeaderLen()])
			pkt, fault := ParseIPv4(whole)
			if fault != FaultNone || len(pkt) != len(whole) {
				t.Fatalf("joined packet: %v, %d bytes of %d", fault, len(pkt), len(whole))
			}
			got := 0
			fault = SegmentTCP(pkt, j.Size(), make([]byte, MaxTotalLen), func(b []byte) {
				if got < n && !bytes.Equal(b, want[i+got]) {
					t.Fatalf("packet %d of %d: %x, want %x", got, n, b, want[i+got])
				}
				got++
			})
			if fault != FaultNone || got != n {
				t.Fatalf("%d packets joined, %d after splitting: %v", n, got, fault)
			}
		}
		i += n
	}
	return packets
}

// cut returns the segments of a superpacket, finished or with a partial checksum.
func cut(t fataler, pkt IPv4, gso int, partial bool) []IPv4 {
	t.Helper()
	var s Splitter
	if fault := s.Start(pkt, 0, ProtocolTCP, gso); fault != FaultNone {
		t.Fatalf("%v", fault)
	}
	var all []IPv4
	for {
		header := make([]byte, MaxHeaders)
		n, payload := s.Next(header)
		if n == 0 {
			return all
		}
		b := append(header[:n:n], payload...)
		if !partial {
			CompleteChecksum(b, s.ChecksumStart(), s.ChecksumOffset())
		}
		all = append(all, b)
	}
}

func TestJoin(t *testing.T) {
	timestamps := []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}
	for _, partial := range []bool{false, true} {
		for _, flags := range []uint8{0x10, 0x18, 0x11, 0x50} {
			if got := joinAll(t, cut(t, superTCP(20001, flags, timestamps), 1428, partial), partial); got != 1 {
				t.Errorf("flags %#x: %d packets, want one", flags, got)
			}
		}
		// Two superpackets of one flow, the second of which begins where the first ends.
		first := cut(t, superTCP(65000, 0x10, nil), 1000, partial)
		if got := joinAll(t, append(first, cut(t, superTCP(5000, 0x10, nil), 1000, partial)...), partial); got != 2 {
			t.Errorf("two superpackets: %d packets", got)
		}
	}
	for name, change := range map[string]func(IPv4){
		"TTL":           func(p IPv4) { p[8]-- },
		"ECN":           func(p IPv4) { p[1] ^= 1 },
		"ID":            func(p IPv4) { p[5]++ },
		"DF":            func(p IPv4) { p[6] ^= 0x40 },
		"source":        func(p IPv4) { p[15]++ },
		"destination":   func(p IPv4) { p[19]++ },
		"port":          func(p IPv4) { p[23]++ },
		"sequence":      func(p IPv4) { p[27]++ },
		"ack":           func(p IPv4) { p[31]++ },
		"window":        func(p IPv4) { p[35]++ },
		"urgent":        func(p IPv4) { p[39]++ },
		"option":        func(p IPv4) { p[51]++ },
		"SYN":           func(p IPv4) { p[33] |= 2 },
		"RST":           func(p IPv4) { p[33] |= 4 },
		"CWR":           func(p IPv4) { p[33] |= 0x80 },
		"no ACK":        func(p IPv4) { p[33] &^= 0x10 },
		"PSH":           func(p IPv4) { p[33] |= 8 },
		"not the first": func(p IPv4) { p[33] |= 0x20 },
	} {
		segments := cut(t, superTCP(5*1000, 0x10, timestamps), 1000, false)
		change(segments[2])
		fixHeader(segments[2])
		binary.BigEndian.PutUint16(segments[2][36:], 0)
		mendTCP(segments[2])
		if got := joinAll(t, segments, false); got < 2 {
			t.Errorf("%s: joined", name)
		}
	}
	segments := cut(t, superTCP(5*1000, 0x10, timestamps), 1000, false)
	segments[2][100] ^= 1
	if got := joinAll(t, segments, false); got != 3 {
		t.Errorf("a damaged segment among five: %d packets, want 3", got)
	}
}

// mendTCP writes a segment's TCP checksum anew.
func mendTCP(p IPv4) {
	tcp := p.Payload()
	binary.BigEndian.PutUint16(tcp[16:], 0)
	putTransportChecksum(tcp[16:], Checksum(tcp, PseudoSum(p, len(tcp))))
}

// TestJoinRandom damages segments, takes some away, and swaps them: what is joined always splits into the same again.
func TestJoinRandom(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 20000).Draw(t, "payload")
		gso := rapid.IntRange(100, 9000).Draw(t, "gso")
		flags := rapid.SampledFrom([]uint8{0x10, 0x18, 0x11, 0x50, 0x12, 0x90, 0x30}).Draw(t, "flags")
		options := make([]byte, 4*rapid.IntRange(0, 10).Draw(t, "option words"))
		partial := rapid.Bool().Draw(t, "partial")
		segments := cut(t, superTCP(n, flags, options), gso, partial)
		for range rapid.IntRange(0, 3).Draw(t, "changes") {
			i := rapid.IntRange(0, len(segments)-1).Draw(t, "segment")
			switch rapid.IntRange(0, 3).Draw(t, "kind") {
			case 0:
				segments = append(segments[:i:i], segments[i+1:]...)
			case 1:
				k := rapid.IntRange(0, len(segments)-1).Draw(t, "other")
				segments[i], segments[k] = segments[k], segments[i]
			default:
				at := rapid.IntRange(1, min(len(segments[i]), 60)-1).Draw(t, "at")
				if at == 2 || at == 3 { // the length is ParseIPv4's to check
					continue
				}
				segments[i][at] ^= byte(rapid.IntRange(1, 255).Draw(t, "bits"))
				fixHeader(segments[i])
				if rapid.Bool().Draw(t, "mended") && !partial {
					mendTCP(segments[i])
				}
			}
			if len(segments) == 0 {
				return
			}
		}
		joinAll(t, segments, partial)
	})
}
