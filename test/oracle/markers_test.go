package oracle

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

// A marker is a packet of the test's own that every router lets pass, or with a TTL of 1 answers. It goes behind a packet on a
// way that this one may take; when it has come out, so has what there is of the packet. Its identification is its number, which
// no other marker has for a long time, and which is in the error about it too: a marker that comes twice, late, or where
// nobody waits for it is a defect, and never taken for another one.
type markers struct{ last uint16 }

// markHost is the pod of the other node that only markers go to and come from.
var markHost = addr("10.244.2.254")

// markPort is the source port of markers by UDP. The destination ports from it on are theirs too.
const markPort = 4

// awaited are the markers that have yet to come out at a place, by their numbers.
type awaited map[uint16]bool

// udp makes a marker that is awaited at a place. Each port is a flow of its own.
func (m *markers) udp(at awaited, src, dst netip.Addr, ttl byte, port uint16, payload int, options []byte) []byte {
	data := binary.BigEndian.AppendUint16([]byte{0, markPort}, markPort+port)
	data = append(binary.BigEndian.AppendUint16(data, uint16(8+payload)), make([]byte, 2+payload)...)
	return build(spec{src: src, dst: dst, ttl: ttl, protocol: 17, id: m.number(at), options: options, payload: data})
}

// icmp makes a marker that is an ICMP message without a byte.
func (m *markers) icmp(at awaited, src, dst netip.Addr) []byte {
	return build(spec{src: src, dst: dst, ttl: 64, protocol: 1, id: m.number(at), payload: []byte{}})
}

func (m *markers) number(at awaited) uint16 {
	m.last++
	at[m.last] = true
	return m.last
}

// markerNumber returns the number of a marker, or of the one that an error is about.
func markerNumber(b []byte) (number uint16, ok bool) {
	if isError(b) {
		b = b[int(b[0]&15)*4+8:]
	}
	if len(b) < 20 {
		return 0, false
	}
	number = binary.BigEndian.Uint16(b[4:])
	src, dst := netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	if b[9] == 1 {
		return number, src == markHost || dst == markHost
	}
	hl := int(b[0]&15) * 4
	ports := func() bool {
		return binary.BigEndian.Uint16(b[hl:]) == markPort && binary.BigEndian.Uint16(b[hl+2:])-markPort < 64
	}
	return number, b[9] == 17 && len(b) >= hl+8 && ports()
}

// until returns what next does besides markers, until the last one that is awaited has come.
func (a awaited) until(t testing.TB, where string, next func() []byte) (out [][]byte) {
	t.Helper()
	for len(a) > 0 {
		b := next()
		number, ok := markerNumber(b)
		switch {
		case !ok:
			out = append(out, b)
		case a[number]:
			delete(a, number)
		default:
			t.Errorf("%s came marker %d, when awaited were %v: % x", where, number, a, head(b))
		}
	}
	return out
}
