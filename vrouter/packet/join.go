package packet

import (
	"bytes"
	"encoding/binary"
)

const (
	tcpACK = 0x10
	tcpECE = 0x40
)

// Joiner is the reverse of [Splitter]: it makes one superpacket of TCP segments that follow each other, so that who
// takes them has one packet to handle. It joins only what splitting would give back, byte for byte. The payloads are
// not copied: the superpacket is the first segment's packet, followed by the payloads of the others.
//
// The zero value is ready for Start; a Joiner may be used again and again.
type Joiner struct {
	head    IPv4
	hl      int
	headers int
	size    int // payload of each segment but the last
	payload int // of all together
	count   int
	last    bool // nothing can follow any more
}

// Start begins with the segment p, a view as ParseIPv4 returns it, and reports whether others may follow it. partial
// says that its TCP checksum has still to be completed; otherwise it is verified here.
func (j *Joiner) Start(p IPv4, partial bool) bool {
	headers, fault := SegmentHeaders(p, ProtocolTCP, MaxTotalLen)
	if fault != FaultNone || len(p) == headers {
		return false
	}
	hl := p.HeaderLen()
	if p[hl+tcpOffFlags]&^tcpECE != tcpACK || !tcpIntact(p, hl, partial) {
		return false
	}
	*j = Joiner{head: p, hl: hl, headers: headers, size: len(p) - headers, payload: len(p) - headers, count: 1}
	return true
}

// tcpIntact reports whether a segment's checksum is right, or a partial one the pseudo-header's sum. One that is stored
// as 0 is not: we would write 0xffff.
func tcpIntact(p IPv4, hl int, partial bool) bool {
	tcp := p[hl:]
	if partial {
		return uint32(binary.BigEndian.Uint16(tcp[tcpOffChecksum:])) == PseudoSum(p, len(tcp))
	}
	return binary.BigEndian.Uint16(tcp[tcpOffChecksum:]) != 0 && Checksum(tcp, PseudoSum(p, len(tcp))) == 0
}

// Add joins the segment p to those before it, or reports that it does not belong to them; then it has changed nothing.
// It returns the payload, a view of p. partial is as with Start.
func (j *Joiner) Add(p IPv4, partial bool) ([]byte, bool) {
	if j.last || len(p) <= j.headers || len(p)-j.headers > j.size || j.headers+j.payload+len(p)-j.headers > MaxTotalLen {
		return nil, false
	}
	h := j.head
	// The IPv4 header: all the same but for total length, identification, which counts, and checksum.
	if p[0] != h[0] || p[offTOS] != h[offTOS] || p.ID() != h.ID()+uint16(j.count) ||
		!bytes.Equal(p[offFragment:offChecksum], h[offFragment:offChecksum]) || !bytes.Equal(p[offSrc:j.hl], h[offSrc:j.hl]) {
		return nil, false
	}
	// The TCP header: all the same but for sequence number, which counts, FIN and PSH, which only the last may have,
	// and checksum.
	tcp, first := p[j.hl:j.headers], h[j.hl:j.headers]
	seq := binary.BigEndian.Uint32(first[tcpOffSeq:]) + uint32(j.payload)
	flags := tcp[tcpOffFlags] &^ (tcpFIN | tcpPSH)
	if !bytes.Equal(tcp[:tcpOffSeq], first[:tcpOffSeq]) || binary.BigEndian.Uint32(tcp[tcpOffSeq:]) != seq ||
		!bytes.Equal(tcp[tcpOffSeq+4:tcpOffFlags], first[tcpOffSeq+4:tcpOffFlags]) || flags != first[tcpOffFlags] ||
		!bytes.Equal(tcp[tcpOffFlags+1:tcpOffChecksum], first[tcpOffFlags+1:tcpOffChecksum]) ||
		!bytes.Equal(tcp[tcpOffChecksum+2:], first[tcpOffChecksum+2:]) {
		return nil, false
	}
	if !tcpIntact(p, j.hl, partial) {
		return nil, false
	}
	payload := p[j.headers:]
	j.last = tcp[tcpOffFlags] != flags || len(payload) < j.size
	if j.last {
		// Kept until Finish: nothing is added any more, so the comparison above does not see it.
		first[tcpOffFlags] = tcp[tcpOffFlags]
	}
	j.payload += len(payload)
	j.count++
	return payload, true
}

// Size returns the payload of each segment but the last, in bytes.
func (j *Joiner) Size() int { return j.size }

// Finish writes the headers of the superpacket into the first segment: its total length, and a partial TCP checksum.
func (j *Joiner) Finish() {
	h := j.head
	binary.BigEndian.PutUint16(h[offTotalLen:], uint16(j.headers+j.payload))
	binary.BigEndian.PutUint16(h[offChecksum:], 0)
	binary.BigEndian.PutUint16(h[offChecksum:], Checksum(h[:j.hl], 0))
	binary.BigEndian.PutUint16(h[j.hl+tcpOffChecksum:], uint16(PseudoSum(h, j.headers-j.hl+j.payload)))
}

// HeaderLen returns the length of the headers of the superpacket, IPv4 and TCP, in bytes.
func (j *Joiner) HeaderLen() int { return j.headers }

// ChecksumStart returns where the bytes begin that the TCP checksum covers.
func (j *Joiner) ChecksumStart() int { return j.hl }
