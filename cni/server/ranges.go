package server

import (
	"net/netip"
	"slices"
)

// addrRange is an inclusive range of addresses of one family.
type addrRange struct{ first, last netip.Addr }

// merge turns the prefixes of one family into sorted, disjoint, non-adjacent ranges: an interval set of nftables takes no
// overlaps. Prefixes of the other family are left out.
func merge(prefixes []netip.Prefix, six bool) []addrRange {
	var in []addrRange
	for _, p := range prefixes {
		if p.IsValid() && p.Addr().Is6() == six {
			in = append(in, addrRange{p.Masked().Addr(), lastAddr(p)})
		}
	}
	slices.SortFunc(in, func(a, b addrRange) int { return a.first.Compare(b.first) })
	var out []addrRange
	for _, r := range in {
		if n := len(out); n > 0 {
			// Next is invalid behind the last address there is, and then everything is in the range already.
			if next := out[n-1].last.Next(); !next.IsValid() || r.first.Compare(next) <= 0 {
				if r.last.Compare(out[n-1].last) > 0 {
					out[n-1].last = r.last
				}
				continue
			}
		}
		out = append(out, r)
	}
	return out
}

// lastAddr is the last address of a prefix.
func lastAddr(p netip.Prefix) netip.Addr {
	raw := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(raw)*8; i++ {
		raw[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(raw)
	return a
}
