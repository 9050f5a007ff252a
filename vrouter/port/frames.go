package port

import (
	"encoding/binary"
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

// send puts one packet into the queue, or reports that the kernel has to find the way.
func (f *frames) send(u *Underlay, table hops, one []*vrouter.Packet) bool {
	p := one[0]
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
		f.whole(u, h, one)
	default:
		f.split(u, h, one)
	}
	return true
}
