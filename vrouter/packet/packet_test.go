package packet

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// naiveSum is the naive twin of Sum: one word at a time, as RFC 1071 writes it.
func naiveSum(b []byte, initial uint32) uint16 {
	s := uint64(initial)
	for i := 0; i < len(b); i += 2 {
		w := uint64(b[i]) << 8
		if i+1 < len(b) {
			w |= uint64(b[i+1])
		}
		s += w
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// unhex reads an annotated byte table: everything behind "//" on a line, and all white space, is comment.
func unhex(t testing.TB, table string) []byte {
	t.Helper()
	var digits strings.Builder
	for line := range strings.Lines(table) {
		line, _, _ = strings.Cut(line, "//")
		digits.WriteString(strings.Join(strings.Fields(line), ""))
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ipv4 builds a valid packet without the code under test: a header of 20 bytes and the payload.
func ipv4(tos uint8, id, frag uint16, ttl, proto uint8, src, dst [4]byte, payload []byte) []byte {
	b := make([]byte, 20, 20+len(payload))
	b[0], b[1], b[8], b[9] = 0x45, tos, ttl, proto
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], frag)
	copy(b[12:], src[:])
	copy(b[16:], dst[:])
	binary.BigEndian.PutUint16(b[10:], ^naiveSum(b, 0))
	return append(b, payload...)
}

var (
	podA  = [4]byte{10, 244, 0, 1}
	podB  = [4]byte{10, 244, 0, 65}
	nodeA = [4]byte{198, 18, 0, 1}
	nodeB = [4]byte{198, 18, 0, 2}
)

func TestSumAgainstNaive(t *testing.T) {
	// Sums are equal modulo 2^16-1; 0 and 0xffff stand for the same number, but only a sum of nothing but zeros may
	// be 0, and in both implementations it is.
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "b")
		initial := rapid.Uint32().Draw(t, "initial")
		if got, want := Sum(b, initial), naiveSum(b, initial); got != want {
			t.Fatalf("Sum = %#04x, naive %#04x", got, want)
		}
	})
	for n := range 100 { // all carries at once, at every length
		b := bytes.Repeat([]byte{0xff}, n)
		for _, initial := range []uint32{0, 1, 0xffff, 0xffffffff} {
			if got, want := Sum(b, initial), naiveSum(b, initial); got != want {
				t.Fatalf("%d × ff, initial %#x: Sum = %#04x, naive %#04x", n, initial, got, want)
			}
		}
	}
}

// The example of RFC 1071 section 3.
func TestSumRFC1071(t *testing.T) {
	if got := Sum([]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}, 0); got != 0xddf2 {
		t.Errorf("Sum = %#04x, want 0xddf2", got)
	}
}

func TestParseIPv4(t *testing.T) {
	b := unhex(t, `
		46       // version 4, IHL 6: one word of options
		b9       // DSCP 46, ECT(1)
		00 1c    // total length 28
		12 34    // identification
		20 05    // MF, offset 5 × 8
		40       // TTL 64
		11       // UDP
		00 00    // checksum, filled in below
		0a f4 00 01   0a f4 00 41
		01 01 01 00   // options: NOP NOP NOP EOL
		de ad be ef
		00 00 00      // padding of the link layer`)
	binary.BigEndian.PutUint16(b[10:], ^naiveSum(b[:24], 0))
	p, fault := ParseIPv4(b)
	if fault != FaultNone {
		t.Fatalf("fault %v", fault)
	}
	if len(p) != 28 || cap(p) != 28 {
		t.Errorf("len %d, cap %d, want 28: the view ends with the packet", len(p), cap(p))
	}
	type fields struct {
		hl, total, off int
		tos, ttl, prot uint8
		id             uint16
		df, mf, frag   bool
		src, dst       netip.Addr
		srcN, dstN     uint32
		payload        string
	}
	got := fields{p.HeaderLen(), p.TotalLen(), p.FragOffset(), p.TOS(), p.TTL(), p.Protocol(), p.ID(), p.DF(), p.MF(),
		p.IsFragment(), p.Src(), p.Dst(), p.SrcU32(), p.DstU32(), hex.EncodeToString(p.Payload())}
	want := fields{24, 28, 40, 0xb9, 64, 17, 0x1234, false, true, true, netip.AddrFrom4(podA), netip.AddrFrom4(podB),
		0x0af40001, 0x0af40041, "deadbeef"}
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestIsFragment(t *testing.T) {
	for frag, want := range map[uint16]bool{0: false, 0x4000: false, 0x8000: false, 0x2000: true, 1: true, 0x2001: true, 0x1fff: true} {
		p, _ := ParseIPv4(ipv4(0, 1, frag, 64, 17, podA, podB, nil))
		if p.IsFragment() != want {
			t.Errorf("fragment word %#04x: IsFragment = %v", frag, !want)
		}
	}
}

func TestParseIPv4Faults(t *testing.T) {
	// fix makes the checksum right again after a change, so that only the change is wrong.
	fix := func(b []byte, hl int) {
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], ^naiveSum(b[:hl], 0))
	}
	for _, c := range []struct {
		name   string
		change func(b []byte) []byte
		want   Fault
	}{
		{"nothing", func(b []byte) []byte { return nil }, FaultShort},
		{"19 bytes", func(b []byte) []byte { return b[:19] }, FaultShort},
		{"version 6", func(b []byte) []byte { b[0] = 0x65; return b }, FaultVersion},
		{"version 0", func(b []byte) []byte { b[0] = 0x05; return b }, FaultVersion},
		{"IHL 4", func(b []byte) []byte { b[0] = 0x44; fix(b, 16); return b }, FaultHeaderLen},
		{"IHL past the end", func(b []byte) []byte { b[0] = 0x4f; return b }, FaultHeaderLen},
		{"total length 0", func(b []byte) []byte { b[2], b[3] = 0, 0; fix(b, 20); return b }, FaultTotalLen},
		{"total length 19", func(b []byte) []byte { b[3] = 19; fix(b, 20); return b }, FaultTotalLen},
		{"total length less than options", func(b []byte) []byte { b[0], b[3] = 0x46, 20; fix(b, 24); return b }, FaultTotalLen},
		{"cut short", func(b []byte) []byte { return b[:len(b)-1] }, FaultTotalLen},
		{"a flipped bit", func(b []byte) []byte { b[15] ^= 1; return b }, FaultChecksum},
		{"checksum 0", func(b []byte) []byte { b[10], b[11] = 0, 0; return b }, FaultChecksum},
		{"good", func(b []byte) []byte { return b }, FaultNone},
	} {
		p, got := ParseIPv4(c.change(ipv4(0, 1, 0, 64, 17, podA, podB, make([]byte, 8))))
		if got != c.want {
			t.Errorf("%s: fault %v, want %v", c.name, got, c.want)
		}
		if (p == nil) != (got != FaultNone) {
			t.Errorf("%s: a view and a fault, or neither", c.name)
		}
	}
}

func TestFaultNames(t *testing.T) {
	seen := make(map[string]bool)
	for f := range faultCount {
		if s := f.String(); s == "" || s == "unknown" || seen[s] {
			t.Errorf("fault %d is named %q", f, s)
		} else {
			seen[s] = true
		}
	}
	if s := faultCount.String(); s != "unknown" {
		t.Errorf("beyond the last: %q", s)
	}
}

func TestDecrementTTL(t *testing.T) {
	for id := range 1 << 16 { // every value of the checksum's neighbourhood, 0x0000 and 0xffff among them
		b := ipv4(0, uint16(id), 0, uint8(id), 17, podA, podB, nil)
		p, _ := ParseIPv4(b)
		DecrementTTL(p)
		want := uint8(id)
		if want > 0 {
			want--
		}
		if _, fault := ParseIPv4(b); fault != FaultNone || p.TTL() != want {
			t.Fatalf("id %#x: fault %v, TTL %d, want %d", id, fault, p.TTL(), want)
		}
	}
}

func TestCompleteChecksum(t *testing.T) {
	payload := []byte("nine odd.")
	udp := append([]byte{0x30, 0x39, 0, 53, 0, byte(8 + len(payload)), 0, 0}, payload...)
	b := ipv4(0, 1, 0, 64, 17, podA, podB, udp)
	p, _ := ParseIPv4(b)
	binary.BigEndian.PutUint16(b[26:], uint16(PseudoSum(p, len(udp))))
	if !CompleteChecksum(b, 20, 6) {
		t.Fatal("refused")
	}
	if !transportOK(b) {
		t.Errorf("wrong checksum %x", b[26:28])
	}

	// All zeros sum to 0, whose complement is 0xffff; all ones to 0xffff, whose complement 0 must not be sent.
	ones := []byte{0xff, 0xff, 0xff, 0xff}
	if !CompleteChecksum(ones, 0, 2) || ones[2] != 0xff || ones[3] != 0xff {
		t.Errorf("a result of 0 was written as %x", ones[2:])
	}

	for _, c := range [][2]int{{-1, 6}, {20, -1}, {len(b), 0}, {len(b) + 1, 0}, {20, len(b) - 21}, {1 << 62, 1 << 62}, {0, 1<<63 - 1}} {
		before := bytes.Clone(b)
		if CompleteChecksum(b, c[0], c[1]) || !bytes.Equal(b, before) {
			t.Errorf("start %d, offset %d: accepted, or changed the packet", c[0], c[1])
		}
	}
	if !CompleteChecksum(b, 20, len(b)-22) {
		t.Error("a field at the very end refused")
	}
}

// transportOK verifies the TCP or UDP checksum of a packet with a 20-byte header the naive way.
func transportOK(b []byte) bool {
	hl := int(b[0]&15) * 4
	pseudo := append(bytes.Clone(b[12:20]), 0, b[9], byte((len(b)-hl)>>8), byte(len(b)-hl))
	return naiveSum(b[hl:], uint32(naiveSum(pseudo, 0))) == 0xffff
}

func TestHeaderSum(t *testing.T) {
	check := func(t rapid.TB, h [IPv4MinLen]byte) {
		h[0] |= 1 // a header is not all zeros
		want := naiveSum(h[:], 0)
		if got := headerSum(binary.BigEndian.Uint64(h[:]), binary.BigEndian.Uint64(h[8:]), binary.BigEndian.Uint32(h[16:])); got != want {
			t.Fatalf("%x: %04x, want %04x", h, got, want)
		}
		if got := validHeader(&h); got != (want == 0xffff) {
			t.Fatalf("%x, whose sum is %04x: valid %v", h, want, got)
		}
		binary.BigEndian.PutUint16(h[offChecksum:], 0)
		binary.BigEndian.PutUint16(h[offChecksum:], ^naiveSum(h[:], 0))
		if !validHeader(&h) {
			t.Fatalf("%x: invalid", h)
		}
	}
	check(t, [IPv4MinLen]byte{})
	check(t, [IPv4MinLen]byte(bytes.Repeat([]byte{0xff}, IPv4MinLen)))
	rapid.Check(t, func(t *rapid.T) {
		check(t, [IPv4MinLen]byte(rapid.SliceOfN(rapid.SampledFrom([]byte{0, 1, 0x7f, 0x80, 0xfe, 0xff}), IPv4MinLen, IPv4MinLen).Draw(t, "h")))
	})
}
