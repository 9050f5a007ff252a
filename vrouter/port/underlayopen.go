package port

import (
	"errors"
	"fmt"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// OpenOffloadUnderlay is OpenUnderlay for a port that carries superpackets and unfinished checksums on, whole where the
// kernel lets a BPF program help.
func OpenOffloadUnderlay() (*Underlay, error) { return openOffloadUnderlay(1, newRetag) }

func openOffloadUnderlay(queues int, load func() (*retag, error)) (*Underlay, error) {
	u, err := openUnderlay(queues)
	if err != nil {
		return nil, err
	}
	resolver, err := newResolver(load)
	if err != nil {
		return nil, errors.Join(err, u.Close())
	}
	for _, q := range u.all() {
		if q.frames, err = newFrames(resolver); err != nil {
			if q == u {
				err = errors.Join(err, resolver.close())
			}
			return nil, errors.Join(err, u.Close())
		}
	}
	return u, nil
}

// OpenXDPUnderlay is OpenOffloadUnderlay with AF_XDP, once SetNode has told whose packets to take.
func OpenXDPUnderlay(o XDPOptions) (*Underlay, error) { return openXDPUnderlay(1, o, newRetag) }

func openXDPUnderlay(queues int, o XDPOptions, load func() (*retag, error)) (*Underlay, error) {
	b, err := newBypass(queues, o)
	if err != nil {
		return nil, err
	}
	u, err := openOffloadUnderlay(queues, load)
	if err != nil {
		return nil, errors.Join(err, b.close())
	}
	for i, q := range u.all() {
		q.bypass = b.all()[i]
	}
	for _, q := range u.all() {
		if err := q.bypass.watch(q.recv); err != nil {
			return nil, errors.Join(err, u.Close())
		}
	}
	return u, nil
}

// OpenUnderlay opens the sockets. The port receives nothing until SetInterface has named the interface.
func OpenUnderlay() (*Underlay, error) { return openUnderlay(1) }

func openUnderlay(queues int) (_ *Underlay, err error) {
	u := newUnderlay(nil, 0)
	for i := range queues - 1 {
		u.more = append(u.more, newUnderlay(u, i+1))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Close())
		}
	}()
	if err := u.openGuard(); err != nil {
		return nil, explainSocket("raw socket for protocol 4", err)
	}
	for _, q := range u.all() {
		if err := q.open(); err != nil {
			return nil, err
		}
	}
	return u, nil
}

func newUnderlay(lead *Underlay, number int) *Underlay {
	return &Underlay{lead: lead, number: number, recv: -1, send: -1, guard: -1, scratch: make([]byte, vrouter.BufferSize)}
}

// all returns the queues, this one first.
func (u *Underlay) all() []*Underlay { return append([]*Underlay{u}, u.more...) }

// queues returns a port for each queue. The first is u itself; to stop and to close it does so to all.
func (u *Underlay) queues() []reader { return readers(u.all()) }

// open opens what each queue has.
func (u *Underlay) open() (err error) {
	if u.waiter, err = newWaiter(); err != nil {
		return err
	}
	if u.drained, err = newWaiter(); err != nil {
		return err
	}
	if err := u.openSend(); err != nil {
		return explainSocket("raw socket for sending", err)
	}
	if u.recv, err = u.openReceiver(); err != nil {
		return explainSocket("packet socket for receiving", err)
	}
	if err := u.ring.prepare(u.recv); err != nil {
		return explainSocket("packet socket for receiving", err)
	}
	return nil
}

func (u *Underlay) openGuard() (err error) {
	u.guard, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protoIPIP)
	if err != nil {
		return err
	}
	// Who hears of errors has the kernel believe, for all of the node's packets, a "fragmentation needed" about the tunnel's,
	// whoever has sent it: what is to be believed is the router's to say (LearnPathMTU).
	err = unix.SetsockoptInt(u.guard, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_INTERFACE)
	return errors.Join(err, attach(u.guard, bpf.RetConstant{Val: 0}))
}

func (u *Underlay) openSend() (err error) {
	// IPPROTO_RAW implies IP_HDRINCL: the bytes on the wire are the ones we wrote, but for the header checksum, which
	// the kernel writes again, and an identification of 0, which it replaces.
	u.send, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	return enlarge(u.send, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF)
}

// networkOffset is SKF_NET_OFF of linux/filter.h, -0x100000: from here on offsets count from the IP header.
const networkOffset = 0xfff00000

// openReceiver opens a socket that will receive IP-in-IP packets for this host, once it is bound, and unless it is the
// first queue's once it is of the group.
func (u *Underlay) openReceiver() (fd int, err error) {
	// Protocol 0: deaf until it is bound, so that nothing of another interface slips in.
	// SOCK_RAW, because PACKET_VNET_HDR is not for SOCK_DGRAM.
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return -1, fmt.Errorf("PACKET_VNET_HDR: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return -1, fmt.Errorf("PACKET_IGNORE_OUTGOING (Linux 4.20): %w", err)
	}
	hear := hearIPIP
	if u.lead != nil {
		hear = deafen
	}
	if err := hear(fd); err != nil {
		return -1, err
	}
	return fd, enlarge(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF)
}

// hearIPIP lets a socket have IP-in-IP packets for this host, and nothing else.
func hearIPIP(fd int) error {
	return attach(fd,
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.PACKET_HOST, SkipTrue: 3},
		bpf.LoadAbsolute{Off: networkOffset + 9, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: protoIPIP, SkipTrue: 1},
		bpf.RetConstant{Val: 0x40000},
		bpf.RetConstant{Val: 0},
	)
}

func attach(fd int, program ...bpf.Instruction) error {
	raw, err := bpf.Assemble(program)
	if err != nil {
		return fmt.Errorf("socket filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}); err != nil {
		return fmt.Errorf("socket filter: %w", err)
	}
	return nil
}

// enlarge sets a socket's buffer past the system's limit, or up to it where NET_ADMIN is missing.
func enlarge(fd, force, polite int) error {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, socketBuffer) == nil {
		return nil
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, polite, socketBuffer); err != nil {
		return fmt.Errorf("socket buffer: %w", err)
	}
	return nil
}
