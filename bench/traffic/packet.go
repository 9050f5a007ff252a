package traffic

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"margay/vrouter/packet"
)

// Port is the UDP destination port of all generated packets; their source ports tell the flows apart.
const Port = 9009

// Profile names a mixture of packet sizes.
type Profile string

// The profiles. Sizes are those of the IP packet in bytes. Small is 18 bytes of UDP payload, what a 64-byte Ethernet frame
// carries. IMIX is 7 small ones, 4 of 576 and 1 of 1,400: the usual mixture, but for its longest packet, which has to fit
// every peer's tunnel. SmallXDP is Small, made by XDPGenerator instead of Generator.
const (
	Small    Profile = "small"
	SmallXDP Profile = "small-xdp"
	IMIX     Profile = "imix"
)

func (p Profile) sizes() ([]int, error) {
	switch p {
	case Small, SmallXDP:
		return []int{46}, nil
	case IMIX:
		return []int{46, 576, 46, 46, 576, 46, 1400, 46, 576, 46, 46, 576}, nil
	}
	return nil, fmt.Errorf("profile %q: expected %s, %s or %s", p, Small, SmallXDP, IMIX)
}

// Frame describes what the generator sends.
type Frame struct {
	SourceMAC, DestinationMAC net.HardwareAddr
	Source, Destination       netip.Addr // IPv4
	Flows                     int
	Profile                   Profile
}

// frames returns the Ethernet frames to be sent over and over: every size of the profile in every flow.
func (f Frame) frames() ([][]byte, error) {
	sizes, err := f.Profile.sizes()
	if err != nil {
		return nil, err
	}
	if !f.Source.Is4() || !f.Destination.Is4() || f.Flows < 1 || f.Flows > 10_000 {
		return nil, fmt.Errorf("from %v to %v, %d flows: expected IPv4 addresses and 1 to 10000 flows", f.Source, f.Destination, f.Flows)
	}
	var out [][]byte
	for flow := range f.Flows {
		for _, size := range sizes {
			b := make([]byte, 14+size)
			copy(b, f.DestinationMAC)
			copy(b[6:], f.SourceMAC)
			binary.BigEndian.PutUint16(b[12:], 0x0800)
			f.fill(b[14:], flow)
			out = append(out, b)
		}
	}
	return out, nil
}

func (f Frame) fill(b []byte, flow int) {
	b[0], b[8], b[9] = 0x45, 64, packet.ProtocolUDP
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	src, dst := f.Source.As4(), f.Destination.As4()
	copy(b[12:], src[:])
	copy(b[16:], dst[:])
	binary.BigEndian.PutUint16(b[10:], ^sum(b[:20], 0))
	udp := b[20:]
	binary.BigEndian.PutUint16(udp, uint16(20_000+flow))
	binary.BigEndian.PutUint16(udp[2:], Port)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	for i := range udp[8:] {
		udp[8+i] = byte(i)
	}
	c := ^sum(udp, pseudo(b))
	if c == 0 {
		c = 0xffff // RFC 768: 0 means "no checksum"
	}
	binary.BigEndian.PutUint16(udp[6:], c)
}

// pseudo is the sum of the pseudo-header of a UDP packet (RFC 768).
func pseudo(ip []byte) uint32 {
	var s uint32
	for i := 12; i < 20; i += 2 {
		s += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	return s + packet.ProtocolUDP + uint32(len(ip)-20)
}

// sum is the ones' complement sum of RFC 1071, begun with s.
func sum(b []byte, s uint32) uint16 {
	acc := uint64(s)
	for ; len(b) >= 4; b = b[4:] {
		acc += uint64(binary.BigEndian.Uint32(b))
	}
	if len(b) >= 2 {
		acc += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		acc += uint64(b[0]) << 8
	}
	for acc > 0xffff {
		acc = acc>>16 + acc&0xffff
	}
	return uint16(acc)
}

// verdict is what the sink makes of a frame.
type verdict uint8

const (
	other  verdict = iota // nothing that the generator has sent
	whole                 // a generated packet, every checksum right
	bad                   // a generated packet that is damaged
	sealed                // a WireGuard transport message: no more can be told
)

const (
	portVXLAN     = 4789
	portWireGuard = 51820
)

// judgeMerged looks at a UDP superpacket, whose segments have size bytes of payload each: somebody on the way has merged packets of
// one flow, whose checksums he had verified (WireGuard does, after decryption), and left that of the whole to whoever splits it.
// It returns how many packets of the generator those are, and their bytes together; 0 if it is anything else.
func judgeMerged(b []byte, size int) (packets, bytes int) {
	const headers = 20 + 8
	if len(b) <= headers || b[0] != 0x45 || b[9] != packet.ProtocolUDP || binary.BigEndian.Uint16(b[22:]) != Port || size <= 0 {
		return 0, 0
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	if n <= headers || n > len(b) || sum(b[:20], 0) != 0xffff {
		return 0, 0
	}
	for i, v := range b[headers:n] {
		if v != byte(i%size) {
			return 0, 0
		}
	}
	packets = (n - headers + size - 1) / size
	return packets, n - headers + headers*packets
}

// judge looks at the IP packet of a frame, and into its tunnel; size is the length in bytes of the packet that was
// generated, 0 where that cannot be told.
func judge(b []byte) (v verdict, size int) {
	for range 2 { // an outer header, if any, and an inner one
		if len(b) < 28 || b[0] != 0x45 {
			return other, 0
		}
		n := int(binary.BigEndian.Uint16(b[2:]))
		if n < 28 || n > len(b) {
			return bad, 0
		}
		b = b[:n] // short frames are padded
		switch b[9] {
		case packet.ProtocolIPIP:
			b = b[20:]
			continue
		case packet.ProtocolUDP:
		default:
			return other, 0
		}
		switch binary.BigEndian.Uint16(b[22:]) {
		case portVXLAN:
			if len(b) < 28+8+14 {
				return bad, 0
			}
			b = b[28+8+14:]
			continue
		case portWireGuard:
			if len(b) > 28 && b[28] == 4 { // message type "transport data"
				return sealed, 0
			}
			return other, 0
		case Port:
			if sum(b[:20], 0) != 0xffff || int(binary.BigEndian.Uint16(b[24:])) != len(b)-20 ||
				binary.BigEndian.Uint16(b[26:]) == 0 || sum(b[20:], pseudo(b)) != 0xffff {
				return bad, 0
			}
			return whole, len(b)
		}
		return other, 0
	}
	return other, 0
}
