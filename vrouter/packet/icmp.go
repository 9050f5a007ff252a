package packet

import "encoding/binary"

// Types of ICMP messages (RFC 792).
const (
	ICMPEchoReply    = 0
	ICMPUnreachable  = 3
	ICMPEcho         = 8
	ICMPTimeExceeded = 11
)

// Codes of ICMPUnreachable (RFC 792; RFC 1812 section 5.2.7.1).
const (
	CodeNet         = 0  // no route to the network
	CodeHost        = 1  // the host, which would be directly connected, is not there
	CodeFragNeeded  = 4  // fragmentation needed, and DF set; Rest is the next hop's MTU (RFC 1191 section 4)
	CodeAdminFilter = 13 // communication administratively prohibited
)

const (
	// ICMPHeaderLen is the length in bytes of the header that every ICMP error has.
	ICMPHeaderLen = 8
	// MaxICMPError is the length in bytes of the longest error: RFC 1812 section 4.3.2.3 wants as much of the original
	// quoted as fits into 576 bytes.
	MaxICMPError = 576

	protocolICMP = 1
	icmpTTL      = 64
	// internetControl is precedence 6, in the bits of the type of service byte.
	internetControl = 0xc0
	// tosMask leaves of a type of service byte the four bits of RFC 1349, the lowest of which is ECN's higher one now.
	tosMask = 0x1c
)

// ICMPError is what an error says. Rest is the second word of its header, in which CodeFragNeeded has the MTU.
type ICMPError struct {
	Type, Code uint8
	Rest       uint32
}

// MayAnswer reports whether an ICMP error may be sent about p, which is a view as ParseIPv4 returns it: RFC 1812 section
// 4.3.2.7. Never about an ICMP error, or what might be one; a fragment but the first; a packet to several hosts; a
// packet whose source is not a single host.
func MayAnswer(p IPv4) bool {
	if p.FragOffset() != 0 || !Unicast(p.SrcU32()) || !Unicast(p.DstU32()) {
		return false
	}
	if p.Protocol() != protocolICMP {
		return true
	}
	payload := p.Payload()
	if len(payload) == 0 {
		return false
	}
	switch payload[0] {
	case ICMPEchoReply, ICMPEcho, 13, 14, 15, 16, 17, 18: // echo, timestamp, information, address mask
		return true
	}
	return false
}

// Unicast reports whether the address a, its first octet in the highest bits, can be that of one host elsewhere: not on
// network 0 or 127, no multicast or broadcast address, none of class E (RFC 1812 section 5.3.7).
func Unicast(a uint32) bool {
	first := a >> 24
	return first != 0 && first != 127 && first < 224
}

// PutICMPError writes the error e about the packet p to the front of dst, IPv4 header included, and returns its length
// in bytes. dst holds MaxICMPError bytes and does not overlap p. The message goes from src to the source of p; its
// precedence is 6 and its type of service that of p (RFC 1812 section 4.3.2.5); DF is clear.
func PutICMPError(dst []byte, p IPv4, e ICMPError, src [4]byte, id uint16) int {
	quoted := min(len(p), MaxICMPError-IPv4MinLen-ICMPHeaderLen)
	total := IPv4MinLen + ICMPHeaderLen + quoted
	dst = dst[:total]
	dst[0] = 4<<4 | IPv4MinLen>>2
	dst[offTOS] = p[offTOS]&tosMask | internetControl
	binary.BigEndian.PutUint16(dst[offTotalLen:], uint16(total))
	binary.BigEndian.PutUint16(dst[offID:], id)
	binary.BigEndian.PutUint16(dst[offFragment:], 0)
	dst[offTTL], dst[offProtocol] = icmpTTL, protocolICMP
	binary.BigEndian.PutUint16(dst[offChecksum:], 0)
	copy(dst[offSrc:], src[:])
	copy(dst[offDst:], p[offSrc:offDst])
	binary.BigEndian.PutUint16(dst[offChecksum:], Checksum(dst[:IPv4MinLen], 0))

	icmp := dst[IPv4MinLen:]
	icmp[0], icmp[1], icmp[2], icmp[3] = e.Type, e.Code, 0, 0
	binary.BigEndian.PutUint32(icmp[4:], e.Rest)
	copy(icmp[ICMPHeaderLen:], p[:quoted])
	binary.BigEndian.PutUint16(icmp[2:], Checksum(icmp, 0))
	return total
}

// FragNeeded is what a router on the way says about a packet of ours that was too long for it.
type FragNeeded struct {
	// MTU is that of the next hop in bytes; 0 from routers older than RFC 1191.
	MTU    int
	Quoted []byte // as in QuotedError
}

// QuotedError is an ICMP error about a packet of ours.
type QuotedError struct {
	ICMPError
	// Quoted is the header of our packet with what follows it in the message. Its total length is the packet's, not
	// that of what is quoted; its header checksum may have become wrong on the way and is not verified.
	Quoted []byte
}

// ParseICMPError reads an ICMP message, IPv4 header included, and reports whether it is a whole and intact error about a packet
// of which at least the IPv4 header is quoted. Quoted is a view of b.
func ParseICMPError(b []byte) (QuotedError, bool) {
	p, fault := ParseIPv4(b)
	if fault != FaultNone || p.Protocol() != protocolICMP || p.IsFragment() {
		return QuotedError{}, false
	}
	icmp := p.Payload()
	if len(icmp) < ICMPHeaderLen+IPv4MinLen || icmp[0] != ICMPUnreachable && icmp[0] != ICMPTimeExceeded || Checksum(icmp, 0) != 0 {
		return QuotedError{}, false
	}
	quoted := icmp[ICMPHeaderLen:]
	// RFC 4884, 4: extensions may follow what is quoted, whose length in words the message tells then.
	if words := int(icmp[5]); words > 0 && words<<2 < len(quoted) {
		quoted = quoted[:words<<2]
	}
	if hl := int(quoted[0]&0x0f) << 2; quoted[0]>>4 != 4 || hl < IPv4MinLen || hl > len(quoted) {
		return QuotedError{}, false
	}
	return QuotedError{ICMPError{icmp[0], icmp[1], binary.BigEndian.Uint32(icmp[4:])}, quoted}, true
}

// ParseFragNeeded is ParseICMPError for "fragmentation needed" alone.
func ParseFragNeeded(b []byte) (FragNeeded, bool) {
	m, ok := ParseICMPError(b)
	if !ok || m.Type != ICMPUnreachable || m.Code != CodeFragNeeded {
		return FragNeeded{}, false
	}
	return FragNeeded{MTU: int(uint16(m.Rest)), Quoted: m.Quoted}, true
}

// plateaus are the MTUs to try where a router does not tell its own: RFC 1191 section 7.
var plateaus = [...]int{32000, 17914, 8166, 4352, 2002, 1492, 1006, 508, 296, 68}

// Plateau returns the largest common MTU that is less than length, in bytes: RFC 1191 section 5 and 7.
func Plateau(length int) int {
	for _, mtu := range plateaus {
		if mtu < length {
			return mtu
		}
	}
	return plateaus[len(plateaus)-1]
}
