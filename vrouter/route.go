package vrouter

import (
	"net/netip"

	"margay/vrouter/fib"
)

// The table's types, for the rooms that program the router and do not import its table.
type (
	// Route is a prefix and its next hop.
	Route = fib.Route
	// NextHop is what becomes of a packet, and by way of which gateway.
	NextHop = fib.NextHop
	// Gateways is a set of gateways.
	Gateways = fib.Gateways
	// Kind is what becomes of a packet.
	Kind = fib.Kind
)

// MaxGateways is the largest number of gateways that a route may have.
const MaxGateways = fib.MaxGateways

// The kinds of next hop.
const (
	KindDrop   = fib.KindDrop
	KindLocal  = fib.KindLocal
	KindTunnel = fib.KindTunnel
	KindDirect = fib.KindDirect
)

// Multipath returns the next hop for flows that are spread over all of gateways.
func Multipath(kind Kind, gateways ...netip.Addr) NextHop { return fib.Multipath(kind, gateways...) }
