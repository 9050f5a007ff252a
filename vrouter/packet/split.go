package packet

import "encoding/binary"

// MaxHeaders is the length in bytes of the longest headers that a [Splitter] writes: an outer IPv4 header without
// options, an inner one and a TCP header with all of theirs.
const MaxHeaders = IPv4MinLen + 60 + 60

// SegmentHeaders returns the length in bytes of the headers, IPv4 and transport, that each segment of the superpacket
// pkt has. protocol is that of the segmentation, ProtocolTCP or ProtocolUDP. pkt must be a view as ParseIPv4 returns
// it. Faults are those of [SegmentTCP] and [SegmentUDP].
func SegmentHeaders(pkt IPv4, protocol uint8, gso int) (int, Fault) {
	if protocol == ProtocolUDP {
		hl, fault := checkSegment(pkt, gso, protocol, udpLen)
		if fault != FaultNone {
			return 0, fault
		}
		if int(binary.BigEndian.Uint16(pkt[hl+udpOffLen:])) != len(pkt)-hl {
			return 0, FaultTransport
		}
		return hl + udpLen, FaultNone
	}
	hl, fault := checkSegment(pkt, gso, protocol, tcpMinLen)
	if fault != FaultNone {
		return 0, fault
	}
	thl := int(pkt[hl+tcpOffDataOff]>>4) << 2
	if thl < tcpMinLen || hl+thl > len(pkt) {
		return 0, FaultTransport
	}
	return hl + thl, FaultNone
}

// Splitter does the work of [SegmentTCP] and [SegmentUDP] for a superpacket that may be in a tunnel already, and
// leaves the payload alone: it writes only the headers of each segment and says which part of the superpacket follows
// them. The transport checksum it writes is a partial one, the pseudo-header's sum, as [CompleteChecksum] or the kernel
// (CHECKSUM_PARTIAL) wants to find it. The zero value is ready for Start; a Splitter may be used again and again.
type Splitter struct {
	pkt      []byte
	outer    int // length of the outer header, 0 or IPv4MinLen
	hl       int // length of the inner IPv4 header
	headers  int // all headers together
	gso      int
	protocol uint8
	done     int // bytes of payload that earlier segments have taken
	count    uint16
}

// Start begins with the superpacket pkt, whose first outer bytes are the header that PushIPIP wrote (0: there is none)
// and whose rest is a view as ParseIPv4 returns it. Faults are those of [SegmentHeaders].
func (s *Splitter) Start(pkt []byte, outer int, protocol uint8, gso int) Fault {
	if outer != 0 && outer != IPv4MinLen || len(pkt) < outer {
		return FaultShort
	}
	headers, fault := SegmentHeaders(IPv4(pkt[outer:]), protocol, gso)
	if fault != FaultNone {
		return fault
	}
	*s = Splitter{pkt: pkt, outer: outer, hl: IPv4(pkt[outer:]).HeaderLen(), headers: outer + headers, gso: gso, protocol: protocol}
	return FaultNone
}

// Count returns how many segments there are.
func (s *Splitter) Count() int { return max(1, (len(s.pkt)-s.headers+s.gso-1)/s.gso) }

// ChecksumStart returns where, in each segment, the bytes begin that its transport checksum covers.
func (s *Splitter) ChecksumStart() int { return s.outer + s.hl }

// ChecksumOffset returns where, from ChecksumStart, the checksum is stored.
func (s *Splitter) ChecksumOffset() int {
	if s.protocol == ProtocolUDP {
		return udpOffChecksum
	}
	return tcpOffChecksum
}

// Next writes the next segment's headers to the front of h, which must hold MaxHeaders bytes, and returns their length
// and the payload that follows them, a view of the superpacket. A length of 0 says that there is no other segment.
func (s *Splitter) Next(h []byte) (int, []byte) {
	rest := s.pkt[s.headers+s.done:]
	if len(rest) == 0 && s.count > 0 {
		return 0, nil
	}
	n := min(s.gso, len(rest))
	last := n == len(rest)
	h = h[:s.headers]
	copy(h, s.pkt)
	if s.outer > 0 {
		binary.BigEndian.PutUint16(h[offTotalLen:], uint16(s.headers+n))
		binary.BigEndian.PutUint16(h[offID:], IPv4(h).ID()+s.count)
		binary.BigEndian.PutUint16(h[offChecksum:], 0)
		binary.BigEndian.PutUint16(h[offChecksum:], Checksum(h[:s.outer], 0))
	}
	ip := h[s.outer:]
	binary.BigEndian.PutUint16(ip[offTotalLen:], uint16(len(ip)+n))
	binary.BigEndian.PutUint16(ip[offID:], IPv4(ip).ID()+s.count)
	binary.BigEndian.PutUint16(ip[offChecksum:], 0)
	binary.BigEndian.PutUint16(ip[offChecksum:], Checksum(ip[:s.hl], 0))
	transport := ip[s.hl:]
	if s.protocol == ProtocolUDP {
		binary.BigEndian.PutUint16(transport[udpOffLen:], uint16(udpLen+n))
	} else {
		if !last {
			transport[tcpOffFlags] &^= tcpFIN | tcpPSH
		}
		if s.count > 0 {
			transport[tcpOffFlags] &^= tcpCWR
		}
		seq := transport[tcpOffSeq:]
		binary.BigEndian.PutUint32(seq, binary.BigEndian.Uint32(seq)+uint32(s.done))
	}
	sum := PseudoSum(IPv4(ip), len(transport)+n)
	binary.BigEndian.PutUint16(transport[s.ChecksumOffset():], uint16(sum))
	s.done += n
	s.count++
	return s.headers, rest[:n]
}
