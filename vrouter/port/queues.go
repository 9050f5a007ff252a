package port

import (
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// Indices into what SO_MEMINFO tells of a socket (linux/sock_diag.h), in bytes.
const (
	memInfoReceiveUsed = iota
	memInfoReceiveSize
	memInfoSendUsed
	memInfoSendSize
	memInfoCount = 9
)

// socketMemory reads it; false where the kernel does not tell.
func socketMemory(fd int) (m [memInfoCount]uint32, ok bool) {
	size := uint32(unsafe.Sizeof(m))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&m)), uintptr(unsafe.Pointer(&size)), 0)
	return m, errno == 0 && size >= (memInfoSendSize+1)*4
}

// numbered is the name of what a port has for each of its queues: the first one's has no number.
func numbered(name string, queue int) string {
	if queue == 0 {
		return name
	}
	return name + strconv.Itoa(queue)
}

// Queues implements vrouter.QueuePort: how full the sockets' buffers are. Each queue of the port tells of its own.
func (u *Underlay) Queues() []vrouter.Queue {
	return socketQueues("underlay", u.number, &u.ring, u.recv, u.send, u.bypass)
}

// Queues implements vrouter.QueuePort.
func (v *Veth) Queues() []vrouter.Queue {
	return socketQueues("vr0", v.number, &v.ring, v.fd, v.fd, v.bypass)
}

// socketQueues are those of one queue's sockets.
func socketQueues(name string, number int, ring *packetRing, receive, send int, b *bypass) (all []vrouter.Queue) {
	if q, ok := ring.queue(numbered(name+"_receive", number), receive); ok {
		all = append(all, q)
	}
	if m, ok := socketMemory(send); ok {
		all = append(all, vrouter.Queue{Name: numbered(name+"_send", number), Used: uint64(m[memInfoSendUsed]), Size: uint64(m[memInfoSendSize])})
	}
	return append(all, b.queues(name+"_xdp", number)...)
}

// Queues implements vrouter.QueuePort. The pods' are the first queue's to tell.
func (d *Direct) Queues() []vrouter.Queue {
	var all []vrouter.Queue
	for _, p := range []reader{d.host, d.underlay} {
		if q, ok := p.(vrouter.QueuePort); ok {
			all = append(all, q.Queues()...)
		}
	}
	if d.lead != nil {
		return all
	}
	return append(all, d.pods.queues()...)
}
