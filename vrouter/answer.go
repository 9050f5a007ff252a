package vrouter

import (
	"time"

	"margay/vrouter/packet"
)

// answers says what the sender of a packet is told that was dropped for a reason; most are dropped without a word. Who
// would answer what comes from another node's wire, or is no packet, helps an attacker.
var answers = [reasonCount]packet.ICMPError{
	ReasonNoRoute:      {Type: packet.ICMPUnreachable, Code: packet.CodeNet},
	ReasonNoPod:        {Type: packet.ICMPUnreachable, Code: packet.CodeHost},
	ReasonPacketTooBig: {Type: packet.ICMPUnreachable, Code: packet.CodeFragNeeded},
	ReasonNestedTunnel: {Type: packet.ICMPUnreachable, Code: packet.CodeAdminFilter},
	ReasonTTLExpired:   {Type: packet.ICMPTimeExceeded},
}

// answerer makes the ICMP errors of one worker, or those that Relay passes on, and limits their rate (RFC 1812, 4.3.2.8): all
// together, and those about packets of one sender, so that one who is answered all the time takes the answers from nobody
// else.
type answerer struct {
	clock func() time.Duration // monotonic
	id    uint16
	all   bucket
	// senders are told apart by a hash; two that share a bucket share its rate.
	senders [answerSenders]bucket
}

const (
	answerSenders = 256
	// senderShare is the part of the rate that one sender may use.
	senderShare = 4
)

// bucket is a token bucket that holds time: an answer costs a second divided by the rate.
type bucket struct {
	saved time.Duration
	last  time.Duration
}

// take reports whether the bucket, which fills up to most, has what an answer costs.
func (b *bucket) take(now, cost, most time.Duration) bool {
	b.saved = min(b.saved+now-b.last, most)
	b.last = now
	if b.saved < cost {
		return false
	}
	b.saved -= cost
	return true
}

// newAnswerer returns one whose buckets are full.
func newAnswerer() *answerer {
	start := time.Now().Add(-time.Second)
	return &answerer{clock: func() time.Duration { return time.Since(start) }}
}

// answer writes into reply the ICMP error about inner that the reason calls for, from the address source. mtu is that of
// the way that is too narrow, in bytes. It reports whether there is one to be sent; limited says that there would have
// been, but for the rate.
func (a *answerer) answer(rate int, inner packet.IPv4, reason Reason, mtu int, source [4]byte, reply *Packet) (ok, limited bool) {
	e := answers[reason]
	if e == (packet.ICMPError{}) {
		return false, false
	}
	if reason == ReasonPacketTooBig {
		e.Rest = uint32(mtu)
	}
	if ok, limited = a.allows(rate, inner); ok {
		a.write(inner, e, source, reply)
	}
	return ok, limited
}

// allows reports whether an error about inner may be sent now, and takes what it costs; limited says that it might, but for the
// rate.
func (a *answerer) allows(rate int, inner packet.IPv4) (ok, limited bool) {
	if rate <= 0 || !packet.MayAnswer(inner) {
		return false, false
	}
	now, cost := a.clock(), time.Second/time.Duration(rate)
	if !a.senders[senderHash(inner.SrcU32())].take(now, cost*senderShare, max(time.Second/2, cost*senderShare)) ||
		!a.all.take(now, cost, max(time.Second/2, cost)) {
		return false, true
	}
	return true, false
}

// write makes the error e about inner.
func (a *answerer) write(inner packet.IPv4, e packet.ICMPError, source [4]byte, reply *Packet) {
	a.id++
	reply.Reset()
	reply.Len = packet.PutICMPError(reply.Buf[reply.Off:], inner, e, source, a.id)
}

func senderHash(a uint32) uint32 { return a * 0x9e3779b1 >> 24 }
