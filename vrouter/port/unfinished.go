package port

import (
	"encoding/binary"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// udpChecksum is the offset of the checksum in a UDP header, in bytes.
const udpChecksum = 6

// markUnfinished finds a checksum that the sender has left to its device, and notes it as undone. Between two ends of a
// veth there is no device that would finish it: other readers are told, AF_XDP's are not. What is stored there until
// then is the sum of the pseudo-header, where a finished packet has that by chance once in 65,536 times; so the whole
// packet is summed up before it counts as unfinished. It looks inside one IP-in-IP header.
func markUnfinished(p *vrouter.Packet) {
	ip, at := packet.IPv4(p.Bytes()), 0
	for {
		if len(ip) < packet.IPv4MinLen || ip[0]>>4 != 4 || ip.IsFragment() {
			return
		}
		hl := ip.HeaderLen()
		length := int(binary.BigEndian.Uint16(ip[2:]))
		if hl < packet.IPv4MinLen || length < hl || length > len(ip) {
			return
		}
		ip = ip[:length]
		if ip.Protocol() != protoIPIP || at > 0 {
			break
		}
		ip, at = ip[hl:], at+hl
	}
	hl := ip.HeaderLen()
	offset := tcpChecksum
	switch ip.Protocol() {
	case packet.ProtocolTCP:
	case packet.ProtocolUDP:
		offset = udpChecksum
	default:
		return
	}
	transport := ip[hl:]
	if len(transport) < offset+2 {
		return
	}
	sum := packet.PseudoSum(ip, len(transport))
	if uint32(binary.BigEndian.Uint16(transport[offset:])) != sum || packet.Checksum(transport, sum) == 0 {
		return
	}
	p.Offload.NeedsChecksum = true
	p.Offload.ChecksumStart, p.Offload.ChecksumOffset = uint16(at+hl), uint16(offset)
}
