package port

import (
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

// Queues implements vrouter.QueuePort: how full the sockets' buffers are.
func (u *Underlay) Queues() (all []vrouter.Queue) {
	if q, ok := u.ring.queue("underlay_receive", u.recv); ok {
		all = append(all, q)
	}
	if m, ok := socketMemory(u.send); ok {
		all = append(all, vrouter.Queue{Name: "underlay_send", Used: uint64(m[memInfoSendUsed]), Size: uint64(m[memInfoSendSize])})
	}
	return all
}

// Queues implements vrouter.QueuePort.
func (v *Veth) Queues() (all []vrouter.Queue) {
	if q, ok := v.ring.queue("vr0_receive", v.fd); ok {
		all = append(all, q)
	}
	if m, ok := socketMemory(v.fd); ok {
		all = append(all, vrouter.Queue{Name: "vr0_send", Used: uint64(m[memInfoSendUsed]), Size: uint64(m[memInfoSendSize])})
	}
	return all
}

// Queues implements vrouter.QueuePort.
func (d *Direct) Queues() []vrouter.Queue {
	var all []vrouter.Queue
	for _, p := range []reader{d.host, d.underlay} {
		if q, ok := p.(vrouter.QueuePort); ok {
			all = append(all, q.Queues()...)
		}
	}
	return all
}
