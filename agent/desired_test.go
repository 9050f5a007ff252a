package agent

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"margay/bgp"
	"margay/vrouter/rpc"
)

var (
	pfx  = netip.MustParsePrefix
	addr = netip.MustParseAddr
)

// threeNodes is node1 of a cluster of three; node3 is in another subnet.
func threeNodes(mode string) Inputs {
	return Inputs{
		Node:     "node1",
		Underlay: Underlay{Interface: "eth0", Prefix: pfx("198.18.0.1/24"), MTU: 1500},
		Tunnel:   addr("10.244.0.1"),
		Pools:    []Pool{{Name: "default", CIDR: pfx("10.244.0.0/16"), BlockSize: 26, IPIPMode: mode, NATOutgoing: true}},
		Members: []Member{{Name: "node1", Address: addr("198.18.0.1")}, {Name: "node2", Address: addr("198.18.0.2")},
			{Name: "node3", Address: addr("198.18.9.3"), AS: 64600}},
		Blocks: []netip.Prefix{pfx("10.244.0.0/26")},
		Paths: map[netip.Prefix]bgp.Path{
			pfx("10.244.0.64/26"):  {NextHop: addr("198.18.0.2"), Peer: addr("198.18.0.2")},
			pfx("10.244.0.128/26"): {NextHop: addr("198.18.9.3"), Peer: addr("198.18.9.3")},
		},
	}
}

func (d Desired) kernel(p string) []string {
	var out []string
	for _, r := range d.Kernel {
		if r.Prefix == pfx(p) {
			out = append(out, r.String())
		}
	}
	return out
}

func TestComputeByMode(t *testing.T) {
	local := rpc.Local()
	tunnel2, tunnel3 := rpc.Tunnel(addr("198.18.0.2")), rpc.Tunnel(addr("198.18.9.3"))
	direct2, direct3 := rpc.Direct(addr("198.18.0.2")), rpc.Direct(addr("198.18.9.3"))
	for _, tc := range []struct {
		mode         string
		node2, node3 rpc.NextHop
		kernel2      []string
		pool         []string
		encap        bool
	}{
		{"Always", tunnel2, tunnel3, nil, []string{"10.244.0.0/16 via 169.254.1.1 dev vr0", "blackhole 10.244.0.0/16 metric 1048576"}, true},
		{"CrossSubnet", direct2, tunnel3, []string{"10.244.0.64/26 via 198.18.0.2 dev eth0"},
			[]string{"10.244.0.0/16 via 169.254.1.1 dev vr0", "blackhole 10.244.0.0/16 metric 1048576"}, true},
		{"Never", direct2, direct3, []string{"10.244.0.64/26 via 198.18.0.2 dev eth0"},
			[]string{"blackhole 10.244.0.0/16 metric 1048576"}, false},
	} {
		t.Run(tc.mode, func(t *testing.T) {
			d := Compute(threeNodes(tc.mode))
			want := map[netip.Prefix]rpc.NextHop{pfx("10.244.0.0/26"): local, pfx("10.244.0.64/26"): tc.node2, pfx("10.244.0.128/26"): tc.node3}
			if diff := cmp.Diff(want, d.Routes, cmp.Comparer(func(a, b rpc.NextHop) bool { return a == b })); diff != "" {
				t.Errorf("vRouter routes (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tc.kernel2, d.kernel("10.244.0.64/26")); diff != "" {
				t.Errorf("kernel route to node2 (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tc.pool, d.kernel("10.244.0.0/16")); diff != "" {
				t.Errorf("kernel routes of the pool (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff([]string{"10.244.0.0/26 via 169.254.1.1 dev vr0 metric 1048575", "blackhole 10.244.0.0/26 metric 1048576"}, d.kernel("10.244.0.0/26")); diff != "" {
				t.Errorf("own block (-want +got):\n%s", diff)
			}
			if d.Encap != tc.encap || len(d.Rejected) != 0 {
				t.Errorf("encap %v, rejected %v", d.Encap, d.Rejected)
			}
			if !slices.Equal(d.Nodes, []netip.Addr{addr("198.18.0.2"), addr("198.18.9.3")}) {
				t.Errorf("nodes that may tunnel to us: %v", d.Nodes)
			}
			if !slices.Equal(d.Announce, []netip.Prefix{pfx("10.244.0.0/26")}) {
				t.Errorf("announced: %v", d.Announce)
			}
		})
	}
}

func TestImportRules(t *testing.T) {
	mesh, outside := addr("198.18.0.2"), addr("198.18.0.200")
	for _, tc := range []struct {
		prefix        string
		nextHop, peer netip.Addr
		why           string // "" is accepted
	}{
		{"10.244.7.0/26", mesh, mesh, ""},
		{"10.244.7.0/26", mesh, outside, ""}, // a route reflector's
		{"10.244.7.10/32", mesh, mesh, ""},   // a borrowed address
		{"10.244.7.10/32", mesh, outside, "neither a block"},
		{"10.244.0.0/16", mesh, outside, "neither a block"},
		{"10.244.128.0/17", mesh, mesh, "neither a block"},
		// Blocks of another size, from before the pool was made again: of a node of the mesh only.
		{"10.244.7.0/28", mesh, mesh, ""},
		{"10.244.16.0/20", mesh, mesh, ""},
		{"10.244.7.0/28", addr("198.18.9.3"), mesh, ""}, // a node that is a route reflector, too
		{"10.244.32.0/19", mesh, mesh, "neither a block"},
		{"10.244.7.0/28", mesh, outside, "neither a block"},
		{"10.244.7.0/28", outside, mesh, "neither a block"},
		{"10.244.0.16/28", mesh, mesh, "own block"},
		{"10.244.7.9/32", mesh, outside, "a pod of this node"},
		{"192.0.2.0/24", outside, outside, ""},
		{"0.0.0.0/0", outside, outside, ""},
		{"192.0.2.0/24", mesh, mesh, "inside no pool"},
		{"0.0.0.0/0", mesh, mesh, "inside no pool"},
		{"10.244.0.0/26", mesh, mesh, "own block"},
		{"10.244.0.7/32", mesh, mesh, ""}, // lent to node2
		{"10.244.0.7/32", mesh, outside, "neither a block"},
		{"10.244.0.7/32", outside, outside, "own block"},
		{"10.244.0.8/31", mesh, mesh, "own block"},
		{"10.244.0.5/32", mesh, mesh, "in use here"},
		{"10.244.0.1/32", mesh, mesh, "in use here"},
		{"10.244.7.9/32", mesh, mesh, "a pod of this node"},
		{"10.0.0.0/8", outside, outside, "covers pool"},
		{"10.244.7.0/26", outside, outside, "no node of the cluster"},
		{"10.244.7.0/26", addr("198.18.0.1"), mesh, "this node itself"},
		{"198.18.0.0/25", outside, outside, "underlay"},
		{"198.18.0.2/32", outside, outside, "underlay"},
		{"127.0.0.0/8", outside, outside, "special-use"},
		{"224.0.0.0/4", outside, outside, "special-use"},
		{"240.0.0.0/4", outside, outside, "special-use"},
		{"0.0.0.0/8", outside, outside, "special-use"},
		{"2001:db8::/32", outside, outside, "not IPv4"},
	} {
		in := threeNodes("Always")
		in.Pods = []netip.Addr{addr("10.244.0.5"), addr("10.244.7.9")}
		in.Paths = map[netip.Prefix]bgp.Path{pfx(tc.prefix): {NextHop: tc.nextHop, Peer: tc.peer}}
		d := Compute(in)
		switch {
		case tc.why == "" && len(d.Rejected) != 0:
			t.Errorf("%s via %s from %s: refused: %s", tc.prefix, tc.nextHop, tc.peer, d.Rejected[0].Why)
		case tc.why != "" && (len(d.Rejected) != 1 || !strings.Contains(d.Rejected[0].Why, tc.why)):
			t.Errorf("%s via %s from %s: expected a refusal that says %q, got %v", tc.prefix, tc.nextHop, tc.peer, tc.why, d.Rejected)
		}
	}
}

// TestPoolOfOneBlock: the pool's prefix is a block's too; the way to the node that has the block is the one route.
func TestPoolOfOneBlock(t *testing.T) {
	in := threeNodes("CrossSubnet")
	in.Pools[0].CIDR, in.Pools[0].BlockSize, in.Blocks = pfx("10.77.0.0/26"), 26, nil
	in.Paths = map[netip.Prefix]bgp.Path{pfx("10.77.0.0/26"): {NextHop: addr("198.18.0.2"), Peer: addr("198.18.0.2")}}
	want := []string{"10.77.0.0/26 via 198.18.0.2 dev eth0", "blackhole 10.77.0.0/26 metric 1048576"}
	if diff := cmp.Diff(want, Compute(in).kernel("10.77.0.0/26")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestPoolThatIsNotSupportedIsBlackholed(t *testing.T) {
	in := threeNodes("Never")
	in.Pools[0].Unsupported, in.Blocks, in.Tunnel = "spec.vxlanMode Always", nil, netip.Addr{}
	d := Compute(in)
	if len(d.Kernel) != 1 || !d.Kernel[0].Blackhole || len(d.Routes) != 0 || len(d.Rejected) != 2 || d.Encap {
		t.Errorf("expected the blackhole alone, and both routes refused: %+v", d)
	}
}

// TestDeletedPool: where this node's own block has lost its pool, the others' blocks have too; they are blackholed.
func TestDeletedPool(t *testing.T) {
	in := threeNodes("Always")
	in.Pools = nil
	d := Compute(in)
	if got := d.kernel("10.244.0.64/26"); !slices.Equal(got, []string{"blackhole 10.244.0.64/26 metric 1048576"}) {
		t.Errorf("node2's block: %v", got)
	}
	in.Blocks = nil
	if d = Compute(in); len(d.Kernel) != 0 {
		t.Errorf("without a block of ours nothing tells that there was a pool: %v", d.Kernel)
	}
}

// TestTunnelledInsideDirect: in CrossSubnet mode the kernel sends node2's block by the underlay; what node3 has inside it
// goes to vr0 all the same.
func TestTunnelledInsideDirect(t *testing.T) {
	in := threeNodes("CrossSubnet")
	node3 := bgp.Path{NextHop: addr("198.18.9.3"), Peer: addr("198.18.9.3")}
	in.Paths[pfx("10.244.0.70/32")], in.Paths[pfx("10.244.0.96/28")] = node3, node3
	d := Compute(in)
	for _, p := range []string{"10.244.0.70/32", "10.244.0.96/28"} {
		if diff := cmp.Diff([]string{p + " via 169.254.1.1 dev vr0"}, d.kernel(p)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", p, diff)
		}
		if d.Routes[pfx(p)] != rpc.Tunnel(addr("198.18.9.3")) {
			t.Errorf("%s: %v", p, d.Routes[pfx(p)])
		}
	}
	if got := d.kernel("10.244.0.128/26"); len(got) != 0 || len(d.Rejected) != 0 {
		t.Errorf("node3's own block needs no route but the pool's: %v, rejected %v", got, d.Rejected)
	}
}

// TestOneRouteForOnePlace: whatever peers send, no two routes want the same place in the kernel's table.
func TestOneRouteForOnePlace(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := threeNodes(rapid.SampledFrom([]string{"Always", "CrossSubnet", "Never"}).Draw(t, "mode"))
		in.Pools[0].BlockSize = rapid.IntRange(20, 32).Draw(t, "blockSize")
		hops := rapid.SampledFrom([]netip.Addr{addr("198.18.0.2"), addr("198.18.9.3"), addr("198.18.0.200")})
		for range rapid.IntRange(0, 20).Draw(t, "routes") {
			a := netip.AddrFrom4([4]byte{10, byte(rapid.IntRange(240, 246).Draw(t, "b")), byte(rapid.IntRange(0, 3).Draw(t, "c")), 0})
			p, _ := a.Prefix(rapid.IntRange(0, 32).Draw(t, "bits"))
			in.Paths[p] = bgp.Path{NextHop: hops.Draw(t, "next hop"), Peer: hops.Draw(t, "peer")}
		}
		seen := map[kernelKey]bool{}
		for _, r := range Compute(in).Kernel {
			key := kernelKey{r.Prefix, r.Metric}
			if seen[key] {
				t.Fatalf("two routes for %s metric %d", r.Prefix, r.Metric)
			}
			seen[key] = true
		}
	})
}

// An address that a pod of this node has borrowed is announced and accepted by itself; one that this node has lent is
// routed to the borrower: by the own block's route to vr0, or by one of its own.
func TestBorrowedAddresses(t *testing.T) {
	for mode, lentRoute := range map[string][]string{"Always": nil, "Never": {"10.244.0.7/32 via 198.18.0.2 dev eth0"}} {
		in := threeNodes(mode)
		in.Pods = []netip.Addr{addr("10.244.0.5"), addr("10.244.0.70"), addr("192.0.2.9"), addr("fd00::1")}
		in.Paths[pfx("10.244.0.7/32")] = bgp.Path{NextHop: addr("198.18.0.2"), Peer: addr("198.18.0.2")}
		d := Compute(in)
		if !slices.Equal(d.Announce, []netip.Prefix{pfx("10.244.0.0/26"), pfx("10.244.0.70/32")}) {
			t.Errorf("%s: announced: %v", mode, d.Announce)
		}
		if d.Routes[pfx("10.244.0.70/32")] != rpc.Local() || len(d.Routes) != 5 {
			t.Errorf("%s: routes: %v", mode, d.Routes)
		}
		want := rpc.Tunnel(addr("198.18.0.2"))
		if mode == "Never" {
			want = rpc.Direct(addr("198.18.0.2"))
		}
		if got := d.Routes[pfx("10.244.0.7/32")]; got != want || len(d.Rejected) != 0 {
			t.Errorf("%s: lent: %v, rejected %v", mode, got, d.Rejected)
		}
		if diff := cmp.Diff(lentRoute, d.kernel("10.244.0.7/32")); diff != "" {
			t.Errorf("%s: lent (-want +got):\n%s", mode, diff)
		}
		if diff := cmp.Diff([]string{"10.244.0.70/32 via 169.254.1.1 dev vr0 metric 1048575", "blackhole 10.244.0.70/32 metric 1048576"}, d.kernel("10.244.0.70/32")); diff != "" {
			t.Errorf("%s: borrowed (-want +got):\n%s", mode, diff)
		}
		// A node whose tunnel address is borrowed, in a pool that is not exported.
		in.Pools[0].DisableBGPExport, in.Tunnel = true, addr("10.244.0.71")
		d = Compute(in)
		if len(d.Announce) != 0 || d.Routes[pfx("10.244.0.71/32")] != rpc.Local() {
			t.Errorf("%s: not exported: %v, %v", mode, d.Announce, d.Routes)
		}
	}
}

// The CNI server's word on who is attached, told more than once.
func TestPods(t *testing.T) {
	var p pods
	for _, step := range []struct {
		added bool
		addr  string
		want  []netip.Addr
	}{
		{false, "10.244.0.9", nil},
		{true, "10.244.0.9", []netip.Addr{addr("10.244.0.9")}},
		{true, "10.244.0.9", []netip.Addr{addr("10.244.0.9")}},
		{true, "10.244.0.8", []netip.Addr{addr("10.244.0.8"), addr("10.244.0.9")}},
		{false, "10.244.0.9", []netip.Addr{addr("10.244.0.8")}},
	} {
		if p.set(step.added, addr(step.addr), "cali"+step.addr); !slices.Equal(p.all(), step.want) {
			t.Errorf("%v %s: %v, expected %v", step.added, step.addr, p.all(), step.want)
		}
		for i, l := range p.links() {
			if l.Address != step.want[i] || l.Interface != "cali"+step.want[i].String() {
				t.Errorf("%v %s: link %d: %v", step.added, step.addr, i, l)
			}
		}
	}
}

// TestDataplaneDifference: applying the differences one after the other leads to what was wanted.
func TestDataplaneDifference(t *testing.T) {
	pod := func(a, link string) rpc.Pod { return rpc.Pod{Address: addr(a), Interface: link} }
	d := dataplane{nodes: map[netip.Addr]bool{}, routes: map[netip.Prefix]rpc.NextHop{}, pods: map[netip.Addr]string{}}
	for i, want := range []Desired{
		{Pods: []rpc.Pod{pod("10.244.0.1", "cali1"), pod("10.244.0.2", "cali2")}, Nodes: []netip.Addr{addr("198.18.0.2")}},
		{Pods: []rpc.Pod{pod("10.244.0.1", "cali3")}, Routes: map[netip.Prefix]rpc.NextHop{pfx("10.244.1.0/26"): rpc.Tunnel(addr("198.18.0.2"))}},
		{},
	} {
		up, changed := d.difference(d.config, want)
		if !changed {
			t.Errorf("step %d: nothing to do", i)
		}
		d.remember(up)
		if len(d.pods) != len(want.Pods) || len(d.nodes) != len(want.Nodes) || len(d.routes) != len(want.Routes) {
			t.Errorf("step %d: pods %v, nodes %v, routes %v", i, d.pods, d.nodes, d.routes)
		}
		for _, p := range want.Pods {
			if d.pods[p.Address] != p.Interface {
				t.Errorf("step %d: pod %s at %q, expected %q", i, p.Address, d.pods[p.Address], p.Interface)
			}
		}
		if up, changed := d.difference(d.config, want); changed {
			t.Errorf("step %d: still to do: %+v", i, up)
		}
	}
}

func TestMeshPassiveIsComparedAsText(t *testing.T) {
	in := Inputs{Node: "a", Underlay: Underlay{Prefix: pfx("10.0.0.5/24")},
		Members: []Member{{Name: "a", Address: addr("10.0.0.5")}, {Name: "b", Address: addr("10.0.0.10")}, {Name: "c", Address: addr("10.0.0.7"), AS: 65001}}}
	peers := MeshPeers(in, 64512)
	if len(peers) != 2 || peers[0].Passive || !peers[1].Passive || peers[0].AS != 64512 || peers[1].AS != 65001 {
		t.Fatalf("10.0.0.5 is above 10.0.0.10 and below 10.0.0.7 as text: %+v", peers)
	}
}

func TestChooseUnderlay(t *testing.T) {
	cands := []candidate{
		{name: "docker0", index: 3, mtu: 1500, up: true, prefix: pfx("172.17.0.1/16")},
		{name: "eth1", index: 2, mtu: 9000, up: true, prefix: pfx("192.0.2.9/24")},
		{name: "lo", index: 1, mtu: 65536, up: true, prefix: pfx("127.0.0.1/8")},
		{name: "eth0", index: 4, mtu: 1500, up: true, prefix: pfx("198.51.100.7/24")},
		{name: "eth9", index: 5, mtu: 1500, up: false, prefix: pfx("203.0.113.7/24")},
	}
	for _, tc := range []struct{ method, want, err string }{
		{"first-found", "eth1", ""},
		{"interface=eth0", "eth0", ""},
		{"interface=nope,eth0", "eth0", ""},
		{"interface=docker.*", "docker0", ""},
		{"interface=eth9", "", "no interface that is up"},
		{"cidr=198.51.100.0/24", "eth0", ""},
		{"can-reach=198.51.100.1", "eth0", ""},
		{"cidr=nope", "", "expected cidr=PREFIX"},
		{"interface=(", "", "expected interface=REGEXP"},
		{"interface=", "", "expected interface=REGEXP"},
		{"best", "", "expected first-found"},
	} {
		got, err := choose(tc.method, slices.Clone(cands), addr("198.51.100.7"))
		switch {
		case tc.err == "" && (err != nil || got.Interface != tc.want):
			t.Errorf("%s: got %+v, %v; expected %s", tc.method, got, err, tc.want)
		case tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)):
			t.Errorf("%s: expected an error that says %q, got %v", tc.method, tc.err, err)
		}
	}
}
