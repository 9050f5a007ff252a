package packet

import "encoding/binary"

// The protocols whose first four bytes are the ports (RFC 9293, RFC 768, RFC 9260, RFC 4340, RFC 3828), but TCP and UDP.
const (
	protocolDCCP    = 33
	protocolSCTP    = 132
	protocolUDPLite = 136
)

// FlowHash returns a hash of the flow that p, a packet with a valid header, belongs to: of source, destination, protocol
// and, where it has them, the ports. All fragments of a packet must go the same way, and only the first has ports: of
// them addresses alone count. Hashes are the same in every process and on every node.
func FlowHash(p IPv4) uint32 {
	addresses := binary.BigEndian.Uint64(p[offSrc:])
	if p.IsFragment() {
		return mix(addresses, 0)
	}
	key := uint64(p.Protocol()) << 32
	switch p.Protocol() {
	case ProtocolTCP, ProtocolUDP, protocolSCTP, protocolDCCP, protocolUDPLite:
		if l4 := p.Payload(); len(l4) >= 4 {
			key |= uint64(binary.BigEndian.Uint32(l4))
		}
	}
	return mix(addresses, key)
}

// mix is two rounds of multiplying and folding, after which every bit of the input has a say in every bit of the result.
func mix(a, b uint64) uint32 {
	x := (a ^ b*0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>32) * 0x94d049bb133111eb
	return uint32(x >> 32)
}
