package oracle

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"margay/test/node"
	"margay/vrouter"
	"margay/vrouter/port"
)

// TestHostile: a pod and a stranger on the underlay send what nobody should, on every driver. Each packet comes to nothing, or
// to what it may come to; each that the vRouter took is accounted for; and behind each, good ones get through both ways.
func TestHostile(t *testing.T) { node.OnEach(t, node.Drivers, hostile) }

func hostile(t *testing.T, driver port.Options) {
	box := newPodBox(t, driver, vrouter.Options{ICMPRate: 1_000_000}, mtuFor(driver))
	pod := box.pods[1]
	for _, c := range fromPods(pod.address, box.pods[2].address) {
		r := box.route(t, input{outward, c.bytes, pod.address})
		if delivered := len(r.out) + len(strangers(r.back)); delivered != c.delivered {
			t.Errorf("a pod, %s: came out %d times, expected %d: % x", c.name, delivered, c.delivered, append(r.out, r.back...))
		}
	}
	for _, c := range fromUnderlay(pod.address) {
		before := box.Counters()[c.counter]
		for _, b := range c.pieces {
			box.fromPeer(t, b)
		}
		if len(c.pieces) > 1 && c.delivered {
			pod.tap.next(t) // the kernel's detour is longer than the markers' way
		}
		r := box.arrive(t, nil, pod)
		if delivered := len(r.back) > 0; delivered != c.delivered {
			t.Errorf("a stranger, %s: came out: %v, expected: %v", c.name, delivered, c.delivered)
		}
		if len(r.out) > 0 {
			t.Errorf("a stranger, %s: went back out: % x", c.name, r.out)
		}
		if c.counter != "" {
			node.Until(t, c.name+": "+c.counter, func() bool { return box.Counters()[c.counter] > before })
		}
	}
	box.Balance(t)
}

// strangers are the packets that are no ICMP errors.
func strangers(all [][]byte) (rest [][]byte) {
	for _, b := range all {
		if !isError(b) {
			rest = append(rest, b)
		}
	}
	return rest
}

// evil is a packet that a pod sends, and how often it may come out.
type evil struct {
	name      string
	bytes     []byte
	delivered int
}

// fromPods are what the pod self sends, and other does not.
func fromPods(self, other netip.Addr) (all []evil) {
	add := func(name string, delivered int, s spec) {
		if !s.src.IsValid() {
			s.src = self
		}
		if !s.dst.IsValid() {
			s.dst = remoteHost
		}
		if s.protocol == 0 {
			s.protocol = 17
		}
		if s.payload == nil {
			s.payload = payloadOf(40)
		}
		all = append(all, evil{name, build(s), delivered})
	}
	add("nothing wrong", 1, spec{ttl: 64})
	add("TTL 0", 0, spec{})
	add("TTL 1", 0, spec{ttl: 1})
	for name, f := range faults() {
		add(name, 0, spec{ttl: 64, corrupt: f})
	}
	for _, n := range []int{1, 2, 19} {
		all = append(all, evil{"truncated", build(spec{src: self, dst: remoteHost, ttl: 64, protocol: 17, payload: payloadOf(40)})[:n], 0})
	}
	for _, src := range []netip.Addr{other, remoteHost, addr(routerIn), nodeAddress, peerAddress, addr("0.0.0.0"), addr("127.0.0.1"),
		addr("224.0.0.1"), addr("255.255.255.255")} {
		add("with the source "+src.String(), 0, spec{ttl: 64, src: src})
		add("with options and the source "+src.String(), 0, spec{ttl: 64, src: src, options: []byte{1, 1, 1, 1}})
	}
	for _, protocol := range []byte{4, 41} {
		inner := build(spec{src: self, dst: remoteHost, ttl: 64, protocol: 17, payload: payloadOf(8)})
		add("a tunnel", 0, spec{ttl: 64, protocol: protocol, payload: inner})
		add("a tunnel, as a fragment", 0, spec{ttl: 64, protocol: protocol, fragment: 0x2000, payload: payloadOf(64)})
	}
	// As another node would send: only the underlay's packets are taken out of tunnels.
	fromNode := build(spec{src: remoteHost, dst: other, ttl: 64, protocol: 17, payload: payloadOf(8)})
	add("a tunnel to this node", 0, spec{dst: nodeAddress, ttl: 64, protocol: 4, payload: fromNode})
	add("another node's tunnel to this node", 0, spec{src: peerAddress, dst: nodeAddress, ttl: 64, protocol: 4, payload: fromNode})
	add("a source route", 0, spec{ttl: 64, options: []byte{0x83, 7, 4, 10, 244, 2, 9}})
	add("an option that is cut off", 0, spec{ttl: 64, options: []byte{0x5e, 9, 0, 0}})
	for _, dst := range []string{"0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", routerIn, "10.245.200.200", "10.244.5.5"} {
		add("to "+dst, 0, spec{ttl: 64, dst: addr(dst)})
	}
	return all
}

// faults make a header wrong; of those that are about something else the checksum is right.
func faults() map[string]func([]byte) {
	return map[string]func([]byte){
		"header checksum wrong":             func(b []byte) { b[10] ^= 1 },
		"version 5":                         func(b []byte) { b[0] = 0x55; mend(b) },
		"IHL 0":                             func(b []byte) { b[0] = 0x40; mend(b) },
		"IHL 4":                             func(b []byte) { b[0] = 0x44; mend(b) },
		"total length 0":                    func(b []byte) { b[2], b[3] = 0, 0; mend(b) },
		"total length less than the header": func(b []byte) { b[2], b[3] = 0, 19; mend(b) },
		"total length greater than what is there": func(b []byte) { b[2]++; mend(b) },
		"total length 65535":                      func(b []byte) { b[2], b[3] = 0xff, 0xff; mend(b) },
	}
}

// intruder is what somebody on the underlay sends, whether anything of it reaches the pod, and the counter that tells.
type intruder struct {
	name      string
	pieces    [][]byte
	delivered bool
	counter   string
}

func fromUnderlay(pod netip.Addr) (all []intruder) {
	inner := func(change func(*spec)) []byte {
		s := spec{src: remoteHost, dst: pod, ttl: 64, protocol: 17, payload: payloadOf(40)}
		if change != nil {
			change(&s)
		}
		return build(s)
	}
	outer := func(payload []byte, change func(*spec)) []byte {
		s := spec{src: peerAddress, dst: nodeAddress, ttl: 64, protocol: 4, payload: payload}
		if change != nil {
			change(&s)
		}
		return build(s)
	}
	add := func(name string, delivered bool, counter string, pieces ...[]byte) {
		all = append(all, intruder{name, pieces, delivered, counter})
	}
	good := inner(nil)
	add("nothing wrong", true, "forwarded_decap", outer(good, nil))
	add("outer TTL 0", true, "forwarded_decap", outer(good, func(s *spec) { s.ttl = 0 }))
	add("padding behind the inner packet", true, "forwarded_decap", outer(append(inner(nil), 1, 2, 3), nil))
	// tun-plain's kernel refuses these itself, and counts.
	for _, o := range [][]byte{{0x83, 7, 4, 10, 244, 2, 9}, {0x89, 7, 8, 10, 244, 2, 9}, {1, 0x83, 3, 4}} {
		add("outer source route", false, "", outer(good, func(s *spec) { s.options = o }))
	}
	add("outer options", true, "forwarded_decap", outer(good, func(s *spec) { s.options = []byte{1, 1, 1, 1} }))

	for name, f := range faults() {
		add("outer: "+name, false, "drop_outer_malformed", outer(good, func(s *spec) { s.corrupt = f }))
		add("inner: "+name, false, "drop_inner_malformed", outer(inner(func(s *spec) { s.corrupt = f }), nil))
	}
	for n := range 20 {
		add("inner packet truncated", false, "drop_inner_malformed", outer(good[:n], nil))
	}
	for _, n := range []int{11, 15, 19} {
		add("outer packet truncated", false, "drop_outer_malformed", outer(good, nil)[:n])
	}
	for _, src := range []netip.Addr{nodeAddress, addr("203.0.113.66"), addr("198.18.0.3"), addr("0.0.0.0"), addr("127.0.0.1"),
		addr("224.0.0.1"), addr("255.255.255.255"), pod} {
		add("outer source "+src.String(), false, "drop_outer_source_not_node", outer(good, func(s *spec) { s.src = src }))
	}
	for _, dst := range []string{"198.18.0.9", "255.255.255.255", "224.0.0.1", routerIn} {
		add("outer destination "+dst, false, "drop_outer_not_for_us", outer(good, func(s *spec) { s.dst = addr(dst) }))
	}
	for _, src := range []netip.Addr{pod, podHost, nodeAddress, addr("192.0.2.1"), holeHost, addr("0.0.0.0"), addr("127.0.0.1"), addr("224.0.0.1")} {
		add("inner source "+src.String(), false, "drop_inner_source_not_routed_to_node", outer(inner(func(s *spec) { s.src = src }), nil))
	}
	for _, dst := range []netip.Addr{remoteHost, nodeAddress, addr("192.0.2.1"), addr("127.0.0.1"), addr("224.0.0.1"), addr("255.255.255.255")} {
		add("inner destination "+dst.String(), false, "drop_inner_destination_not_local", outer(inner(func(s *spec) { s.dst = dst }), nil))
	}
	nested := outer(good, nil)
	add("a tunnel in the tunnel", false, "drop_nested_tunnel", outer(inner(func(s *spec) { s.protocol, s.payload = 4, nested }), nil))
	add("6in4 in the tunnel", false, "drop_nested_tunnel", outer(inner(func(s *spec) { s.protocol = 41 }), nil))
	add("congestion marked on what cannot be", false, "drop_ecn_illegal", outer(good, func(s *spec) { s.tos = 3 }))
	add("IPv6 inside", false, "drop_inner_malformed", outer(append([]byte{0x60}, make([]byte, 59)...), nil))

	// What comes in pieces the kernel puts together. It refuses pieces that overlap (RFC 5722 is its reason for IPv4 too).
	long := outer(inner(func(s *spec) { s.payload = payloadOf(65535 - 40) }), nil)
	add("65,535 bytes in pieces", true, "forwarded_decap", pieces(long, 1480, 0, 0x1001)...)
	add("pieces that overlap", false, "", pieces(long[:4000], 1480, 8, 0x1002)...)
	add("a first piece alone", false, "", pieces(long[:4000], 1480, 0, 0x1003)[0])
	add("a last piece beyond 65,535 bytes", false, "", outer(payloadOf(1000), func(s *spec) { s.fragment, s.id = 0x1fff, 0x1004 }))
	add("a last piece alone", false, "", outer(payloadOf(100), func(s *spec) { s.fragment, s.id = 185, 0x1005 }))
	return all
}

// pieces cuts a packet to fragments with so many bytes of payload, each of which begins overlap bytes before the end of the one
// before.
func pieces(b []byte, size, overlap int, id uint16) (all [][]byte) {
	payload := b[20:]
	for at := 0; ; at += size - overlap {
		more, end := uint16(0x2000), at+size
		if end >= len(payload) {
			more, end = 0, len(payload)
		}
		piece := append(append([]byte(nil), b[:20]...), payload[at:end]...)
		binary.BigEndian.PutUint16(piece[2:], uint16(len(piece)))
		binary.BigEndian.PutUint16(piece[4:], id)
		binary.BigEndian.PutUint16(piece[6:], more|uint16(at/8))
		mend(piece)
		all = append(all, piece)
		if more == 0 {
			return all
		}
	}
}
