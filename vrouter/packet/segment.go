package packet

import "encoding/binary"

// Offsets into the TCP header (RFC 9293 section 3.1) and the UDP header (RFC 768).
const (
	tcpMinLen      = 20
	tcpOffSeq      = 4
	tcpOffDataOff  = 12
	tcpOffFlags    = 13
	tcpOffChecksum = 16

	udpLen         = 8
	udpOffLen      = 4
	udpOffChecksum = 6
)

const (
	tcpFIN = 0x01
	tcpPSH = 0x08
	tcpCWR = 0x80
)

// SegmentTCP splits a TCP superpacket (one IPv4 header, one TCP header, more payload than a segment may have) into
// packets of at most gso bytes of TCP payload each, and calls emit with each in order. The slice that emit gets lies
// in scratch and is overwritten by the next packet; scratch must not overlap pkt, which is not changed. pkt must be a
// view as ParseIPv4 returns it.
//
// Every packet has the original's headers with their options. What differs is what the kernel's own segmentation
// makes differ: total length; identification, counted up; sequence number; FIN and PSH only on the last; CWR only on
// the first (RFC 3168 section 6.1.2: once per window). All checksums are computed anew, so that it does not matter
// whether pkt's TCP checksum is a partial one. A packet of gso bytes or less is emitted as one.
//
// scratch must hold the two headers and gso bytes of payload (or all of the payload, if that is less); else
// FaultShort. FaultGSO when gso is not between 1 and MaxTotalLen, FaultProtocol, FaultFragment and FaultTransport as
// their names say. On a fault nothing has been emitted.
func SegmentTCP(pkt IPv4, gso int, scratch []byte, emit func([]byte)) Fault {
	hl, fault := checkSegment(pkt, gso, ProtocolTCP, tcpMinLen)
	if fault != FaultNone {
		return fault
	}
	thl := int(pkt[hl+tcpOffDataOff]>>4) << 2
	if thl < tcpMinLen || hl+thl > len(pkt) {
		return FaultTransport
	}
	headers := hl + thl
	payload := pkt[headers:]
	if len(scratch) < headers+min(gso, len(payload)) {
		return FaultShort
	}
	var (
		id    = pkt.ID()
		seq   = binary.BigEndian.Uint32(pkt[hl+tcpOffSeq:])
		flags = pkt[hl+tcpOffFlags]
	)
	copy(scratch, pkt[:headers])
	for first := true; ; first = false {
		n := min(gso, len(payload))
		last := n == len(payload)
		out := scratch[:headers+n]
		copy(out[headers:], payload[:n])
		payload = payload[n:]

		f := flags
		if !last {
			f &^= tcpFIN | tcpPSH
		}
		if !first {
			f &^= tcpCWR
		}
		tcp := out[hl:]
		tcp[tcpOffFlags] = f
		binary.BigEndian.PutUint32(tcp[tcpOffSeq:], seq)
		finishSegment(out, hl, id, tcpOffChecksum)
		emit(out)
		if last {
			return FaultNone
		}
		seq += uint32(n)
		id++
	}
}

// SegmentUDP splits a UDP superpacket (UDP GSO: one header in front of datagrams that were laid end to end) into
// datagrams of gso bytes of payload, the last one possibly shorter, and calls emit with each in order. Buffers,
// identification, checksums and faults are as with [SegmentTCP]; the UDP length must agree with the packet's, else
// FaultTransport. The UDP checksum is always present in what is emitted.
func SegmentUDP(pkt IPv4, gso int, scratch []byte, emit func([]byte)) Fault {
	hl, fault := checkSegment(pkt, gso, ProtocolUDP, udpLen)
	if fault != FaultNone {
		return fault
	}
	if int(binary.BigEndian.Uint16(pkt[hl+udpOffLen:])) != len(pkt)-hl {
		return FaultTransport
	}
	headers := hl + udpLen
	payload := pkt[headers:]
	if len(scratch) < headers+min(gso, len(payload)) {
		return FaultShort
	}
	copy(scratch, pkt[:headers])
	for id := pkt.ID(); ; id++ {
		n := min(gso, len(payload))
		last := n == len(payload)
		out := scratch[:headers+n]
		copy(out[headers:], payload[:n])
		payload = payload[n:]

		binary.BigEndian.PutUint16(out[hl+udpOffLen:], uint16(udpLen+n))
		finishSegment(out, hl, id, udpOffChecksum)
		emit(out)
		if last {
			return FaultNone
		}
	}
}

// checkSegment makes the checks that TCP and UDP share and returns the length of the IPv4 header.
func checkSegment(pkt IPv4, gso int, protocol uint8, transportLen int) (int, Fault) {
	if gso < 1 || gso > MaxTotalLen {
		return 0, FaultGSO
	}
	if len(pkt) < IPv4MinLen {
		return 0, FaultShort
	}
	if len(pkt) > MaxTotalLen {
		return 0, FaultTotalLen
	}
	if pkt.Protocol() != protocol {
		return 0, FaultProtocol
	}
	if pkt.IsFragment() {
		return 0, FaultFragment
	}
	hl := pkt.HeaderLen()
	if hl < IPv4MinLen {
		return 0, FaultHeaderLen
	}
	if hl+transportLen > len(pkt) {
		return 0, FaultTransport
	}
	return hl, FaultNone
}

// finishSegment writes what every packet of a split needs: total length, identification and both checksums, that of
// the transport at checksumOff from the end of the IPv4 header.
func finishSegment(out []byte, hl int, id uint16, checksumOff int) {
	binary.BigEndian.PutUint16(out[offTotalLen:], uint16(len(out)))
	binary.BigEndian.PutUint16(out[offID:], id)
	binary.BigEndian.PutUint16(out[offChecksum:], 0)
	binary.BigEndian.PutUint16(out[offChecksum:], Checksum(out[:hl], 0))

	transport := out[hl:]
	field := transport[checksumOff:]
	binary.BigEndian.PutUint16(field, 0)
	putTransportChecksum(field, Checksum(transport, PseudoSum(IPv4(out), len(transport))))
}
