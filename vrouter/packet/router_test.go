package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

// withOptions puts options, padded to a word, into the header of the packet b.
func withOptions(b, options []byte) []byte {
	options = append(bytes.Clone(options), make([]byte, -len(options)&3)...)
	out := append(append(bytes.Clone(b[:20]), options...), b[20:]...)
	out[0] = 4<<4 | byte(20+len(options))>>2
	binary.BigEndian.PutUint16(out[2:], uint16(len(out)))
	setHeaderChecksum(out)
	return out
}

func setHeaderChecksum(b []byte) {
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], ^naiveSum(b[:int(b[0]&15)<<2], 0))
}

// reassemble is the naive twin of Fragmenter: it puts fragments together by what their headers say.
func reassemble(t fataler, fragments [][]byte) []byte {
	var payload []byte
	for i, b := range fragments {
		p, fault := ParseIPv4(b)
		if fault != FaultNone || len(p) != len(b) {
			t.Fatalf("fragment %d: %v", i, fault)
		}
		if p.FragOffset()-IPv4(fragments[0]).FragOffset() != len(payload) || i < len(fragments)-1 && (!p.MF() || len(p.Payload())%8 != 0) {
			t.Fatalf("fragment %d: offset %d of %d, more %v, %d bytes", i, p.FragOffset(), len(payload), p.MF(), len(p.Payload()))
		}
		payload = append(payload, p.Payload()...)
	}
	return payload
}

func fragmentsOf(p IPv4, mtu int) ([][]byte, Fault) {
	var f Fragmenter
	if fault := f.Start(p, mtu); fault != FaultNone {
		return nil, fault
	}
	var out [][]byte
	for {
		b := make([]byte, MaxTotalLen)
		n := f.Next(b)
		if n == 0 {
			return out, FaultNone
		}
		out = append(out, b[:n])
	}
}

// TestFragmentRandom: what fits is sent as it is, else every fragment but the last is as long as can be, and together
// they are the packet again.
func TestFragmentRandom(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		payload := rapid.SliceOfN(rapid.Byte(), 0, 4000).Draw(t, "payload")
		frag := rapid.SampledFrom([]uint16{0, flagMF, flagMF | 7, 100, 0x8000}).Draw(t, "fragment field")
		p := IPv4(ipv4(rapid.Byte().Draw(t, "tos"), 7, frag, 9, 17, podA, podB, payload))
		if options := rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, "options"); len(options) > 0 {
			p = withOptions(p, options)
		}
		mtu := rapid.IntRange(68, 1600).Draw(t, "mtu")
		out, fault := fragmentsOf(p, mtu)
		if fault != FaultNone {
			t.Fatalf("%v", fault)
		}
		if !bytes.Equal(reassemble(t, out), p.Payload()) {
			t.Fatal("together they are another packet")
		}
		size := (mtu - p.HeaderLen()) &^ 7
		for i, b := range out {
			last := i == len(out)-1
			if len(b) > mtu || !last && len(b) != p.HeaderLen()+size {
				t.Fatalf("fragment %d of %d bytes, MTU %d", i, len(b), mtu)
			}
			if IPv4(b).ID() != 7 || IPv4(b).TOS() != p.TOS() || IPv4(b).TTL() != 9 || last && IPv4(b).MF() != p.MF() || IPv4(b).DF() {
				t.Fatalf("fragment %d: header % x", i, b[:20])
			}
		}
		// One less than that many cannot carry it.
		if n := len(out) - 1; n > 0 && len(p.Payload()) <= (n-1)*size+mtu-p.HeaderLen() {
			t.Fatalf("%d fragments of %d bytes, MTU %d", len(out), len(p), mtu)
		}
	})
}

func TestFragmentFaults(t *testing.T) {
	df := IPv4(ipv4(0, 1, flagDF, 9, 17, podA, podB, make([]byte, 2000)))
	if _, fault := fragmentsOf(df, 1500); fault != FaultFragment {
		t.Errorf("DF: %v", fault)
	}
	if _, fault := fragmentsOf(IPv4(ipv4(0, 1, 0, 9, 17, podA, podB, make([]byte, 2000))), 27); fault != FaultShort {
		t.Errorf("no room: %v", fault)
	}
	// The second piece would begin at 65536, which the field has no room for: it would say 0, and that more follow.
	if _, fault := fragmentsOf(IPv4(ipv4(0, 1, 0x1fff, 9, 17, podA, podB, make([]byte, 100))), 68); fault != FaultTotalLen {
		t.Errorf("behind the end of a packet: %v", fault)
	}
	if out, fault := fragmentsOf(IPv4(ipv4(0, 1, (65535-100)>>3, 9, 17, podA, podB, make([]byte, 100))), 68); fault != FaultNone || len(out) != 3 {
		t.Errorf("to the end of a packet: %v, %d fragments", fault, len(out))
	}
	if out, _ := fragmentsOf(IPv4(ipv4(0, 1, 0, 9, 17, podA, podB, nil)), 68); len(out) != 1 || len(out[0]) != 20 {
		t.Errorf("an empty packet: %d fragments", len(out))
	}
}

// TestFragmentOptions: RFC 791: an option whose copied flag is clear is in the first fragment only.
func TestFragmentOptions(t *testing.T) {
	record, alert := []byte{7, 7, 4, 0, 0, 0, 0}, []byte{0x94, 4, 0, 0}
	p := IPv4(withOptions(ipv4(0, 1, 0, 9, 17, podA, podB, make([]byte, 100)), append(append(bytes.Clone(record), 1), alert...)))
	out, _ := fragmentsOf(p, 100)
	if !bytes.Equal(out[0][20:28], append(bytes.Clone(record), 1)) || !bytes.Equal(out[1][20:28], []byte{1, 1, 1, 1, 1, 1, 1, 1}) ||
		!bytes.Equal(out[1][28:32], alert) {
		t.Errorf("options % x, then % x", out[0][20:32], out[1][20:32])
	}
}

func TestMayAnswer(t *testing.T) {
	echo, unreachable := []byte{8, 0, 0, 0, 0, 0, 0, 0}, []byte{3, 0, 0, 0, 0, 0, 0, 0}
	for _, test := range []struct {
		name string
		p    []byte
		want bool
	}{
		{"UDP", ipv4(0, 1, 0, 9, 17, podA, podB, nil), true},
		{"first fragment", ipv4(0, 1, flagMF, 9, 17, podA, podB, make([]byte, 8)), true},
		{"later fragment", ipv4(0, 1, flagMF|1, 9, 17, podA, podB, make([]byte, 8)), false},
		{"echo", ipv4(0, 1, 0, 9, 1, podA, podB, echo), true},
		{"ICMP error", ipv4(0, 1, 0, 9, 1, podA, podB, unreachable), false},
		{"redirect", ipv4(0, 1, 0, 9, 1, podA, podB, []byte{5}), false},
		{"ICMP of an unknown type", ipv4(0, 1, 0, 9, 1, podA, podB, []byte{200}), false},
		{"ICMP without a type", ipv4(0, 1, 0, 9, 1, podA, podB, nil), false},
		{"to multicast", ipv4(0, 1, 0, 9, 17, podA, [4]byte{224, 0, 0, 1}, nil), false},
		{"to broadcast", ipv4(0, 1, 0, 9, 17, podA, [4]byte{255, 255, 255, 255}, nil), false},
		{"from nobody", ipv4(0, 1, 0, 9, 17, [4]byte{}, podB, nil), false},
		{"from loopback", ipv4(0, 1, 0, 9, 17, [4]byte{127, 0, 0, 1}, podB, nil), false},
		{"from multicast", ipv4(0, 1, 0, 9, 17, [4]byte{230, 0, 0, 1}, podB, nil), false},
	} {
		if got := MayAnswer(IPv4(test.p)); got != test.want {
			t.Errorf("%s: %v", test.name, got)
		}
	}
}

// TestICMPError: RFC 1812 section 4.3.2: length, quoted bytes, precedence, checksums.
func TestICMPError(t *testing.T) {
	for _, size := range []int{0, 7, 8, 527, 528, 529, 1400} {
		p := IPv4(ipv4(0x2e, 1, flagDF, 9, 17, podA, podB, pattern(size)))
		dst := bytes.Repeat([]byte{0xaa}, MaxICMPError)
		n := PutICMPError(dst, p, ICMPError{Type: ICMPUnreachable, Code: CodeFragNeeded, Rest: 1480}, nodeA, 77)
		got, fault := ParseIPv4(dst)
		quoted := min(len(p), 548)
		if fault != FaultNone || n != 28+quoted || len(got) != n || n > 576 {
			t.Fatalf("%d bytes: %v, %d bytes", size, fault, n)
		}
		icmp := got.Payload()
		if got.Src().As4() != nodeA || got.Dst().As4() != podA || got.Protocol() != 1 || got.ID() != 77 || got.TTL() != 64 ||
			got.TOS() != 0xcc || got.IsFragment() || got.DF() || naiveSum(icmp, 0) != 0xffff ||
			!bytes.Equal(icmp[:2], []byte{3, 4}) || !bytes.Equal(icmp[4:8], []byte{0, 0, 1480 >> 8, 1480 & 0xff}) || !bytes.Equal(icmp[8:], p[:quoted]) {
			t.Errorf("%d bytes: % x", size, dst[:60])
		}
		back, ok := ParseFragNeeded(got)
		if !ok || back.MTU != 1480 || !bytes.Equal(back.Quoted, p[:quoted]) {
			t.Errorf("%d bytes: read back: %v, %+v", size, ok, back)
		}
	}
}

func TestPlateau(t *testing.T) {
	for length, want := range map[int]int{65535: 32000, 1500: 1492, 1492: 1006, 69: 68, 68: 68, 20: 68} {
		if got := Plateau(length); got != want {
			t.Errorf("below %d: %d: expected %d", length, got, want)
		}
	}
}

// syn builds a SYN whose MSS option has so many NOPs in front of it.
func syn(mss uint16, nops int) IPv4 {
	options := append(bytes.Repeat([]byte{1}, nops), 2, 4, byte(mss>>8), byte(mss))
	options = append(options, make([]byte, -len(options)&3)...)
	tcp := make([]byte, 20+len(options))
	copy(tcp[20:], options)
	tcp[0], tcp[12], tcp[13] = 0x12, byte(len(tcp)>>2)<<4, tcpSYN
	p := IPv4(ipv4(0, 1, flagDF, 9, 6, podA, podB, tcp))
	mendTCP(p)
	return p
}

func TestClampMSS(t *testing.T) {
	for _, nops := range []int{0, 1, 2, 3} {
		for _, partial := range []bool{false, true} {
			t.Run(fmt.Sprintf("nops=%d partial=%v", nops, partial), func(t *testing.T) {
				p := syn(1460, nops)
				if partial {
					binary.BigEndian.PutUint16(p[36:], uint16(PseudoSum(p, len(p)-20)))
				}
				before := binary.BigEndian.Uint16(p[36:])
				if !ClampMSS(p, 1300, partial) || binary.BigEndian.Uint16(p[42+nops:]) != 1300 {
					t.Fatalf("MSS % x", p[40:])
				}
				if partial && binary.BigEndian.Uint16(p[36:]) != before || !partial && !transportOK(p) {
					t.Error("checksum")
				}
				if ClampMSS(p, 1300, partial) || ClampMSS(p, 1301, partial) {
					t.Error("changed what fits")
				}
			})
		}
	}
	ack := syn(1460, 0)
	ack[33] = tcpACK
	if ClampMSS(ack, 1, false) || ClampMSS(IPv4(ipv4(0, 1, 0, 9, 17, podA, podB, ack[20:])), 1, false) {
		t.Error("changed what is no SYN")
	}
}

func TestCopyDSCP(t *testing.T) {
	outer, inner := IPv4(ipv4(0xbb, 1, 0, 9, 4, nodeA, nodeB, nil)), IPv4(ipv4(0x01, 1, 0, 9, 17, podA, podB, nil))
	CopyDSCP(outer, inner)
	if inner.TOS() != 0xb9 || naiveSum(inner, 0) != 0xffff {
		t.Errorf("type of service %#x, sum %#x", inner.TOS(), naiveSum(inner, 0))
	}
}

func TestHasSourceRoute(t *testing.T) {
	for _, c := range []struct {
		options []byte
		want    bool
	}{
		{nil, false},
		{[]byte{1, 1, 1, 1}, false},
		{[]byte{7, 7, 4, 0, 0, 0, 0}, false},
		{[]byte{0x83, 7, 4, 10, 244, 2, 9}, true},
		{[]byte{0x83, 7, 8, 10, 244, 2, 9}, true}, // at its end
		{[]byte{1, 0x89, 3, 4}, true},
		{[]byte{0x94, 4, 0, 0, 0x89, 3, 4}, true},
		{[]byte{7, 7, 4, 0x83, 7, 4, 0}, false}, // inside another option
		{[]byte{0, 0x83, 7, 4}, false},          // behind the end
		{[]byte{0x94, 0, 0x83, 7}, false},
		{[]byte{0x94, 1, 0x83, 7}, false},
		{[]byte{0x94, 255, 0x83, 7}, false},
		{[]byte{1, 1, 1, 0x94}, false},
	} {
		if got := HasSourceRoute(withOptions(ipv4(0, 1, 0, 9, 4, nodeA, nodeB, nil), c.options)); got != c.want {
			t.Errorf("% x: %v", c.options, got)
		}
	}
}

// FuzzRouter gives a packet to everything that a router does with one, and checks what must hold whatever is in it.
func FuzzRouter(f *testing.F) {
	f.Add([]byte(syn(1460, 1)), uint16(1000), uint16(1300))
	f.Add(withOptions(ipv4(0, 1, 0, 9, 17, podA, podB, pattern(300)), []byte{7, 7, 4, 0, 0, 0, 0, 0x94, 4, 0, 0}), uint16(100), uint16(1))
	f.Add(ipv4(0, 1, flagMF|8, 9, 1, podA, podB, pattern(64)), uint16(68), uint16(0))
	f.Fuzz(func(t *testing.T, b []byte, mtu, mss uint16) {
		if len(b) >= 20 && int(b[0]&15)<<2 >= 20 && int(b[0]&15)<<2 <= len(b) { // past the checksum, which a fuzzer cannot guess
			setHeaderChecksum(b)
		}
		p, fault := ParseIPv4(b)
		if fault != FaultNone {
			return
		}
		orig := bytes.Clone(b)
		HasSourceRoute(p)
		answer := make([]byte, MaxICMPError)
		if MayAnswer(p) {
			n := PutICMPError(answer, p, ICMPError{Type: ICMPUnreachable, Code: CodeFragNeeded}, nodeA, 1)
			reply, fault := ParseIPv4(answer[:n])
			if fault != FaultNone || MayAnswer(reply) {
				t.Fatalf("answer: %v; may be answered again: %v", fault, MayAnswer(reply))
			}
			if _, ok := ParseFragNeeded(reply); !ok {
				t.Fatal("the answer cannot be read")
			}
		}
		if out, fault := fragmentsOf(p, max(int(mtu), 68)); fault == FaultNone && !bytes.Equal(reassemble(t, out), p.Payload()) {
			t.Fatal("fragments")
		}
		if !bytes.Equal(b, orig) {
			t.Fatal("the packet was changed")
		}
		if ok := transportOK(b); ClampMSS(p, mss, false) && len(p) == len(b) && ok && p.Protocol() == ProtocolTCP && !p.MF() && !transportOK(b) {
			t.Fatal("a right checksum became wrong")
		}
	})
}

// FuzzFragNeeded: whatever comes to the ICMP socket, what is read lies within it.
func FuzzFragNeeded(f *testing.F) {
	b := make([]byte, MaxICMPError)
	n := PutICMPError(b, IPv4(ipv4(0, 1, flagDF, 9, 4, nodeA, nodeB, pattern(40))), ICMPError{Type: 3, Code: 4, Rest: 1400}, nodeB, 1)
	f.Add(b[:n])
	f.Add(b[:48])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 28 && b[0] == 0x45 {
			binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
			setHeaderChecksum(b)
			b[22], b[23] = 0, 0
			binary.BigEndian.PutUint16(b[22:], ^naiveSum(b[20:], 0))
		}
		m, ok := ParseFragNeeded(b)
		if ok && (len(m.Quoted) < 20 || len(m.Quoted) > len(b)-28 || m.MTU < 0 || m.MTU > 65535) {
			t.Fatalf("%+v", m)
		}
	})
}
