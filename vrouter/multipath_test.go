package vrouter

import (
	"bytes"
	"net/netip"
	"testing"

	"margay/vrouter/packet"
)

// udpTo is a packet of one of many flows to dst.
func udpTo(dst netip.Addr, flow int) []byte {
	return ip(ownPod, dst, packet.ProtocolUDP, []byte{byte(flow >> 8), byte(flow), 0, 53, 0, 8, 0, 0})
}

// outerDst sends b to another node and returns the one it goes to.
func outerDst(t *testing.T, r *Router, b []byte) netip.Addr {
	t.Helper()
	out, reason := walk(t, r, Encap, b, Offload{})
	if reason != ReasonNotSet {
		t.Fatalf("dropped: %v", reason)
	}
	return packet.IPv4(out).Dst()
}

// Flows to a prefix with several gateways are spread over them, each keeps to its own, and when a gateway goes those of
// the others stay where they are.
func TestFlowsAreSpread(t *testing.T) {
	r, dst := testRouter(t), netip.MustParseAddr("10.244.6.1")
	node4 := netip.MustParseAddr("198.18.0.4")
	route := func(gateways ...netip.Addr) Update {
		return Update{Set: []Route{{Prefix: netip.MustParsePrefix("10.244.6.0/26"), NextHop: Multipath(KindTunnel, gateways...)}}}
	}
	if err := r.Update(route(node2, node3, node4)); err != nil {
		t.Fatal(err)
	}
	const flows = 300
	var before [flows]netip.Addr
	share := map[netip.Addr]int{}
	for i := range before {
		before[i] = outerDst(t, r, udpTo(dst, i))
		share[before[i]]++
		if again := outerDst(t, r, udpTo(dst, i)); again != before[i] {
			t.Fatalf("flow %d goes to %v and to %v", i, before[i], again)
		}
	}
	for _, a := range []netip.Addr{node2, node3, node4} {
		if share[a] < flows/5 {
			t.Errorf("%v has %d of %d flows", a, share[a], flows)
		}
	}
	// All fragments of a packet go one way, whatever is where the ports would be.
	first := outerDst(t, r, ip(ownPod, dst, packet.ProtocolUDP, make([]byte, 16), func(b []byte) { b[6] = 0x20 }))
	for i := range 50 {
		b := ip(ownPod, dst, packet.ProtocolUDP, bytes.Repeat([]byte{byte(i)}, 16), func(b []byte) { b[7] = 2 })
		if to := outerDst(t, r, b); to != first {
			t.Fatalf("a fragment goes to %v, the first to %v", to, first)
		}
	}
	if err := r.Update(route(node2, node4)); err != nil {
		t.Fatal(err)
	}
	for i := range before {
		if to := outerDst(t, r, udpTo(dst, i)); to != before[i] && before[i] != node3 {
			t.Errorf("flow %d moved from %v to %v", i, before[i], to)
		}
	}
}

// What comes out of a tunnel may come from any of the gateways to its source, and from nobody else.
func TestDecapFromAnyGateway(t *testing.T) {
	r := testRouter(t)
	node4, source := netip.MustParseAddr("198.18.0.4"), netip.MustParseAddr("10.244.6.1")
	err := r.Update(Update{AddNodes: []netip.Addr{node4},
		Set: []Route{{Prefix: netip.MustParsePrefix("10.244.6.0/26"), NextHop: Multipath(KindTunnel, node2, node3)}}})
	if err != nil {
		t.Fatal(err)
	}
	inner := ip(source, ownPod, packet.ProtocolUDP, make([]byte, 8))
	for from, want := range map[netip.Addr]Reason{node2: ReasonNotSet, node3: ReasonNotSet, node4: ReasonInnerSource} {
		if _, reason := walk(t, r, Decap, ip(from, self, packet.ProtocolIPIP, inner), Offload{}); reason != want {
			t.Errorf("from %v: %v, want %v", from, reason, want)
		}
	}
}

// Choosing among gateways allocates nothing.
func TestNoAllocationsWithGroups(t *testing.T) {
	r := testRouter(t)
	err := r.Update(Update{Set: []Route{{Prefix: netip.MustParsePrefix("10.244.6.0/26"), NextHop: Multipath(KindTunnel, node2, node3)}}})
	if err != nil {
		t.Fatal(err)
	}
	const turns = 100
	one := udpTo(netip.MustParseAddr("10.244.6.1"), 1)
	in, out := &queue{}, &queue{}
	for range turns + 1 {
		in.in = append(in.in, one)
	}
	w := r.NewWorker(Encap, in, out)
	w.packets = w.packets[:1]
	n := testing.AllocsPerRun(turns, func() {
		if err := w.turn(); err != nil {
			t.Error(err)
		}
	})
	if got := w.tallies.forwarded[Encap].packets.Load(); n != 0 || got != turns+1 {
		t.Errorf("%v allocations a packet, %d of %d forwarded", n, got, turns+1)
	}
}
