package filter

import "encoding/binary"

// Filter decides about packets. It is immutable: any number of goroutines may use one.
type Filter struct {
	text string
	root *node // nil: everything
}

// String returns the text that Parse was given.
func (f *Filter) String() string { return f.text }

// Match reports whether the filter accepts the packet b, which begins with its IP header; length is the packet's own
// length in bytes, which is more than len(b) when b has been cut. It does not allocate.
//
// As in libpcap a test that reads behind the end of b ends the whole filter with "no", also under a negation.
func (f *Filter) Match(b []byte, length int) bool {
	if f == nil || f.root == nil {
		return true
	}
	m := matcher{b: b, length: length}
	return f.root.eval(&m) && !m.short
}

// matcher is one packet being asked about.
type matcher struct {
	b      []byte
	length int
	short  bool // a test read behind the end: the answer is no, whatever else is asked
}

// load returns size bytes (1, 2 or 4) at off as a big-endian number.
func (m *matcher) load(off, size int) uint32 {
	if off < 0 || off+size > len(m.b) {
		m.short = true
		return 0
	}
	switch size {
	case 1:
		return uint32(m.b[off])
	case 2:
		return uint32(binary.BigEndian.Uint16(m.b[off:]))
	}
	return binary.BigEndian.Uint32(m.b[off:])
}

// node is one test, or several combined: kind says which field counts. It is no interface, so that the matcher stays on
// the stack.
type node struct {
	kind     kind
	a, b     *node // of kindAnd and kindOr; a also of kindNot
	version  version
	protocol *protocol
	address  *address
	ports    *ports
	size     *size
	field    *field
}

type kind uint8

const (
	kindAnd kind = iota
	kindOr
	kindNot
	kindVersion
	kindProtocol
	kindAddress
	kindPorts
	kindSize
	kindField
)

func (n *node) eval(m *matcher) bool {
	switch n.kind {
	case kindAnd:
		return n.a.eval(m) && !m.short && n.b.eval(m)
	case kindOr:
		return n.a.eval(m) || !m.short && n.b.eval(m)
	case kindNot:
		return !n.a.eval(m)
	case kindVersion:
		return n.version.eval(m)
	case kindProtocol:
		return n.protocol.eval(m)
	case kindAddress:
		return n.address.eval(m)
	case kindPorts:
		return n.ports.eval(m)
	case kindSize:
		return n.size.eval(m)
	}
	return n.field.eval(m)
}

// version asks for the version of IP, 4 or 6.
type version uint8

func (v version) eval(m *matcher) bool { return m.load(0, 1)>>4 == uint32(v) }

// The headers' offsets and values that tests need: RFC 791, RFC 8200.
const (
	ip4Fragment  = 6
	ip4Protocol  = 9
	ip6Next      = 6
	ip6Header    = 40
	ip6Fragment  = 44 // next header: a fragment header
	fragmentMask = 0x1fff
	protoTCP     = 6
	protoUDP     = 17
	protoSCTP    = 132
)

// protocol asks for the protocol number; version 0 means either.
type protocol struct {
	version uint8
	number  uint8
}

func (p *protocol) eval(m *matcher) bool {
	v := m.load(0, 1) >> 4
	if m.short || p.version != 0 && v != uint32(p.version) {
		return false
	}
	switch v {
	case 4:
		return m.load(ip4Protocol, 1) == uint32(p.number)
	case 6:
		next := m.load(ip6Next, 1)
		return next == uint32(p.number) || next == ip6Fragment && m.load(ip6Header, 1) == uint32(p.number)
	}
	return false
}

// side says which of two fields a test is about.
type side uint8

const (
	either side = iota
	source
	destination
	both
)

// pick combines the answers for the two fields; the second is not asked when the first decides.
func (s side) pick(first, second func() bool) bool {
	switch s {
	case source:
		return first()
	case destination:
		return second()
	case both:
		return first() && second()
	}
	return first() || second()
}

// address asks whether an address lies in a prefix: value under mask, four words for IPv6 and one for IPv4.
type address struct {
	side        side
	version     uint8
	value, mask [4]uint32
}

func (a *address) eval(m *matcher) bool {
	if m.load(0, 1)>>4 != uint32(a.version) || m.short {
		return false
	}
	src, dst := 12, 16
	if a.version == 6 {
		src, dst = 8, 24
	}
	return a.side.pick(func() bool { return a.at(m, src) }, func() bool { return a.at(m, dst) })
}

func (a *address) at(m *matcher, off int) bool {
	words := 1
	if a.version == 6 {
		words = 4
	}
	for i := range words { // whatever the mask is: libpcap reads them all
		if m.load(off+4*i, 4)&a.mask[i] != a.value[i] || m.short {
			return false
		}
	}
	return true
}

// ports asks for a port from first to last; protocol 0 means TCP, UDP or SCTP. Later fragments have no ports.
type ports struct {
	side        side
	protocol    uint8
	first, last uint16
}

func (p *ports) eval(m *matcher) bool {
	var proto uint32
	off := ip6Header
	switch m.load(0, 1) >> 4 {
	case 4:
		proto = m.load(ip4Protocol, 1)
	case 6:
		proto = m.load(ip6Next, 1)
	default:
		return false
	}
	if m.short || !p.carries(proto) {
		return false
	}
	if m.b[0]>>4 == 4 {
		if m.load(ip4Fragment, 2)&fragmentMask != 0 || m.short {
			return false
		}
		off = int(m.b[0]&0x0f) << 2
	}
	return p.side.pick(func() bool { return p.at(m, off) }, func() bool { return p.at(m, off+2) })
}

func (p *ports) carries(proto uint32) bool {
	if p.protocol != 0 {
		return proto == uint32(p.protocol)
	}
	return proto == protoTCP || proto == protoUDP || proto == protoSCTP
}

func (p *ports) at(m *matcher, off int) bool {
	n := m.load(off, 2)
	return !m.short && n >= uint32(p.first) && n <= uint32(p.last)
}

// operator compares two numbers.
type operator uint8

const (
	equal operator = iota
	unequal
	less
	lessEqual
	greater
	greaterEqual
)

func (o operator) holds(a, b uint32) bool {
	switch o {
	case equal:
		return a == b
	case unequal:
		return a != b
	case less:
		return a < b
	case lessEqual:
		return a <= b
	case greater:
		return a > b
	}
	return a >= b
}

// size asks for the packet's length.
type size struct {
	op operator
	n  uint32
}

func (s *size) eval(m *matcher) bool { return s.op.holds(uint32(m.length), s.n) }

// The IP headers themselves as a field's base: numbers of protocols that a field cannot ask for.
const (
	baseIP  = 4
	baseIP6 = 41
)

// field asks for size bytes at off of a header, under mask. base is baseIP, baseIP6, or the protocol that an IPv4 packet
// carries which is no later fragment, as in libpcap.
type field struct {
	base      uint8
	off, size int
	mask      uint32
	op        operator
	n         uint32
}

func (f *field) eval(m *matcher) bool {
	off := f.off
	switch f.base {
	case baseIP:
		if m.load(0, 1)>>4 != 4 || m.short {
			return false
		}
	case baseIP6:
		if m.load(0, 1)>>4 != 6 || m.short {
			return false
		}
	default:
		if m.load(0, 1)>>4 != 4 || m.short || m.load(ip4Protocol, 1) != uint32(f.base) || m.short ||
			m.load(ip4Fragment, 2)&fragmentMask != 0 || m.short {
			return false
		}
		off += int(m.b[0]&0x0f) << 2
	}
	v := m.load(off, f.size)
	return !m.short && f.op.holds(v&f.mask, f.n)
}
