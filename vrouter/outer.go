package vrouter

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
	"time"

	"margay/vrouter/packet"
)

// The identification of an outer header proves, when somebody quotes it, that we have sent the packet. With DF set it says
// nothing else (RFC 6864, 4.1), and so it is the inner one plus an offset that only this process knows, another for each
// gateway. Whoever cuts a superpacket to segments counts up both, so that it holds for each of them; and the first eight
// bytes of the inner packet, with its identification, are in every quote (RFC 792). No state tells what has been sent.
//
// With DF clear identifications have to differ (RFC 6864, 4.3), and are a worker's counter.

// outerKey is what the offsets are made of: random, and new for each process.
type outerKey [16]byte

func newOuterKey() (k outerKey) {
	_, _ = rand.Read(k[:]) // never fails: it crashes the program instead
	return k
}

// offset returns the difference between the outer identification and the inner one in packets with DF set to gateway. It is
// never 0: an outer identification of 0, which the kernel replaces in what a raw socket sends, would be the one of all
// packets whose inner one is 0.
func (k *outerKey) offset(gateway uint32) uint16 {
	var b [len(k) + 4]byte
	copy(b[:], k[:])
	binary.BigEndian.PutUint32(b[len(k):], gateway)
	sum := sha256.Sum256(b[:])
	return max(1, binary.BigEndian.Uint16(sum[:]))
}

// OuterOffset returns what is added to the inner identification to make the outer one, modulo 2^16, in packets with DF set
// to the node at gateway: for whoever makes outer headers in the vRouter's place. It is the same as long as the process
// lives.
func (r *Router) OuterOffset(gateway netip.Addr) uint16 {
	b := gateway.As4()
	return r.state.Load().key.offset(binary.BigEndian.Uint32(b[:]))
}

// outer is what a worker makes outer headers with. The zero value is ready to begin.
type outer struct {
	packet.Outer
	key     outerKey
	counter uint16            // the last identification of a packet with DF clear
	offsets [64]gatewayOffset // a cache of outerKey.offset
}

type gatewayOffset struct {
	gateway uint32 // 0, which no gateway is: none
	offset  uint16
}

// begin takes over what is the same for all packets of a batch; the key is for all of a router.
func (o *outer) begin(s *state) {
	o.Src, o.TTL, o.Pipe, o.DSCP = s.source, outerTTL, s.pipe, s.options.DSCP.Value
	o.key = s.key
}

// next returns the identification for a packet with DF clear, which becomes that many segments.
func (o *outer) next(segments int) uint16 {
	first := o.counter + 1
	o.counter += uint16(segments)
	return first
}

// offset is outerKey.offset.
func (o *outer) offset(gateway uint32) uint16 {
	at := &o.offsets[gateway*0x9e3779b1>>26]
	if at.gateway != gateway {
		at.gateway, at.offset = gateway, o.key.offset(gateway)
	}
	return at.offset
}

// sent reports whether quoted, an outer packet of this node with DF set as far as somebody has quoted it, can be one that
// the key was used for, and one that PushIPIP makes.
func (k *outerKey) sent(quoted packet.IPv4) bool {
	inner := packet.IPv4(quoted[quoted.HeaderLen():])
	const idEnd = 8 // of flags too; RFC 792 has eight bytes quoted at least
	return len(inner) >= idEnd && inner[0]>>4 == 4 && inner.DF() && quoted.HeaderLen() == outerLen &&
		inner.TotalLen()+outerLen == quoted.TotalLen() && quoted.ID()-inner.ID() == k.offset(quoted.DstU32())
}

// Blind forgers: whoever has seen no packet of ours hits the offset once in 2^16 messages. So that they cannot try them all,
// forgedLimit of them about one node in a forgedPeriod make all others about it unheard until the period is over.
const (
	forgedLimit  = 16
	forgedPeriod = time.Minute
)

// forgers counts messages that quote what we have not sent. The zero value is ready.
type forgers struct {
	refused uint64 // messages, since the start: those that went unheard too
	since   time.Time
	forged  map[uint32]int // in this period, by gateway; only of nodes of the cluster
}

// sent is outerKey.sent for as long as forgers have not asked too often.
func (f *forgers) sent(key *outerKey, quoted packet.IPv4, now time.Time) bool {
	if now.Sub(f.since) >= forgedPeriod {
		f.since, f.forged = now, nil
	}
	gateway := quoted.DstU32()
	if f.forged[gateway] < forgedLimit && key.sent(quoted) {
		return true
	}
	if f.refused++; f.forged == nil {
		f.forged = make(map[uint32]int)
	}
	f.forged[gateway]++
	return false
}
