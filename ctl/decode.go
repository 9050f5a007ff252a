package ctl

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"margay/vrouter/packet"
)

// describe writes a packet in one line, in tcpdump's manner: b are its bytes from the IP header on, or the first of them, and
// length is its own. It shows what it can of what is broken or cut.
func describe(b []byte, length int) string {
	if len(b) == 0 {
		return "empty"
	}
	switch b[0] >> 4 {
	case 4:
		return describeIPv4(b, length, 0)
	case 6:
		return describeIPv6(b, length)
	}
	return fmt.Sprintf("no IP: %d bytes, % x", length, b[:min(len(b), 16)])
}

// maxNested is how many tunnels within tunnels are unpacked.
const maxNested = 3

func describeIPv4(b []byte, length, depth int) string {
	if len(b) < ipHeader {
		return fmt.Sprintf("IPv4, cut: %d bytes", length)
	}
	src, dst := netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	var notes []string
	note := func(format string, args ...any) { notes = append(notes, fmt.Sprintf(format, args...)) }
	fragment := binary.BigEndian.Uint16(b[6:])
	note("length %d, ttl %d", length, b[8])
	if b[1] != 0 {
		note("tos %#02x", b[1])
	}
	if fragment&0x4000 != 0 {
		note("DF")
	}
	if fragment&0x3fff != 0 {
		note("fragment at %d", int(fragment&0x1fff)*8)
		if fragment&0x2000 != 0 {
			note("more follow")
		}
	}
	hl := int(b[0]&0x0f) << 2
	rest := b[min(max(hl, ipHeader), len(b)):]
	if hl >= ipHeader && hl <= len(b) && packet.Sum(b[:hl], 0) != 0xffff {
		note("bad header checksum")
	}
	proto := b[9]
	head := fmt.Sprintf("%s > %s", src, dst)
	if fragment&0x1fff == 0 {
		switch {
		case proto == packet.ProtocolIPIP && depth < maxNested && len(rest) > 0 && rest[0]>>4 == 4:
			return fmt.Sprintf("%s: IP-in-IP, %s: %s", head, strings.Join(notes, ", "), describeIPv4(rest, length-hl, depth+1))
		default:
			if text := describeTransport(proto, src, dst, rest); text != "" {
				return text + ", " + strings.Join(notes, ", ")
			}
		}
	}
	return fmt.Sprintf("%s: protocol %d, %s", head, proto, strings.Join(notes, ", "))
}

func describeIPv6(b []byte, length int) string {
	if len(b) < 40 {
		return fmt.Sprintf("IPv6, cut: %d bytes", length)
	}
	src, dst := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	notes := fmt.Sprintf("length %d, hop limit %d", length, b[7])
	if text := describeTransport(b[6], src, dst, b[40:]); text != "" {
		return text + ", " + notes
	}
	return fmt.Sprintf("%s > %s: next header %d, %s", src, dst, b[6], notes)
}

// icmpTypes are the names that people use (RFC 792).
var icmpTypes = map[byte]string{0: "echo reply", 3: "unreachable", 4: "source quench", 5: "redirect", 8: "echo request",
	11: "time exceeded", 12: "parameter problem"}

// describeTransport is "" for a protocol that it does not know, and for too few bytes.
func describeTransport(proto byte, src, dst netip.Addr, b []byte) string {
	if len(b) < 4 {
		return ""
	}
	first, second := binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	ports := fmt.Sprintf("%s > %s", netip.AddrPortFrom(src, first), netip.AddrPortFrom(dst, second))
	switch proto {
	case packet.ProtocolUDP:
		return ports + ": UDP"
	case packet.ProtocolTCP:
		if len(b) < 16 {
			return ports + ": TCP"
		}
		var set []string
		for i, name := range []string{"FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"} {
			if b[13]&(1<<i) != 0 {
				set = append(set, name)
			}
		}
		return fmt.Sprintf("%s: TCP %s seq %d ack %d win %d", ports, orText(strings.Join(set, "+"), "no flags"),
			binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint16(b[14:]))
	case protoICMP:
		name, ok := icmpTypes[b[0]]
		if !ok {
			name = fmt.Sprintf("type %d", b[0])
		}
		text := fmt.Sprintf("%s > %s: ICMP %s", src, dst, name)
		switch {
		case (b[0] == 0 || b[0] == 8) && len(b) >= 8:
			text += fmt.Sprintf(" id %d seq %d", binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:]))
		case b[0] == packet.ICMPUnreachable && b[1] == packet.CodeFragNeeded && len(b) >= 8:
			text += fmt.Sprintf(" code 4, fragmentation needed, MTU %d", binary.BigEndian.Uint16(b[6:]))
		case b[1] != 0:
			text += fmt.Sprintf(" code %d", b[1])
		}
		return text
	}
	return ""
}
