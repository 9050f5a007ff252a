package table

import (
	"math/rand/v2"
	"net/netip"

	"github.com/gaissmai/bart"

	"margay/vrouter/fib"
)

// Form6 is one way to look up a batch of IPv6 addresses.
type Form6 struct {
	Name     string
	Batch    func(dst []fib.Addr6, hops []fib.Hop)
	Gateways func(dst, gateways []fib.Addr6) // what Batch's answers mean; the zero address where no prefix matches
	Bytes    uint64                          // of the table; 0 where that is not known
}

// Real6 returns the IPv6 prefixes that the bart module ships.
func Real6() ([]netip.Prefix, error) { return readPrefixes(netip.Addr.Is6) }

// Cluster6 makes n blocks of 122 bits, as Calico's IPAM does.
func Cluster6(n int) []netip.Prefix {
	all := make([]netip.Prefix, n)
	for i := range all {
		all[i] = netip.PrefixFrom(fib.Addr6{Hi: 0xfd00_0010_0244_0000, Lo: uint64(i) << 6}.Addr(), 122)
	}
	return all
}

// NewForms6 builds the prefixes in every form.
func NewForms6(prefixes []netip.Prefix) ([]Form6, error) {
	fast, t := new(bart.Fast[uint32]), fib.New()
	routes := make([]fib.Route, len(prefixes))
	gateways := make([]fib.Addr6, len(prefixes)+1)
	for i, p := range prefixes {
		gateways[i+1] = fib.Addr6{Hi: 0xfd01 << 48, Lo: uint64(1 + i%62_500)}
		routes[i] = fib.Route{Prefix: p, NextHop: fib.NextHop{Kind: fib.KindTunnel, Gateway: gateways[i+1].Addr()}}
		fast.Insert(p, uint32(i+1))
	}
	if err := t.Update(routes, nil); err != nil {
		return nil, err
	}
	f := t.Forwarding()
	peer := func(dst []fib.Addr6, hops []fib.Hop) {
		for i, a := range dst {
			n, _ := fast.Lookup(a.Addr())
			hops[i] = fib.Hop(n)
		}
	}
	each := func(batch func([]fib.Addr6, []fib.Hop), gateway func(fib.Hop) fib.Addr6) func(dst, gateways []fib.Addr6) {
		return func(dst, gateways []fib.Addr6) {
			hops := make([]fib.Hop, len(dst))
			batch(dst, hops)
			for i, h := range hops {
				gateways[i] = gateway(h)
			}
		}
	}
	one := func(dst []fib.Addr6, hops []fib.Hop) {
		var last uint64
		for i, a := range dst {
			hops[i] = f.Lookup6(fib.Addr6{Hi: a.Hi, Lo: a.Lo ^ last})
			last = uint64(hops[i] >> 63) // 0, but the processor has to wait for it
		}
	}
	return []Form6{
		{Name: Peer, Batch: peer, Gateways: each(peer, func(h fib.Hop) fib.Addr6 { return gateways[h] })},
		{Name: Ours, Batch: f.LookupBatch6, Gateways: each(f.LookupBatch6, f.Gateway6), Bytes: uint64(f.Bytes())},
		{Name: Ours + ", one by one", Batch: one, Gateways: each(one, f.Gateway6)},
	}, nil
}

// Addresses6 returns n random addresses, each inside a random prefix.
func Addresses6(prefixes []netip.Prefix, n int) []fib.Addr6 {
	rnd := rand.New(rand.NewPCG(3, 6))
	dst := make([]fib.Addr6, n)
	for i := range dst {
		p := prefixes[rnd.IntN(len(prefixes))]
		a := fib.Addr6Of(p.Addr())
		hi, lo := rnd.Uint64(), rnd.Uint64()
		if bits := p.Bits(); bits <= 64 {
			a.Hi |= hi & (1<<(64-bits) - 1)
			a.Lo = lo
		} else {
			a.Lo |= lo & (1<<(128-bits) - 1)
		}
		dst[i] = a
	}
	return dst
}

// LookupBatches looks n addresses up by batches of 64, from the front of dst and round; len(dst) is a multiple of 64.
func (f Form6) LookupBatches(dst []fib.Addr6, n int) {
	var hops [64]fib.Hop
	for done, at := 0, 0; done < n; done += len(hops) {
		f.Batch(dst[at:at+len(hops)], hops[:])
		if at += len(hops); at == len(dst) {
			at = 0
		}
	}
}
