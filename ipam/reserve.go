package ipam

import (
	"encoding/json"
	"net/netip"
	"slices"

	"margay/datastore"
)

// reservationPrefix is where IPReservations lie.
const reservationPrefix = "/calico/resources/v3/projectcalico.org/ipreservations/"

// decodeReservations reads the ranges that are not given out unless somebody asks for that very address. What cannot be
// read reserves nothing.
func (a *Allocator) decodeReservations(kvs []datastore.KV) []netip.Prefix {
	var out []netip.Prefix
	for _, kv := range kvs {
		var r struct {
			Spec struct {
				ReservedCIDRs []string `json:"reservedCIDRs"`
			} `json:"spec"`
		}
		if err := json.Unmarshal(kv.Value, &r); err != nil {
			a.log.Warn("reservation ignored", "key", kv.Key, "err", err)
			continue
		}
		for _, text := range r.Spec.ReservedCIDRs {
			p, err := netip.ParsePrefix(text)
			if addr, addrErr := netip.ParseAddr(text); err != nil && addrErr == nil {
				p, err = addr.Prefix(addr.BitLen())
			}
			if err != nil {
				a.log.Warn("reservation ignored", "key", kv.Key, "reservedCIDRs", text, "err", err)
				continue
			}
			out = append(out, p.Masked())
		}
	}
	return out
}

// allowed says whether an address may be given out unasked.
func (v *view) allowed(addr netip.Addr) bool {
	for _, r := range v.reserved {
		if r.Contains(addr) {
			return false
		}
	}
	return true
}

// whollyReserved says whether a block has no address that may be given out unasked.
func (v *view) whollyReserved(cidr netip.Prefix) bool {
	if !slices.ContainsFunc(v.reserved, cidr.Overlaps) {
		return false
	}
	for addr := cidr.Addr(); cidr.Contains(addr); addr = addr.Next() {
		if v.allowed(addr) {
			return false
		}
	}
	return true
}
