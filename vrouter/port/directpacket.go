package port

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// podLink is the host's side of one pod's interface; immutable once it is in a table.
type podLink struct {
	index    int
	fd       int  // an AF_PACKET socket that receives what the vRouter owns; with AF_XDP none, -1
	xsk      *xsk // nil: AF_PACKET
	ethernet [ethernetHeader]byte
	address  unix.RawSockaddrLinklayer
	programs []link.Link
	lost     socketLosses
	queue    int    // of the port, which reads it; that one alone sends by its AF_XDP socket
	waits    bool   // the sender has packets queued for its AF_XDP socket
	way      uint32 // to the pod in the shortcut; directPods' own
}

// newPodLink returns an interface that has nothing open.
func newPodLink(index int, own, pod []byte) *podLink {
	l := &podLink{index: index, fd: -1}
	copy(l.ethernet[:6], pod)
	copy(l.ethernet[6:12], own)
	binary.BigEndian.PutUint16(l.ethernet[12:], unix.ETH_P_IP)
	l.address = unix.RawSockaddrLinklayer{Family: unix.AF_PACKET, Protocol: htons(unix.ETH_P_IP), Ifindex: int32(index), Halen: 6}
	copy(l.address.Addr[:], pod)
	return l
}

// readFD is the descriptor that is readable when a packet has come.
func (l *podLink) readFD() int {
	if l.xsk != nil {
		return l.xsk.fd
	}
	return l.fd
}

// openPodLink prepares to take over the interface index for the pod with the hardware address pod; own is the
// interface's. Until steering.take the interface is the kernel's.
func openPodLink(s *steering, index int, own, pod []byte) (_ *podLink, err error) {
	l := newPodLink(index, own, pod)
	defer func() {
		if err != nil {
			_ = l.close()
		}
	}()
	if l.fd, err = podSocket(s.filter); err != nil {
		return nil, explainSocket("packet socket for a pod", err)
	}
	if l.programs, err = s.attach(index, true); err != nil {
		return nil, err
	}
	// ETH_P_IP, because that is heard after the programs at tc ingress have run, and ETH_P_ALL before.
	if err := unix.Bind(l.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: index}); err != nil {
		return nil, fmt.Errorf("bind packet socket: %w", err)
	}
	return l, nil
}

func podSocket(filter *ebpf.Program) (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	for _, o := range []struct {
		name                 string
		level, option, value int
	}{
		{"PACKET_VNET_HDR", unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1},
		{"PACKET_IGNORE_OUTGOING (Linux 4.20)", unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1},
		{"SO_ATTACH_BPF", unix.SOL_SOCKET, unix.SO_ATTACH_BPF, filter.FD()},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.option, o.value); err != nil {
			_ = unix.Close(fd)
			return -1, fmt.Errorf("%s: %w", o.name, err)
		}
	}
	if err := enlarge(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// moved reports whether the pod has other hardware addresses now.
func (l *podLink) moved(own, pod []byte) bool {
	return string(l.ethernet[:6]) != string(pod) || string(l.ethernet[6:12]) != string(own)
}

// holds reports whether an AF_XDP socket was opened for packets as long as the MTU, in bytes; others take any.
func (l *podLink) holds(mtu int) bool { return l.xsk == nil || mtu <= l.xsk.mtu }

// dropped returns what the socket has lost so far.
func (l *podLink) dropped() uint64 {
	if l.xsk != nil {
		return l.xsk.dropped()
	}
	return l.lost.read(l.fd)
}

// recv takes what waits, without waiting for more.
func (l *podLink) recv(r *packetReader, batch []*vrouter.Packet) int {
	if l.xsk == nil {
		// EAGAIN, or once ENETDOWN when the interface goes: there is nothing either way.
		n, _ := r.recv(l.fd, ethernetHeader, batch)
		return n
	}
	n := l.xsk.receive(batch, ethernetHeader)
	for _, p := range batch[:n] {
		markUnfinished(p)
	}
	return n
}

func (l *podLink) close() error {
	errs := []error{closeLinks(l.programs)}
	if l.fd >= 0 {
		errs = append(errs, unix.Close(l.fd))
	}
	if l.xsk != nil {
		errs = append(errs, l.xsk.close())
	}
	return errors.Join(errs...)
}

// podSender sends to pods' interfaces: superpackets, and where there is no AF_XDP everything, by one AF_PACKET socket. It is
// used by one goroutine. It goes through the interface's queueing discipline, so that a limit which an operator has set
// on it holds; the mark says to the programs there that it is ours.
type podSender struct {
	queue  int // of the port
	writer packetWriter
	queued []*podLink // whose AF_XDP socket has packets that wait
}

func (s *podSender) open() (err error) {
	// Protocol 0: it receives nothing.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return explainSocket("packet socket for sending", err)
	}
	s.writer.fd = fd
	if err := enlarge(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return fmt.Errorf("PACKET_VNET_HDR: %w", err)
	}
	return explainMark(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, retagMark))
}

// send puts the one packet of one into a queue. Superpackets go by AF_PACKET, whatever the interface has beside it:
// AF_XDP knows none; and so does what comes by another queue than the interface's own, all of a flow.
func (s *podSender) send(l *podLink, one []*vrouter.Packet) {
	p := one[0]
	p.Sent, p.Drop = 0, vrouter.ReasonNotSet
	if l.xsk != nil && l.queue == s.queue && p.Offload.Segmentation == vrouter.SegmentNone {
		l.xsk.send(p, l.ethernet[:])
		if !l.waits {
			l.waits = true
			s.queued = append(s.queued, l)
		}
		return
	}
	headers, segments, fault := super(p.Bytes(), 0, &p.Offload)
	if fault != packet.FaultNone {
		p.Drop = vrouter.ReasonMalformed
		return
	}
	if !s.writer.room(1) {
		s.writer.flush(nil)
	}
	start := p.Off - ethernetHeader - vnetHeader
	putVnet(p.Buf[start:], &p.Offload, ethernetHeader, headers)
	copy(p.Buf[p.Off-ethernetHeader:], l.ethernet[:])
	s.writer.begin(&l.address, one, segments)
	s.writer.piece(p.Buf[start : p.Off+p.Len])
}

// flush sends what waits. It never waits for room: a pod that does not take its packets must not hold up the others.
func (s *podSender) flush() {
	for _, l := range s.queued {
		l.xsk.flush(nil)
		l.waits = false
	}
	s.queued = s.queued[:0]
	s.writer.flush(nil)
}
