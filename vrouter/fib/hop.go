package fib

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// Hop is the next hop of a route as forwarding reads it: one word, without pointers. The zero Hop means that no route
// matches. What it refers to (the gateways of a group, those of IPv6) is in the [Forwarding] that it came from.
type Hop uint64

// The bits of a Hop: in the lowest 32 the gateway of an IPv4 route that has one, or else the place of the first of its
// gateways in the table's array; the kind above it; marks; and the number of gateways in a group.
const (
	hopKindShift  = 32
	hopFound      = 1 << 40 // tells a drop route without a gateway from no route
	hopGroup      = 1 << 41
	hop6          = 1 << 42
	hopCountShift = 48
)

// Found reports whether a route matched.
func (h Hop) Found() bool { return h&hopFound != 0 }

// Kind returns what is done with the packet; KindDrop when no route matched.
func (h Hop) Kind() Kind { return Kind(h >> hopKindShift) }

// IsGroup reports whether the route has several gateways: then [Forwarding.Select] says which of them a flow takes.
func (h Hop) IsGroup() bool { return h&hopGroup != 0 }

// Gateway returns the gateway's address as a number, its first octet in the highest bits; 0 where there is none. It is
// for IPv4 hops that are no group.
func (h Hop) Gateway() uint32 { return uint32(h) }

// count is the number of gateways of a group.
func (h Hop) count() uint32 { return uint32(h >> hopCountShift) }

// plain returns n as a Hop where the word holds all of it: for IPv4, and at most one gateway.
func plain(n NextHop) Hop {
	h := Hop(hopFound) | Hop(n.Kind)<<hopKindShift
	if n.Gateway.IsValid() {
		h |= Hop(number(n.Gateway))
	}
	return h
}

// nextHop is the inverse of plain.
func (h Hop) nextHop() NextHop {
	n := NextHop{Kind: h.Kind()}
	if h.Gateway() != 0 {
		n.Gateway = address(h.Gateway())
	}
	return n
}

// number returns an IPv4 address as a number.
func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

// address is the inverse of number.
func address(n uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}

// Addr6 is an IPv6 address as forwarding reads it: its two halves as numbers, the first octet in the highest bits.
type Addr6 struct{ Hi, Lo uint64 }

// Addr6Of returns an IPv6 address as numbers.
func Addr6Of(a netip.Addr) Addr6 {
	b := a.As16()
	return Addr6{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

// Addr is the inverse of Addr6Of.
func (a Addr6) Addr() netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], a.Hi)
	binary.BigEndian.PutUint64(b[8:], a.Lo)
	return netip.AddrFrom16(b)
}

// weight is what a flow gives a gateway, of which x is a number: the flow takes the gateway that it gives most. That is
// rendezvous hashing (Thaler, Ravishankar 1998; RFC 2991 calls it highest random weight): what a flow takes depends on
// no other gateway, so one that goes moves its own flows alone, and one that comes takes only those that it keeps.
func weight(flow uint32, x uint64) uint64 {
	hi, lo := bits.Mul64(uint64(flow)*0x9e3779b97f4a7c15^0xd1b54a32d192ed03, x*0xbf58476d1ce4e5b9^0x94d049bb133111eb)
	return hi ^ lo
}
