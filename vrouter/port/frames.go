package port

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

const (
	// frameMessages is the number of frames that one system call sends.
	frameMessages = 64
	// frameHeaders is the room for what precedes a segment's payload: virtio-net and link-layer header, and the
	// packet's own.
	frameHeaders = vnetHeader + ethernetHeader + packet.MaxHeaders
)

// frames sends on the underlay by an AF_PACKET socket with PACKET_VNET_HDR: whole superpackets where the interface has
// the program of retag.go, their segments where it has not. Segments are given to the kernel in two pieces, headers of
// ours and payload where it lies, with the checksum left to the kernel.
//
// It is used by one goroutine, Send's.
type frames struct {
	fd       int
	resolver *resolver

	n        int // messages that wait
	messages [frameMessages]mmsghdr
	pieces   [frameMessages][2]unix.Iovec
	headers  [frameMessages][frameHeaders]byte
	owners   [frameMessages]*vrouter.Packet
	counts   [frameMessages]int // packets that the message stands for
	splitter packet.Splitter
}

func newFrames(load func() (*retag, error)) (_ *frames, err error) {
	f := &frames{}
	if f.resolver, err = newResolver(load); err != nil {
		return nil, err
	}
	// Protocol 0: it receives nothing. No PACKET_QDISC_BYPASS: that would go past the program.
	f.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		_ = f.resolver.close()
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
		_ = f.close()
		return nil, err
	}
	return f, nil
}

func explainMark(err error) error {
	if err == nil {
		return nil
	}
	return &Missing{What: "mark of the packet socket", Err: err, Do: needPrivilege}
}

func (f *frames) close() error {
	err := f.resolver.close()
	if closeErr := unix.Close(f.fd); err == nil {
		err = closeErr
	}
	return err
}

// message puts the next message into the queue: to h, of one or two pieces, a part of p that stands for packets packets.
// The queue has room.
func (f *frames) message(h *hop, p *vrouter.Packet, first, second []byte, packets int) {
	i := f.n
	f.pieces[i][0] = unix.Iovec{Base: &first[0]}
	f.pieces[i][0].SetLen(len(first))
	pieces := 1
	if len(second) > 0 {
		f.pieces[i][1] = unix.Iovec{Base: &second[0]}
		f.pieces[i][1].SetLen(len(second))
		pieces = 2
	}
	m := &f.messages[i].header
	m.Name = (*byte)(unsafe.Pointer(&h.address))
	m.Namelen = unix.SizeofSockaddrLinklayer
	m.Iov = &f.pieces[i][0]
	m.SetIovlen(pieces)
	f.owners[i], f.counts[i] = p, packets
	f.n++
}

// whole puts p, headers and all, into the queue.
func (f *frames) whole(u *Underlay, h *hop, p *vrouter.Packet) {
	headers, segments, fault := super(p.Bytes(), packet.IPv4MinLen, &p.Offload)
	if fault != packet.FaultNone {
		p.Drop = vrouter.ReasonMalformed
		return
	}
	if f.n == frameMessages {
		f.flush(u)
	}
	start := p.Off - ethernetHeader - vnetHeader
	putVnet(p.Buf[start:], &p.Offload, ethernetHeader, headers)
	copy(p.Buf[p.Off-ethernetHeader:], h.ethernet[:])
	f.message(h, p, p.Buf[start:p.Off+p.Len], nil, segments)
}

// split puts p's segments into the queue.
func (f *frames) split(u *Underlay, h *hop, p *vrouter.Packet) {
	s := &f.splitter
	if s.Start(p.Bytes(), packet.IPv4MinLen, p.Offload.Protocol(), int(p.Offload.Size)) != packet.FaultNone {
		p.Drop = vrouter.ReasonMalformed
		return
	}
	o := vrouter.Offload{NeedsChecksum: true, ChecksumStart: uint16(s.ChecksumStart()), ChecksumOffset: uint16(s.ChecksumOffset())}
	for {
		if f.n == frameMessages {
			f.flush(u)
		}
		header := &f.headers[f.n]
		n, payload := s.Next(header[vnetHeader+ethernetHeader:])
		if n == 0 {
			return
		}
		putVnet(header[:], &o, ethernetHeader, 0)
		copy(header[vnetHeader:], h.ethernet[:])
		f.message(h, p, header[:vnetHeader+ethernetHeader+n], payload, 1)
	}
}

// send puts p into the queue, or reports that the kernel has to find the way.
func (f *frames) send(u *Underlay, table hops, p *vrouter.Packet) bool {
	to := binary.BigEndian.Uint32(p.Buf[p.Off+16:])
	h := table.find(to)
	if h == nil {
		f.resolver.want(to)
		return false
	}
	if !h.used.Load() {
		h.used.Store(true)
	}
	switch {
	case h.raw:
		return false
	case p.Offload.Segmentation == vrouter.SegmentNone || h.whole:
		f.whole(u, h, p)
	default:
		f.split(u, h, p)
	}
	return true
}

// flush sends what waits, and notes the outcome with each packet.
func (f *frames) flush(u *Underlay) {
	for i := 0; i < f.n; {
		sent, err := sendmmsg(f.fd, f.messages[i:f.n], unix.MSG_DONTWAIT)
		if err == unix.EAGAIN && u.drained.wait(f.fd, unix.POLLOUT, sendPatience) {
			sent, err = sendmmsg(f.fd, f.messages[i:f.n], unix.MSG_DONTWAIT)
		}
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			f.owners[i].Drop = sendFailure(err)
			i++
			continue
		}
		for range sent {
			f.owners[i].Sent += f.counts[i]
			i++
		}
	}
	f.n = 0
}
