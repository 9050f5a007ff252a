package vrouter

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"

	"margay/vrouter/packet"
)

// Flow is one direction of a transport connection over IPv4.
type Flow struct {
	Source, Destination netip.AddrPort
	Protocol            uint8
}

// Key returns the flow as BPF programs read it off a packet: the addresses and the ports in network order, the protocol as
// a word of this machine's.
func (f Flow) Key() (key [16]byte) {
	from, to := f.Source.Addr().As4(), f.Destination.Addr().As4()
	copy(key[:], from[:])
	copy(key[4:], to[:])
	binary.BigEndian.PutUint16(key[8:], f.Source.Port())
	binary.BigEndian.PutUint16(key[10:], f.Destination.Port())
	binary.NativeEndian.PutUint32(key[12:], uint32(f.Protocol))
	return key
}

// word returns the flow as flowSet keeps it.
func (f Flow) word() flow {
	key := f.Key()
	return flow{binary.BigEndian.Uint64(key[:]), uint64(f.Protocol)<<32 | uint64(binary.BigEndian.Uint32(key[8:]))}
}

// flow is one direction of a transport connection, as a word for the addresses and one for the rest. The zero flow is
// none.
type flow struct {
	addresses uint64 // source, destination
	rest      uint64 // protocol, source port, destination port
}

// The protocols, beside TCP and UDP, whose ports a connection tracker may rewrite: all have them in their first four
// bytes (RFC 9260, RFC 4340, RFC 3828).
const (
	protoICMP    = 1
	protoDCCP    = 33
	protoSCTP    = 132
	protoUDPLite = 136
)

// flowOf returns the flow of a packet. ok is false for a protocol without ports, and for a fragment that is not the
// first.
func flowOf(p packet.IPv4) (f flow, ok bool) {
	switch p.Protocol() {
	case packet.ProtocolTCP, packet.ProtocolUDP, protoSCTP, protoDCCP, protoUDPLite:
	default:
		return flow{}, false
	}
	hl := p.HeaderLen()
	if p.FragOffset() != 0 || len(p) < hl+4 {
		return flow{}, false
	}
	return flow{
		addresses: binary.BigEndian.Uint64(p[12:]),
		rest:      uint64(p.Protocol())<<32 | uint64(binary.BigEndian.Uint32(p[hl:])),
	}, true
}

// reverse returns the other direction.
func (f flow) reverse() flow {
	ports := uint32(f.rest)
	return flow{
		addresses: f.addresses<<32 | f.addresses>>32,
		rest:      f.rest&^0xffffffff | uint64(ports<<16|ports>>16),
	}
}

// The size of a flowSet: 64 Ki flows in 1 MiB, four of them in a cache line.
const (
	flowWays  = 4
	flowShift = 64 - 14
	flowLines = 1 << (64 - flowShift)
)

// flowSet is a set of flows of bounded size: what has not been seen for longest makes room. One worker writes it; others
// may read it at any time, without waiting for each other.
type flowSet struct {
	lines    [flowLines]flowLine
	changing [flowLines]atomic.Uint32 // odd while the worker moves the flows of a line
	some     atomic.Bool              // it is not empty
}

type flowLine [flowWays]struct{ addresses, rest atomic.Uint64 }

func (l *flowLine) load(i int) flow { return flow{l[i].addresses.Load(), l[i].rest.Load()} }

func (l *flowLine) store(i int, f flow) {
	l[i].addresses.Store(f.addresses)
	l[i].rest.Store(f.rest)
}

// has reports whether f is in the line, as far as nobody changes it.
func (l *flowLine) has(f flow) bool {
	for i := range l {
		if l.load(i) == f {
			return true
		}
	}
	return false
}

func (f flow) line() int {
	const multiplier = 0x9e3779b97f4a7c15 // 2^64 divided by the golden ratio
	return int((f.addresses ^ f.rest*multiplier) * multiplier >> flowShift)
}

// add puts f in. It is for the set's worker.
func (s *flowSet) add(f flow) {
	at := f.line()
	line := &s.lines[at]
	if line.load(0) == f {
		return
	}
	last := 0
	for last < flowWays-1 && line.load(last) != f {
		last++
	}
	s.changing[at].Add(1)
	for ; last > 0; last-- {
		line.store(last, line.load(last-1))
	}
	line.store(0, f)
	s.changing[at].Add(1)
	if !s.some.Load() {
		s.some.Store(true)
	}
}

// has reports whether f is in the set. It is for the set's worker.
func (s *flowSet) has(f flow) bool { return s.some.Load() && s.lines[f.line()].has(f) }

// hasNow is has for everybody else.
func (s *flowSet) hasNow(f flow) bool {
	if !s.some.Load() {
		return false
	}
	for at := f.line(); ; {
		before := s.changing[at].Load()
		has := s.lines[at].has(f)
		if before%2 == 0 && s.changing[at].Load() == before {
			return has
		}
	}
}

// flowSets are a worker's own set, and those of the workers beside it.
type flowSets struct {
	own    *flowSet
	others []*flowSet
}

// has reports whether f is in any of the sets.
func (s *flowSets) has(f flow) bool {
	if s.own.has(f) {
		return true
	}
	for _, o := range s.others {
		if o.hasNow(f) {
			return true
		}
	}
	return false
}
