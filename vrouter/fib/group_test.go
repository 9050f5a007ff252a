package fib

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func manyGateways(n int) []netip.Addr {
	all := make([]netip.Addr, n)
	for i := range all {
		all[i] = netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
	}
	return all
}

func manyGateways6(n int) []netip.Addr {
	all := make([]netip.Addr, n)
	for i := range all {
		all[i] = netip.AddrFrom16([16]byte{0: 0xfd, 1: 1, 14: byte(i >> 8), 15: byte(i)})
	}
	return all
}

func TestMultipathIsASet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := manyGateways(8)
		if rapid.Bool().Draw(t, "v6") {
			all = append(manyGateways6(8), addr("fe80::1%eth0"))
		}
		drawn := rapid.SliceOf(rapid.SampledFrom(all)).Draw(t, "gateways")
		n := Multipath(KindDirect, drawn...)
		want := slices.Clone(drawn)
		slices.SortFunc(want, netip.Addr.Compare)
		want = slices.Compact(want)
		if got := n.Gateways(); !slices.Equal(got, want) {
			t.Fatalf("%v became %v", drawn, got)
		}
		slices.Reverse(drawn)
		if again := Multipath(KindDirect, drawn...); again != n {
			t.Fatalf("%v in another order differs", drawn)
		}
		if n.IsGroup() != (len(want) > 1) {
			t.Fatalf("%v: a group: %v", n, n.IsGroup())
		}
	})
	if s := Multipath(KindTunnel, addr("198.18.0.3"), addr("198.18.0.2")).String(); s != "tunnel 198.18.0.2 198.18.0.3" {
		t.Errorf("as text: %q", s)
	}
}

// selections returns the gateway that each of many flows takes among gateways.
func selections(t *testing.T, gateways []netip.Addr, flows []uint32) []netip.Addr {
	t.Helper()
	tab, p := New(), pfx("10.0.0.0/8")
	if !gateways[0].Is4() {
		p = pfx("fd00::/8")
	}
	mustUpdate(t, tab, []Route{{p, Multipath(KindTunnel, gateways...)}})
	f := tab.Forwarding()
	h := alone(f, p.Addr())
	taken := make([]netip.Addr, len(flows))
	for i, flow := range flows {
		one := f.Select(h, flow)
		if one.IsGroup() || !one.Found() || one.Kind() != KindTunnel {
			t.Fatalf("of %v flow %d takes %x", gateways, flow, one)
		}
		n := f.NextHop(one)
		if taken[i] = n.Gateway; n.IsGroup() || !slices.Contains(gateways, n.Gateway) {
			t.Fatalf("of %v flow %d takes %v", gateways, flow, n)
		}
		if p.Addr().Is4() && (one.Gateway() != number(n.Gateway) || !f.LeadsTo(h, one.Gateway())) {
			t.Fatalf("%v is not among %v", n, gateways)
		}
		if !p.Addr().Is4() && f.Gateway6(one).Addr() != n.Gateway {
			t.Fatalf("%v is not %v", f.Gateway6(one), n)
		}
	}
	return taken
}

// Flows are spread evenly; when a gateway goes only its own flows move, when one comes only those that it takes.
func TestFlowsStay(t *testing.T) {
	rnd := rand.New(rand.NewPCG(4, 4))
	flows := make([]uint32, 20_000)
	for i := range flows {
		flows[i] = rnd.Uint32()
	}
	for _, all := range [][]netip.Addr{manyGateways(MaxGateways), manyGateways6(MaxGateways)} {
		for _, n := range []int{1, 2, 3, 4, 7, 16, 63} {
			with, without := selections(t, all[:n+1], flows), selections(t, all[:n], flows)
			last, share := all[n], map[netip.Addr]int{}
			for i := range flows {
				share[with[i]]++
				if with[i] != without[i] && with[i] != last {
					t.Fatalf("%d gateways: flow %d moves from %v to %v", n, flows[i], without[i], with[i])
				}
			}
			even := float64(len(flows)) / float64(n+1)
			for _, a := range all[:n+1] {
				if got := float64(share[a]); got < even*0.75 || got > even*1.25 {
					t.Errorf("of %d gateways %v has %v of %d flows, its share is %.0f", n+1, a, got, len(flows), even)
				}
			}
		}
	}
}

// Flows whose hashes are near each other, and gateways far apart, are spread too.
func TestFlowsOfCountingHashes(t *testing.T) {
	flows := make([]uint32, 20_000)
	for i := range flows {
		flows[i] = uint32(i)
	}
	gateways := []netip.Addr{addr("10.0.0.1"), addr("172.16.255.254"), addr("192.0.2.1"), addr("198.18.0.1")}
	share := map[netip.Addr]int{}
	for _, a := range selections(t, gateways, flows) {
		share[a]++
	}
	for _, a := range gateways {
		if n := share[a]; n < 4_000 || n > 6_000 {
			t.Errorf("%v has %d of %d flows", a, n, len(flows))
		}
	}
}

// Which gateway a flow takes is a contract between versions and nodes: these must not change.
func TestSelectionIsFixed(t *testing.T) {
	got := selections(t, manyGateways(4), []uint32{0, 1, 2, 0xdeadbeef, 1<<32 - 1})
	want := []netip.Addr{addr("198.18.0.3"), addr("198.18.0.3"), addr("198.18.0.2"), addr("198.18.0.0"), addr("198.18.0.1")}
	if !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
}

func TestLeadsTo(t *testing.T) {
	tab := New()
	mustUpdate(t, tab, []Route{tunnel("10.1.0.0/16", "198.18.0.9"), {pfx("10.0.0.0/16"), Multipath(KindTunnel, manyGateways(3)...)}, local("10.2.0.0/16")})
	f := tab.Forwarding()
	for _, c := range []struct {
		to, gateway string
		want        bool
	}{
		{"10.0.0.1", "198.18.0.0", true}, {"10.0.0.1", "198.18.0.2", true}, {"10.0.0.1", "198.18.0.3", false},
		{"10.1.0.1", "198.18.0.9", true}, {"10.1.0.1", "198.18.0.0", false}, {"10.2.0.1", "198.18.0.0", false}, {"10.3.0.1", "198.18.0.0", false},
	} {
		if got := f.LeadsTo(alone(f, addr(c.to)), number(addr(c.gateway))); got != c.want {
			t.Errorf("%s leads to %s: %v", c.to, c.gateway, got)
		}
	}
}
