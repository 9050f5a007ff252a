package oracle

import (
	"encoding/binary"
	"net/netip"

	"pgregory.net/rapid"
)

// spec describes an IPv4 packet; its header is right but for what corrupt does to it.
type spec struct {
	src, dst netip.Addr
	tos      byte
	id       uint16
	fragment uint16 // flags and offset
	ttl      byte
	protocol byte
	options  []byte
	payload  []byte
	corrupt  func([]byte)
}

// build makes the packet, without any code under test.
func build(s spec) []byte {
	options := append(append([]byte(nil), s.options...), make([]byte, -len(s.options)&3)...)
	b := make([]byte, 20, 20+len(options)+len(s.payload))
	b[0], b[1], b[8], b[9] = 4<<4|byte(20+len(options))>>2, s.tos, s.ttl, s.protocol
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(options)+len(s.payload)))
	binary.BigEndian.PutUint16(b[4:], s.id)
	binary.BigEndian.PutUint16(b[6:], s.fragment)
	copy(b[12:], s.src.AsSlice())
	copy(b[16:], s.dst.AsSlice())
	b = append(b, options...)
	binary.BigEndian.PutUint16(b[10:], ^sum(b))
	b = append(b, s.payload...)
	if s.corrupt != nil {
		s.corrupt(b)
	}
	return b
}

// sum is RFC 1071's, one word at a time.
func sum(b []byte) uint16 {
	var n uint32
	for i := 0; i+1 < len(b); i += 2 {
		n += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		n += uint32(b[len(b)-1]) << 8
	}
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	return uint16(n)
}

// mend writes the header checksum anew, as long as there is a header.
func mend(b []byte) {
	if len(b) < 20 {
		return
	}
	n := min(len(b), max(20, int(b[0]&15)*4))
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], ^sum(b[:n]))
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

var (
	podHost    = addr("10.245.255.5")
	remoteHost = addr("10.244.2.5")
	holeHost   = addr("10.244.5.5")
	nowhere    = addr("10.244.7.5")
)

func payloadOf(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// input is a packet on its way from a pod, or to it.
type input struct {
	direction direction
	bytes     []byte
	pod       netip.Addr
}

// world is what the generator may use.
type world struct {
	// nextPod returns another pod each time, if there are enough: the kernel limits the errors to each by a rate that no
	// setting of a namespace takes away. It is not drawn: to use one pod again and again is what shrinking would end with.
	nextPod func() netip.Addr
	// neighbour is a pod that others send to; the zero Addr: none, and senders with any source and to any destination
	// besides.
	neighbour netip.Addr
	mtu       int // of the pods' interfaces
}

// wideWorld has all pods behind one interface, in0.
var wideWorld = world{nextPod: nextPod, mtu: 9000}

var pods uint16

func nextPod() netip.Addr {
	if pods++; pods >= 0xff00 {
		pods = 1
	}
	return netip.AddrFrom4([4]byte{10, 245, byte(pods >> 8), byte(pods)})
}

// sizes are lengths of payloads around every boundary there is: the way's MTU and the underlay's, with 20 and 28 bytes of
// headers, one and two fragments.
var sizes = rapid.OneOf(rapid.IntRange(0, 64), rapid.IntRange(1420, 1520), rapid.IntRange(2900, 2960), rapid.IntRange(0, 8000))

var options = rapid.OneOf(
	rapid.SampledFrom([][]byte{
		{1, 1, 1, 1}, {0x94, 4, 0, 0}, {0x5e, 6, 1, 2, 3, 4}, {1, 0x5e, 3, 9, 0},
		{0x83, 7, 4, 10, 244, 2, 9}, {0x89, 3, 4, 0}, {7, 7, 4, 0, 0, 0, 0}, {0x44, 8, 9, 0, 0, 0, 0, 0},
	}),
	// No timestamps: the two routers' clocks differ.
	rapid.SliceOfN(rapid.Byte().Filter(func(b byte) bool { return b != 0x44 }), 1, 40),
)

// draw makes one input.
func (w world) draw(t *rapid.T) input {
	d := rapid.SampledFrom([]direction{outward, outward, inward}).Draw(t, "direction")
	s := spec{
		tos:      rapid.Byte().Draw(t, "tos"),
		id:       rapid.Uint16().Draw(t, "id"),
		fragment: rapid.SampledFrom([]uint16{0, 0, 0x4000, 0x4000, 0x2000, 0x2005, 5, 0x4005, 0x6000, 0x8000}).Draw(t, "fragment"),
		ttl:      rapid.SampledFrom([]byte{64, 64, 64, 255, 2, 1, 0}).Draw(t, "ttl"),
		protocol: rapid.OneOf(rapid.SampledFrom([]byte{1, 6, 17, 17, 4, 41, 47}), rapid.Byte()).Draw(t, "protocol"),
	}
	if d == outward {
		s.src, s.dst = w.nextPod(), remoteHost
		s.payload = payloadOf(min(sizes.Draw(t, "size"), w.mtu-120)) // 60 of header, and padding
		kind := rapid.IntRange(0, 9).Draw(t, "kind of address")
		switch {
		case w.neighbour.IsValid():
			if s.dst = w.neighbour; kind > 2 {
				s.dst = remoteHost
			}
		case kind == 0:
			s.dst = netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "destination")))
			if first := s.dst.AsSlice()[0]; first == 10 || first == 198 {
				s.dst = remoteHost // what both have routes for is drawn elsewhere
			}
			// Which of two errors is told is each router's choice, see docs/router.md.
			s.ttl, s.payload, s.options = 64, s.payload[:min(len(s.payload), 1000)], nil
		case kind == 1:
			s.dst = rapid.SampledFrom([]netip.Addr{nowhere, holeHost}).Draw(t, "nowhere")
			s.ttl, s.payload = 64, s.payload[:min(len(s.payload), 1000)]
		case kind == 2:
			s.src = netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "source")))
		}
	} else {
		s.src, s.dst = remoteHost, w.nextPod()
		s.payload = payloadOf(min(sizes.Draw(t, "size"), 1300))
	}
	if s.protocol == 1 && len(s.payload) > 0 {
		s.payload[0] = rapid.Byte().Draw(t, "ICMP type")
	}
	if s.dst == remoteHost || d == inward || s.dst == w.neighbour {
		if rapid.IntRange(0, 7).Draw(t, "with options") == 0 {
			s.options = options.Draw(t, "options")
		}
	}
	pod := s.src
	if d == inward {
		pod = s.dst
	}
	b := build(s)
	switch rapid.IntRange(0, 11).Draw(t, "fuzz") {
	case 0: // anything in the header, its checksum wrong
		b[rapid.IntRange(0, 19).Draw(t, "at")] ^= byte(rapid.IntRange(1, 255).Draw(t, "bits"))
	case 1: // the length fields, the checksum right
		b[rapid.SampledFrom([]int{0, 2, 3}).Draw(t, "at")] ^= byte(rapid.IntRange(1, 255).Draw(t, "bits"))
		mend(b)
	case 2: // cut short
		b = b[:rapid.IntRange(1, len(b)).Draw(t, "length")]
	case 3: // padded
		b = append(b, payloadOf(rapid.IntRange(1, 46).Draw(t, "padding"))...)
	}
	return input{d, b, pod}
}
