package server

import (
	"net/netip"
	"slices"
)

// addrRange is an inclusive range of IPv4 addresses.
type addrRange struct{ first, last uint32 }

// mergeIPv4 turns prefixes into sorted, disjoint, non-adjacent ranges: an interval set of nftables takes no overlaps.
// Prefixes of other families are left out.
func mergeIPv4(prefixes []netip.Prefix) []addrRange {
	var in []addrRange
	for _, p := range prefixes {
		if !p.IsValid() || !p.Addr().Is4() {
			continue
		}
		first := u32(p.Masked().Addr())
		in = append(in, addrRange{first, first | uint32(uint64(1)<<(32-p.Bits())-1)})
	}
	slices.SortFunc(in, func(a, b addrRange) int {
		if a.first < b.first {
			return -1
		}
		return 1
	})
	var out []addrRange
	for _, r := range in {
		if n := len(out); n > 0 && uint64(r.first) <= uint64(out[n-1].last)+1 {
			out[n-1].last = max(out[n-1].last, r.last)
			continue
		}
		out = append(out, r)
	}
	return out
}

func u32(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}
