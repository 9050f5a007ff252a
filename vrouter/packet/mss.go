package packet

import "encoding/binary"

const (
	tcpSYN       = 0x02
	tcpOptionMSS = 2
)

// ClampMSS lowers the maximum segment size that the SYN p announces (RFC 9293 section 3.7.1) to at most most, in bytes
// of TCP payload, and reports whether it has changed anything. It leaves alone what is no whole TCP SYN with that
// option. p is a view as ParseIPv4 returns it; partial says that its TCP checksum has still to be completed, and then
// is not touched.
func ClampMSS(p IPv4, most uint16, partial bool) bool {
	hl := p.HeaderLen()
	if p.Protocol() != ProtocolTCP || p.FragOffset() != 0 || hl+tcpMinLen > len(p) || p[hl+tcpOffFlags]&tcpSYN == 0 {
		return false
	}
	tcp := p[hl:]
	thl := int(tcp[tcpOffDataOff]>>4) << 2
	if thl < tcpMinLen || thl > len(tcp) {
		return false
	}
	for i := tcpMinLen; i < thl; {
		n := optionLen(tcp[i:thl])
		if n == 0 {
			return false
		}
		if tcp[i] == tcpOptionMSS && n == 4 {
			was := binary.BigEndian.Uint16(tcp[i+2:])
			if was <= most {
				return false
			}
			binary.BigEndian.PutUint16(tcp[i+2:], most)
			if !partial {
				before, after := was, most
				if i&1 != 0 {
					// The value lies across two words of the sum: each of its bytes counts on the other side.
					before, after = was<<8|was>>8, most<<8|most>>8
				}
				updateChecksum(tcp[tcpOffChecksum:], before, after)
			}
			return true
		}
		i += n
	}
	return false
}
