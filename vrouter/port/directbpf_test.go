package port

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// randomFrame is a frame of a pod's: most are what the programs decide about.
func randomFrame(rnd *rand.Rand) []byte {
	b := make([]byte, 60+rnd.IntN(40))
	for i := range b {
		b[i] = byte(rnd.Uint32())
	}
	copy(b, []byte{0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0})
	binary.BigEndian.PutUint16(b[16:], uint16(len(b)-ethernetHeader))
	binary.BigEndian.PutUint16(b[20:], 0x4000) // DF
	b[22], b[23] = 64, []byte{1, 6, 17, 17, 132, 33, 136, 47}[rnd.IntN(8)]
	copy(b[26:], []byte{10, 244, 1, byte(rnd.IntN(4))})
	copy(b[30:], []byte{10, 244, byte(rnd.IntN(4)), byte(rnd.IntN(4) * 32)})
	binary.BigEndian.PutUint16(b[34:], uint16(rnd.IntN(3)))
	binary.BigEndian.PutUint16(b[36:], uint16(rnd.IntN(3)))
	if b[23] == 1 {
		b[34] = byte(rnd.IntN(14))
	}
	switch rnd.IntN(12) { // and some are not
	case 0:
		b[0] |= 1 // a group address
	case 1:
		b[12] = 0x86
	case 2:
		b[14] = 0x46
	case 3:
		b[20] |= 0x20
	case 4:
		b[21] = 1
	}
	b[24], b[25] = 0, 0
	binary.BigEndian.PutUint16(b[24:], packet.Checksum(b[ethernetHeader:headersLen], 0))
	return b
}

// isOwned is the naive twin of steering.classify.
func isOwned(b []byte, owned []netip.Prefix, flows map[vrouter.Flow]bool) bool {
	if b[0]&1 != 0 || binary.BigEndian.Uint16(b[12:]) != 0x0800 || b[14] != 0x45 || binary.BigEndian.Uint16(b[20:])&0x3fff != 0 {
		return false
	}
	from, to := netip.AddrFrom4([4]byte(b[26:30])), netip.AddrFrom4([4]byte(b[30:34]))
	switch b[23] {
	case 1:
		switch b[34] {
		case 3, 4, 5, 11, 12:
			return false
		}
	case 6, 17, 132, 33, 136:
		if flows[vrouter.Flow{Source: netip.AddrPortFrom(from, binary.BigEndian.Uint16(b[34:])),
			Destination: netip.AddrPortFrom(to, binary.BigEndian.Uint16(b[36:])), Protocol: b[23]}] {
			return false
		}
	}
	for _, p := range owned {
		if p.Contains(to) {
			return true
		}
	}
	return false
}

// TestClassify: the program says what its naive twin says, before and after the gate is opened. The three kinds of program have
// the same instructions but for their ends.
func TestClassify(t *testing.T) {
	s, err := newSteering(IOXDP)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	rnd := rand.New(rand.NewPCG(1, 2))
	owned := []netip.Prefix{netip.MustParsePrefix("10.244.2.0/26"), netip.MustParsePrefix("10.244.1.32/32"), netip.MustParsePrefix("10.244.3.64/27")}
	for _, p := range append(owned, netip.MustParsePrefix("10.244.0.0/24")) {
		if err := s.own(p, ownedRoute, true, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.own(netip.MustParsePrefix("10.244.0.0/24"), ownedRoute, false, 0); err != nil {
		t.Fatal(err)
	}
	flows := map[vrouter.Flow]bool{}
	for range 40 {
		b := randomFrame(rnd)
		f := vrouter.Flow{Source: netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[26:30])), binary.BigEndian.Uint16(b[34:])),
			Destination: netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[30:34])), binary.BigEndian.Uint16(b[36:])), Protocol: b[23]}
		flows[f] = true
		if err := s.remember([]vrouter.Flow{f}); err != nil {
			t.Fatal(err)
		}
	}
	// A test run's packets come by the loopback device.
	for _, open := range []bool{false, true} {
		if err := s.take(loopbackIndex, 0, netip.MustParseAddr("10.244.1.1"), open); err != nil {
			t.Fatal(err)
		}
		ours, asked := 0, 0
		for range 4000 {
			b := randomFrame(rnd)
			want := open && isOwned(b, owned, flows)
			if want {
				ours++
			}
			verdict, _, err := s.claim.Test(b)
			if err != nil {
				t.Fatal(err)
			}
			if got := verdict == tcxPass; got != want {
				t.Fatalf("claimed %v, expected %v: % x", got, want, b)
			}
			// What a trace says of the same: it asks about whole packets, at interfaces that are taken.
			if _, fault := packet.ParseIPv4(b[ethernetHeader:]); open && fault == packet.FaultNone && b[0]&1 == 0 && b[12] == 8 {
				asked++
				if why := s.leaves(b[ethernetHeader:]); (why == "") != want {
					t.Fatalf("claimed %v, and why it is left to the kernel: %q: % x", want, why, b)
				}
			}
		}
		if open && (ours < 400 || ours > 3600 || asked < 2000) {
			t.Errorf("%d of 4000 frames are ours, %d were asked about: the test decides nothing", ours, asked)
		}
	}
}
