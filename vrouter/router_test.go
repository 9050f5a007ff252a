package vrouter

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var compareAddrs = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
var comparePrefixes = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

// TestUpdateIsAllOrNothing gives each kind of mistake beside changes that are right, and looks for traces.
func TestUpdateIsAllOrNothing(t *testing.T) {
	pfx := netip.MustParsePrefix
	good := Update{
		Config:   &Config{NodeAddress: node2, Underlay: "eth1", MTU: 1400},
		AddNodes: []netip.Addr{netip.MustParseAddr("198.18.0.7")},
		DelNodes: []netip.Addr{node3},
		Set:      []Route{{Prefix: pfx("10.0.0.0/8"), NextHop: NextHop{Kind: KindLocal}}},
		Del:      []netip.Prefix{pfx("10.244.2.0/26")},
	}
	tests := []struct {
		name   string
		change func(*Update)
		want   string
	}{
		{"no address", func(u *Update) { u.Config.NodeAddress = netip.Addr{} }, "node address"},
		{"IPv6 address", func(u *Update) { u.Config.NodeAddress = netip.MustParseAddr("fd00::1") }, "node address"},
		{"no underlay", func(u *Update) { u.Config.Underlay = "" }, "underlay"},
		{"long underlay", func(u *Update) { u.Config.Underlay = strings.Repeat("e", 16) }, "underlay"},
		{"underlay with a slash", func(u *Update) { u.Config.Underlay = "a/b" }, "underlay"},
		{"small MTU", func(u *Update) { u.Config.MTU = 67 }, "mtu"},
		{"large MTU", func(u *Update) { u.Config.MTU = 65516 }, "mtu"},
		{"MTU the port refuses", func(u *Update) { u.Config.MTU = 65515 }, "port"},
		{"invalid node", func(u *Update) { u.AddNodes = append(u.AddNodes, netip.Addr{}) }, "node"},
		{"multicast node", func(u *Update) { u.DelNodes = append(u.DelNodes, netip.MustParseAddr("224.0.0.1")) }, "node"},
		{"tunnel without gateway", func(u *Update) {
			u.Set = append(u.Set, Route{Prefix: pfx("10.1.0.0/16"), NextHop: NextHop{Kind: KindTunnel}})
		}, "gateway"},
		{"invalid prefix", func(u *Update) { u.Set = append(u.Set, Route{NextHop: NextHop{Kind: KindLocal}}) }, "prefix"},
		{"unmasked deletion", func(u *Update) { u.Del = append(u.Del, netip.PrefixFrom(self, 8)) }, "prefix"},
	}
	for _, test := range tests {
		r := testRouter(t)
		r.OnConfig(func(c Config) error {
			if c.MTU == MaxMTU {
				return errors.New("the device refuses it")
			}
			return nil
		})
		before := r.Save()
		u := good
		config := *good.Config
		u.Config = &config
		test.change(&u)
		err := r.Update(u)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v: expected one about %q", test.name, err, test.want)
		}
		if errors.Is(err, ErrPort) != (test.want == "port") {
			t.Errorf("%s: %v: is it the port's?", test.name, err)
		}
		if d := cmp.Diff(before, r.Save(), compareAddrs, comparePrefixes); d != "" {
			t.Errorf("%s: the state has changed:\n%s", test.name, d)
		}
	}
	if err := testRouter(t).Update(good); err != nil {
		t.Error(err)
	}
}

// TestRestoredMeansCompleted follows Status.Restored through a first synchronisation and a second one.
func TestRestoredMeansCompleted(t *testing.T) {
	r := New()
	r.Begin()
	r.End()
	if r.Status().Restored {
		t.Error("restored without a configuration")
	}
	r.Begin()
	if err := r.Update(testUpdate()); err != nil {
		t.Fatal(err)
	}
	if s := r.Status(); s.Restored || !s.Configured || s.Routes != 5 || s.Nodes != 3 || s.Stale != 0 {
		t.Errorf("before End: %+v", s)
	}
	if swept := r.End(); swept != 0 || !r.Status().Restored {
		t.Errorf("after End: swept %d, %+v", swept, r.Status())
	}
	r.Begin()
	if s := r.Status(); !s.Restored || s.Stale != 9 || s.Routes != 5 {
		t.Errorf("after the second Begin: %+v", s)
	}
	u := testUpdate()
	u.AddNodes, u.Set = u.AddNodes[:2], u.Set[:4]
	if err := r.Update(u); err != nil {
		t.Fatal(err)
	}
	entries, nodes := r.Routes()
	if len(entries) != 5 || len(nodes) != 3 || entries[0].Stale || !entries[4].Stale {
		t.Errorf("before the sweep: %v, %v", entries, nodes)
	}
	if swept := r.End(); swept != 2 {
		t.Errorf("swept %d: expected a route and a node", swept)
	}
	if entries, nodes := r.Routes(); len(entries) != 4 || !slices.Equal(nodes, []netip.Addr{self, node2}) {
		t.Errorf("after the sweep: %v, %v", entries, nodes)
	}
}

// TestAgainstNaiveTwin drives the router and two maps through the same random transactions.
func TestAgainstNaiveTwin(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := New()
		routes, nodes := map[netip.Prefix]bool{}, map[netip.Addr]bool{} // true: stale
		node := rapid.Custom(func(t *rapid.T) netip.Addr {
			return netip.AddrFrom4([4]byte{198, 18, 0, rapid.ByteRange(1, 6).Draw(t, "node")})
		})
		prefix := rapid.Custom(func(t *rapid.T) netip.Prefix {
			return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, rapid.ByteRange(0, 5).Draw(t, "net"), 0, 0}), rapid.IntRange(16, 17).Draw(t, "bits"))
		})
		t.Repeat(map[string]func(*rapid.T){
			"update": func(t *rapid.T) {
				u := Update{
					AddNodes: rapid.SliceOfN(node, 0, 3).Draw(t, "add"),
					DelNodes: rapid.SliceOfN(node, 0, 2).Draw(t, "remove"),
					Del:      rapid.SliceOfN(prefix, 0, 2).Draw(t, "del"),
				}
				for _, p := range rapid.SliceOfN(prefix, 0, 3).Draw(t, "set") {
					u.Set = append(u.Set, Route{Prefix: p, NextHop: NextHop{Kind: KindLocal}})
				}
				if err := r.Update(u); err != nil {
					t.Fatal(err)
				}
				for _, a := range u.DelNodes {
					delete(nodes, a)
				}
				for _, a := range u.AddNodes {
					nodes[a] = false
				}
				for _, p := range u.Del {
					delete(routes, p)
				}
				for _, s := range u.Set {
					routes[s.Prefix] = false
				}
			},
			"begin": func(*rapid.T) {
				r.Begin()
				for a := range nodes {
					nodes[a] = true
				}
				for p := range routes {
					routes[p] = true
				}
			},
			"end": func(t *rapid.T) {
				want := 0
				for a, stale := range nodes {
					if stale {
						delete(nodes, a)
						want++
					}
				}
				for p, stale := range routes {
					if stale {
						delete(routes, p)
						want++
					}
				}
				if got := r.End(); got != want {
					t.Fatalf("swept %d: expected %d", got, want)
				}
			},
			"": func(t *rapid.T) {
				entries, list := r.Routes()
				got := map[netip.Prefix]bool{}
				for _, e := range entries {
					got[e.Prefix] = e.Stale
				}
				if !maps.Equal(got, routes) || !slices.Equal(list, slices.SortedFunc(maps.Keys(nodes), netip.Addr.Compare)) {
					t.Fatalf("routes %v, nodes %v: expected %v, %v", got, list, routes, nodes)
				}
				for i := range byte(8) {
					a := netip.AddrFrom4([4]byte{198, 18, 0, i})
					if _, want := nodes[a]; r.state.Load().isNode(a) != want {
						t.Fatalf("isNode(%v) is not %v", a, want)
					}
				}
			},
		})
	})
}
