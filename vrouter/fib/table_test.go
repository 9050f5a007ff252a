package fib

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"
)

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func addr(s string) netip.Addr  { return netip.MustParseAddr(s) }

func tunnel(p, gw string) Route { return Route{pfx(p), NextHop{Kind: KindTunnel, Gateway: addr(gw)}} }
func local(p string) Route      { return Route{pfx(p), NextHop{Kind: KindLocal}} }
func drop(p string) Route       { return Route{Prefix: pfx(p)} }

func mustUpdate(t testing.TB, tab *Table, set []Route, del ...netip.Prefix) {
	t.Helper()
	if err := tab.Update(set, del); err != nil {
		t.Fatal(err)
	}
}

func TestLookup(t *testing.T) {
	tab := New()
	if n, ok := tab.Load().Lookup(addr("10.0.0.1")); ok || n != (NextHop{}) {
		t.Errorf("an empty table answers %v", n)
	}
	mustUpdate(t, tab, []Route{
		drop("10.244.0.0/16"), local("10.244.0.0/26"), tunnel("10.244.0.64/26", "198.18.0.2"),
		{pfx("10.244.1.0/26"), NextHop{Kind: KindDirect, Gateway: addr("198.18.0.3")}}, tunnel("10.244.0.70/32", "198.18.0.4"),
		{pfx("fd00::/48"), NextHop{Kind: KindTunnel, Gateway: addr("fd01::2")}},
	})
	s := tab.Load()
	for a, want := range map[string]string{
		"10.244.0.1": "local", "10.244.0.63": "local", "10.244.0.64": "tunnel 198.18.0.2", "10.244.0.70": "tunnel 198.18.0.4",
		"10.244.0.71": "tunnel 198.18.0.2", "10.244.1.1": "direct 198.18.0.3", "10.244.200.1": "drop", "10.245.0.0": "none",
		"fd00::1": "tunnel fd01::2", "fd00:1::1": "none", "::ffff:10.244.0.1": "none",
	} {
		got := "none"
		if n, ok := s.Lookup(addr(a)); ok {
			got = n.String()
		}
		if got != want {
			t.Errorf("%s: %s, want %s", a, got, want)
		}
	}
	if n := testing.AllocsPerRun(100, func() { tab.Load().Lookup(netip.AddrFrom4([4]byte{10, 244, 0, 70})) }); n != 0 {
		t.Errorf("a lookup makes %v allocations", n)
	}
	if _, ok := s.Get(pfx("10.244.0.64/27")); ok {
		t.Error("Get matches more than the very prefix")
	}
}

func TestSnapshotNeverChanges(t *testing.T) {
	tab := New()
	mustUpdate(t, tab, []Route{local("10.0.0.0/8")})
	old := tab.Load()
	mustUpdate(t, tab, []Route{drop("10.0.0.0/8"), local("10.1.0.0/16")})
	mustUpdate(t, tab, nil, pfx("10.0.0.0/8"))
	if got := slices.Collect(old.All()); !slices.Equal(got, []Route{local("10.0.0.0/8")}) {
		t.Errorf("the old snapshot now has %v", got)
	}
	if got := slices.Collect(tab.Load().All()); !slices.Equal(got, []Route{local("10.1.0.0/16")}) {
		t.Errorf("the new one has %v", got)
	}
}

func TestUpdateRefuses(t *testing.T) {
	v4, v6 := addr("198.18.0.2"), addr("fd01::2")
	for _, c := range []struct {
		name string
		set  []Route
		del  []netip.Prefix
		want string // in the error
	}{
		{"no prefix", []Route{{}}, nil, "set[0]: prefix"},
		{"no prefix to delete", nil, []netip.Prefix{{}}, "del[0]: prefix"},
		{"prefix too long", []Route{{Prefix: netip.PrefixFrom(v4, 33)}}, nil, "set[0]: prefix"},
		{"unmasked", []Route{drop("10.0.0.1/8")}, nil, "want 10.0.0.0/8"},
		{"unmasked to delete", nil, []netip.Prefix{pfx("10.0.0.0/8"), pfx("10.0.0.1/8")}, "del[1]: prefix: 10.0.0.1/8"},
		{"IPv4-mapped", []Route{{Prefix: netip.PrefixFrom(addr("::ffff:10.0.0.0"), 120)}}, nil, "prefix"},
		{"unknown kind", []Route{{pfx("10.0.0.0/8"), NextHop{Kind: kindCount}}}, nil, "kind: kind(4)"},
		{"tunnel without gateway", []Route{{pfx("10.0.0.0/8"), NextHop{Kind: KindTunnel}}}, nil, "gateway: missing"},
		{"direct without gateway", []Route{{pfx("10.0.0.0/8"), NextHop{Kind: KindDirect}}}, nil, "gateway: missing"},
		{"local with gateway", []Route{{pfx("10.0.0.0/8"), NextHop{Kind: KindLocal, Gateway: v4}}}, nil, "a local route has none"},
		{"drop with gateway", []Route{{pfx("10.0.0.0/8"), NextHop{Kind: KindDrop, Gateway: v4}}}, nil, "a drop route has none"},
		{"families 4 and 6", []Route{{pfx("10.0.0.0/8"), NextHop{Kind: KindTunnel, Gateway: v6}}}, nil, "family"},
		{"families 6 and 4", []Route{{pfx("fd00::/8"), NextHop{Kind: KindTunnel, Gateway: v4}}}, nil, "family"},
		{"gateway mapped", []Route{{pfx("fd00::/8"), NextHop{Kind: KindTunnel, Gateway: addr("::ffff:1.2.3.4")}}}, nil, "plain"},
		{"gateway with zone", []Route{{pfx("fd00::/8"), NextHop{Kind: KindTunnel, Gateway: addr("fe80::1%eth0")}}}, nil, "plain"},
		{"gateway unspecified", []Route{tunnel("10.0.0.0/8", "0.0.0.0")}, nil, "unicast"},
		{"gateway multicast", []Route{tunnel("10.0.0.0/8", "224.0.0.5")}, nil, "unicast"},
		{"gateway broadcast", []Route{tunnel("10.0.0.0/8", "255.255.255.255")}, nil, "unicast"},
		{"gateways not sorted", []Route{{pfx("10.0.0.0/8"), NextHop{KindTunnel, addr("198.18.0.3"), gatewaysOf([]netip.Addr{v4})}}}, nil, "sorted"},
		{"gateways of two families", []Route{{pfx("10.0.0.0/8"), Multipath(KindTunnel, v4, v6)}}, nil, "family"},
		{"a gateway of a group with zone", []Route{{pfx("fd00::/8"), Multipath(KindTunnel, v6, addr("fe80::1%eth0"))}}, nil, "plain"},
		{"a group of a local route", []Route{{pfx("10.0.0.0/8"), NextHop{Kind: KindLocal, Others: gatewaysOf([]netip.Addr{v4})}}}, nil, "a local route has none"},
		{"a group without its first", []Route{{pfx("10.0.0.0/8"), NextHop{Kind: KindTunnel, Others: gatewaysOf([]netip.Addr{v4})}}}, nil, "gateway: missing"},
		{"too many gateways", []Route{{pfx("10.0.0.0/8"), Multipath(KindTunnel, manyGateways(MaxGateways+1)...)}}, nil, "want at most 64"},
		{"the last of many", []Route{local("10.0.0.0/8"), local("10.1.0.0/16"), {}}, []netip.Prefix{pfx("192.0.2.0/24")}, "set[2]: prefix"},
	} {
		tab := New()
		mustUpdate(t, tab, []Route{local("192.0.2.0/24")})
		tab.MarkStale()
		before := tab.Load()
		err := tab.Update(c.set, c.del)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one with %q", c.name, err, c.want)
		}
		if tab.Load() != before || tab.Stale() != 1 {
			t.Errorf("%s: the refused transaction left a trace", c.name)
		}
	}
}

func TestSetWinsOverDelAndLaterOverEarlier(t *testing.T) {
	tab := New()
	mustUpdate(t, tab, []Route{drop("10.0.0.0/8"), local("10.0.0.0/8")}, pfx("10.0.0.0/8"), pfx("172.16.0.0/12"))
	if got := slices.Collect(tab.Load().All()); !slices.Equal(got, []Route{local("10.0.0.0/8")}) {
		t.Errorf("got %v", got)
	}
}

func TestMarkAndSweep(t *testing.T) {
	tab := New()
	if got := tab.Sweep(); got != nil {
		t.Errorf("swept %v off an empty table", got)
	}
	mustUpdate(t, tab, []Route{local("10.244.0.0/26"), tunnel("10.244.0.64/26", "198.18.0.2"), tunnel("10.244.0.128/26", "198.18.0.3"), drop("10.244.0.0/16")})
	tab.MarkStale()
	tab.MarkStale() // the writer came back and was lost again
	if tab.Stale() != 4 || !tab.StaleAt(pfx("10.244.0.64/26")) || tab.StaleAt(pfx("10.244.0.192/26")) {
		t.Errorf("%d stale", tab.Stale())
	}
	if n, ok := tab.Load().Lookup(addr("10.244.0.65")); !ok || n.Kind != KindTunnel {
		t.Error("a stale route does not forward")
	}
	mustUpdate(t, tab, []Route{
		local("10.244.0.0/26"),                  // as it was
		tunnel("10.244.0.64/26", "198.18.0.9"),  // changed
		tunnel("10.244.0.192/26", "198.18.0.4"), // new
	}, pfx("10.244.0.128/26")) // deleted: not for Sweep to report
	if tab.Stale() != 1 || tab.StaleAt(pfx("10.244.0.0/26")) || tab.StaleAt(pfx("10.244.0.64/26")) || !tab.StaleAt(pfx("10.244.0.0/16")) {
		t.Errorf("%d stale", tab.Stale())
	}
	before := tab.Load()
	if got := tab.Sweep(); !slices.Equal(got, []Route{drop("10.244.0.0/16")}) {
		t.Errorf("swept %v", got)
	}
	want := []Route{local("10.244.0.0/26"), tunnel("10.244.0.64/26", "198.18.0.9"), tunnel("10.244.0.192/26", "198.18.0.4")}
	if got := slices.Collect(tab.Load().All()); !slices.Equal(got, want) || tab.Stale() != 0 {
		t.Errorf("left %v, %d stale", got, tab.Stale())
	}
	if before.Len() != 4 {
		t.Error("Sweep changed an old snapshot")
	}
}

// twin is the naive table: a map, and a walk over all of it for a lookup.
type twin struct {
	routes map[netip.Prefix]NextHop
	stale  map[netip.Prefix]bool
}

func (w *twin) lookup(a netip.Addr) (best NextHop, ok bool) {
	bits := -1
	for p, n := range w.routes {
		if p.Contains(a) && p.Bits() > bits {
			best, bits, ok = n, p.Bits(), true
		}
	}
	return best, ok
}

func (w *twin) sorted() []Route {
	var all []Route
	for p, n := range w.routes {
		all = append(all, Route{p, n})
	}
	slices.SortFunc(all, func(a, b Route) int { return a.Prefix.Compare(b.Prefix) })
	return all
}

// Few bits are random, so that prefixes nest, collide and cover the addresses that are asked for.
func genAddr(t *rapid.T) netip.Addr {
	if rapid.IntRange(0, 3).Draw(t, "family") == 0 {
		a := [16]byte{0: 0xfd, 7: rapid.Uint8Range(0, 3).Draw(t, "b7"), 15: rapid.Uint8Range(0, 3).Draw(t, "b15")}
		return netip.AddrFrom16(a)
	}
	return netip.AddrFrom4([4]byte{10, rapid.Uint8Range(0, 3).Draw(t, "b1"), rapid.Uint8Range(0, 3).Draw(t, "b2"), rapid.Uint8().Draw(t, "b3")})
}

func genPrefix(t *rapid.T) netip.Prefix {
	a := genAddr(t)
	return netip.PrefixFrom(a, rapid.IntRange(0, a.BitLen()).Draw(t, "bits")).Masked()
}

func genRoute(t *rapid.T) Route {
	r := Route{Prefix: genPrefix(t), NextHop: NextHop{Kind: Kind(rapid.Uint8Range(0, uint8(kindCount)-1).Draw(t, "kind"))}}
	if r.NextHop.Kind == KindTunnel || r.NextHop.Kind == KindDirect {
		gateways := make([]netip.Addr, 1+rapid.IntRange(-3, 4).Draw(t, "more")&3)
		for i := range gateways {
			gateways[i] = netip.AddrFrom4([4]byte{198, 18, 0, rapid.Uint8().Draw(t, "gateway")})
			if !r.Prefix.Addr().Is4() {
				gateways[i] = netip.AddrFrom16([16]byte{0: 0xfd, 15: rapid.Uint8().Draw(t, "gateway")})
			}
		}
		r.NextHop = Multipath(r.NextHop.Kind, gateways...)
	}
	return r
}

func TestAgainstTwin(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tab, w := New(), &twin{map[netip.Prefix]NextHop{}, map[netip.Prefix]bool{}}
		t.Repeat(map[string]func(*rapid.T){
			"update": func(t *rapid.T) {
				set := rapid.SliceOfN(rapid.Custom(genRoute), 0, 6).Draw(t, "set")
				del := rapid.SliceOfN(rapid.Custom(genPrefix), 0, 3).Draw(t, "del")
				if all := w.sorted(); len(all) > 0 {
					del = append(del, rapid.SampledFrom(all).Draw(t, "present").Prefix)
				}
				if err := tab.Update(set, del); err != nil {
					t.Fatal(err)
				}
				for _, p := range del {
					delete(w.routes, p)
					delete(w.stale, p)
				}
				for _, r := range set {
					w.routes[r.Prefix] = r.NextHop
					delete(w.stale, r.Prefix)
				}
			},
			"mark": func(*rapid.T) {
				tab.MarkStale()
				for p := range w.routes {
					w.stale[p] = true
				}
			},
			"sweep": func(t *rapid.T) {
				swept := &twin{routes: map[netip.Prefix]NextHop{}}
				for p := range w.stale {
					swept.routes[p] = w.routes[p]
					delete(w.routes, p)
				}
				clear(w.stale)
				if got, want := tab.Sweep(), swept.sorted(); !slices.Equal(got, want) {
					t.Fatalf("swept %v, want %v", got, want)
				}
			},
			"": func(t *rapid.T) {
				s := tab.Load()
				if got, want := slices.Collect(s.All()), w.sorted(); !slices.Equal(got, want) {
					t.Fatalf("routes %v\nwant   %v", got, want)
				}
				if s.Len() != len(w.routes) || tab.Stale() != len(w.stale) {
					t.Fatalf("%d routes, want %d; %d stale, want %d", s.Len(), len(w.routes), tab.Stale(), len(w.stale))
				}
				for range 4 {
					a := genAddr(t)
					got, ok := s.Lookup(a)
					if want, wantOK := w.lookup(a); got != want || ok != wantOK {
						t.Fatalf("%v: %v %v, want %v %v", a, got, ok, want, wantOK)
					}
					checkForwarding(t, tab.Forwarding(), a, w)
				}
				p := genPrefix(t)
				got, ok := s.Get(p)
				if want, wantOK := w.routes[p]; got != want || ok != wantOK || tab.StaleAt(p) != w.stale[p] {
					t.Fatalf("%v: %v %v, want %v %v", p, got, ok, want, wantOK)
				}
			},
		})
	})
}

// checkForwarding compares the hot table's answers for a, alone and in a batch, with the twin's.
func checkForwarding(t *rapid.T, f *Forwarding, a netip.Addr, w *twin) {
	batch := ask(f, []netip.Addr{a})
	h := alone(f, a)
	if want, ok := w.lookup(a); f.NextHop(h) != batch[0] || h.Found() != ok || batch[0] != want || h.Kind() != want.Kind {
		t.Fatalf("forwarding %v: %v %v, in a batch %v: want %v %v", a, f.NextHop(h), h.Found(), batch[0], want, ok)
	}
}

// Small changes of a large table are made in place; the snapshots from before them stay as they are.
func TestLargeTableSmallChanges(t *testing.T) {
	tab, w := New(), &twin{routes: map[netip.Prefix]NextHop{}}
	var all []Route
	for i := range 5000 {
		r := tunnel(fmt.Sprintf("10.%d.%d.%d/26", i>>10, i>>2&255, i&3<<6), "198.18.0.2")
		all, w.routes[r.Prefix] = append(all, r), r.NextHop
	}
	mustUpdate(t, tab, all)
	full := tab.Load()
	for i := 0; i < len(all); i += 50 {
		changed := Route{all[i].Prefix, NextHop{Kind: KindLocal}}
		mustUpdate(t, tab, []Route{changed, all[i+1]}, all[i+2].Prefix)
		w.routes[changed.Prefix] = changed.NextHop
		delete(w.routes, all[i+2].Prefix)
	}
	if got := slices.Collect(tab.Load().All()); !slices.Equal(got, w.sorted()) {
		t.Error("differs from the twin")
	}
	if got := slices.Collect(full.All()); !slices.Equal(got, all) {
		t.Error("the old snapshot changed")
	}
}

// Each transaction moves a group of routes to another gateway at once. A reader that ever sees two gateways in one
// snapshot has seen half a transaction.
func TestReadersSeeWholeTransactions(t *testing.T) {
	tab := New()
	group := make([]Route, 64)
	moveTo := func(gw byte) []Route {
		for i := range group {
			group[i] = Route{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i), 0}), 24), NextHop{Kind: KindTunnel, Gateway: netip.AddrFrom4([4]byte{198, 18, 0, gw})}}
		}
		return group
	}
	mustUpdate(t, tab, moveTo(1))
	// Ballast, so that both ways of sweeping run: what is stale is less than an eighth of the table, or more.
	var ballast []Route
	for i := range 1000 {
		ballast = append(ballast, local(fmt.Sprintf("172.16.%d.%d/32", i>>8, i&255)))
	}
	var (
		readers sync.WaitGroup
		done    atomic.Bool
		checked atomic.Int64
	)
	for range 3 {
		readers.Go(func() {
			for !done.Load() {
				s := tab.Load()
				first, ok := s.Lookup(addr("10.244.0.1"))
				for i := range group {
					n, ok2 := s.Lookup(netip.AddrFrom4([4]byte{10, 244, byte(i), 9}))
					if !ok || !ok2 || n != first {
						t.Errorf("10.244.%d.9 by %v, 10.244.0.1 by %v", i, n, first)
						return
					}
				}
				checked.Add(1)
			}
		})
	}
	for round := range 200 {
		if round == 100 {
			mustUpdate(t, tab, ballast)
		}
		tab.MarkStale()
		mustUpdate(t, tab, moveTo(byte(2+round%200)))
		if round < 100 {
			tab.Sweep()
		}
	}
	for checked.Load() < 10 && !t.Failed() {
		mustUpdate(t, tab, moveTo(1))
	}
	done.Store(true)
	readers.Wait()
}

func TestKindNames(t *testing.T) {
	for k := range kindCount {
		if got, err := ParseKind(k.String()); err != nil || got != k {
			t.Errorf("%v: parsed as %v, %v", k, got, err)
		}
	}
	for _, s := range []string{"", "Tunnel", "kind(4)", "blackhole"} {
		if k, err := ParseKind(s); err == nil || k != KindDrop || !strings.Contains(err.Error(), "want drop, local, tunnel or direct") {
			t.Errorf("%q: %v, %v", s, k, err)
		}
	}
	var zero NextHop
	if zero.Kind != KindDrop {
		t.Error("the zero next hop does not drop")
	}
}
