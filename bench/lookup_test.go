package bench

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"unsafe"

	"github.com/gaissmai/bart"

	"margay/vrouter/fib"
)

// stretch is a run of addresses, from first to the next stretch, with one next hop.
type stretch struct {
	first uint32
	hop   uint32 // into the hops
}

// flatten returns the whole table as stretches, without two equal ones side by side, and the hops they use.
func flatten(table []netip.Prefix, lookup func(uint32) fib.Hop) ([]stretch, []uint64) {
	edges := make([]uint32, 1, 2*len(table)+1)
	for _, p := range table {
		a := binary.BigEndian.Uint32(p.Addr().AsSlice())
		edges = append(edges, a)
		if end := uint64(a) + 1<<(32-p.Bits()); end < 1<<32 {
			edges = append(edges, uint32(end))
		}
	}
	slices.Sort(edges)
	hops, index := []uint64{}, map[fib.Hop]uint32{}
	var all []stretch
	for _, a := range slices.Compact(edges) {
		h := lookup(a)
		i, ok := index[h]
		if !ok {
			i = uint32(len(hops))
			index[h], hops = i, append(hops, uint64(h))
		}
		if len(all) == 0 || all[len(all)-1].hop != i {
			all = append(all, stretch{a, i})
		}
	}
	return all, hops
}

// dir248 is DIR-24-8: a cell for each 24 bits, which holds the hop or leads to 256 more cells.
type dir248 struct {
	cells  []uint32
	groups []uint32
	hops   []uint64
}

func newDIR248(cells []uint32, all []stretch, hops []uint64) *dir248 {
	d := &dir248{cells: cells, hops: hops}
	at := 0
	for i := range cells {
		first := uint32(i) << 8
		for at+1 < len(all) && all[at+1].first <= first {
			at++
		}
		if at+1 == len(all) || all[at+1].first-first > 255 {
			cells[i] = all[at].hop
			continue
		}
		cells[i] = 1<<31 | uint32(len(d.groups)>>8)
		for low, j := uint32(0), at; low < 256; low++ {
			for j+1 < len(all) && all[j+1].first <= first|low {
				j++
			}
			d.groups = append(d.groups, all[j].hop)
		}
	}
	return d
}

func (d *dir248) batch(dst []uint32, hops []fib.Hop) {
	hops = hops[:len(dst)]
	for i, a := range dst {
		c := d.cells[a>>8]
		if c >= 1<<31 {
			c = d.groups[c<<8|a&255]
		}
		hops[i] = fib.Hop(d.hops[c])
	}
}

// dxr is DXR (Zec, Rizzo, Mikuc 2012) with 18 bits looked up directly and the other 14 by binary search in the
// stretches that begin there: few bytes a prefix, so that all of it stays in a cache.
type dxr struct {
	direct []uint32 // index of the chunk's first stretch
	ranges []uint32 // first address, 14 bits of it, above the hop's index, 18 bits
	hops   []uint64
}

func newDXR(all []stretch, hops []uint64) *dxr {
	d := &dxr{direct: make([]uint32, 1<<18+1), hops: hops}
	at := 0
	for i := range uint32(1 << 18) {
		first := i << 14
		d.direct[i] = uint32(len(d.ranges))
		for at+1 < len(all) && all[at+1].first <= first {
			at++
		}
		d.ranges = append(d.ranges, all[at].hop)
		for at+1 < len(all) && all[at+1].first>>14 == i {
			at++
			d.ranges = append(d.ranges, all[at].first<<18|all[at].hop)
		}
	}
	d.direct[1<<18] = uint32(len(d.ranges))
	return d
}

func (d *dxr) batch(dst []uint32, hops []fib.Hop) {
	hops = hops[:len(dst)]
	for i, a := range dst {
		chunk := a >> 14
		from, n := d.direct[chunk], d.direct[chunk+1]-d.direct[chunk]
		key := a<<18 | (1<<18 - 1)
		for n > 1 {
			half := n / 2
			if d.ranges[from+half] <= key {
				from += half
			}
			n -= half
		}
		hops[i] = fib.Hop(d.hops[d.ranges[from]&(1<<18-1)])
	}
}

// numbers maps an array of its own, in huge pages or in none.
func numbers(tb testing.TB, n int, huge bool) []uint32 {
	const page = 2 << 20
	b, err := syscall.Mmap(-1, 0, n*4+page, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := syscall.Munmap(b); err != nil {
			tb.Error(err)
		}
	})
	advice := syscall.MADV_NOHUGEPAGE
	if huge {
		advice = syscall.MADV_HUGEPAGE
	}
	if err := syscall.Madvise(b, advice); err != nil {
		tb.Logf("no choice of pages in this kernel, both forms are alike: %v", err)
	}
	skip := -uintptr(unsafe.Pointer(&b[0])) % page
	return unsafe.Slice((*uint32)(unsafe.Pointer(&b[skip])), n)
}

// form is one way to look up a batch.
type form struct {
	name  string
	batch func(dst []uint32, hops []fib.Hop)
}

// forms builds the real table in every form.
func forms(tb testing.TB, table []netip.Prefix) []form {
	tb.Helper()
	fast, t := new(bart.Fast[fib.NextHop]), fib.New()
	routes := routesOf(table)
	for _, r := range routes {
		fast.Insert(r.Prefix, r.NextHop)
	}
	if err := t.Update(routes, nil); err != nil {
		tb.Fatal(err)
	}
	f := t.Forwarding()
	all, hops := flatten(table, f.Lookup)
	d := newDXR(all, hops)
	tb.Logf("bytes: Forwarding %d, DIR-24-8 %d, DXR %d", f.Bytes(), 1<<26, (len(d.direct)+len(d.ranges))*4)
	return []form{
		{"bart.Fast", func(dst []uint32, hops []fib.Hop) {
			for i, a := range dst {
				var b [4]byte
				binary.BigEndian.PutUint32(b[:], a)
				n, _ := fast.Lookup(netip.AddrFrom4(b))
				hops[i] = fib.Hop(n.Kind)
			}
		}},
		{"20-4-8", f.LookupBatch},
		{"20-4-8,single", func(dst []uint32, hops []fib.Hop) {
			var last uint32
			for i, a := range dst {
				hops[i] = f.Lookup(a ^ last)
				last = uint32(hops[i] >> 63) // 0, but the processor has to wait for it
			}
		}},
		{"DIR-24-8", newDIR248(numbers(tb, 1<<24, false), all, hops).batch},
		{"DIR-24-8,huge", newDIR248(numbers(tb, 1<<24, true), all, hops).batch},
		{"DXR", d.batch},
	}
}

// BenchmarkLookup is random lookups in the real table, in batches of 64, in every form: ns/op is nanoseconds per lookup.
func BenchmarkLookup(b *testing.B) {
	table := realTable(b)
	rnd := rand.New(rand.NewPCG(3, 4))
	dst := make([]uint32, 1<<20)
	for i := range dst {
		dst[i] = inside(rnd, table[rnd.IntN(len(table))])
	}
	hops := make([]fib.Hop, 64)
	for _, f := range forms(b, table) {
		b.Run("form="+f.name, func(b *testing.B) {
			b.ReportAllocs()
			for done, at := 0, 0; done < b.N; done += len(hops) {
				f.batch(dst[at:at+len(hops)], hops)
				if at += len(hops); at == len(dst) {
					at = 0
				}
			}
		})
	}
}

// TestFormsAgree keeps the comparison honest: every form gives the same answers.
func TestFormsAgree(t *testing.T) {
	table := realTable(t)
	all := forms(t, table)
	rnd := rand.New(rand.NewPCG(5, 6))
	dst := make([]uint32, 1<<16)
	for i := range dst {
		if i%2 == 0 {
			dst[i] = rnd.Uint32()
		} else {
			dst[i] = inside(rnd, table[rnd.IntN(len(table))])
		}
	}
	want, got := make([]fib.Hop, len(dst)), make([]fib.Hop, len(dst))
	all[1].batch(dst, want)
	for _, f := range all[2:] {
		f.batch(dst, got)
		if !slices.Equal(got, want) {
			t.Errorf("%s differs", f.name)
		}
	}
}

// BenchmarkUpdate is one route's update of the full table while a reader looks up at full speed: ns/op is nanoseconds
// per update. Every other one gives a route another next hop, the others take a route away and bring it back.
func BenchmarkUpdate(b *testing.B) {
	table := realTable(b)
	routes := routesOf(table)
	for _, readers := range []int{0, 1} {
		for _, batch := range []int{1, 64} {
			b.Run(fmt.Sprintf("readers=%d/batch=%d", readers, batch), func(b *testing.B) {
				t := fib.New()
				if err := t.Update(routes, nil); err != nil {
					b.Fatal(err)
				}
				stop := read(t, table, readers)
				defer stop()
				rnd := rand.New(rand.NewPCG(7, 8))
				b.ResetTimer()
				for done := 0; done < b.N; done += batch {
					if err := churn(t, rnd, routes, done/batch, batch); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// churn makes the n-th transaction, of so many changes.
func churn(t *fib.Table, rnd *rand.Rand, routes []fib.Route, n, changes int) error {
	at := rnd.IntN(len(routes) - changes)
	some := routes[at : at+changes]
	switch n % 3 {
	case 0:
		moved := slices.Clone(some)
		for i := range moved {
			moved[i].NextHop = routes[rnd.IntN(len(routes))].NextHop
		}
		return t.Update(moved, nil)
	case 1:
		del := make([]netip.Prefix, changes)
		for i, r := range some {
			del[i] = r.Prefix
		}
		return t.Update(nil, del)
	default:
		return t.Update(some, nil)
	}
}

// read starts readers that look up random addresses; stop ends them and waits.
func read(t *fib.Table, table []netip.Prefix, readers int) (stop func()) {
	var (
		wg   sync.WaitGroup
		done atomic.Bool
	)
	for i := range readers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(9, uint64(i)))
			dst, hops := make([]uint32, 1<<16), make([]fib.Hop, 64)
			for i := range dst {
				dst[i] = inside(rnd, table[rnd.IntN(len(table))])
			}
			for at := 0; !done.Load(); at = (at + len(hops)) % len(dst) {
				t.Forwarding().LookupBatch(dst[at:at+len(hops)], hops)
			}
		})
	}
	return func() {
		done.Store(true)
		wg.Wait()
	}
}

// BenchmarkLoad is the full table into an empty one: the time, and the memory that it keeps (live-MB).
func BenchmarkLoad(b *testing.B) {
	routes := routesOf(realTable(b))
	for range b.N {
		b.StopTimer()
		before := live()
		b.StartTimer()
		t := fib.New()
		if err := t.Update(routes, nil); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		b.ReportMetric(float64(live()-before)/1e6, "live-MB")
		runtime.KeepAlive(t)
	}
}

// live returns the bytes of the heap that are in use.
func live() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
