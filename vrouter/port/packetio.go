package port

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// packetBatch is the number of packets that one system call receives or sends.
const packetBatch = 64

// mmsghdr is struct mmsghdr of sendmmsg(2) and recvmmsg(2).
type mmsghdr struct {
	header unix.Msghdr
	length uint32
}

// packetReader receives from AF_PACKET sockets with PACKET_VNET_HDR, a batch in a system call. It is used by one
// goroutine. The zero value is ready.
type packetReader struct {
	mean     int // length of the packets that came last, bytes
	messages [packetBatch]mmsghdr
	pieces   [packetBatch]unix.Iovec
}

// readBytes is how many bytes one call shall bring, about: what is copied in and out again shall stay in the cache of the
// processor (L2) meanwhile. Of small packets it is a full batch.
const readBytes = 256 << 10

// recv takes what waits at the socket fd, as many packets as batch holds, in front of each of which are link bytes of
// link-layer header. It does not wait. The error says why there is nothing.
func (r *packetReader) recv(fd, link int, batch []*vrouter.Packet) (int, error) {
	return r.read(fd, link, batch[:min(len(batch), packetBatch, max(1, readBytes/max(1, r.mean)))])
}

// read is recv for a batch of packetBatch packets at most, however long they may be.
func (r *packetReader) read(fd, link int, batch []*vrouter.Packet) (int, error) {
	start := vrouter.Headroom - link - vnetHeader
	for i, p := range batch {
		r.pieces[i].Base = &p.Buf[start]
		r.pieces[i].SetLen(len(p.Buf) - start)
		r.messages[i].header.Iov = &r.pieces[i]
		r.messages[i].header.SetIovlen(1)
	}
	n, err := recvmmsg(fd, r.messages[:len(batch)])
	sum := 0
	for i, p := range batch[:n] {
		p.Off, p.Len = vrouter.Headroom, max(int(r.messages[i].length)-link-vnetHeader, 0)
		p.Offload = parseVnet(p.Buf[start:start+vnetHeader], link)
		sum += p.Len
	}
	if n > 0 {
		r.mean = sum / n
	}
	return n, err
}

// recvmmsg is recvmmsg(2) without waiting, which x/sys does not have.
func recvmmsg(fd int, messages []mmsghdr) (int, error) {
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)),
			unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		}
		return 0, errno
	}
}

// sendmmsg is sendmmsg(2), which x/sys does not have.
func sendmmsg(fd int, messages []mmsghdr, flags int) (int, error) {
	n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)),
		uintptr(flags), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// packetWriter sends on an AF_PACKET socket with PACKET_VNET_HDR, a batch in a system call. It is used by one goroutine.
type packetWriter struct {
	fd       int
	n        int // messages that wait
	used     int // pieces of those
	messages [packetBatch]mmsghdr
	pieces   [2 * packetBatch]unix.Iovec
	owners   [packetBatch][]*vrouter.Packet
	counts   [packetBatch]int // packets that the message stands for, of each owner
}

// room reports whether the queue takes another message of so many pieces.
func (w *packetWriter) room(pieces int) bool {
	return w.n < len(w.messages) && w.used+pieces <= len(w.pieces)
}

// begin begins a message to the address, a part of each of owners, of which it stands for count packets. piece follows.
// The queue has room, and owners stays as it is until flush.
func (w *packetWriter) begin(to *unix.RawSockaddrLinklayer, owners []*vrouter.Packet, count int) {
	m := &w.messages[w.n].header
	m.Name = (*byte)(unsafe.Pointer(to))
	m.Namelen = unix.SizeofSockaddrLinklayer
	m.Iov = &w.pieces[w.used]
	m.SetIovlen(0)
	w.owners[w.n], w.counts[w.n] = owners, count
	w.n++
}

// piece adds bytes, which stay as they are until flush, to the message begun last.
func (w *packetWriter) piece(b []byte) {
	w.pieces[w.used].Base = &b[0]
	w.pieces[w.used].SetLen(len(b))
	w.used++
	m := &w.messages[w.n-1].header
	m.SetIovlen(int(m.Iovlen) + 1)
}

// flush sends what waits, and notes the outcome with each packet. A full socket is waited for with drained, if there
// is one, once.
func (w *packetWriter) flush(drained *waiter) {
	for i := 0; i < w.n; {
		sent, err := sendmmsg(w.fd, w.messages[i:w.n], unix.MSG_DONTWAIT)
		if err == unix.EAGAIN && drained != nil && drained.wait(w.fd, unix.POLLOUT, sendPatience) {
			sent, err = sendmmsg(w.fd, w.messages[i:w.n], unix.MSG_DONTWAIT)
		}
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			for _, p := range w.owners[i] {
				p.Drop = sendFailure(err)
			}
			i++
			continue
		}
		for range sent {
			for _, p := range w.owners[i] {
				p.Sent += w.counts[i]
			}
			i++
		}
	}
	w.n, w.used = 0, 0
}

// socketLosses counts the packets that an AF_PACKET socket had no room for.
type socketLosses struct{ sum atomic.Uint64 }

// read returns the count so far, of the socket fd.
func (l *socketLosses) read(fd int) uint64 {
	// Reading resets the kernel's count, so the sum is kept here.
	if s, err := unix.GetsockoptTpacketStats(fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
		l.sum.Add(uint64(s.Drops))
	}
	return l.sum.Load()
}

// boundTo reports whether an AF_PACKET socket is on the interface index: the kernel takes it off one that goes, and the
// index may come back with another.
func boundTo(fd, index int) bool {
	address, err := unix.Getsockname(fd)
	link, ok := address.(*unix.SockaddrLinklayer)
	return err == nil && ok && link.Ifindex == index
}
