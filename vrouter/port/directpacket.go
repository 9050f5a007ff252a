package port

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// podLink is the host's side of one pod's interface; immutable once it is in a table.
type podLink struct {
	index    int
	fd       int // an AF_PACKET socket that receives what the vRouter owns
	ethernet [ethernetHeader]byte
	address  unix.RawSockaddrLinklayer
	programs []link.Link
	lost     atomic.Uint64 // packets that the socket had no room for
}

// openPodLink prepares to take over the interface index for the pod with the hardware address pod; own is the
// interface's. Until steering.take the interface is the kernel's.
func openPodLink(s *steering, index int, own, pod []byte) (_ *podLink, err error) {
	l := &podLink{index: index, fd: -1}
	copy(l.ethernet[:6], pod)
	copy(l.ethernet[6:12], own)
	binary.BigEndian.PutUint16(l.ethernet[12:], unix.ETH_P_IP)
	l.address = unix.RawSockaddrLinklayer{Family: unix.AF_PACKET, Protocol: htons(unix.ETH_P_IP), Ifindex: int32(index), Halen: 6}
	copy(l.address.Addr[:], pod)
	defer func() {
		if err != nil {
			_ = l.close()
		}
	}()
	if l.fd, err = podSocket(s.filter); err != nil {
		return nil, explainSocket("packet socket for a pod", err)
	}
	if l.programs, err = s.attach(index); err != nil {
		return nil, err
	}
	// ETH_P_ALL, because that is heard before the programs at tc ingress run, and ETH_P_IP after.
	if err := unix.Bind(l.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: index}); err != nil {
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

// dropped returns what the socket has lost so far.
func (l *podLink) dropped() uint64 {
	// Reading resets the kernel's count, so the sum is kept here.
	if s, err := unix.GetsockoptTpacketStats(l.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
		l.lost.Add(uint64(s.Drops))
	}
	return l.lost.Load()
}

func (l *podLink) close() error {
	err := closeLinks(l.programs)
	if l.fd >= 0 {
		if closeErr := unix.Close(l.fd); err == nil {
			err = closeErr
		}
	}
	return err
}

// podSender sends to pods' interfaces by one AF_PACKET socket, superpackets whole, a batch in a system call. It is used by
// one goroutine. It goes through the interface's queueing discipline, so that a limit which an operator has set on it
// holds; the mark says to the programs there that it is ours.
type podSender struct {
	fd       int
	n        int // messages that wait
	messages [packetBatch]mmsghdr
	pieces   [packetBatch]unix.Iovec
	owners   [packetBatch]*vrouter.Packet
	counts   [packetBatch]int // packets that the message stands for
}

func (s *podSender) open() (err error) {
	// Protocol 0: it receives nothing.
	s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return explainSocket("packet socket for sending", err)
	}
	if err := enlarge(s.fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(s.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return fmt.Errorf("PACKET_VNET_HDR: %w", err)
	}
	return explainMark(unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_MARK, retagMark))
}

// send puts p into the queue.
func (s *podSender) send(l *podLink, p *vrouter.Packet) {
	headers, segments, fault := super(p.Bytes(), 0, &p.Offload)
	if fault != packet.FaultNone {
		p.Drop = vrouter.ReasonMalformed
		return
	}
	if s.n == packetBatch {
		s.flush()
	}
	start := p.Off - ethernetHeader - vnetHeader
	putVnet(p.Buf[start:], &p.Offload, ethernetHeader, headers)
	copy(p.Buf[p.Off-ethernetHeader:], l.ethernet[:])
	i := s.n
	s.pieces[i].Base = &p.Buf[start]
	s.pieces[i].SetLen(p.Off + p.Len - start)
	m := &s.messages[i].header
	m.Name = (*byte)(unsafe.Pointer(&l.address))
	m.Namelen = unix.SizeofSockaddrLinklayer
	m.Iov = &s.pieces[i]
	m.SetIovlen(1)
	s.owners[i], s.counts[i] = p, segments
	s.n++
}

// flush sends what waits, and notes the outcome with each packet. It never waits for room: a pod that does not take its
// packets must not hold up the others.
func (s *podSender) flush() {
	for i := 0; i < s.n; {
		sent, err := sendmmsg(s.fd, s.messages[i:s.n], unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			s.owners[i].Drop = sendFailure(err)
			i++
			continue
		}
		for range sent {
			s.owners[i].Sent = s.counts[i]
			i++
		}
	}
	s.n = 0
}
