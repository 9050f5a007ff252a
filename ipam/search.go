package ipam

import (
	"context"
	"encoding/binary"
	"errors"
	"hash/fnv"
	"math/bits"
	"net/netip"
	"strings"
)

// A free block is found by asking for some, not by listing all: the walk visits the pool's blocks in an order that looks
// random and is another one on each node, and each look asks etcd about the next few. Where one block in twenty is free,
// a large look misses all of them in less than four of a hundred cases, however large the cluster is. Only a pool that is
// as good as full is listed.

// looks says how many blocks are asked for, one time after the other: few at first, as most pools have room.
var looks = []int{8, 64, 64, 64, 64}

// walk visits the blocks of a pool, each once; of a pool with more than 2^48 blocks only so many.
type walk struct {
	pool               netip.Prefix
	bits               int
	total              uint64 // a power of two
	start, step, taken uint64 // step is odd: it visits all before it comes back
}

func newWalk(pool netip.Prefix, bits int, node string) *walk {
	h := fnv.New64a()
	_, _ = h.Write([]byte(node)) // a hash takes everything
	sum := h.Sum64()
	return &walk{pool: pool, bits: bits, total: 1 << min(48, bits-pool.Bits()), start: sum, step: (sum>>16)*2 + 1}
}

func (w *walk) next() (netip.Prefix, bool) {
	if w.taken == w.total {
		return netip.Prefix{}, false
	}
	n := (w.start + w.taken*w.step) % w.total
	w.taken++
	return netip.PrefixFrom(advance(w.pool.Addr(), n, w.pool.Addr().BitLen()-w.bits), w.bits), true
}

// advance is the address n << shift behind a.
func advance(a netip.Addr, n uint64, shift int) netip.Addr {
	raw := a.As16()
	low := binary.BigEndian.Uint64(raw[8:])
	sum, carry := bits.Add64(low, n<<shift, 0)
	binary.BigEndian.PutUint64(raw[8:], sum)
	binary.BigEndian.PutUint64(raw[:8], binary.BigEndian.Uint64(raw[:8])+n>>(64-shift)+carry)
	if a.Is4() {
		return netip.AddrFrom16(raw).Unmap()
	}
	return netip.AddrFrom16(raw)
}

// search claims a free block of the pool; errFull if there is none.
func (a *Allocator) search(ctx context.Context, v *view, pool *poolView) (*stored, error) {
	w := newWalk(pool.prefix, pool.Spec.BlockSize, a.node)
	for _, size := range looks {
		var ask []netip.Prefix
		for len(ask) < size {
			cidr, ok := w.next()
			if !ok {
				break
			}
			if _, own := v.affinities[cidr]; !own && !v.whollyReserved(cidr) {
				ask = append(ask, cidr)
			}
		}
		if len(ask) == 0 {
			return nil, errFull
		}
		b, err := a.claimOneOf(ctx, v, ask)
		if err != errFull {
			return b, err
		}
	}
	return a.searchList(ctx, v, w)
}

// claimOneOf claims the first of some blocks that is free; errFull if none is.
func (a *Allocator) claimOneOf(ctx context.Context, v *view, ask []netip.Prefix) (*stored, error) {
	names := make([]string, len(ask))
	for i, cidr := range ask {
		names[i] = blockKey(cidr)
	}
	found, err := a.store.Existing(ctx, names...)
	if err != nil {
		return nil, err
	}
	there := make(map[string]bool, len(found))
	for _, key := range found {
		there[key] = true
	}
	for i, cidr := range ask {
		if there[names[i]] {
			continue
		}
		if b, err := a.claimFree(ctx, v, cidr); err != errFull {
			return b, err
		}
	}
	return nil, errFull
}

// searchList is the last resort: it lists all blocks' keys, and claims what the rest of the walk finds to be free.
func (a *Allocator) searchList(ctx context.Context, v *view, w *walk) (*stored, error) {
	kvs, _, err := a.store.Keys(ctx, blockRoot(familyOf(w.pool)))
	if err != nil {
		return nil, err
	}
	used := make(map[string]bool, len(kvs))
	for _, kv := range kvs {
		used[kv.Key] = true
	}
	for cidr, ok := w.next(); ok; cidr, ok = w.next() {
		if _, own := v.affinities[cidr]; own || used[blockKey(cidr)] || v.whollyReserved(cidr) {
			continue
		}
		if b, err := a.claimFree(ctx, v, cidr); err != errFull {
			return b, err
		}
	}
	return nil, errFull
}

// claimFree claims a block that was not there a moment ago; errFull if its range is taken after all.
func (a *Allocator) claimFree(ctx context.Context, v *view, cidr netip.Prefix) (*stored, error) {
	taken, err := a.overlapped(ctx, cidr)
	if err != nil {
		return nil, err
	}
	if taken {
		return nil, errFull
	}
	b, err := a.claim(ctx, v, cidr)
	if errors.Is(err, errTaken) {
		return nil, errFull
	}
	return b, err
}

// overlapped says whether a block of another size, left by an older pool, lies over or in a range. Blocks over it have
// one of a few names. IPv4 blocks in it share its first bytes, and there cannot be many; IPv6 addresses are written too
// variously for that, so that each name they can have is asked for.
func (a *Allocator) overlapped(ctx context.Context, cidr netip.Prefix) (bool, error) {
	var names []string
	largest, smallest := sizes(cidr.Addr())
	for bits := largest; bits < cidr.Bits(); bits++ {
		names = append(names, blockKey(netip.PrefixFrom(cidr.Addr(), bits).Masked()))
	}
	if cidr.Addr().Is6() {
		for bits := cidr.Bits() + 1; bits <= smallest; bits++ {
			for n := range uint64(1) << (bits - cidr.Bits()) {
				names = append(names, blockKey(netip.PrefixFrom(advance(cidr.Addr(), n, smallest-bits), bits)))
			}
		}
	} else if cidr.Bits() < smallest {
		for n := range uint64(1) << max(0, 24-cidr.Bits()) {
			text := advance(cidr.Addr(), n, 8).String()
			names = append(names, blockRootV4+text[:strings.LastIndexByte(text, '.')+1]+"*")
		}
	}
	found, err := a.store.Existing(ctx, names...)
	if err != nil {
		return false, err
	}
	for _, key := range found {
		p, err := parseKeyCIDR(strings.TrimPrefix(key, blockRoot(familyOf(cidr))))
		if err == nil && p != cidr && p.Overlaps(cidr) {
			return true, nil
		}
	}
	return false, nil
}

// sizes are the prefix lengths of the largest and the smallest block that an address can be in.
func sizes(a netip.Addr) (largest, smallest int) {
	if a.Is6() {
		return 116, 128
	}
	return 20, 32
}
