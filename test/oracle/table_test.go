package oracle

import "net/netip"

// testCase is an input with a name.
type testCase struct {
	name string
	input
}

// table is the hand-written list.
func table() []testCase {
	var all []testCase
	add := func(name string, d direction, s spec) {
		if !s.src.IsValid() {
			if s.src = podHost; d == inward {
				s.src = remoteHost
			}
		}
		if !s.dst.IsValid() {
			if s.dst = remoteHost; d == inward {
				s.dst = podHost
			}
		}
		if s.protocol == 0 {
			s.protocol = 17
		}
		if s.payload == nil {
			s.payload = payloadOf(40)
		}
		pod := s.src
		if d == inward {
			pod = s.dst
		}
		all = append(all, testCase{name, input{d, build(s), pod}})
	}
	// Every case that counts errors has a sender of its own: the kernel limits them for each.
	pod := func(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 245, 254, n}) }
	const df = 0x4000

	add("plain", outward, spec{ttl: 64})
	add("plain, inward", inward, spec{ttl: 64})
	for tos := range 256 {
		add("type of service", outward, spec{ttl: 64, tos: byte(tos)})
		add("type of service, inward", inward, spec{ttl: 64, tos: byte(tos)})
	}
	for i, ttl := range []byte{0, 1, 2, 3, 255} {
		add("TTL", outward, spec{ttl: ttl, src: pod(byte(i))})
		add("TTL, inward", inward, spec{ttl: ttl})
		add("TTL, echo", outward, spec{ttl: ttl, protocol: 1, payload: []byte{8, 0, 0, 0, 1, 2, 3, 4}, src: pod(byte(i))})
		add("TTL, ICMP error", outward, spec{ttl: ttl, protocol: 1, payload: append([]byte{3, 1, 0, 0, 0, 0, 0, 0}, payloadOf(28)...), src: pod(byte(i))})
		add("TTL, redirect", outward, spec{ttl: ttl, protocol: 1, payload: append([]byte{5, 1, 0, 0, 0, 0, 0, 0}, payloadOf(28)...), src: pod(byte(i))})
		add("TTL, ICMP of an unknown type", outward, spec{ttl: ttl, protocol: 1, payload: []byte{200, 0, 0, 0}, src: pod(byte(i))})
		add("TTL, ICMP without a byte", outward, spec{ttl: ttl, protocol: 1, payload: []byte{}, src: pod(byte(i))})
		add("TTL, first fragment", outward, spec{ttl: ttl, fragment: 0x2000, payload: payloadOf(64), src: pod(byte(i))})
		add("TTL, later fragment", outward, spec{ttl: ttl, fragment: 0x2008, payload: payloadOf(64), src: pod(byte(i))})
		add("TTL, last fragment", outward, spec{ttl: ttl, fragment: 8, src: pod(byte(i))})
	}
	for i, size := range []int{0, 1, 520, 527, 528, 529, 1459, 1460, 1461, 1479, 1480, 1481, 2911, 2912, 2913, 8000, 65515} {
		for j, fragment := range []uint16{0, df, 0x2000, 0x2001, 1, df | 1, df | 0x2000} {
			if fragment&0x1fff != 0 && size > 60000 {
				continue // longer than a whole may be
			}
			src := netip.AddrFrom4([4]byte{10, 245, 253, byte(i*8 + j)})
			add("size", outward, spec{ttl: 64, payload: payloadOf(size), fragment: fragment, src: src})
			if size <= 1460 { // the underlay carries no more
				add("size, inward", inward, spec{ttl: 64, payload: payloadOf(size), fragment: fragment})
			}
		}
	}
	for i, o := range [][]byte{
		{1, 1, 1, 1}, {0, 0, 0, 0}, {0x94, 4, 0, 0}, {0x5e, 6, 1, 2, 3, 4}, {0x83, 7, 4, 10, 244, 2, 9}, {0x89, 3, 4, 0},
		{7, 7, 4, 0, 0, 0, 0}, {7, 7, 8, 1, 2, 3, 4}, {0x44, 8, 9, 0, 0, 0, 0, 0}, {0x44, 8, 9, 0xe1, 0, 0, 0, 0},
		{1, 1, 1, 7}, {7, 2, 0, 0}, {7, 7, 3, 0, 0, 0, 0, 0}, {0x44, 4, 5, 0xf0}, {0x94, 3, 0, 0}, {0x5e, 1, 0, 0}, {0x5e, 9, 0, 0},
	} {
		add("options", outward, spec{ttl: 64, options: o, src: pod(100 + byte(i))})
		add("options, to be fragmented", outward, spec{ttl: 64, options: o, payload: payloadOf(2000), src: pod(100 + byte(i))})
		add("options, inward", inward, spec{ttl: 64, options: o})
	}
	for i, dst := range []string{
		"10.244.5.5", "10.244.7.5", "192.0.2.1", "0.0.0.0", "0.0.0.1", "127.0.0.1", "127.9.9.9", "169.254.1.1", "224.0.0.1", "224.0.1.1",
		"239.1.1.1", "240.0.0.1", "255.255.255.255", "10.245.64.255", "198.18.0.2",
	} {
		if dst != "192.0.2.1" && dst != "198.18.0.2" && dst != "169.254.1.1" && dst != "240.0.0.1" { // these the node's other routes have
			add("destination "+dst, outward, spec{ttl: 64, dst: addr(dst), src: pod(200 + byte(i))})
		}
	}
	for _, src := range []string{"0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "10.244.2.5", routerIn} {
		add("source "+src, outward, spec{ttl: 64, src: addr(src)})
		add("source "+src+", TTL over", outward, spec{ttl: 1, src: addr(src)})
	}
	for protocol := range 256 {
		add("protocol", outward, spec{ttl: 64, protocol: byte(protocol)})
	}
	for i, corrupt := range []func([]byte){
		func(b []byte) { b[10] ^= 1 }, func(b []byte) { b[0] = 0x55; mend(b) }, func(b []byte) { b[0] = 0x44; mend(b) },
		func(b []byte) { b[0] = 0x4f; mend(b) }, func(b []byte) { b[2] = 9; mend(b) }, func(b []byte) { b[2], b[3] = 0, 19; mend(b) },
		func(b []byte) { b[2], b[3] = 0, 20; mend(b) }, func(b []byte) { b[3]--; mend(b) }, func(b []byte) { b[3]++; mend(b) },
	} {
		add("header", outward, spec{ttl: 64, corrupt: corrupt, src: pod(230 + byte(i))})
		add("header, inward", inward, spec{ttl: 64, corrupt: corrupt})
	}
	return all
}
