package port

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// OpenSplitUnderlay is OpenOffloadUnderlay where the kernel allows no BPF.
func OpenSplitUnderlay() (*Underlay, error) {
	return openOffloadUnderlay(1, func() (*retag, error) { return nil, explainBPF("load the BPF program", unix.EPERM) })
}

// Raw reports whether all packets leave by the raw socket.
func (u *Underlay) Raw() bool { return u.frames == nil }

// Resolved reports whether packets to the destination leave by AF_PACKET, and superpackets whole.
func (u *Underlay) Resolved(to netip.Addr) (frames, whole bool) {
	a := to.As4()
	h := u.frames.resolver.table.Load().find(binary.BigEndian.Uint32(a[:]))
	return h != nil && !h.raw, h != nil && h.whole
}

// OpenXDPSplitUnderlay is OpenXDPUnderlay where the kernel does not take superpackets whole.
func OpenXDPSplitUnderlay() (*Underlay, error) {
	return openXDPUnderlay(1, XDPOptions{}, func() (*retag, error) { return nil, explainBPF("attach the BPF program", unix.EOPNOTSUPP) })
}

// OpenPortsWith is OpenPorts with other drivers for the offloads: veth for AttachVeth, and tun for the other attachments.
func OpenPortsWith(o Options, before func() error, underlay func() (*Underlay, error), veth, tun func(string) (Device, error)) (*Ports, error) {
	return openPorts(o, before, func(o Options) openers {
		if o.Attach == AttachVeth {
			return openers{underlay, veth}
		}
		return openers{underlay, tun}
	})
}

// MarkUnfinished is for tests of nothing else.
var MarkUnfinished = markUnfinished

// ByXDP reports whether packets come and go by AF_XDP.
func (u *Underlay) ByXDP() bool { return u.bypass != nil && u.bypass.intact() }

// XSK is an AF_XDP socket with its program, for tests of nothing else.
type XSK struct {
	socket  *xsk
	program *xdp
	waiter  *waiter
}

// OpenXSK opens a socket on the interface index for IP-in-IP to the address.
func OpenXSK(index, mtu, frames int, mac net.HardwareAddr, address netip.Addr) (*XSK, error) {
	wait, err := newWaiter()
	if err != nil {
		return nil, err
	}
	program, err := newXDP(1, matchIPIP([6]byte(mac), address.As4()))
	if err != nil {
		return nil, errors.Join(err, wait.close())
	}
	x := &XSK{program: program, waiter: wait}
	if err = program.attach(index); err == nil {
		x.socket, err = openXSK(xskOptions{index: index, mtu: mtu, receive: frames, send: frames})
	}
	if err == nil {
		err = program.set(0, x.socket)
	}
	if err != nil {
		return nil, errors.Join(err, x.Close())
	}
	return x, nil
}

// Recv waits for packets.
func (x *XSK) Recv(batch []*vrouter.Packet) int {
	for {
		if n := x.socket.receive(batch, ethernetHeader); n > 0 {
			return n
		}
		if !x.waiter.wait(x.socket.fd, unix.POLLIN, 5000) {
			return 0
		}
	}
}

// Send sends frames, and returns how many the socket took.
func (x *XSK) Send(frames ...[]byte) int {
	for i, b := range frames {
		f := x.socket.next()
		if f == nil {
			return i
		}
		x.socket.queue(copy(f, b))
	}
	x.socket.flush(x.waiter)
	return len(frames)
}

// Native reports whether the driver runs the program.
func (x *XSK) Native() bool { return x.program.native }

// Occupancy tells how full the socket's rings are.
func (x *XSK) Occupancy() (receive, send vrouter.Queue) { return x.socket.occupancy() }

// Dropped returns the kernel's count of frames that it could not hand over.
func (x *XSK) Dropped() uint64 { return x.socket.dropped() }

// Close frees everything.
func (x *XSK) Close() error {
	err := errors.Join(x.program.close(), x.waiter.close())
	if x.socket != nil {
		err = errors.Join(err, x.socket.close())
	}
	return err
}

// Spinner is a spinner, for tests of nothing else.
type Spinner struct{ s spinner }

// NewSpinner returns one that looks for so long at most.
func NewSpinner(longest time.Duration) *Spinner { return &Spinner{spinner{longest: longest}} }

// SetLongest changes how long it looks.
func (s *Spinner) SetLongest(longest time.Duration) { s.s.longest = longest }

// Again is spinner.again.
func (s *Spinner) Again() bool { return s.s.again() }

// Found is spinner.found.
func (s *Spinner) Found(n int) { s.s.found(n) }

// Looks reports whether the last wait was so short that the next one may begin with looking.
func (s *Spinner) Looks() bool { return s.s.short }
