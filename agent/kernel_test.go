package agent

import (
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
)

// newNamespace moves the test into a network namespace of its own, with a device "eth0" that has 198.18.0.1/24.
func newNamespace(t *testing.T) *netlink.Handle {
	t.Helper()
	// The thread is left locked: it ends with the test's goroutine, and the namespace with it.
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	h, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	// Any two devices will do; every kernel that runs pods has veth.
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "vr0"}
	if err := h.LinkAdd(pair); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"eth0", "vr0"} {
		link, err := h.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if name == "eth0" {
			if err := h.AddrAdd(link, &netlink.Addr{IPNet: ipNet(pfx("198.18.0.1/24"))}); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.LinkSetUp(link); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

// kernelHas lists the main table as `ip route` would print its destinations.
func kernelHas(t *testing.T, h *netlink.Handle) map[string]netlink.Route {
	t.Helper()
	routes, err := dump.RoutesLike(h, unix.AF_INET, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]netlink.Route{}
	for _, r := range routes {
		key := r.Dst.String()
		if r.Type == unix.RTN_BLACKHOLE {
			key = "blackhole " + key
		}
		m[key] = r
	}
	return m
}

func TestKernelTable(t *testing.T) {
	h := newNamespace(t)
	k := &kernelTable{nl: h}
	foreign := netlink.Route{Dst: ipNet(pfx("192.0.2.0/24")), Gw: addr("198.18.0.9").AsSlice(), Protocol: unix.RTPROT_STATIC}
	if err := h.RouteAdd(&foreign); err != nil {
		t.Fatal(err)
	}
	all := []KernelRoute{
		{Prefix: pfx("10.244.0.0/16"), Device: "vr0"},
		{Prefix: pfx("10.244.0.0/16"), Blackhole: true, Metric: blackholeMetric},
		{Prefix: pfx("10.244.7.0/26"), Device: "eth0", Gateway: addr("198.18.0.7")},
		// Not on the link: by way of the kernel's own route to it.
		{Prefix: pfx("10.244.8.0/26"), Device: "eth0", Gateway: addr("192.0.2.5")},
	}
	for range 2 { // the second time nothing is left to do
		if err := k.Apply(all, true); err != nil {
			t.Fatal(err)
		}
	}
	has := kernelHas(t, h)
	for _, want := range []string{"10.244.0.0/16", "blackhole 10.244.0.0/16", "10.244.7.0/26", "10.244.8.0/26", "192.0.2.0/24"} {
		if _, ok := has[want]; !ok {
			t.Errorf("no route %s in %v", want, has)
		}
	}
	if gw := has["10.244.8.0/26"].Gw.String(); gw != "198.18.0.9" {
		t.Errorf("10.244.8.0/26 via %s, expected the gateway of the route to its next hop", gw)
	}
	moved := []KernelRoute{all[0], all[1], {Prefix: pfx("10.244.7.0/26"), Device: "eth0", Gateway: addr("198.18.0.8")}}
	if err := k.Apply(moved, false); err != nil {
		t.Fatal(err)
	}
	has = kernelHas(t, h)
	if gw := has["10.244.7.0/26"].Gw.String(); gw != "198.18.0.8" {
		t.Errorf("10.244.7.0/26 via %s, expected 198.18.0.8", gw)
	}
	if _, ok := has["10.244.8.0/26"]; !ok {
		t.Error("a route was swept before the sweep")
	}
	if err := k.Apply(nil, true); err != nil {
		t.Fatal(err)
	}
	if has = kernelHas(t, h); len(has) != 2 {
		t.Errorf("after the sweep only the subnet's and the foreign route stay, got %v", has)
	}
	// Somebody else's route of the same place is left alone, and said.
	err := k.Apply([]KernelRoute{{Prefix: pfx("192.0.2.0/24"), Device: "eth0", Gateway: addr("198.18.0.7")}}, true)
	if err == nil || !strings.Contains(err.Error(), "somebody else's route") {
		t.Errorf("a place that is taken: got %v", err)
	}
	if gw := kernelHas(t, h)["192.0.2.0/24"].Gw.String(); gw != "198.18.0.9" {
		t.Errorf("the foreign route now goes via %s", gw)
	}
	err = k.Apply([]KernelRoute{{Prefix: pfx("10.1.0.0/16"), Device: "nope"}, all[2]}, true)
	if err == nil {
		t.Error("a device that is not there: expected an error")
	}
	if _, ok := kernelHas(t, h)["10.244.7.0/26"]; !ok {
		t.Error("one route's failure kept the others away")
	}
}

// An IPv6 pool is unreachable beyond this node's own pods, which have routes of their own, and says so; the route goes with
// the pool.
func TestIPv6PoolIsUnreachable(t *testing.T) {
	h := newNamespace(t)
	k := &kernelTable{nl: h}
	count := func() (n int) {
		routes, err := dump.RoutesLike(h, unix.AF_INET6, &netlink.Route{Protocol: routeProtocol, Table: unix.RT_TABLE_MAIN},
			netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range routes {
			if r.Type == unix.RTN_UNREACHABLE && r.Dst.String() == "fd00:244::/48" && r.Priority == blackholeMetric {
				n++
			}
		}
		return n
	}
	want := Compute(Inputs{Pools: []Pool{{Name: "six", CIDR: pfx("fd00:244::/48"), IPIPMode: "Never"}}}).Kernel
	for range 2 { // the second time there is nothing to do
		if err := k.Apply(want, true); err != nil || count() != 1 {
			t.Errorf("with the pool: %v, %d routes", err, count())
		}
	}
	if err := k.Apply(nil, true); err != nil || count() != 0 {
		t.Errorf("without: %v, %d routes", err, count())
	}
}

// TestPolicyRulesAreNamed: a rule that refuses is named as such, and not taken for a wrong address.
func TestPolicyRulesAreNamed(t *testing.T) {
	h := newNamespace(t)
	for _, name := range []string{"all", "eth0"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/forwarding", []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	k := &kernelTable{nl: h}
	src, dst := addr("198.18.0.7"), addr("198.18.0.9")
	for kind, want := range map[uint8]string{unix.RTN_BLACKHOLE: "blackhole", unix.RTN_PROHIBIT: "prohibit", unix.RTN_UNREACHABLE: "unreachable"} {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Type, r.Src = unix.AF_INET, 5, kind, ipNet(pfx("198.18.0.7/32"))
		if err := h.RuleAdd(r); err != nil {
			t.Fatal(err)
		}
		for in, from := range map[string]string{"": "198.18.0.1", "eth0": "198.18.0.8"} {
			if a, err := k.askRoute(addr(from), dst, in); err == nil && a.reason == "policy_rule" {
				t.Errorf("%s: refuses %s too: %+v", want, from, a)
			}
		}
		if a, err := k.askRoute(src, dst, "eth0"); err != nil || a.reason != "policy_rule" || a.detail != "pref 5 from 198.18.0.7/32 "+want {
			t.Errorf("%s: %+v, %v", want, a, err)
		}
		if err := h.RuleDel(r); err != nil {
			t.Fatal(err)
		}
	}
}
