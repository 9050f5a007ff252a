package port

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// frameHeaders is the room for what precedes a segment's payload: virtio-net and link-layer header, and the packet's own.
const frameHeaders = vnetHeader + ethernetHeader + packet.MaxHeaders

// frames sends on the underlay by an AF_PACKET socket with PACKET_VNET_HDR: whole superpackets where the interface has
// the program of retag.go, their segments where it has not. Segments are given to the kernel in two pieces, headers of
// ours and payload where it lies, with the checksum left to the kernel.
//
// It is used by one goroutine, Send's.
type frames struct {
	packetWriter
	resolver *resolver
	headers  [packetBatch][frameHeaders]byte
	splitter packet.Splitter
}

// newFrames opens the socket. The resolver is one for all queues of the underlay.
func newFrames(r *resolver) (_ *frames, err error) {
	f := &frames{resolver: r}
	// Protocol 0: it receives nothing. No PACKET_QDISC_BYPASS: that would go past the program.
	f.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, explainSocket("packet socket for sending", err)
	}
	err = enlarge(f.fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF)
	if err == nil {
		if err = unix.SetsockoptInt(f.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			err = fmt.Errorf("PACKET_VNET_HDR: %w", err)
		}
	}
	if err == nil {
		err = explainMark(unix.SetsockoptInt(f.fd, unix.SOL_SOCKET, unix.SO_MARK, retagMark))
	}
	if err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

func explainMark(err error) error {
	if err == nil {
		return nil
	}
	return &Missing{What: "mark of the packet socket", Err: err, Do: needPrivilege}
}

func (f *frames) close() error { return unix.Close(f.fd) }

// whole puts one packet, headers and all, into the queue.
func (f *frames) whole(u *Underlay, h *hop, one []*vrouter.Packet) {
	p := one[0]
	headers, segments, fault := super(p.Bytes(), packet.IPv4MinLen, &p.Offload)
	if fault != packet.FaultNone {
		p.Drop = vrouter.ReasonMalformed
		return
	}
	if !f.room(1) {
		f.flush(u.drained)
	}
	start := p.Off - ethernetHeader - vnetHeader
	putVnet(p.Buf[start:], &p.Offload, ethernetHeader, headers)
	copy(p.Buf[p.Off-ethernetHeader:], h.ethernet[:])
	f.begin(&h.address, one, segments)
	f.piece(p.Buf[start : p.Off+p.Len])
}

// split puts the segments of one packet into the queue.
func (f *frames) split(u *Underlay, h *hop, one []*vrouter.Packet) {
	s, p := &f.splitter, one[0]
	if s.Start(p.Bytes(), packet.IPv4MinLen, p.Offload.Protocol(), int(p.Offload.Size)) != packet.FaultNone {
		p.Drop = vrouter.ReasonMalformed
		return
	}
	o := vrouter.Offload{NeedsChecksum: true, ChecksumStart: uint16(s.ChecksumStart()), ChecksumOffset: uint16(s.ChecksumOffset())}
	for {
		if !f.room(2) {
			f.flush(u.drained)
		}
		header := &f.headers[f.n]
		n, payload := s.Next(header[vnetHeader+ethernetHeader:])
		if n == 0 {
			return
		}
		putVnet(header[:], &o, ethernetHeader, 0)
		copy(header[vnetHeader:], h.ethernet[:])
		f.begin(&h.address, one, 1)
		f.piece(header[:vnetHeader+ethernetHeader+n])
		if len(payload) > 0 {
			f.piece(payload)
		}
	}
}

// splitXDP hands the segments of one packet to an AF_XDP socket, which takes only finished ones.
func (f *frames) splitXDP(h *hop, x *xsk, p *vrouter.Packet) {
	s := &f.splitter
	if s.Start(p.Bytes(), packet.IPv4MinLen, p.Offload.Protocol(), int(p.Offload.Size)) != packet.FaultNone {
		p.Drop = vrouter.ReasonMalformed
		return
	}
	for {
		n, payload := s.Next(f.headers[0][:])
		if n == 0 {
			return
		}
		if n+len(payload) > x.mtu {
			p.Drop = vrouter.ReasonSendTooBig
			return
		}
		frame := x.next()
		if frame == nil {
			p.Drop = vrouter.ReasonSendQueueFull
			return
		}
		b := frame[copy(frame, h.ethernet[:]):]
		b = b[:copy(b, f.headers[0][:n])+copy(b[n:], payload)]
		packet.CompleteChecksum(b, s.ChecksumStart(), s.ChecksumOffset())
		x.queue(ethernetHeader + len(b))
		p.Sent++
	}
}

// sendBatch sends every packet of batch by the way that its next hop and its kind allow, the packets of each flow in
// order: of two ways the one is emptied before the other is taken.
func (f *frames) sendBatch(u *Underlay, batch []*vrouter.Packet) {
	table := *f.resolver.table.Load()
	x := u.bypass.hold(int(f.resolver.index.Load()))
	for i, p := range batch {
		p.Sent, p.Drop = 0, vrouter.ReasonNotSet
		h := f.find(table, p)
		single := p.Offload.Segmentation == vrouter.SegmentNone
		switch {
		case h == nil:
			u.sendRaw(p)
		case x != nil && single:
			f.flush(u.drained)
			x.send(p, h.ethernet[:])
		case x != nil && !h.whole:
			f.flush(u.drained)
			f.splitXDP(h, x, p)
		case single || h.whole:
			x.flush(u.drained)
			f.whole(u, h, batch[i:i+1])
		default:
			f.split(u, h, batch[i:i+1])
		}
	}
	f.flush(u.drained)
	u.bypass.release(x, u.drained)
}

// find returns the next hop of a packet, or nil where the kernel has to find it.
func (f *frames) find(table hops, p *vrouter.Packet) *hop {
	to := binary.BigEndian.Uint32(p.Buf[p.Off+16:])
	h := table.find(to)
	if h == nil {
		f.resolver.want(to)
		return nil
	}
	if !h.used.Load() {
		h.used.Store(true)
	}
	if h.raw {
		return nil
	}
	return h
}
