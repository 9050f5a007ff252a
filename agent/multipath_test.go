package agent

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"margay/bgp"
	"margay/vrouter/rpc"
)

// from is a path from the peer that is its next hop.
func from(a string) bgp.Path { return bgp.Path{NextHop: addr(a), Peer: addr(a)} }

// equally is several paths that are as good as each other.
func equally(paths ...bgp.Path) bgp.Path {
	p := paths[0]
	p.Equal = paths[1:]
	return p
}

// Equally good paths become one route with several gateways, without those that are refused.
func TestComputeMultipath(t *testing.T) {
	in := threeNodes("CrossSubnet")
	in.Members = append(in.Members, Member{Name: "node4", Address: addr("198.18.0.4")})
	in.Paths = map[netip.Prefix]bgp.Path{
		pfx("10.244.1.0/26"):   equally(from("198.18.0.2"), from("198.18.0.4")),                                              // both on the link
		pfx("10.244.1.64/26"):  equally(from("198.18.9.3"), bgp.Path{NextHop: addr("198.18.9.3"), Peer: addr("198.18.0.2")}), // one gateway, by two
		pfx("10.244.1.128/26"): equally(from("198.18.0.2"), from("198.18.9.3")),                                              // one needs a tunnel
		pfx("192.0.2.0/24"):    equally(from("198.18.0.200"), from("198.18.0.201")),
		pfx("203.0.113.0/24"):  equally(from("198.18.0.1"), from("198.18.0.201")), // one is this node
	}
	d := Compute(in)
	want := map[netip.Prefix]rpc.NextHop{
		pfx("10.244.0.0/26"):   rpc.Local(),
		pfx("10.244.1.0/26"):   rpc.Multipath(rpc.KindDirect, addr("198.18.0.2"), addr("198.18.0.4")),
		pfx("10.244.1.64/26"):  rpc.Tunnel(addr("198.18.9.3")),
		pfx("10.244.1.128/26"): rpc.Direct(addr("198.18.0.2")),
	}
	if diff := cmp.Diff(want, d.Routes, cmp.Comparer(func(a, b rpc.NextHop) bool { return a == b })); diff != "" {
		t.Errorf("vRouter routes (-want +got):\n%s", diff)
	}
	for p, want := range map[string][]string{
		"10.244.1.0/26":  {"10.244.1.0/26 nexthop via 198.18.0.2 dev eth0 nexthop via 198.18.0.4 dev eth0"},
		"192.0.2.0/24":   {"192.0.2.0/24 nexthop via 198.18.0.200 dev eth0 nexthop via 198.18.0.201 dev eth0 metric 32"},
		"203.0.113.0/24": {"203.0.113.0/24 via 198.18.0.201 dev eth0 metric 32"},
	} {
		if diff := cmp.Diff(want, d.kernel(p)); diff != "" {
			t.Errorf("kernel routes (-want +got):\n%s", diff)
		}
	}
	if len(d.Rejected) != 1 || d.Rejected[0].Peer != addr("198.18.0.1") {
		t.Errorf("rejected: %+v", d.Rejected)
	}
	in = threeNodes("Always")
	in.Paths = map[netip.Prefix]bgp.Path{pfx("10.244.1.0/26"): equally(from("198.18.0.2"), from("198.18.9.3"))}
	if got := Compute(in).Routes[pfx("10.244.1.0/26")]; got != rpc.Multipath(rpc.KindTunnel, addr("198.18.0.2"), addr("198.18.9.3")) {
		t.Errorf("in a tunnel: %v", got)
	}
}

// The kernel takes a route with several gateways, keeps it, and follows when one of them goes.
func TestKernelMultipath(t *testing.T) {
	h := newNamespace(t)
	k := &kernelTable{nl: h}
	route := func(gateways ...string) []KernelRoute {
		var all []netip.Addr
		for _, g := range gateways {
			all = append(all, addr(g))
		}
		hop := rpc.Multipath(rpc.KindDirect, all...)
		return []KernelRoute{{Prefix: pfx("192.0.2.0/24"), Device: "eth0", Gateway: hop.Gateway, Others: hop.Others, Metric: learnedMetric}}
	}
	has := func(want ...string) {
		t.Helper()
		r := kernelHas(t, h)["192.0.2.0/24"]
		var got []string
		for _, n := range r.MultiPath {
			got = append(got, n.Gw.String())
		}
		if r.Gw != nil {
			got = append(got, r.Gw.String())
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("gateways (-want +got):\n%s", diff)
		}
	}
	for _, gateways := range [][]string{{"198.18.0.7", "198.18.0.8", "198.18.0.9"}, {"198.18.0.7", "198.18.0.9"}, {"198.18.0.9"}, {"198.18.0.8", "198.18.0.9"}} {
		if err := k.Apply(route(gateways...), true); err != nil {
			t.Fatal(err)
		}
		has(gateways...)
		have, err := k.list()
		if err != nil {
			t.Fatal(err)
		}
		want, err := k.toNetlink(route(gateways...)[0], map[string]int{})
		if err != nil || !sameRoute(have[kernelKey{pfx("192.0.2.0/24"), learnedMetric}], want) {
			t.Errorf("%v would be set again and again: %v", gateways, err)
		}
	}
	// One that cannot be reached is said, and does not keep the others from being used.
	if err := k.Apply(route("198.18.0.8", "203.0.113.1"), true); err == nil {
		t.Error("a gateway that cannot be reached is accepted in silence")
	}
	has("198.18.0.8")
}
