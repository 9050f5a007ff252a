package port

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"margay/vrouter/packet"
)

// ICMP hears what routers of the underlay, and the node's own kernel, say about packets of ours that they could not deliver.
type ICMP struct {
	fd     int
	waiter *waiter
}

// OpenICMP opens the socket, which hears "unreachable", "fragmentation needed" among it, and "time exceeded", about packets
// of protocol 4, and nothing else.
func OpenICMP() (*ICMP, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_ICMP)
	if err != nil {
		return nil, explainSocket("raw socket for ICMP", err)
	}
	const (
		unreachable, timeExceeded = 3, 11
		quotedProtocol            = 8 + 9 // from the ICMP header on
	)
	i := &ICMP{fd: fd}
	// The program sees the packet from its IPv4 header on.
	err = attach(fd,
		bpf.LoadMemShift{Off: 0}, // X: length of that header
		bpf.LoadIndirect{Off: quotedProtocol, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: packet.ProtocolIPIP, SkipTrue: 4},
		bpf.LoadIndirect{Off: 0, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unreachable, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: timeExceeded, SkipTrue: 1},
		bpf.RetConstant{Val: 0xffff},
		bpf.RetConstant{Val: 0},
	)
	if err == nil {
		i.waiter, err = newWaiter()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("raw socket for ICMP: %w", err), unix.Close(fd))
	}
	return i, nil
}

// Listen calls heard for each message, from its IPv4 header on, until Stop, and idle about every interval. heard may use
// the bytes until it returns.
func (i *ICMP) Listen(interval time.Duration, heard func([]byte), idle func()) error {
	b := make([]byte, 2048) // a router quotes at most 576 bytes, or little more
	next := time.Now().Add(interval)
	for !i.waiter.stopped.Load() {
		n, err := unix.Read(i.fd, b)
		switch {
		case err == nil:
			heard(b[:n])
		case errors.Is(err, unix.EAGAIN):
			i.waiter.wait(i.fd, unix.POLLIN, int(time.Until(next).Milliseconds())+1)
		case !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENETDOWN):
			return fmt.Errorf("raw socket for ICMP: %w", err)
		}
		if now := time.Now(); !now.Before(next) {
			idle()
			next = now.Add(interval)
		}
	}
	return nil
}

// Stop ends Listen.
func (i *ICMP) Stop() { i.waiter.stop() }

// Close frees the socket. The caller has seen Listen return.
func (i *ICMP) Close() error { return errors.Join(unix.Close(i.fd), i.waiter.close()) }
