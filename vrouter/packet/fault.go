package packet

// Fault says what is wrong with a packet. The zero value, FaultNone, means nothing is.
type Fault uint8

// The faults. Their names (see [Fault.String]) are stable: counters and traces show them.
const (
	// FaultNone: nothing is wrong.
	FaultNone Fault = iota
	// FaultShort: fewer bytes than the shortest header needs, or a buffer of the caller's (headroom, scratch) that is
	// too small for the result.
	FaultShort
	// FaultVersion: the version field is not 4.
	FaultVersion
	// FaultHeaderLen: the IHL field is less than five words, or reaches past the end of the packet.
	FaultHeaderLen
	// FaultTotalLen: the total length field is less than the header, more than the bytes there are, or, on a push,
	// the result would exceed MaxTotalLen.
	FaultTotalLen
	// FaultChecksum: the header checksum is wrong.
	FaultChecksum
	// FaultECN: the outer header says "congestion experienced" and the inner transport is not ECN-capable; RFC 6040
	// section 4.2 wants the packet dropped.
	FaultECN
	// FaultProtocol: the protocol field is not the one that the operation is for.
	FaultProtocol
	// FaultFragment: the packet is a fragment, and the operation needs a whole one.
	FaultFragment
	// FaultTransport: the TCP or UDP header does not fit into the packet or contradicts it.
	FaultTransport
	// FaultGSO: the segment size is not positive, or larger than an IPv4 packet can carry.
	FaultGSO

	faultCount
)

var faultNames = [faultCount]string{
	FaultNone:      "none",
	FaultShort:     "short",
	FaultVersion:   "version",
	FaultHeaderLen: "header_length",
	FaultTotalLen:  "total_length",
	FaultChecksum:  "checksum",
	FaultECN:       "ecn",
	FaultProtocol:  "protocol",
	FaultFragment:  "fragment",
	FaultTransport: "transport",
	FaultGSO:       "gso",
}

// String returns the fault's stable name in snake_case, "unknown" for a value that is none of the constants.
func (f Fault) String() string {
	if f >= faultCount {
		return "unknown"
	}
	return faultNames[f]
}
