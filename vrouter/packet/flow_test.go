package packet

import (
	"math/bits"
	"testing"
)

// flowPacket is a packet with ports.
func flowPacket(src, dst [4]byte, proto uint8, frag, sport, dport uint16) IPv4 {
	l4 := []byte{byte(sport >> 8), byte(sport), byte(dport >> 8), byte(dport), 1, 2, 3, 4}
	return ipv4(0, 7, frag, 64, proto, src, dst, l4)
}

func TestFlowHash(t *testing.T) {
	a, b := [4]byte{10, 0, 0, 1}, [4]byte{10, 0, 1, 1}
	base := flowPacket(a, b, ProtocolTCP, 0, 1000, 80)
	for _, c := range []struct {
		name string
		p    IPv4
		same bool
	}{
		{"another payload, TTL and TOS", func() IPv4 { p := append(IPv4(nil), base...); p[1], p[8], p[27] = 9, 3, 9; return p }(), true},
		{"another source port", flowPacket(a, b, ProtocolTCP, 0, 1001, 80), false},
		{"another destination port", flowPacket(a, b, ProtocolTCP, 0, 1000, 81), false},
		{"another protocol", flowPacket(a, b, ProtocolUDP, 0, 1000, 80), false},
		{"the other direction", flowPacket(b, a, ProtocolTCP, 0, 80, 1000), false},
		{"another source", flowPacket([4]byte{10, 0, 0, 2}, b, ProtocolTCP, 0, 1000, 80), false},
		{"don't fragment set", flowPacket(a, b, ProtocolTCP, flagDF, 1000, 80), true},
	} {
		if got := FlowHash(c.p) == FlowHash(base); got != c.same {
			t.Errorf("%s: same hash: %v", c.name, got)
		}
	}
	// The first fragment and the others, which have payload where ports would be.
	first := FlowHash(flowPacket(a, b, ProtocolUDP, flagMF, 1000, 80))
	if next := FlowHash(flowPacket(a, b, ProtocolUDP, 185, 4, 5)); next != first {
		t.Error("fragments of a packet are in different flows")
	}
	// ICMP has no ports: an identifier is none.
	if FlowHash(flowPacket(a, b, 1, 0, 1, 2)) != FlowHash(flowPacket(a, b, 1, 0, 3, 4)) {
		t.Error("pings of one pair of hosts are in different flows")
	}
	// Cut off before the ports, and with options before them.
	if p := ipv4(0, 7, 0, 64, ProtocolTCP, a, b, []byte{1, 2}); FlowHash(p) == 0 {
		t.Error("no hash without ports")
	}
	if n := testing.AllocsPerRun(100, func() { FlowHash(base) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Each bit of the ports and the addresses changes about half of the hash's bits, on average over many flows.
func TestFlowHashAvalanche(t *testing.T) {
	changed := make(map[int]int)
	const flows = 500
	for n := range flows {
		src, dst := [4]byte{10, 1, byte(n >> 4), byte(n)}, [4]byte{10, 2, 0, byte(n * 7)}
		p := flowPacket(src, dst, ProtocolTCP, 0, uint16(32768+n), 443)
		before := FlowHash(p)
		for bit := offSrc * 8; bit < 24*8; bit++ {
			p[bit/8] ^= 0x80 >> (bit % 8)
			changed[bit] += bits.OnesCount32(FlowHash(p) ^ before)
			p[bit/8] ^= 0x80 >> (bit % 8)
		}
	}
	for bit, n := range changed {
		if mean := float64(n) / flows; mean < 10 || mean > 22 {
			t.Errorf("bit %d changes %.1f bits of 32", bit, mean)
		}
	}
}
