package fib

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"
)

// via returns a tunnel route whose gateway tells n.
func via(p netip.Prefix, n int) Route {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], 0xc6120000+uint32(n))
	return Route{p, NextHop{KindTunnel, netip.AddrFrom4(b)}}
}

func ip4(a uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], a)
	return netip.AddrFrom4(b)
}

// nested draws prefixes of all lengths around few addresses, so that most contain one another. The shortest, which
// change very many cells, are rare.
func nested(rnd *rand.Rand) netip.Prefix {
	bits := 9 + rnd.IntN(24)
	if rnd.IntN(20) == 0 {
		bits = rnd.IntN(9)
	}
	return netip.PrefixFrom(ip4(0x0a000000|rnd.Uint32()&0x01010181), bits).Masked()
}

// probes are addresses that differ in what nested prefixes tell apart.
func probes() []uint32 {
	var all []uint32
	for i := range uint32(32) {
		a := uint32(0x0a000000) | i&1<<24 | i>>1&1<<16 | i>>2&1<<8 | i>>3&1<<7 | i>>4&1
		all = append(all, a)
	}
	return append(all, 0, 0x08000000, 0x80000000, 0xffffffff)
}

// step is a random transaction whose every route has a gateway of its own, made on the twin too.
func step(rnd *rand.Rand, w *twin, gateway *int) (set []Route, del []netip.Prefix) {
	for range rnd.IntN(5) {
		*gateway++
		set = append(set, via(nested(rnd), *gateway))
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

func (w *twin) answers(addresses []uint32) []NextHop {
	all := make([]NextHop, len(addresses))
	for i, a := range addresses {
		all[i], _ = w.lookup(ip4(a))
	}
	return all
}

// After each single change that a reader could see in the middle of a transaction, every address has the next hop from
// before it or the one from after it.
func TestNeverAThirdNextHop(t *testing.T) {
	seen := 0
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(1, seed))
		tab, w, gateway := New(), &twin{routes: map[netip.Prefix]NextHop{}}, 0
		addresses := probes()
		before := w.answers(addresses)
		for range 20 {
			set, del := step(rnd, w, &gateway)
			after := w.answers(addresses)
			stores := 0
			check := func() {
				if stores++; stores > 1000 && stores%61 != 0 {
					return // a short prefix: its cells are very many and all alike
				}
				seen++
				f := tab.Forwarding()
				for i, a := range addresses {
					if got := f.Lookup(a).NextHop(); got != before[i] && got != after[i] {
						t.Fatalf("seed %d: %v by %v in the middle of a transaction: before %v, after %v\nset %v\ndel %v", seed, ip4(a), got, before[i], after[i], set, del)
					}
				}
			}
			tab.Forwarding().stored = check
			mustUpdate(t, tab, set, del...)
			tab.Forwarding().stored = nil
			f := tab.Forwarding()
			for i, a := range addresses {
				if got := f.Lookup(a).NextHop(); got != after[i] {
					t.Fatalf("seed %d: %v by %v: want %v", seed, ip4(a), got, after[i])
				}
			}
			before = after
		}
	}
	if seen < 10_000 {
		t.Errorf("looked only %d times", seen)
	}
}

// The same with readers that run beside the writer, through all of its ways: in place, anew for want of room, swept.
func TestReadersBesideWriter(t *testing.T) {
	const rounds = 1500
	var (
		rnd       = rand.New(rand.NewPCG(2, 2))
		w         = &twin{routes: map[netip.Prefix]NextHop{}}
		addresses = probes()
		gateway   int
		sets      = make([][]Route, rounds)
		dels      = make([][]netip.Prefix, rounds)
		answers   = [][]NextHop{w.answers(addresses)} // by the number of transactions made
	)
	for i := range rounds {
		sets[i], dels[i] = step(rnd, w, &gateway)
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
			hops := make([]Hop, len(addresses))
			for done.Load() == 0 {
				from := made.Load()
				tab.Forwarding().LookupBatch(addresses, hops)
				to := begun.Load()
				for i, h := range hops {
					ok := slices.ContainsFunc(answers[from:to+1], func(a []NextHop) bool { return a[i] == h.NextHop() })
					if !ok {
						t.Errorf("%v by %v, between transactions %d and %d", ip4(addresses[i]), h.NextHop(), from, to)
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
	mustUpdate(t, tab, []Route{drop("0.0.0.0/0"), drop("128.0.0.0/1"), local("10.0.0.0/8")})
	for i := range 50_000 {
		p := netip.PrefixFrom(ip4(uint32(i)*0x10100+0x40), 26)
		mustUpdate(t, tab, []Route{via(p, i)})
		if h := tab.Forwarding().Lookup(number(p.Addr())); h.NextHop() != via(p, i).NextHop {
			t.Fatalf("%v by %v", p, h.NextHop())
		}
		mustUpdate(t, tab, nil, p)
	}
	f := tab.Forwarding()
	if n := f.Bytes(); n > 512<<10 || len(f.cells) > 2*(rootLen+spareNodes<<nodeShift) || len(f.hops) > 4*spareHops {
		t.Errorf("three routes take %d bytes, %d cells, %d hops", n, len(f.cells), len(f.hops))
	}
}

func TestLookupBatch(t *testing.T) {
	tab, rnd := New(), rand.New(rand.NewPCG(3, 3))
	for i := range 200 {
		mustUpdate(t, tab, []Route{via(nested(rnd), i)})
	}
	f := tab.Forwarding()
	for _, n := range []int{0, 1, 2, stride - 1, stride, stride + 1, 2 * stride, 200} {
		dst, hops := make([]uint32, n), make([]Hop, n+1)
		for i := range dst {
			dst[i] = 0x0a000000 | rnd.Uint32()&0x010101ff
		}
		if allocs := testing.AllocsPerRun(10, func() { f.LookupBatch(dst, hops) }); allocs != 0 {
			t.Errorf("a batch of %d makes %v allocations", n, allocs)
		}
		for i, a := range dst {
			if hops[i] != f.Lookup(a) {
				t.Errorf("%v of a batch of %d: %v, alone %v", ip4(a), n, hops[i].NextHop(), f.Lookup(a).NextHop())
			}
		}
		if hops[n] != 0 {
			t.Errorf("a batch of %d writes behind its end", n)
		}
	}
}

func TestHopIsNextHop(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := genRoute(t)
		if r.Validate() != nil || !r.Prefix.Addr().Is4() {
			return
		}
		if h := hopOf(r.NextHop); !h.Found() || h.NextHop() != r.NextHop || h.Kind() != r.NextHop.Kind {
			t.Fatalf("%v became %v", r.NextHop, h.NextHop())
		}
	})
	if h := Hop(0); h.Found() || h.Kind() != KindDrop || h.NextHop() != (NextHop{}) {
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
