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
	if m, ok := socketMemory(u.recv); ok {
		all = append(all, vrouter.Queue{Name: "underlay_receive", Used: uint64(m[memInfoReceiveUsed]), Size: uint64(m[memInfoReceiveSize])})
	}
	if m, ok := socketMemory(u.send); ok {
		all = append(all, vrouter.Queue{Name: "underlay_send", Used: uint64(m[memInfoSendUsed]), Size: uint64(m[memInfoSendSize])})
	}
	return all
}

// Queues implements vrouter.QueuePort.
func (d *Direct) Queues() []vrouter.Queue {
	if q, ok := d.underlay.(vrouter.QueuePort); ok {
		return q.Queues()
	}
	return nil
}
