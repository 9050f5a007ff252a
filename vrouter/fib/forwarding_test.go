package fib

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"
)

// via returns a tunnel route whose gateway tells n. For every third n there are more gateways.
func via(p netip.Prefix, n int) Route {
	gateways := []netip.Addr{ip4(0xc6120000 + uint32(n))}
	if n%3 == 0 {
		for i := range 1 + n/3%3 {
			gateways = append(gateways, ip4(0xc7120000+uint32(n*4+i)))
		}
	}
	if !p.Addr().Is4() {
		for i, a := range gateways {
			gateways[i] = netip.AddrFrom16([16]byte(append([]byte{0xfd, 11: 0}, a.AsSlice()...)))
		}
	}
	return Route{p, Multipath(KindTunnel, gateways...)}
}

func ip4(a uint32) netip.Addr { return address(a) }

// family is what the random tests of one family draw from.
type family struct {
	name string
	// nested draws prefixes of all lengths around few addresses, so that most contain one another. The shortest, which
	// change very many cells, are rare.
	nested func(rnd *rand.Rand) netip.Prefix
	probes []netip.Addr // addresses that differ in what nested prefixes tell apart
}

var families = []family{
	{"IPv4", nested, probes()},
	{"IPv6", nested6, probes6()},
}

func nested(rnd *rand.Rand) netip.Prefix {
	bits := 9 + rnd.IntN(24)
	if rnd.IntN(20) == 0 {
		bits = rnd.IntN(9)
	}
	return netip.PrefixFrom(ip4(0x0a000000|rnd.Uint32()&0x01011181), bits).Masked()
}

func probes() []netip.Addr {
	var all []netip.Addr
	for i := range uint32(64) {
		a := uint32(0x0a000000) | i&1<<24 | i>>1&1<<16 | i>>2&1<<12 | i>>3&1<<8 | i>>4&1<<7 | i>>5&1
		all = append(all, ip4(a))
	}
	return append(all, ip4(0), ip4(0x08000000), ip4(0x80000000), ip4(0xffffffff))
}

// The bits in which the addresses of IPv6 prefixes differ, from the left.
var bits6 = []int{14, 15, 16, 31, 47, 49, 64, 65, 99, 127}

func scattered6(choose func(i int) bool) netip.Addr {
	a := [16]byte{0: 0xfd}
	for i, bit := range bits6 {
		if choose(i) {
			a[bit/8] |= 0x80 >> (bit % 8)
		}
	}
	return netip.AddrFrom16(a)
}

func nested6(rnd *rand.Rand) netip.Prefix {
	bits := 12 + rnd.IntN(117)
	if rnd.IntN(20) == 0 {
		bits = rnd.IntN(12)
	}
	few := rnd.IntN(len(bits6)) // mostly the last bits, so that there are long ways without a fork
	a := scattered6(func(i int) bool { return i >= few && rnd.IntN(2) == 0 })
	return netip.PrefixFrom(a, bits).Masked()
}

func probes6() []netip.Addr {
	var all []netip.Addr
	for n := range 1 << len(bits6) {
		if n%7 < 2 || n < 32 { // enough of the thousand
			all = append(all, scattered6(func(i int) bool { return n>>(len(bits6)-1-i)&1 == 1 }))
		}
	}
	return append(all, netip.IPv6Unspecified(), addr("fd00::8000:0:0:0"), addr("fc00::1"), addr("2001:db8::1"), addr("ffff::"))
}

// ask returns what f says of addresses, all of one family, in batches.
func ask(f *Forwarding, addresses []netip.Addr) []NextHop {
	hops, all := make([]Hop, len(addresses)), make([]NextHop, len(addresses))
	if addresses[0].Is4() {
		dst := make([]uint32, len(addresses))
		for i, a := range addresses {
			dst[i] = number(a)
		}
		f.LookupBatch(dst, hops)
	} else {
		dst := make([]Addr6, len(addresses))
		for i, a := range addresses {
			dst[i] = Addr6Of(a)
		}
		f.LookupBatch6(dst, hops)
	}
	for i, h := range hops {
		all[i] = f.NextHop(h)
	}
	return all
}

// alone is what f says of one address, asked for alone.
func alone(f *Forwarding, a netip.Addr) Hop {
	if a.Is4() {
		return f.Lookup(number(a))
	}
	return f.Lookup6(Addr6Of(a))
}

// step is a random transaction whose every route has a gateway of its own, made on the twin too.
func (fam family) step(rnd *rand.Rand, w *twin, gateway *int) (set []Route, del []netip.Prefix) {
	for range rnd.IntN(5) {
		*gateway++
		set = append(set, via(fam.nested(rnd), *gateway))
	}
	if len(set) > 0 && rnd.IntN(4) == 0 {
		*gateway++
		set = append(set, via(set[0].Prefix, *gateway)) // of two for one prefix the later stays
		del = append(del, set[0].Prefix)                // and is not deleted
	}
	for _, r := range w.sorted() {
		if rnd.IntN(3) == 0 {
			del = append(del, r.Prefix)
		}
	}
	rnd.Shuffle(len(del), func(i, j int) { del[i], del[j] = del[j], del[i] })
	for _, p := range del {
		delete(w.routes, p)
	}
	for _, r := range set {
		w.routes[r.Prefix] = r.NextHop
	}
	return set, del
}

func (w *twin) answers(addresses []netip.Addr) []NextHop {
	all := make([]NextHop, len(addresses))
	for i, a := range addresses {
		all[i], _ = w.lookup(a)
	}
	return all
}

// After each single change that a reader could see in the middle of a transaction, every address has the next hop from
// before it or the one from after it.
func TestNeverAThirdNextHop(t *testing.T) {
	for _, fam := range families {
		t.Run(fam.name, fam.neverAThird)
	}
}

func (fam family) neverAThird(t *testing.T) {
	seen := 0
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(1, seed))
		tab, w, gateway := New(), &twin{routes: map[netip.Prefix]NextHop{}}, 0
		addresses := fam.probes
		before := w.answers(addresses)
		for range 20 {
			set, del := fam.step(rnd, w, &gateway)
			after := w.answers(addresses)
			stores := 0
			check := func() {
				if stores++; stores > 100 && stores%997 != 0 {
					return // a short prefix: its cells are very many and all alike
				}
				seen++
				for i, got := range ask(tab.Forwarding(), addresses) {
					if got != before[i] && got != after[i] {
						t.Fatalf("seed %d: %v by %v in the middle of a transaction: before %v, after %v\nset %v\ndel %v", seed, addresses[i], got, before[i], after[i], set, del)
					}
				}
			}
			f := tab.Forwarding()
			f.v4.stored, f.v6.stored = check, check
			mustUpdate(t, tab, set, del...)
			f.v4.stored, f.v6.stored = nil, nil
			for i, got := range ask(tab.Forwarding(), addresses) {
				if got != after[i] {
					t.Fatalf("seed %d: %v by %v: want %v", seed, addresses[i], got, after[i])
				}
			}
			before = after
		}
	}
	if seen < 5_000 {
		t.Errorf("looked only %d times", seen)
	}
}

// The same with readers that run beside the writer, through all of its ways: in place, anew for want of room, swept.
func TestReadersBesideWriter(t *testing.T) {
	for _, fam := range families {
		t.Run(fam.name, fam.besideWriter)
	}
}

func (fam family) besideWriter(t *testing.T) {
	const rounds = 1500
	var (
		rnd       = rand.New(rand.NewPCG(2, 2))
		w         = &twin{routes: map[netip.Prefix]NextHop{}}
		addresses = fam.probes[:min(len(fam.probes), 80)]
		gateway   int
		sets      = make([][]Route, rounds)
		dels      = make([][]netip.Prefix, rounds)
		answers   = [][]NextHop{w.answers(addresses)} // by the number of transactions made
	)
	for i := range rounds {
		sets[i], dels[i] = fam.step(rnd, w, &gateway)
		answers = append(answers, w.answers(addresses))
	}
	tab := New()
	var (
		readers           sync.WaitGroup
		begun, made, done atomic.Int64
		checked           atomic.Int64
	)
	for range 2 {
		readers.Go(func() {
			for done.Load() == 0 {
				from := made.Load()
				got := ask(tab.Forwarding(), addresses)
				to := begun.Load()
				for i, n := range got {
					ok := slices.ContainsFunc(answers[from:to+1], func(a []NextHop) bool { return a[i] == n })
					if !ok {
						t.Errorf("%v by %v, between transactions %d and %d", addresses[i], n, from, to)
						return
					}
				}
				checked.Add(1)
			}
		})
	}
	for i := range rounds {
		begun.Add(1)
		if i%50 == 49 { // the same end by way of a sweep
			tab.MarkStale()
			var keep []Route
			for r := range tab.Load().All() {
				if !slices.Contains(dels[i], r.Prefix) {
					keep = append(keep, r)
				}
			}
			mustUpdate(t, tab, keep)
			mustUpdate(t, tab, sets[i])
			tab.Sweep()
		} else {
			mustUpdate(t, tab, sets[i], dels[i]...)
		}
		made.Add(1)
		for seen := checked.Load(); i%10 == 0 && checked.Load() == seen && !t.Failed(); {
			tab.Len() // until the readers have come round
		}
	}
	done.Store(1)
	readers.Wait()
}

// What is whole is seen at once: who holds the table from before sees nothing of it, who asks again sees all.
func TestWholeChanges(t *testing.T) {
	tab := New()
	few := []Route{local("10.244.0.0/26"), local("10.244.0.64/26"), drop("0.0.0.0/0")}
	mustUpdate(t, tab, few)
	f := tab.Forwarding()
	mustUpdate(t, tab, []Route{local("10.244.1.0/26")}, pfx("10.244.0.64/26"))
	if tab.Forwarding() != f || f.Lookup(0x0af40101).Kind() != KindLocal || f.Lookup(0x0af40041).Kind() != KindDrop {
		t.Error("a small transaction is not made in place")
	}
	tab.MarkStale()
	mustUpdate(t, tab, few[:1])
	tab.Sweep()
	if f.Lookup(0x0af40101).Kind() != KindLocal || !f.Lookup(0x01010101).Found() {
		t.Error("Sweep is seen in the table from before")
	}
	if now := tab.Forwarding(); now.Lookup(0x0af40101).Found() || now.Lookup(0x01010101).Found() || !now.Lookup(0x0af40001).Found() {
		t.Error("Sweep is not seen")
	}
	f = tab.Forwarding()
	var many []Route
	for i := range wholeChanges {
		many = append(many, via(netip.PrefixFrom(ip4(0x0b000000+uint32(i)<<6), 26), 7))
	}
	mustUpdate(t, tab, many)
	if f.Lookup(0x0b000001).Found() || !tab.Forwarding().Lookup(0x0b000001).Found() || !tab.Forwarding().Lookup(0x0b00ffc1).Found() {
		t.Error("a large transaction is not seen at once")
	}
}

// Prefixes and gateways that come and go for ever take no more and more memory, and few take little.
func TestRoomIsUsedAgain(t *testing.T) {
	tab := New()
	mustUpdate(t, tab, []Route{drop("0.0.0.0/0"), drop("128.0.0.0/1"), local("10.0.0.0/8"), drop("::/0"), local("fd00::/8")})
	for i := range 30_000 {
		p := netip.PrefixFrom(ip4(uint32(i)*0x10100+0x40), 26)
		p6 := netip.PrefixFrom(Addr6{0xfd00<<48 | uint64(i)<<20, uint64(i) << 40}.Addr(), 122)
		mustUpdate(t, tab, []Route{via(p, i), via(p6, i)})
		for _, r := range []Route{via(p, i), via(p6, i)} {
			if got := ask(tab.Forwarding(), []netip.Addr{r.Prefix.Addr()}); got[0] != r.NextHop {
				t.Fatalf("%v by %v, want %v", r.Prefix, got[0], r.NextHop)
			}
		}
		mustUpdate(t, tab, nil, p, p6)
	}
	f := tab.Forwarding()
	if n := f.Bytes(); n > 5<<20 || len(f.v4.cells) > rootLen+2*spareUnits<<unitBits || len(f.v4.hops) > 4*spareHops ||
		len(f.v4.members) > 2*spareMembers || len(f.v6.nodes) > 2*spareNodes6 || len(f.v6.hops) > 4*spareHops || len(f.v6.gateways) > 2*spareMembers {
		t.Errorf("five routes take %d bytes, IPv4: %d cells, %d hops, %d members, IPv6: %d nodes, %d hops, %d gateways", n,
			len(f.v4.cells), len(f.v4.hops), len(f.v4.members), len(f.v6.nodes), len(f.v6.hops), len(f.v6.gateways))
	}
	if len(tab.groups.all) > 4 || len(tab.groups.numbers) != 0 {
		t.Errorf("the table remembers %d groups, %d in use", len(tab.groups.all), len(tab.groups.numbers))
	}
}

func TestLookupBatch(t *testing.T) {
	tab, rnd := New(), rand.New(rand.NewPCG(3, 3))
	for i := range 200 {
		mustUpdate(t, tab, []Route{via(nested(rnd), i), via(nested6(rnd), i)})
	}
	f := tab.Forwarding()
	for _, n := range []int{0, 1, 2, stride - 1, stride, stride + 1, 2 * stride, 200} {
		dst, dst6, hops, hops6 := make([]uint32, n), make([]Addr6, n), make([]Hop, n+1), make([]Hop, n+1)
		for i := range dst {
			dst[i] = 0x0a000000 | rnd.Uint32()&0x010111ff
			dst6[i] = Addr6Of(nested6(rnd).Addr())
		}
		if allocs := testing.AllocsPerRun(10, func() { f.LookupBatch(dst, hops); f.LookupBatch6(dst6, hops6) }); allocs != 0 {
			t.Errorf("a batch of %d makes %v allocations", n, allocs)
		}
		for i := range dst {
			if hops[i] != f.Lookup(dst[i]) || hops6[i] != f.Lookup6(dst6[i]) {
				t.Errorf("%v of a batch of %d: %v, alone %v; %v: %v, alone %v", ip4(dst[i]), n, hops[i], f.Lookup(dst[i]), dst6[i], hops6[i], f.Lookup6(dst6[i]))
			}
		}
		if hops[n] != 0 || hops6[n] != 0 {
			t.Errorf("a batch of %d writes behind its end", n)
		}
	}
}

func TestHopIsNextHop(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := genRoute(t)
		tab := New()
		if err := tab.Update([]Route{r}, nil); err != nil {
			t.Fatal(err)
		}
		f := tab.Forwarding()
		h := alone(f, r.Prefix.Addr())
		if !h.Found() || f.NextHop(h) != r.NextHop || h.Kind() != r.NextHop.Kind || h.IsGroup() != (len(r.NextHop.Gateways()) > 1) {
			t.Fatalf("%v became %v", r.NextHop, f.NextHop(h))
		}
	})
	if h := Hop(0); h.Found() || h.Kind() != KindDrop || New().Forwarding().NextHop(h) != (NextHop{}) {
		t.Error("the zero hop is not: no route")
	}
}

func TestTooManyRoutes(t *testing.T) {
	tab := New()
	tab.most = 3
	mustUpdate(t, tab, []Route{local("10.0.0.0/8"), local("11.0.0.0/8")})
	err := tab.Update([]Route{local("12.0.0.0/8"), local("13.0.0.0/8")}, nil)
	if err == nil || !strings.Contains(err.Error(), "want at most 3") || tab.Len() != 2 {
		t.Errorf("%d routes, error %v", tab.Len(), err)
	}
}

// A snapshot that is in use is not copied again.
func TestLoadShares(t *testing.T) {
	tab := New()
	mustUpdate(t, tab, []Route{local("10.0.0.0/8"), {pfx("fd00::/8"), NextHop{Kind: KindLocal}}})
	s := tab.Load()
	if tab.Load() != s || s.Len() != 2 || tab.Len() != 2 {
		t.Error("the same state twice is not one snapshot")
	}
	mustUpdate(t, tab, nil, pfx("fd00::/8"))
	if tab.Load() == s || s.Len() != 2 || tab.Load().Len() != 1 {
		t.Error("a new state is not a new snapshot")
	}
}
