package vrouter

import (
	"margay/vrouter/fib"
	"margay/vrouter/packet"
)

// What a worker sends that it has not received: fragments, and ICMP errors. All of it is off the usual way, and made in
// packets of the worker's own, which flush gives back.

// splitting is what a worker needs to send a packet in pieces.
type splitting struct {
	pieces     []*Packet
	used       int // pieces that wait to be sent
	fragmenter packet.Fragmenter
	scratch    []byte // one segment of a superpacket
	segment    func([]byte)

	// Of the packet that split is at.
	in   Interface
	hop  fib.Hop
	mtu  int
	made uint64
}

// growPieces is how many pieces a worker makes room for when it has none left, up to batchSize.
const growPieces = 8

// piece returns an empty packet. It sends what waits when there is no other.
func (w *Worker) piece() *Packet {
	s := &w.splitting
	if s.used == len(s.pieces) {
		if len(s.pieces) < batchSize {
			for range growPieces {
				s.pieces = append(s.pieces, NewPacket())
			}
		} else {
			w.flush()
		}
	}
	p := s.pieces[s.used]
	s.used++
	p.Reset()
	return p
}

// split sends inner, the packet in p that is too long for the tunnel to hop, or for vr0, as it is, in pieces: a
// superpacket in its segments, and what is too long then, and has DF clear, in fragments. Into the tunnel it is the second
// half of the ladder for each.
func (w *Worker) split(p *Packet, inner packet.IPv4, hop fib.Hop) {
	s := &w.splitting
	s.in, s.hop, s.mtu, s.made = p.In, hop, w.view.state.mtuTo(hop.Gateway()), 0
	if w.direction == Decap {
		s.mtu = w.view.state.config.MTU
	}
	fault := packet.FaultNone
	switch o := &p.Offload; o.Segmentation {
	case SegmentNone:
		if o.NeedsChecksum && !packet.CompleteChecksum(inner, int(o.ChecksumStart), int(o.ChecksumOffset)) {
			fault = packet.FaultTransport
			break
		}
		fault = w.fragments(inner)
	default:
		if s.scratch == nil {
			s.scratch, s.segment = make([]byte, MaxPacket), w.segmentOf
		}
		if o.Protocol() == packet.ProtocolUDP {
			fault = packet.SegmentUDP(inner, int(o.Size), s.scratch, s.segment)
		} else {
			fault = packet.SegmentTCP(inner, int(o.Size), s.scratch, s.segment)
		}
	}
	if fault != packet.FaultNone {
		w.drop(p, ReasonMalformed)
		return
	}
	p.Sent = int(s.made)
	w.tallies.more[moreSplit].add(1, uint64(p.Len))
	w.tallies.more[morePieces].add(s.made, 0)
}

// segmentOf sends one segment of the superpacket that split is at.
func (w *Worker) segmentOf(b []byte) {
	s := &w.splitting
	if len(b) > s.mtu {
		// split is here only if DF is clear or each segment fits. A way so narrow that it carries no fragment is
		// narrower than MinMTU.
		_ = w.fragments(packet.IPv4(b))
		return
	}
	p := w.piece()
	p.Len = copy(p.Buf[p.Off:], b)
	w.sendPiece(p)
}

// fragments sends b in fragments.
func (w *Worker) fragments(b packet.IPv4) packet.Fault {
	s := &w.splitting
	if fault := s.fragmenter.Start(b, s.mtu); fault != packet.FaultNone {
		return fault
	}
	for {
		p := w.piece()
		if p.Len = s.fragmenter.Next(p.Buf[p.Off : p.Off+MaxPacket]); p.Len == 0 {
			s.used--
			return packet.FaultNone
		}
		w.sendPiece(p)
	}
}

// sendPiece sends one piece, into the tunnel in a header of its own.
func (w *Worker) sendPiece(p *Packet) {
	s := &w.splitting
	s.made++
	if w.direction == Decap {
		w.outgoing = append(w.outgoing, p)
		return
	}
	p.In, p.Out = s.in, UnderlayInterface
	if verdict, reason := w.view.encap(p, packet.IPv4(p.Bytes()), s.hop, &w.outer); verdict != VerdictForward {
		w.drop(p, reason)
		return
	}
	w.outgoing = append(w.outgoing, p)
}

// answer tells the sender of inner, which came in the packet p and was dropped on its way to hop, the reason, where
// there is something to tell. What came from the underlay is not answered.
func (w *Worker) answer(p *Packet, inner packet.IPv4, hop fib.Hop, reason Reason) {
	fromPod := w.direction == Transit && p.In >= FirstPodInterface
	if answers[reason] == (packet.ICMPError{}) || p.In == UnderlayInterface || !fromPod && w.reply == nil {
		return
	}
	state := w.view.state
	var source [4]byte // the reply port's choice
	if fromPod {
		source = state.answers
	}
	reply := w.piece()
	ok, limited := w.answerer.answer(state.options.ICMPRate, inner, reason, state.mtuTo(hop.Gateway()), source, reply)
	switch {
	case !ok:
		w.splitting.used--
		if limited {
			w.tallies.more[moreICMPLimited].add(1, uint64(len(inner)))
		}
	case fromPod:
		reply.Out = p.In
		w.podReplies = append(w.podReplies, reply)
	default:
		w.replies = append(w.replies, reply)
	}
}

// sendReplies sends replies on port, and counts them.
func (w *Worker) sendReplies(port Port, replies []*Packet) {
	if len(replies) == 0 {
		return
	}
	port.Send(replies)
	for _, p := range replies {
		which := moreICMPSent
		if p.Drop != ReasonNotSet {
			which = moreICMPFailed
		}
		w.tallies.more[which].add(1, uint64(p.Len))
	}
}
