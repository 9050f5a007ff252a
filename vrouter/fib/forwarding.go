package fib

import "net/netip"

// Forwarding is the table as workers read it: flat arrays without pointers, one trie for each family. Lookups allocate
// nothing and wait for nobody.
//
// A worker asks the [Table] for it once per batch. Small transactions change it under the worker's eyes, one cell at a
// time, in an order that gives every lookup the next hop before the transaction or the one after it, never a third.
// Whole resynchronisations make a new one, and the worker sees them at once with its next batch. A [Hop] means nothing
// to another Forwarding than the one that gave it.
type Forwarding struct {
	v4 *trie4
	v6 *trie6
}

// Lookup returns the next hop of the longest IPv4 prefix that contains the address a, whose first octet is in the
// highest bits.
func (f *Forwarding) Lookup(a uint32) Hop { return f.v4.lookup(a) }

// Lookup6 is the same for IPv6. An IPv4-mapped address is an IPv6 address: it matches no IPv4 route.
func (f *Forwarding) Lookup6(a Addr6) Hop { return f.v6.lookup(a) }

// LookupBatch looks up every address of dst and writes the answers to the front of hops, which is at least as long. It
// is several times as fast as Lookup for each.
func (f *Forwarding) LookupBatch(dst []uint32, hops []Hop) {
	for len(dst) > stride {
		f.v4.lookups(dst[:stride], hops[:stride])
		dst, hops = dst[stride:], hops[stride:]
	}
	f.v4.lookups(dst, hops[:len(dst)])
}

// LookupBatch6 is the same for IPv6.
func (f *Forwarding) LookupBatch6(dst []Addr6, hops []Hop) {
	for len(dst) > stride {
		f.v6.lookups(dst[:stride], hops[:stride])
		dst, hops = dst[stride:], hops[stride:]
	}
	f.v6.lookups(dst, hops[:len(dst)])
}

// Select returns the one gateway of the group h that a flow takes, as a hop that is no group; any other hop as it is.
// flow is the flow's hash. The same flow always takes the same gateway of the same set, in every process and on every
// node; when a gateway leaves the set only its flows take others, and one that joins takes flows from the others and
// moves none between them.
func (f *Forwarding) Select(h Hop, flow uint32) Hop {
	switch {
	case !h.IsGroup():
		return h
	case h&hop6 != 0:
		return f.v6.choose(h, flow)
	}
	return f.v4.choose(h, flow)
}

// LeadsTo reports whether gateway, an IPv4 address as a number, is h's or one of h's.
func (f *Forwarding) LeadsTo(h Hop, gateway uint32) bool {
	if !h.IsGroup() {
		return h.Gateway() == gateway
	}
	for _, m := range f.v4.members[uint32(h):][:h.count()] {
		if m == gateway {
			return true
		}
	}
	return false
}

// Gateway6 returns the gateway of an IPv6 hop that is no group; the zero address where there is none.
func (f *Forwarding) Gateway6(h Hop) Addr6 { return f.v6.gateways[uint32(h)] }

// NextHop returns h as the control plane writes it, all gateways of a group included.
func (f *Forwarding) NextHop(h Hop) NextHop {
	if h&hop6 == 0 && !h.IsGroup() {
		return h.nextHop()
	}
	gateways := make([]netip.Addr, h.count())
	for i := range gateways {
		if h&hop6 != 0 {
			gateways[i] = f.v6.gateways[int(uint32(h))+i].Addr()
		} else {
			gateways[i] = address(f.v4.members[int(uint32(h))+i])
		}
	}
	return Multipath(h.Kind(), gateways...)
}

// Bytes returns the memory that the table takes, in bytes.
func (f *Forwarding) Bytes() int { return f.v4.bytes() + f.v6.bytes() }
