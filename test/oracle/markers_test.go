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

const (
	// markPort is the source port of markers. Their destination ports are markPorts from it on: each way has its own, and so
	// flows of its own, because a flow that the kernel has been seen to handle stays the kernel's.
	markPort  = 4
	markPorts = 8
)

// awaited are the markers that have yet to come out at a place, by their numbers.
type awaited map[uint16]bool

// mark makes a marker that is awaited at a place.
func (m *markers) mark(at awaited, src, dst netip.Addr, ttl byte, way uint16, payload int, options []byte) []byte {
	m.last++
	at[m.last] = true
	data := binary.BigEndian.AppendUint16([]byte{0, markPort}, markPort+way)
	data = append(binary.BigEndian.AppendUint16(data, uint16(8+payload)), make([]byte, 2+payload)...)
	return build(spec{src: src, dst: dst, ttl: ttl, protocol: 17, id: m.last, options: options, payload: data})
}

// markerNumber returns the number of a marker, or of the one that an error is about.
func markerNumber(b []byte) (number uint16, ok bool) {
	if isError(b) {
		b = b[int(b[0]&15)*4+8:]
	}
	if len(b) < 20 || b[9] != 17 {
		return 0, false
	}
	udp := b[min(int(b[0]&15)*4, len(b)):]
	return binary.BigEndian.Uint16(b[4:]),
		len(udp) >= 8 && binary.BigEndian.Uint16(udp) == markPort && binary.BigEndian.Uint16(udp[2:])-markPort < markPorts
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

// lane is a pod of the other node with which markers go by a certain worker.
type lane = netip.Addr

// lanes finds a lane for each of so many workers, which are all that a way leads to. send sends a marker in a lane, by one
// worker, and waits until it has come out.
func (n *nodeBox) lanes(t testing.TB, workers int, send func(lane)) (all []lane) {
	t.Helper()
	found := map[int]bool{}
	for host := byte(100); len(all) < workers; host++ {
		if host == 200 {
			t.Fatalf("markers go by %d workers, expected %d", len(all), workers)
		}
		l := netip.AddrFrom4([4]byte{10, 244, 2, host})
		before := n.Router.Batches()
		send(l)
		for worker, b := range n.Router.Batches() {
			if b.Packets > before[worker].Packets && !found[worker] {
				found[worker] = true
				all = append(all, l)
			}
		}
	}
	return all
}
