package packet

import (
	"bytes"
	"encoding/binary"
	"testing"

	"pgregory.net/rapid"
)

// pattern returns n bytes in which no two places look alike for long.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// superTCP returns a TCP superpacket with n bytes of payload; its TCP checksum is nonsense, as a partial one is.
func superTCP(n int, flags uint8, options []byte) IPv4 {
	tcp := make([]byte, 20, 20+len(options)+n)
	binary.BigEndian.PutUint16(tcp, 40000)
	binary.BigEndian.PutUint16(tcp[2:], 5201)
	binary.BigEndian.PutUint32(tcp[4:], 0xfffffc00) // wraps after 1024 bytes
	binary.BigEndian.PutUint32(tcp[8:], 0x01020304)
	tcp[12], tcp[13] = byte(20+len(options))<<2, flags
	tcp[16], tcp[17] = 0xab, 0xcd
	tcp = append(append(tcp, options...), pattern(n)...)
	return IPv4(ipv4(0x02, 0xfffe, 0x4000, 64, ProtocolTCP, podA, podB, tcp))
}

func superUDP(n int) IPv4 {
	udp := make([]byte, 8, 8+n)
	binary.BigEndian.PutUint16(udp, 40000)
	binary.BigEndian.PutUint16(udp[2:], 443)
	binary.BigEndian.PutUint16(udp[4:], uint16(8+n))
	udp[6], udp[7] = 0xab, 0xcd
	return IPv4(ipv4(0, 0xfffe, 0, 64, ProtocolUDP, podA, podB, append(udp, pattern(n)...)))
}

type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

// checkTCP splits pkt and holds every property of the result against the original, naively.
func checkTCP(t fataler, pkt IPv4, gso int, scratch []byte) int {
	t.Helper()
	hl := pkt.HeaderLen()
	thl := int(pkt[hl+12]>>4) * 4
	orig := bytes.Clone(pkt)
	var got []byte
	count := 0
	pieces := max(1, (len(pkt)-hl-thl+gso-1)/gso)
	fault := SegmentTCP(pkt, gso, scratch, func(b []byte) {
		p, f := ParseIPv4(b)
		if f != FaultNone || len(p) != len(b) {
			t.Fatalf("piece %d: fault %v, length %d of %d", count, f, len(p), len(b))
		}
		if !transportOK(b) {
			t.Fatalf("piece %d: wrong TCP checksum", count)
		}
		// What must differ is made equal; the rest of the headers must then be the original's.
		want := bytes.Clone(orig[:hl+thl])
		binary.BigEndian.PutUint16(want[2:], uint16(len(b)))
		binary.BigEndian.PutUint16(want[4:], uint16(int(IPv4(orig).ID())+count))
		copy(want[10:12], b[10:12])
		binary.BigEndian.PutUint32(want[hl+4:], binary.BigEndian.Uint32(orig[hl+4:])+uint32(len(got)))
		if count > 0 {
			want[hl+13] &^= 0x80
		}
		if count < pieces-1 {
			want[hl+13] &^= 0x09
			if len(b) != hl+thl+gso {
				t.Fatalf("piece %d: %d bytes of payload, want %d", count, len(b)-hl-thl, gso)
			}
		}
		copy(want[hl+16:hl+18], b[hl+16:hl+18])
		if !bytes.Equal(want, b[:hl+thl]) {
			t.Fatalf("piece %d\nheaders %x\nwant    %x", count, b[:hl+thl], want)
		}
		got = append(got, b[hl+thl:]...)
		count++
	})
	if fault != FaultNone {
		t.Fatalf("fault %v", fault)
	}
	if count != pieces || !bytes.Equal(got, orig[hl+thl:]) || !bytes.Equal(pkt, orig) {
		t.Fatalf("%d pieces, want %d; %d bytes of payload, want %d, unchanged", count, pieces, len(got), len(orig)-hl-thl)
	}
	return count
}

func checkUDP(t fataler, pkt IPv4, gso int, scratch []byte) {
	t.Helper()
	hl := pkt.HeaderLen()
	orig := bytes.Clone(pkt)
	var got []byte
	count := 0
	fault := SegmentUDP(pkt, gso, scratch, func(b []byte) {
		p, f := ParseIPv4(b)
		if f != FaultNone || len(p) != len(b) || !transportOK(b) || b[hl+6]|b[hl+7] == 0 {
			t.Fatalf("piece %d: fault %v, length %d of %d, checksum right: %v", count, f, len(p), len(b), transportOK(b))
		}
		want := bytes.Clone(orig[:hl+8])
		binary.BigEndian.PutUint16(want[2:], uint16(len(b)))
		binary.BigEndian.PutUint16(want[4:], uint16(int(IPv4(orig).ID())+count))
		copy(want[10:12], b[10:12])
		binary.BigEndian.PutUint16(want[hl+4:], uint16(len(b)-hl))
		copy(want[hl+6:hl+8], b[hl+6:hl+8])
		if !bytes.Equal(want, b[:hl+8]) {
			t.Fatalf("piece %d\nheaders %x\nwant    %x", count, b[:hl+8], want)
		}
		got = append(got, b[hl+8:]...)
		count++
	})
	if want := max(1, (len(pkt)-hl-8+gso-1)/gso); fault != FaultNone || count != want || !bytes.Equal(got, orig[hl+8:]) {
		t.Fatalf("fault %v, %d pieces, want %d; %d bytes of payload, want %d", fault, count, want, len(got), len(orig)-hl-8)
	}
}

func TestSegmentTCP(t *testing.T) {
	timestamps := []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}
	scratch := make([]byte, MaxTotalLen)
	for _, c := range []struct{ payload, gso, want int }{
		{0, 1448, 1}, {1, 1448, 1}, {1448, 1448, 1}, {1449, 1448, 2}, {2896, 1448, 2}, {60000, 1448, 42}, {10, 1, 10}, {100, 65535, 1},
		{MaxTotalLen - 52, 1448, 46},
	} {
		if got := checkTCP(t, superTCP(c.payload, 0x99, timestamps), c.gso, scratch); got != c.want {
			t.Errorf("%d bytes by %d: %d packets, want %d", c.payload, c.gso, got, c.want)
		}
	}
}

func TestSegmentRandom(t *testing.T) {
	scratch := make([]byte, MaxTotalLen)
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 20000).Draw(t, "payload")
		gso := rapid.IntRange(1, 9000).Draw(t, "gso")
		flags := rapid.Uint8().Draw(t, "flags")
		options := make([]byte, 4*rapid.IntRange(0, 10).Draw(t, "option words"))
		checkTCP(t, superTCP(n, flags, options), gso, scratch)
		checkUDP(t, superUDP(n), gso, scratch)
	})
}

func TestSegmentScratchExact(t *testing.T) {
	checkTCP(t, superTCP(5000, 0x18, nil), 1000, make([]byte, 40+1000))
	checkTCP(t, superTCP(500, 0x18, nil), 1000, make([]byte, 40+500))
	checkUDP(t, superUDP(5000), 1000, make([]byte, 28+1000))
}

func TestSegmentFaults(t *testing.T) {
	scratch := make([]byte, 4096)
	with := func(p IPv4, at int, v byte) IPv4 { p[at] = v; return p }
	type segment func(IPv4, int, []byte, func([]byte)) Fault
	for _, c := range []struct {
		name    string
		f       segment
		pkt     IPv4
		gso     int
		scratch []byte
		want    Fault
	}{
		{"gso 0", SegmentTCP, superTCP(3000, 0, nil), 0, scratch, FaultGSO},
		{"gso negative", SegmentUDP, superUDP(3000), -1, scratch, FaultGSO},
		{"gso too large", SegmentUDP, superUDP(3000), MaxTotalLen + 1, scratch, FaultGSO},
		{"scratch", SegmentTCP, superTCP(3000, 0, nil), 1000, scratch[:1039], FaultShort},
		{"scratch for UDP", SegmentUDP, superUDP(3000), 1000, scratch[:1027], FaultShort},
		{"no scratch", SegmentTCP, superTCP(0, 0, nil), 1000, nil, FaultShort},
		{"no packet", SegmentTCP, nil, 1000, scratch, FaultShort},
		{"IHL 0", SegmentTCP, with(superTCP(10, 0, nil), 0, 0x40), 1000, scratch, FaultHeaderLen},
		{"too large", SegmentTCP, make(IPv4, MaxTotalLen+1), 1000, scratch, FaultTotalLen},
		{"UDP as TCP", SegmentTCP, superUDP(3000), 1000, scratch, FaultProtocol},
		{"TCP as UDP", SegmentUDP, superTCP(3000, 0, nil), 1000, scratch, FaultProtocol},
		{"fragment", SegmentTCP, with(superTCP(3000, 0, nil), 6, 0x20), 1000, scratch, FaultFragment},
		{"data offset 4", SegmentTCP, with(superTCP(3000, 0, nil), 32, 0x40), 1000, scratch, FaultTransport},
		{"data offset past the end", SegmentTCP, with(superTCP(3, 0, nil), 32, 0xf0), 1000, scratch, FaultTransport},
		{"TCP cut short", SegmentTCP, superTCP(0, 0, nil)[:39], 1000, scratch, FaultTransport},
		{"UDP cut short", SegmentUDP, superUDP(0)[:27], 1000, scratch, FaultTransport},
		{"UDP length", SegmentUDP, with(superUDP(3000), 25, 0), 1000, scratch, FaultTransport},
	} {
		emitted := 0
		if got := c.f(c.pkt, c.gso, c.scratch, func([]byte) { emitted++ }); got != c.want || emitted != 0 {
			t.Errorf("%s: fault %v, want %v; %d emitted", c.name, got, c.want, emitted)
		}
	}
}
