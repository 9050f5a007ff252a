package port

import (
	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// sendRaw sends a packet by the raw socket, which takes only finished ones.
func (u *Underlay) sendRaw(p *vrouter.Packet) {
	b, o := p.Bytes(), &p.Offload
	copy(u.to.Addr[:], b[16:20])
	switch o.Segmentation {
	case vrouter.SegmentNone:
		if o.NeedsChecksum && !packet.CompleteChecksum(b, int(o.ChecksumStart), int(o.ChecksumOffset)) {
			p.Drop = vrouter.ReasonMalformed
			return
		}
		u.sendto(p, b)
		return
	case vrouter.SegmentUnsupported:
		p.Drop = vrouter.ReasonOffloadUnsupported
		return
	}
	s := &u.splitter
	if s.Start(b, packet.IPv4MinLen, o.Protocol(), int(o.Size)) != packet.FaultNone {
		p.Drop = vrouter.ReasonMalformed
		return
	}
	for {
		n, payload := s.Next(u.scratch)
		if n == 0 {
			return
		}
		segment := u.scratch[:n+copy(u.scratch[n:], payload)]
		packet.CompleteChecksum(segment, s.ChecksumStart(), s.ChecksumOffset())
		u.sendto(p, segment)
	}
}

// sendto sends one finished packet and notes the outcome with p.
func (u *Underlay) sendto(p *vrouter.Packet, b []byte) {
	err := u.tryRaw(b)
	if err == unix.EAGAIN && u.drained.wait(u.send, unix.POLLOUT, sendPatience) {
		err = u.tryRaw(b)
	}
	if err != nil {
		p.Drop = sendFailure(err)
		return
	}
	p.Sent++
}

// sendFailure names why the kernel did not send.
func sendFailure(err error) vrouter.Reason {
	switch err {
	case unix.EMSGSIZE:
		return vrouter.ReasonSendTooBig
	case unix.EAGAIN, unix.ENOBUFS:
		return vrouter.ReasonSendQueueFull
	}
	return vrouter.ReasonSendFailed
}

func (u *Underlay) tryRaw(b []byte) error {
	for {
		if err := unix.Sendto(u.send, b, unix.MSG_DONTWAIT, &u.to); err != unix.EINTR {
			return err
		}
	}
}
