package vrouter

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"margay/vrouter/packet"
)

// aboutOuter is an ICMP error of a router between the nodes about the packet b.
func aboutOuter(kind, code byte, b []byte) []byte {
	dst := make([]byte, packet.MaxICMPError)
	return dst[:packet.PutICMPError(dst, packet.IPv4(b), packet.ICMPError{Type: kind, Code: code}, [4]byte{198, 18, 9, 9}, 1)]
}

// icmpCounters returns what was relayed, held back by the rate, and refused.
func icmpCounters(r *Router) (relayed, limited, refused uint64) {
	for _, c := range r.Counters() {
		switch c.Name {
		case "icmp_relayed":
			relayed = c.Packets
		case "icmp_rate_limited":
			limited = c.Packets
		case "icmp_relay_refused":
			refused = c.Packets
		}
	}
	return relayed, limited, refused
}

// TestRelay: RFC 2003, section 4, kind by kind: what the sender inside is told, of whom, and about what.
func TestRelay(t *testing.T) {
	now := time.Unix(1e9, 0)
	inner := ip(ownPod, pod2, 17, append(ports(1234, 53), make([]byte, 40)...), setDF)
	for _, c := range []struct {
		name       string
		kind, code byte
		want       int // the code of "unreachable", -1: nothing
	}{
		{"network unreachable", 3, 0, 0},
		{"host unreachable", 3, 1, 1},
		{"protocol unreachable", 3, 2, 1},
		{"port unreachable", 3, 3, -1},
		{"fragmentation needed, which LearnPathMTU hears", 3, 4, -1},
		{"source route failed", 3, 5, -1},
		{"network unknown", 3, 6, 0},
		{"host unknown", 3, 7, 1},
		{"network prohibited", 3, 9, 13},
		{"host prohibited", 3, 10, 13},
		{"communication prohibited", 3, 13, 13},
		{"precedence cutoff", 3, 15, -1},
		{"source quench", 4, 0, -1},
		{"redirect", 5, 1, -1},
		{"time to live over", 11, 0, 1},
		{"reassembly time over", 11, 1, -1},
		{"parameter problem", 12, 0, -1},
	} {
		r := testRouter(t)
		outer, reply := outerOf(t, r, slices.Clone(inner)), NewPacket()
		ok := r.Relay(aboutOuter(c.kind, c.code, outer), now, reply)
		if ok != (c.want >= 0) {
			t.Errorf("%s: relayed: %v", c.name, ok)
		}
		if !ok {
			continue
		}
		p, fault := packet.ParseIPv4(reply.Bytes())
		if fault != packet.FaultNone || p.Dst() != ownPod || p[20] != 3 || int(p[21]) != c.want || packet.Checksum(p[20:], 0) != 0 {
			t.Errorf("%s: % x, %v", c.name, reply.Bytes(), fault)
		}
		if !bytes.Equal(p[28:], inner) {
			t.Errorf("%s: quotes % x", c.name, p[28:])
		}
		if relayed, _, _ := icmpCounters(r); relayed != 1 {
			t.Errorf("%s: counted %d times", c.name, relayed)
		}
	}
}

// TestRelayRefuses: nobody who has not seen a packet of ours is believed, and nobody is told who has not sent one.
func TestRelayRefuses(t *testing.T) {
	now := time.Unix(1e9, 0)
	r := testRouter(t)
	reply := NewPacket()
	long := ip(ownPod, pod2, 17, make([]byte, 900), setDF)
	outer := outerOf(t, r, long)
	changed := func(b []byte, at int) []byte {
		b = slices.Clone(b)
		b[at] ^= 1
		return b
	}
	quoting := func(n int) []byte { return aboutOuter(3, 1, outer[:n]) }
	foreign := outerOf(t, r, ip(unknown, pod2, 17, make([]byte, 8), setDF))
	for name, b := range map[string][]byte{
		"no node":                 aboutOuter(3, 1, ip(self, unknown, 4, long, setDF)),
		"not from us":             aboutOuter(3, 1, ip(node3, node2, 4, long, setDF)),
		"not a tunnel":            aboutOuter(3, 1, ip(self, node2, 17, long, setDF)),
		"DF clear":                aboutOuter(3, 1, outerOf(t, r, ip(ownPod, pod2, 17, nil))),
		"from a pod":              from(ownPod, aboutOuter(3, 1, outer)),
		"too little is quoted":    quoting(20 + 8),
		"not a byte of transport": quoting(20 + 20),
		"about no pod of ours":    aboutOuter(3, 1, foreign),
		"about an ICMP error":     aboutOuter(3, 1, outerOf(t, r, ip(ownPod, pod2, 1, make([]byte, 8), setDF, func(b []byte) { b[20] = 3 }))),
		"a wrong checksum":        changed(quoting(100), 30),
	} {
		if r.Relay(b, now, reply) {
			t.Errorf("%s: relayed", name)
		}
	}
	if relayed, _, refused := icmpCounters(r); relayed != 0 || refused != 0 {
		t.Errorf("relayed %d, refused %d", relayed, refused)
	}
	// A forger has a minute's share of guesses about a node.
	for range forgedLimit + 4 {
		if r.Relay(aboutOuter(3, 1, changed(outer, 5)), now, reply) {
			t.Fatal("a guess is believed")
		}
	}
	if r.Relay(quoting(100), now, reply) {
		t.Error("a forger may guess on and on")
	}
	if _, _, refused := icmpCounters(r); refused != forgedLimit+5 {
		t.Errorf("refused %d", refused)
	}
	if !r.Relay(quoting(100), now.Add(forgedPeriod), reply) {
		t.Error("not believed again")
	}
	// RFC 4884: what follows the quoted packet is none of it.
	extended := aboutOuter(3, 1, append(slices.Clone(outer[:128]), bytes.Repeat([]byte{0xee}, 20)...))
	extended[25] = 128 / 4
	extended[22], extended[23] = 0, 0
	sum := packet.Checksum(extended[20:], 0)
	extended[22], extended[23] = byte(sum>>8), byte(sum)
	if !r.Relay(extended, now.Add(forgedPeriod), reply) || !bytes.Equal(reply.Bytes()[28:], outer[20:128]) {
		t.Errorf("with an extension: % x", reply.Bytes())
	}
	// RFC 1812, 4.3.2.8.
	for range 1000 {
		r.Relay(quoting(100), now.Add(forgedPeriod), reply)
	}
	if relayed, limited, _ := icmpCounters(r); relayed+limited != 1002 || relayed > 500 {
		t.Errorf("relayed %d, held back %d", relayed, limited)
	}
}

// FuzzRelay: no message from the underlay does harm, and what is passed on is an ICMP error to a pod of ours.
func FuzzRelay(f *testing.F) {
	r := testRouter(f)
	now := time.Unix(1e9, 0)
	pushed, fault := packet.PushIPIP(append(make([]byte, 20), ip(ownPod, pod2, 17, make([]byte, 200), setDF)...), 20,
		&packet.Outer{Src: self.As4(), Dst: node2.As4(), TTL: 64, ID: r.OuterOffset(node2)})
	if fault != packet.FaultNone {
		f.Fatal(fault)
	}
	f.Add(aboutOuter(3, 1, pushed))
	f.Add(aboutOuter(11, 0, pushed[:60]))
	f.Add(aboutOuter(3, 13, pushed[:45]))
	f.Fuzz(func(t *testing.T, b []byte) {
		mendHeaders(b)
		if len(b) >= 28 && b[0] == 0x45 {
			b[22], b[23] = 0, 0
			sum := packet.Checksum(b[20:], 0)
			b[22], b[23] = byte(sum>>8), byte(sum)
		}
		now = now.Add(time.Hour) // nothing is refused for the rate of guesses
		reply := NewPacket()
		if !r.Relay(b, now, reply) {
			return
		}
		p, fault := packet.ParseIPv4(reply.Bytes())
		if fault != packet.FaultNone || p.Protocol() != 1 || p[20] != packet.ICMPUnreachable {
			t.Errorf("% x, %v", reply.Bytes(), fault)
		}
	})
}
