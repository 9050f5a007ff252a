package fib

import (
	"encoding/binary"
	"net/netip"
)

// Hop is the next hop of an IPv4 route as forwarding reads it: one word, without pointers. The zero Hop means that no
// route matches.
type Hop uint64

// The bits of a Hop: the gateway in the lowest 32, the kind above it, and a mark that tells a drop route without a
// gateway from no route.
const (
	hopKindShift = 32
	hopFound     = 1 << 40
)

// Found reports whether a route matched.
func (h Hop) Found() bool { return h&hopFound != 0 }

// Kind returns what is done with the packet; KindDrop when no route matched.
func (h Hop) Kind() Kind { return Kind(h >> hopKindShift) }

// Gateway returns the gateway's address as a number, its first octet in the highest bits; 0 where there is none.
func (h Hop) Gateway() uint32 { return uint32(h) }

// NextHop returns h as the control plane writes it.
func (h Hop) NextHop() NextHop {
	n := NextHop{Kind: h.Kind()}
	if h.Gateway() != 0 {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], h.Gateway())
		n.Gateway = netip.AddrFrom4(b)
	}
	return n
}

// hopOf is the inverse of NextHop, for the next hop of a valid IPv4 route: its gateway is IPv4 and not 0.0.0.0.
func hopOf(n NextHop) Hop {
	h := Hop(hopFound) | Hop(n.Kind)<<hopKindShift
	if n.Gateway.IsValid() {
		h |= Hop(number(n.Gateway))
	}
	return h
}

// number returns an IPv4 address as a number.
func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}
