package table

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"syscall"
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
func flatten(prefixes []netip.Prefix, lookup func(uint32) fib.Hop) ([]stretch, []uint64) {
	edges := make([]uint32, 1, 2*len(prefixes)+1)
	for _, p := range prefixes {
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

// numbers maps an array of its own, in huge pages or in none; close gives it back.
func numbers(n int, huge bool) (_ []uint32, close func() error, err error) {
	const page = 2 << 20
	b, err := syscall.Mmap(-1, 0, n*4+page, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		return nil, nil, fmt.Errorf("mmap: %w", err)
	}
	advice := syscall.MADV_NOHUGEPAGE
	if huge {
		advice = syscall.MADV_HUGEPAGE
	}
	// In a kernel that gives no choice of pages both forms are alike.
	if err := syscall.Madvise(b, advice); err != nil && err != syscall.EINVAL {
		return nil, nil, errors.Join(fmt.Errorf("madvise: %w", err), syscall.Munmap(b))
	}
	skip := -uintptr(unsafe.Pointer(&b[0])) % page
	return unsafe.Slice((*uint32)(unsafe.Pointer(&b[skip])), n), func() error { return syscall.Munmap(b) }, nil
}

// Form is one way to look up a batch.
type Form struct {
	Name  string
	Batch func(dst []uint32, hops []fib.Hop)
	Bytes uint64 // of the table; 0 where that is not known
}

// Forms are the ways to look up, over the same prefixes.
type Forms struct {
	All    []Form
	closes []func() error
}

// Close frees what lies outside Go's heap.
func (f *Forms) Close() error {
	var errs []error
	for _, c := range f.closes {
		errs = append(errs, c())
	}
	f.closes = nil
	return errors.Join(errs...)
}

// Ours and Peer name the form that the vRouter uses, and the one that it is measured against.
const (
	Ours = "Forwarding"
	Peer = "bart.Fast"
)

// NewForms builds the prefixes in every form.
func NewForms(prefixes []netip.Prefix) (_ *Forms, err error) {
	fast, t := new(bart.Fast[uint32]), fib.New()
	routes := routesOf(prefixes)
	if err := t.Update(routes, nil); err != nil {
		return nil, err
	}
	f := t.Forwarding()
	for _, r := range routes {
		fast.Insert(r.Prefix, binary.BigEndian.Uint32(r.NextHop.Gateway.AsSlice()))
	}
	all, hops := flatten(prefixes, f.Lookup)
	d := newDXR(all, hops)
	out := &Forms{All: []Form{
		{Name: Peer, Batch: func(dst []uint32, hops []fib.Hop) {
			for i, a := range dst {
				var b [4]byte
				binary.BigEndian.PutUint32(b[:], a)
				gateway, _ := fast.Lookup(netip.AddrFrom4(b))
				hops[i] = fib.Hop(gateway)
			}
		}},
		{Name: Ours, Batch: f.LookupBatch, Bytes: uint64(f.Bytes())},
		{Name: Ours + ", one by one", Batch: func(dst []uint32, hops []fib.Hop) {
			var last uint32
			for i, a := range dst {
				hops[i] = f.Lookup(a ^ last)
				last = uint32(hops[i] >> 63) // 0, but the processor has to wait for it
			}
		}},
		{Name: "DXR", Batch: d.batch, Bytes: uint64(len(d.direct)+len(d.ranges)) * 4},
	}}
	for _, huge := range []bool{false, true} {
		cells, free, err := numbers(1<<24, huge)
		if err != nil {
			return nil, errors.Join(err, out.Close())
		}
		out.closes = append(out.closes, free)
		name := "DIR-24-8"
		if huge {
			name += ", huge pages"
		}
		out.All = append(out.All, Form{Name: name, Batch: newDIR248(cells, all, hops).batch, Bytes: 1 << 26})
	}
	return out, nil
}

// Addresses returns n random addresses inside the prefixes, each inside a random one.
func Addresses(prefixes []netip.Prefix, n int) []uint32 {
	rnd := rand.New(rand.NewPCG(3, 4))
	dst := make([]uint32, n)
	for i := range dst {
		dst[i] = inside(rnd, prefixes[rnd.IntN(len(prefixes))])
	}
	return dst
}

// LookupBatches looks n addresses up by batches of 64, from the front of dst and round; len(dst) is a multiple of 64.
func (f Form) LookupBatches(dst []uint32, n int) {
	var hops [64]fib.Hop
	for done, at := 0, 0; done < n; done += len(hops) {
		f.Batch(dst[at:at+len(hops)], hops[:])
		if at += len(hops); at == len(dst) {
			at = 0
		}
	}
}
