package packet

import (
	"encoding/binary"
	"net/netip"
)

const (
	// IPv4MinLen is the length in bytes of an IPv4 header without options.
	IPv4MinLen = 20
	// MaxTotalLen is the largest value of the total length field, in bytes.
	MaxTotalLen = 65535

	// ProtocolIPIP, ProtocolTCP, ProtocolUDP and ProtocolIPv6 are values of the protocol field (IANA); 4 and 41 mean
	// that another IP packet is inside.
	ProtocolIPIP = 4
	ProtocolTCP  = 6
	ProtocolUDP  = 17
	ProtocolIPv6 = 41
)

// Offsets into the IPv4 header, RFC 791 section 3.1.
const (
	offTOS      = 1
	offTotalLen = 2
	offID       = 4
	offFragment = 6
	offTTL      = 8
	offProtocol = 9
	offChecksum = 10
	offSrc      = 12
	offDst      = 16
)

const (
	flagDF       = 0x4000
	flagMF       = 0x2000
	fragmentMask = 0x1fff
)

// IPv4 is a view of an IPv4 packet, from the first byte of its header to the last byte of its payload. It shares
// memory with the bytes it was parsed from. The methods rely on ParseIPv4's checks: on a slice shorter than a header
// they panic.
type IPv4 []byte

// ParseIPv4 validates the header at the start of b as RFC 1812 section 5.2.2 asks of a router (length, version, IHL,
// total length, checksum) and returns the packet, cut to its total length: bytes behind it are link-layer padding.
// On a fault the view is nil.
func ParseIPv4(b []byte) (IPv4, Fault) {
	if len(b) < IPv4MinLen {
		return nil, FaultShort
	}
	hl, total := IPv4MinLen, int(binary.BigEndian.Uint16(b[offTotalLen:]))
	if b[0] != 4<<4|IPv4MinLen>>2 {
		if b[0]>>4 != 4 {
			return nil, FaultVersion
		}
		if hl = int(b[0]&0x0f) << 2; hl < IPv4MinLen || hl > len(b) {
			return nil, FaultHeaderLen
		}
	}
	if total < hl || total > len(b) {
		return nil, FaultTotalLen
	}
	if hl == IPv4MinLen {
		if !validHeader((*[IPv4MinLen]byte)(b)) {
			return nil, FaultChecksum
		}
	} else if Sum(b[:hl], 0) != 0xffff {
		return nil, FaultChecksum
	}
	return IPv4(b[:total:total]), FaultNone
}

// header returns the header without its options: one check of the length in place of one for the field and one for its end.
func (p IPv4) header() *[IPv4MinLen]byte { return (*[IPv4MinLen]byte)(p) }

// HeaderLen returns the length of the header with its options, in bytes.
func (p IPv4) HeaderLen() int { return int(p[0]&0x0f) << 2 }

// TOS returns the type of service byte: six bits DSCP (RFC 2474), two bits ECN (RFC 3168).
func (p IPv4) TOS() uint8 { return p[offTOS] }

// TotalLen returns the total length field, header included, in bytes.
func (p IPv4) TotalLen() int { return int(binary.BigEndian.Uint16(p[offTotalLen : offTotalLen+2])) }

// ID returns the identification field.
func (p IPv4) ID() uint16 { return binary.BigEndian.Uint16(p[offID : offID+2]) }

// DF reports whether the "don't fragment" flag is set.
func (p IPv4) DF() bool { return binary.BigEndian.Uint16(p[offFragment:offFragment+2])&flagDF != 0 }

// MF reports whether the "more fragments" flag is set.
func (p IPv4) MF() bool { return binary.BigEndian.Uint16(p[offFragment:offFragment+2])&flagMF != 0 }

// FragOffset returns the fragment offset in bytes.
func (p IPv4) FragOffset() int {
	return int(binary.BigEndian.Uint16(p[offFragment:offFragment+2])&fragmentMask) << 3
}

// IsFragment reports whether the packet is one of several fragments: more follow, or some came before.
func (p IPv4) IsFragment() bool {
	return binary.BigEndian.Uint16(p[offFragment:offFragment+2])&(flagMF|fragmentMask) != 0
}

// TTL returns the time to live.
func (p IPv4) TTL() uint8 { return p[offTTL] }

// Protocol returns the protocol number of the payload.
func (p IPv4) Protocol() uint8 { return p[offProtocol] }

// Src returns the source address.
func (p IPv4) Src() netip.Addr { return netip.AddrFrom4([4]byte(p[offSrc : offSrc+4])) }

// Dst returns the destination address.
func (p IPv4) Dst() netip.Addr { return netip.AddrFrom4([4]byte(p[offDst : offDst+4])) }

// SrcU32 returns the source address as a number, its first octet in the highest bits.
func (p IPv4) SrcU32() uint32 { return binary.BigEndian.Uint32(p.header()[offSrc:]) }

// DstU32 returns the destination address as a number, its first octet in the highest bits.
func (p IPv4) DstU32() uint32 { return binary.BigEndian.Uint32(p.header()[offDst:]) }

// Payload returns what follows the header and its options.
func (p IPv4) Payload() []byte { return p[p.HeaderLen():] }

// DecrementTTL takes one from the time to live and updates the header checksum (RFC 1624). A TTL that is already 0
// stays 0; whether a packet may still be forwarded is the caller's question, to be asked before.
func DecrementTTL(p IPv4) {
	if p[offTTL] == 0 {
		return
	}
	before := binary.BigEndian.Uint16(p[offTTL:])
	p[offTTL]--
	updateHeaderChecksum(p, before, binary.BigEndian.Uint16(p[offTTL:]))
}
