package packet

import (
	"encoding/binary"
	"math/bits"
)

// Sum adds b to initial in one's complement arithmetic over 16-bit big-endian words (RFC 1071) and returns the sum
// folded to 16 bits, not complemented, so that it can be the initial value of another call. A last odd byte counts as
// the high byte of a word, so only the last piece of a whole may be of odd length.
func Sum(b []byte, initial uint32) uint16 {
	// RFC 1071 section 2: the words may be added in any grouping, so that eight bytes at a time with the carry
	// brought round give the same sum modulo 2^16-1.
	acc := uint64(initial)
	var carry uint64
	for len(b) >= 32 {
		acc, carry = bits.Add64(acc, binary.BigEndian.Uint64(b), carry)
		acc, carry = bits.Add64(acc, binary.BigEndian.Uint64(b[8:]), carry)
		acc, carry = bits.Add64(acc, binary.BigEndian.Uint64(b[16:]), carry)
		acc, carry = bits.Add64(acc, binary.BigEndian.Uint64(b[24:]), carry)
		b = b[32:]
	}
	for len(b) >= 8 {
		acc, carry = bits.Add64(acc, binary.BigEndian.Uint64(b), carry)
		b = b[8:]
	}
	if len(b) >= 4 {
		acc, carry = bits.Add64(acc, uint64(binary.BigEndian.Uint32(b)), carry)
		b = b[4:]
	}
	if len(b) >= 2 {
		acc, carry = bits.Add64(acc, uint64(binary.BigEndian.Uint16(b)), carry)
		b = b[2:]
	}
	if len(b) == 1 {
		acc, carry = bits.Add64(acc, uint64(b[0])<<8, carry)
	}
	// Adding the last carry can carry once more only when acc is all ones, and then leaves nothing to carry after.
	acc, carry = bits.Add64(acc, 0, carry)
	return fold(acc, carry)
}

// fold adds the four 16-bit words of acc and the carry with end-around carry.
func fold(acc, carry uint64) uint16 {
	s := acc>>48 + acc>>32&0xffff + acc>>16&0xffff + acc&0xffff + carry
	s = s>>16 + s&0xffff
	return uint16(s>>16 + s&0xffff)
}

// validHeader reports whether the checksum of a header without options, which nearly every header is, is right. One's
// complement arithmetic is arithmetic modulo 0xffff, where the sum of a right one is 0; so eight bytes may be added at a
// time, in any order of bytes (RFC 1071, 2), and there is nothing to fold.
func validHeader(h *[IPv4MinLen]byte) bool {
	return addHeader(binary.NativeEndian.Uint64(h[:]), binary.NativeEndian.Uint64(h[8:]), binary.NativeEndian.Uint32(h[16:]))%0xffff == 0
}

// headerSum is Sum for a header without options that is at hand as numbers, one of them not 0.
func headerSum(a, b uint64, c uint32) uint16 {
	return uint16((addHeader(a, b, c)-1)%0xffff) + 1 // of 0 and 0xffff, which are the same, the sum is the latter
}

// addHeader adds with end-around carry.
func addHeader(a, b uint64, c uint32) uint64 {
	s, carry := bits.Add64(a, b, 0)
	s, carry = bits.Add64(s, uint64(c), carry)
	return s + carry // no more to carry: where there was one, little is left of c
}

// Checksum returns the Internet checksum of b (RFC 1071): the complement of Sum(b, initial). The initial value is 0
// for an IP header and [PseudoSum] for TCP and UDP.
func Checksum(b []byte, initial uint32) uint16 { return ^Sum(b, initial) }

// PseudoSum returns the folded sum of the pseudo-header of RFC 9293 section 3.1 and RFC 768, taken from the addresses
// and the protocol of p, for a transport header and payload of length bytes.
func PseudoSum(p IPv4, length int) uint32 {
	return uint32(Sum(p[offSrc:offDst+4], uint32(p[offProtocol])+uint32(length)))
}

// CompleteChecksum finishes a checksum that the sender has left to its device (CHECKSUM_PARTIAL): start and offset are
// virtio's csum_start and csum_offset, in bytes, start counted from pkt's first byte. The field at start+offset holds
// the pseudo-header's sum; it is replaced by the checksum of everything from start to the end of pkt, so pkt must end
// where the packet ends. A result of 0 is written as 0xffff, its equal in this arithmetic, because UDP reads 0 as "no
// checksum". It returns false, and has changed nothing, when the field does not lie within pkt.
func CompleteChecksum(pkt []byte, start, offset int) bool {
	if start < 0 || offset < 0 || start > len(pkt) || offset > len(pkt)-start-2 {
		return false
	}
	putTransportChecksum(pkt[start+offset:], Checksum(pkt[start:], 0))
	return true
}

// putTransportChecksum writes a TCP or UDP checksum, 0 as 0xffff.
func putTransportChecksum(field []byte, sum uint16) {
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(field, sum)
}

// updateHeaderChecksum corrects p's header checksum after a 16-bit word of the header has changed from before to
// after: equation 3 of RFC 1624.
func updateHeaderChecksum(p IPv4, before, after uint16) {
	updateChecksum(p[offChecksum:], before, after)
}

// updateChecksum is updateHeaderChecksum for any checksum's field.
func updateChecksum(field []byte, before, after uint16) {
	s := uint32(^binary.BigEndian.Uint16(field)) + uint32(^before) + uint32(after)
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	binary.BigEndian.PutUint16(field, ^uint16(s))
}
