package packet

import "encoding/binary"

// Options of an IPv4 header, RFC 791 section 3.1; those of TCP end and are filled up in the same way.
const (
	optionEnd    = 0
	optionNop    = 1
	optionCopied = 0x80 // this bit: into every fragment
	optionLSRR   = 0x83 // loose source and record route
	optionSSRR   = 0x89 // strict
)

// Fragmenter splits a packet that is too long for the next link into fragments: RFC 791 section 3.2, RFC 1812 section
// 4.2.2.7. Each has as many bytes as fit, in eights but for the last one. The zero value is ready for Start; a Fragmenter may be
// used again and again.
type Fragmenter struct {
	pkt    IPv4
	hl     int
	room   int  // for the payload of a fragment; all but the last take a multiple of 8
	done   int  // bytes of payload that earlier fragments have taken
	offset int  // of pkt itself, which may be a fragment already
	more   bool // follow pkt itself
	ended  bool
}

// Start begins with pkt, a view as ParseIPv4 returns it, which must not change before the last fragment has been made.
// mtu is in bytes. FaultFragment when DF is set; FaultTotalLen when pkt is a fragment that ends behind the longest packet there can
// be, of which the pieces would have offsets that do not fit the field, and would say that they are others; FaultShort when
// a link of that MTU carries no payload.
func (f *Fragmenter) Start(pkt IPv4, mtu int) Fault {
	if pkt.DF() {
		return FaultFragment
	}
	hl := pkt.HeaderLen()
	if pkt.FragOffset()+len(pkt)-hl > MaxTotalLen {
		return FaultTotalLen
	}
	if mtu-hl < 8 {
		return FaultShort
	}
	*f = Fragmenter{pkt: pkt, hl: hl, room: mtu - hl, offset: pkt.FragOffset(), more: pkt.MF()}
	return FaultNone
}

// Next writes the next fragment to the front of dst, which does not overlap the packet, and returns its length in bytes:
// at most the MTU; 0 when there is no other. dst must have room for it.
func (f *Fragmenter) Next(dst []byte) int {
	if f.ended {
		return 0
	}
	rest := f.pkt[f.hl+f.done:]
	n := len(rest)
	last := n <= f.room
	if !last {
		n = f.room &^ 7
	}
	dst = dst[:f.hl+n]
	copy(dst, f.pkt[:f.hl])
	copy(dst[f.hl:], rest[:n])
	if f.done > 0 {
		blankOptions(dst[IPv4MinLen:f.hl])
	}
	field := uint16((f.offset + f.done) >> 3)
	if !last || f.more {
		field |= flagMF
	}
	binary.BigEndian.PutUint16(dst[offTotalLen:], uint16(len(dst)))
	binary.BigEndian.PutUint16(dst[offFragment:], field)
	binary.BigEndian.PutUint16(dst[offChecksum:], 0)
	binary.BigEndian.PutUint16(dst[offChecksum:], Checksum(dst[:f.hl], 0))
	f.done += n
	f.ended = last
	return len(dst)
}

// HasSourceRoute reports whether p, a view as ParseIPv4 returns it, names routers to go by (RFC 791, section 3.1), or ends them
// here.
func HasSourceRoute(p IPv4) bool {
	for options := p[IPv4MinLen:p.HeaderLen()]; len(options) > 0; {
		if options[0] == optionLSRR || options[0] == optionSSRR {
			return true
		}
		n := optionLen(options)
		if n == 0 {
			return false
		}
		options = options[n:]
	}
	return false
}

// optionLen returns the length in bytes of the first of options, of IPv4 or TCP; 0 where they end, and where it does not fit.
func optionLen(options []byte) int {
	switch {
	case len(options) == 0 || options[0] == optionEnd:
		return 0
	case options[0] == optionNop:
		return 1
	case len(options) < 2 || options[1] < 2 || int(options[1]) > len(options):
		return 0
	}
	return int(options[1])
}

// blankOptions replaces the options that only the first fragment carries (RFC 791 section 3.1, the copied flag) by
// options that mean nothing, so that all fragments have headers of one length.
func blankOptions(options []byte) {
	for n := optionLen(options); n > 0; n = optionLen(options) {
		if options[0]&optionCopied == 0 {
			for i := range n {
				options[i] = optionNop
			}
		}
		options = options[n:]
	}
}
