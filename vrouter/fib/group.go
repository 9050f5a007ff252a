package fib

import (
	"encoding"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// MaxGateways is the largest number of gateways that a route may have.
const MaxGateways = 64

// Gateways is a set of addresses, sorted. It may be compared with ==; the zero value is empty.
type Gateways struct {
	packed string // for each: the length of its binary form, one byte, and that form
}

// gatewaysOf packs addresses as they are.
func gatewaysOf(all []netip.Addr) Gateways {
	var b []byte
	for _, a := range all {
		at := len(b)
		b = append(b, 0)
		b, _ = encoding.BinaryAppender(a).AppendBinary(b) // an Addr has no error to give
		b[at] = byte(len(b) - at - 1)
	}
	return Gateways{string(b)}
}

// Equal reports whether g and o are the same set.
func (g Gateways) Equal(o Gateways) bool { return g == o }

// append appends the addresses to all.
func (g Gateways) append(all []netip.Addr) []netip.Addr {
	for s := g.packed; s != ""; {
		n := 1 + int(s[0])
		var a netip.Addr
		_ = a.UnmarshalBinary([]byte(s[1:n])) // gatewaysOf has written it
		all, s = append(all, a), s[n:]
	}
	return all
}

// Multipath returns the next hop for flows that are spread over all of gateways, whose order does not matter and of
// which each counts once; with one it is the plain next hop, with none it has no gateway.
func Multipath(kind Kind, gateways ...netip.Addr) NextHop {
	all := slices.Clone(gateways)
	slices.SortFunc(all, netip.Addr.Compare)
	all = slices.Compact(all)
	if len(all) == 0 {
		return NextHop{Kind: kind}
	}
	return NextHop{Kind: kind, Gateway: all[0], Others: gatewaysOf(all[1:])}
}

// Gateways returns all of them, sorted: none, one, or those of a group.
func (n NextHop) Gateways() []netip.Addr {
	if !n.Gateway.IsValid() {
		return n.Others.append(nil)
	}
	return n.Others.append([]netip.Addr{n.Gateway})
}

// IsGroup reports whether n has several gateways.
func (n NextHop) IsGroup() bool { return n.Others != Gateways{} }

// String returns the kind, followed by the gateways where there are any: "tunnel 198.18.0.2".
func (n NextHop) String() string {
	words := []string{n.Kind.String()}
	for _, a := range n.Gateways() {
		words = append(words, a.String())
	}
	return strings.Join(words, " ")
}

// validateGroup returns an error unless the gateways are as Multipath orders them. Each by itself is checked elsewhere.
func (r Route) validateGroup(all []netip.Addr) error {
	if len(all) > MaxGateways {
		return fmt.Errorf("route %v: gateways: %d: want at most %d", r.Prefix, len(all), MaxGateways)
	}
	for i := 1; i < len(all); i++ {
		if all[i-1].Compare(all[i]) >= 0 {
			return fmt.Errorf("route %v: gateways: %v behind %v: want them sorted, each once", r.Prefix, all[i], all[i-1])
		}
	}
	return nil
}

// groups gives IPv4 next hops with several gateways numbers, because they do not fit in a [Hop]. A number is used again
// when no route has it any more.
type groups struct {
	numbers map[NextHop]uint32
	all     []NextHop
	users   []int
	free    []uint32
}

// hop returns n as the exact table keeps it. A group counts one user more.
func (g *groups) hop(n NextHop) Hop {
	if !n.IsGroup() {
		return plain(n)
	}
	i, ok := g.numbers[n]
	if !ok {
		if last := len(g.free) - 1; last >= 0 {
			i, g.free = g.free[last], g.free[:last]
			g.all[i] = n
		} else {
			i = uint32(len(g.all))
			g.all, g.users = append(g.all, n), append(g.users, 0)
		}
		if g.numbers == nil {
			g.numbers = make(map[NextHop]uint32)
		}
		g.numbers[n] = i
	}
	g.users[i]++
	return hopFound | hopGroup | Hop(n.Kind)<<hopKindShift | Hop(i)
}

// release says that one route less has h.
func (g *groups) release(h Hop) {
	if !h.IsGroup() {
		return
	}
	i := uint32(h)
	if g.users[i]--; g.users[i] == 0 {
		delete(g.numbers, g.all[i])
		g.all[i] = NextHop{}
		g.free = append(g.free, i)
	}
}

// nextHop is the inverse of hop.
func nextHop(h Hop, all []NextHop) NextHop {
	if h.IsGroup() {
		return all[uint32(h)]
	}
	return h.nextHop()
}
