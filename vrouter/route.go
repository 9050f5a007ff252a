package vrouter

import "margay/vrouter/fib"

// The table's types, for the rooms that program the router and do not import its table.
type (
	// Route is a prefix and its next hop.
	Route = fib.Route
	// NextHop is what becomes of a packet, and by way of which gateway.
	NextHop = fib.NextHop
	// Kind is what becomes of a packet.
	Kind = fib.Kind
)

// The kinds of next hop.
const (
	KindDrop   = fib.KindDrop
	KindLocal  = fib.KindLocal
	KindTunnel = fib.KindTunnel
	KindDirect = fib.KindDirect
)
