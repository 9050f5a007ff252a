package fib

import (
	"fmt"
	"net/netip"
)

// Kind says what is done with a packet whose destination a route covers. The zero value is drop.
type Kind uint8

const (
	// KindDrop: dropped on purpose, as a blackhole route does.
	KindDrop Kind = iota
	// KindLocal: a pod or block of this node; the host takes it.
	KindLocal
	// KindTunnel: encapsulated in IP-in-IP and sent to the node at Gateway.
	KindTunnel
	// KindDirect: the kernel routes it unencapsulated via Gateway.
	KindDirect

	kindCount
)

var kindNames = [kindCount]string{KindDrop: "drop", KindLocal: "local", KindTunnel: "tunnel", KindDirect: "direct"}

// String returns "drop", "local", "tunnel" or "direct", and "kind(N)" for a value that is none of the constants.
func (k Kind) String() string {
	if k >= kindCount {
		return fmt.Sprintf("kind(%d)", uint8(k))
	}
	return kindNames[k]
}

// ParseKind is the inverse of [Kind.String].
func ParseKind(s string) (Kind, error) {
	for k, name := range kindNames {
		if s == name {
			return Kind(k), nil
		}
	}
	return KindDrop, fmt.Errorf("kind: %q: want drop, local, tunnel or direct", s)
}

// NextHop is where a route leads. Gateway is set for KindTunnel and KindDirect and the zero Addr otherwise. A route with
// several gateways (ECMP), which [Multipath] makes, has the lowest there and the rest in Others; each flow keeps to one
// of them. NextHops may be compared with ==. The zero NextHop drops.
type NextHop struct {
	Kind    Kind
	Gateway netip.Addr
	Others  Gateways
}

// Route is one entry of the table.
type Route struct {
	// Prefix is masked: no bit is set beyond its length.
	Prefix  netip.Prefix
	NextHop NextHop
}

// Validate returns nil for a route that the table accepts, and an error that names the field and what was expected
// otherwise: a masked IPv4 or IPv6 prefix (not IPv4-mapped); a known kind; for tunnel and direct unicast gateways of
// the prefix' family and without a zone, at most [MaxGateways] and as Multipath orders them; for the others none.
func (r Route) Validate() error {
	if err := validatePrefix(r.Prefix); err != nil {
		return err
	}
	switch r.NextHop.Kind {
	case KindDrop, KindLocal:
		if all := r.NextHop.Gateways(); len(all) > 0 {
			return fmt.Errorf("route %v: gateway: %v: a %v route has none", r.Prefix, all[0], r.NextHop.Kind)
		}
		return nil
	case KindTunnel, KindDirect:
	default:
		return fmt.Errorf("route %v: kind: %v: want drop, local, tunnel or direct", r.Prefix, r.NextHop.Kind)
	}
	if !r.NextHop.Gateway.IsValid() {
		return fmt.Errorf("route %v: gateway: missing: a %v route needs one", r.Prefix, r.NextHop.Kind)
	}
	if err := r.validateGateway(r.NextHop.Gateway); err != nil || !r.NextHop.IsGroup() {
		return err
	}
	all := r.NextHop.Gateways()
	for _, gw := range all[1:] {
		if err := r.validateGateway(gw); err != nil {
			return err
		}
	}
	return r.validateGroup(all)
}

func (r Route) validateGateway(gw netip.Addr) error {
	switch {
	case !gw.IsValid() || gw.Is4In6() || gw.Zone() != "":
		return fmt.Errorf("route %v: gateway: %v: want a plain IPv4 or IPv6 address", r.Prefix, gw)
	case gw.Is4() != r.Prefix.Addr().Is4():
		return fmt.Errorf("route %v: gateway: %v: want an address of the prefix' family", r.Prefix, gw)
	case gw.IsUnspecified() || gw.IsMulticast() || gw == broadcast:
		return fmt.Errorf("route %v: gateway: %v: want a unicast address", r.Prefix, gw)
	}
	return nil
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

func validatePrefix(p netip.Prefix) error {
	switch {
	case !p.IsValid():
		return fmt.Errorf("prefix: %v: want an IPv4 or IPv6 prefix", p)
	case p.Addr().Is4In6():
		return fmt.Errorf("prefix: %v: want IPv4 or IPv6, not IPv4-mapped", p)
	case p.Masked() != p:
		return fmt.Errorf("prefix: %v: bits set beyond the length: want %v", p, p.Masked())
	}
	return nil
}
