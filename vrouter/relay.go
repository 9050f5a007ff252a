package vrouter

import (
	"time"

	"margay/vrouter/packet"
)

// RFC 2003, section 4: routers between two nodes tell this node, the tunnel's entrance, what they could not do with an outer
// packet. The sender inside, who can act on it, is told in words that make sense to him, about the packet that he has sent.

// relays counts what was done about such messages.
type relays struct {
	relayed, limited uint64
	answerer         *answerer
	forgers          forgers
}

// relayedAs says what the sender inside is told for an ICMP error about an outer packet (RFC 2003, 4.1 and 4.4); false: nothing.
// Fragmentation needed is LearnPathMTU's.
func relayedAs(kind, code uint8) (packet.ICMPError, bool) {
	unreachable := func(code uint8) (packet.ICMPError, bool) {
		return packet.ICMPError{Type: packet.ICMPUnreachable, Code: code}, true
	}
	switch {
	case kind == packet.ICMPTimeExceeded && code == 0: // a loop between the nodes
		return unreachable(packet.CodeHost)
	case kind != packet.ICMPUnreachable:
		return packet.ICMPError{}, false
	}
	switch code {
	case 0, 6, 11: // network unreachable, unknown, or not for this type of service
		return unreachable(packet.CodeNet)
	case 1, 2, 7, 8, 12: // host, the same; and protocol: the other node takes no IP-in-IP
		return unreachable(packet.CodeHost)
	case 9, 10, packet.CodeAdminFilter:
		return unreachable(packet.CodeAdminFilter)
	}
	return packet.ICMPError{}, false
}

// Relay makes, of an ICMP error about an outer packet of this node, the one that the sender of the inner packet is told, and
// writes it into reply; its source is 0.0.0.0, for the port to choose. b is the message with its IPv4 header. It reports
// whether there is one to be sent. What it quotes has to be a packet that we have sent, as for LearnPathMTU, and enough of it
// to tell whose it was; the rate is that of a worker (RFC 1812, 4.3.2.8).
func (r *Router) Relay(b []byte, now time.Time, reply *Packet) bool {
	m, ok := packet.ParseICMPError(b)
	if !ok {
		return false
	}
	e, ok := relayedAs(m.Type, m.Code)
	if !ok {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.state.Load()
	quoted := packet.IPv4(m.Quoted)
	if !s.configured || quoted.Protocol() != packet.ProtocolIPIP || quoted.SrcU32() != s.address || !quoted.DF() ||
		!s.isNode(quoted.Dst()) || r.fromPods(packet.IPv4(b).Src()) {
		return false
	}
	if !r.relays.forgers.sent(&s.key, quoted, now) {
		return false
	}
	inner := quoted[quoted.HeaderLen():]
	if len(inner) < packet.IPv4MinLen || inner.HeaderLen() < packet.IPv4MinLen || inner.HeaderLen() >= len(inner) {
		return false // too little to tell its sender
	}
	inner = inner[:min(len(inner), inner.TotalLen())]
	if route, found := r.table.Match(inner.Src()); !found || route.NextHop.Kind != KindLocal {
		return false
	}
	allowed, limited := r.relays.answerer.allows(s.options.ICMPRate, inner)
	switch {
	case limited:
		r.relays.limited++
		return false
	case !allowed:
		return false
	}
	r.relays.relayed++
	r.relays.answerer.write(inner, e, [4]byte{}, reply)
	return true
}

// counters are those of Relay.
func (r *relays) counters() []Counter {
	return []Counter{{Name: "icmp_relayed", Packets: r.relayed}, {Name: "icmp_relay_refused", Packets: r.forgers.refused}}
}
