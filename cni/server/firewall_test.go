package server

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"pgregory.net/rapid"
)

func (n *node) counter(name string) uint64 {
	n.t.Helper()
	all, err := n.server.Counters()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, c := range all {
		if c.Name == name {
			return c.Packets
		}
	}
	n.t.Fatalf("no counter %s in %v", name, all)
	return 0
}

func TestSpoofedSourceIsDropped(t *testing.T) {
	n := newNode(t)
	n.start()
	a, b := newPod(t, 0), newPod(t, 1)
	addrA, hostA, _ := n.add(a)
	addrB, _, _ := n.add(b)
	false1 := netip.MustParseAddr("10.244.0.77")
	a.do(t, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(l, &netlink.Addr{IPNet: hostNet(false1)})
	})
	if _, ok := exchange(t, a, b, false1, addrB, moment); ok {
		t.Error("a false source got through")
	}
	if got := n.counter("spoofed"); got == 0 {
		t.Error("not counted")
	}
	if _, ok := exchange(t, a, b, addrA, addrB, patience); !ok {
		t.Error("the true source did not get through")
	}
	spoofers := func() (packets uint64) {
		t.Helper()
		all, err := n.server.Spoofers()
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range all {
			if s.Iface != hostA || s.Source != false1 || s.Destination != addrB || s.Bytes < 28*s.Packets {
				t.Errorf("who spoofs: %+v", s)
			}
			packets += s.Packets
		}
		return packets
	}
	if got, all := spoofers(), n.counter("spoofed"); got != all {
		t.Errorf("%d packets were dropped, %d of them by who sent them", all, got)
	}
	// The counters outlive a rebuild.
	if err := n.server.SetPools(nil, nil); err != nil {
		t.Fatal(err)
	}
	if got := n.counter("spoofed"); got == 0 || spoofers() != got {
		t.Errorf("counter reset: %d, and by who sent them %d", got, spoofers())
	}
}

func TestMasquerade(t *testing.T) {
	n := newNode(t)
	n.start()
	a := newPod(t, 0)
	addr, _, _ := n.add(a)
	// Another machine, at the far end of an underlay.
	out := newPod(t, 9)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "mgt-underlay"
	v := netlink.NewVeth(attrs)
	v.PeerName, v.PeerNamespace = "eth0", netlink.NsFd(int(out.ns.Fd()))
	if err := netlink.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	addressed := func(name, cidr string) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		ad, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, ad); err != nil {
			return err
		}
		return netlink.LinkSetUp(l)
	}
	if err := addressed("mgt-underlay", "198.18.9.1/24"); err != nil {
		t.Fatal(err)
	}
	out.do(t, func() error {
		if err := addressed("eth0", "198.18.9.2/24"); err != nil {
			return err
		}
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: hostNet(addr), Gw: netip.MustParseAddr("198.18.9.1").AsSlice()})
	})
	target := netip.MustParseAddr("198.18.9.2")
	pool := netip.MustParsePrefix("10.244.0.0/16")
	for _, tc := range []struct {
		name     string
		nat, all []netip.Prefix
		want     string
	}{
		{"no natOutgoing", nil, []netip.Prefix{pool}, addr.String()},
		{"leaves the cluster", []netip.Prefix{pool}, []netip.Prefix{pool}, "198.18.9.1"},
		{"destination is a pool", []netip.Prefix{pool}, []netip.Prefix{pool, netip.MustParsePrefix("198.18.9.0/24")}, addr.String()},
		{"overlapping pools", []netip.Prefix{pool, netip.MustParsePrefix("10.244.0.0/24"), netip.MustParsePrefix("255.0.0.0/8"), netip.MustParsePrefix("fd00::/64")},
			[]netip.Prefix{pool, netip.MustParsePrefix("10.244.128.0/17")}, "198.18.9.1"},
	} {
		if err := n.server.SetPools(tc.nat, tc.all); err != nil {
			t.Fatal(err)
		}
		if seen, ok := exchange(t, a, out, addr, target, patience); !ok || seen != tc.want {
			t.Errorf("%s: seen from %s (%v), want %s", tc.name, seen, ok, tc.want)
		}
	}
	if err := n.server.SetPools([]netip.Prefix{{}}, nil); err == nil {
		t.Error("an invalid prefix was accepted")
	}
}

// The naive twin of merge: an address is in the ranges exactly when a prefix contains it.
func TestMerge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		six := rapid.Bool().Draw(t, "IPv6")
		prefixes := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) netip.Prefix {
			b := rapid.SliceOfN(rapid.SampledFrom([]byte{0, 1, 127, 128, 255}), 4, 4).Draw(t, "bytes")
			if !six {
				return netip.PrefixFrom(netip.AddrFrom4([4]byte(b)), rapid.IntRange(0, 32).Draw(t, "bits"))
			}
			at := rapid.SampledFrom([]int{0, 12}).Draw(t, "at") // the bytes that differ: the first or the last ones
			var raw [16]byte
			copy(raw[at:], b)
			return netip.PrefixFrom(netip.AddrFrom16(raw), at*8+rapid.IntRange(0, 32).Draw(t, "bits"))
		}), 0, 8).Draw(t, "prefixes")
		ranges := merge(prefixes, six)
		for i, r := range ranges {
			if r.first.Compare(r.last) > 0 || i > 0 && ranges[i-1].last.Next().Compare(r.first) >= 0 {
				t.Fatalf("ranges not disjoint: %v", ranges)
			}
		}
		b := rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "address")
		probes := []netip.Addr{netip.AddrFrom4([4]byte(b))}
		if six {
			probes = []netip.Addr{netip.AddrFrom16([16]byte(append(make([]byte, 12), b...)))}
		}
		for _, p := range prefixes {
			first := p.Masked().Addr()
			probes = append(probes, first, first.Prev(), p.Addr().Next())
		}
		for _, a := range probes {
			if !a.IsValid() {
				continue
			}
			want, got := false, false
			for _, p := range prefixes {
				want = want || p.Contains(a)
			}
			for _, r := range ranges {
				got = got || r.first.Compare(a) <= 0 && a.Compare(r.last) <= 0
			}
			if got != want {
				t.Fatalf("%s: in ranges %v, in prefixes %v", a, got, want)
			}
		}
	})
}

func FuzzParseAlias(f *testing.F) {
	f.Add("margay k8s-pod-network abc eth0 10.244.0.1")
	f.Add("margay    ")
	f.Fuzz(func(t *testing.T, alias string) {
		a, ok := parseAlias("cali1", alias)
		if !ok {
			return
		}
		if b, ok := parseAlias("cali1", a.alias()); !ok || a != b {
			t.Errorf("%q does not survive a round trip: %+v, %+v", alias, a, b)
		}
	})
}
