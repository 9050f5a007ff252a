package packet

import "encoding/binary"

// Outer is what a tunnel's entrance decides about the outer header; the rest follows from the inner one.
type Outer struct {
	// Src and Dst are the two ends of the tunnel.
	Src, Dst [4]byte
	// TTL of the outer header; the inner one is left as it is.
	TTL uint8
	// ID is the identification. It must differ between packets that may be fragmented on the way (RFC 6864).
	ID uint16
	// Pipe says that the outer DSCP is DSCP and not the inner one: the pipe model of RFC 2983 section 3.1.
	Pipe bool
	DSCP uint8
}

// PushIPIP puts an IP-in-IP header (RFC 2003) in front of the valid IPv4 packet at buf[off:] and returns the outer
// packet, which lies in buf from off-20 to the end of the inner packet as its total length says. The inner packet is
// not touched.
//
// The outer header: DF is set when the inner one has it set (RFC 2003 section 3.1); ECN is copied, RFC 6040's normal
// mode; DSCP is copied, unless o.Pipe is set; no options.
//
// Faults: FaultShort when there are not 20 bytes in front of off or not the inner packet's length behind it,
// FaultTotalLen when the result would be longer than MaxTotalLen. buf is unchanged then.
func PushIPIP(buf []byte, off int, o *Outer) ([]byte, Fault) {
	if off < IPv4MinLen || off > len(buf)-IPv4MinLen {
		return nil, FaultShort
	}
	// Both headers are in registers, the inner one's first half and the whole outer one, checksum and all: to read back what
	// was just written in smaller pieces would stall the processor.
	inner := binary.BigEndian.Uint64(buf[off:])
	total := IPv4MinLen + int(inner>>32&0xffff)
	if total > MaxTotalLen {
		return nil, FaultTotalLen
	}
	out := buf[off-IPv4MinLen:]
	if total > len(out) {
		return nil, FaultShort
	}
	out = out[:total:total]
	const tosShift = 48
	first := (4<<4|IPv4MinLen>>2)<<56 | inner&(0xff<<tosShift|flagDF) | uint64(total)<<32 | uint64(o.ID)<<16
	if o.Pipe {
		first = first&^((0xff&^ecnMask)<<tosShift) | uint64(o.DSCP)<<2<<tosShift
	}
	second := uint64(o.TTL)<<56 | ProtocolIPIP<<48 | uint64(binary.BigEndian.Uint32(o.Src[:]))
	third := binary.BigEndian.Uint32(o.Dst[:])
	second |= uint64(^headerSum(first, second, third)) << 32
	h := (*[IPv4MinLen]byte)(out)
	binary.BigEndian.PutUint64(h[:], first)
	binary.BigEndian.PutUint64(h[8:], second)
	binary.BigEndian.PutUint32(h[16:], third)
	return out, FaultNone
}

// ECN codepoints, RFC 3168 section 5.
const (
	notECT  = 0
	ect1    = 1
	ect0    = 2
	ce      = 3
	ecnMask = 3

	ecnDrop = 0xff
)

// ecnDecap is figure 4 of RFC 6040 (section 4.2): the codepoint of the forwarded packet, by inner and outer codepoint.
var ecnDecap = [4][4]uint8{
	notECT: {notECT: notECT, ect0: notECT, ect1: notECT, ce: ecnDrop},
	ect0:   {notECT: ect0, ect0: ect0, ect1: ect1, ce: ce},
	ect1:   {notECT: ect1, ect0: ect1, ect1: ect1, ce: ce},
	ce:     {notECT: ce, ect0: ce, ect1: ce, ce: ce},
}

// PopIPIP takes the outer header, parsed by ParseIPv4, off an IP-in-IP packet and returns the inner packet, parsed and
// cut to its own total length. Where congestion was marked on the way, the mark is written into the inner header and
// its checksum updated (RFC 6040 section 4.2); the inner DSCP and TTL stay.
//
// Faults: FaultProtocol when the outer protocol is not 4, FaultFragment when the outer packet is a fragment, FaultECN
// when the combination of ECN fields must be dropped, and all of ParseIPv4's for the inner packet. The packet is
// unchanged then.
func PopIPIP(outer IPv4) (IPv4, Fault) {
	if outer.Protocol() != ProtocolIPIP {
		return nil, FaultProtocol
	}
	if outer.IsFragment() {
		return nil, FaultFragment
	}
	inner, fault := ParseIPv4(outer.Payload())
	if fault != FaultNone {
		return nil, fault
	}
	was := inner[offTOS]
	ecn := ecnDecap[was&ecnMask][outer[offTOS]&ecnMask]
	if ecn == ecnDrop {
		return nil, FaultECN
	}
	if now := was&^ecnMask | ecn; now != was {
		before := binary.BigEndian.Uint16(inner)
		inner[offTOS] = now
		updateHeaderChecksum(inner, before, binary.BigEndian.Uint16(inner))
	}
	return inner, FaultNone
}

// UnusedECN reports whether the ECN fields of an outer packet and of the inner one, which PopIPIP has returned, come together as
// nothing sends them today (RFC 6040 section 4.2, the combinations of figure 4 with an exclamation mark): somebody on the way
// has changed one, or abuses it.
func UnusedECN(outer, inner IPv4) bool {
	// PopIPIP has written what came of the two: it is the outer field, but where that is clear, or is one of these, or is
	// ECT(0) over a mark that the inner one had before.
	was, now := outer[offTOS]&ecnMask, inner[offTOS]&ecnMask
	return was != notECT && was != now && (was != ect0 || now != ce)
}

// CopyDSCP gives the inner packet, which PopIPIP has returned, the DSCP of the outer one: the tunnel's exit in the
// uniform model of RFC 2983 section 3.1. The inner ECN field stays.
func CopyDSCP(outer, inner IPv4) {
	was := inner[offTOS]
	now := outer[offTOS]&^ecnMask | was&ecnMask
	if now == was {
		return
	}
	before := binary.BigEndian.Uint16(inner)
	inner[offTOS] = now
	updateHeaderChecksum(inner, before, binary.BigEndian.Uint16(inner))
}
