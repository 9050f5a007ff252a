package port

import (
	"errors"

	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// Reply is the port by which ICMP errors of ours go to pods and programs of this node: a raw socket, so that the kernel
// finds the way, fills in a source address of 0.0.0.0 with the one that it would use itself, and takes the packet for
// its own. Written to vr0 it would come from outside with an address of this node, and be refused as a martian. It
// implements vrouter.Port, and never receives.
type Reply struct {
	fd     int
	waiter *waiter
	to     unix.SockaddrInet4
}

// OpenReply opens the socket.
func OpenReply() (*Reply, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return nil, explainSocket("raw socket for ICMP errors", err)
	}
	r := &Reply{fd: fd}
	if r.waiter, err = newWaiter(); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return r, nil
}

// Name implements vrouter.Port.
func (r *Reply) Name() string { return "reply" }

// Recv implements vrouter.Port: it waits for Stop.
func (r *Reply) Recv([]*vrouter.Packet) (int, error) {
	for !r.waiter.stopped.Load() {
		r.waiter.wait(-1, 0, -1)
	}
	return 0, vrouter.ErrStopped
}

// Send implements vrouter.Port. It takes only finished packets, and does not wait for a full socket: an answer may be
// lost.
func (r *Reply) Send(batch []*vrouter.Packet) {
	for _, p := range batch {
		p.Sent, p.Drop = 0, vrouter.ReasonNotSet
		b := p.Bytes()
		copy(r.to.Addr[:], b[16:20])
		err := unix.Sendto(r.fd, b, unix.MSG_DONTWAIT, &r.to)
		for err == unix.EINTR {
			err = unix.Sendto(r.fd, b, unix.MSG_DONTWAIT, &r.to)
		}
		if err != nil {
			p.Drop = sendFailure(err)
			continue
		}
		p.Sent = 1
	}
}

// Counters implements vrouter.Port.
func (r *Reply) Counters() []vrouter.Counter { return nil }

// Stop implements vrouter.Port.
func (r *Reply) Stop() { r.waiter.stop() }

// Close implements vrouter.Port.
func (r *Reply) Close() error { return errors.Join(unix.Close(r.fd), r.waiter.close()) }
