package port

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Commands of the ethtool ioctl (linux/ethtool.h).
const (
	ethtoolSetTxChecksum = 0x17
	ethtoolGetGRO        = 0x2b
	ethtoolGetChannels   = 0x3c
)

// ethtoolCall hands data, which begins with the command, to the driver of the interface. fd is any socket of the
// interface's namespace.
func ethtoolCall(fd int, name string, data []uint32) error {
	request := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&data[0])}
	copy(request.name[:unix.IFNAMSIZ-1], name)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	runtime.KeepAlive(data)
	if errno != 0 {
		return errno
	}
	return nil
}

// setTxChecksum says whether the device, and not the kernel before it, finishes checksums.
func setTxChecksum(fd int, name string, on bool) error {
	data := []uint32{ethtoolSetTxChecksum, 0}
	if on {
		data[1] = 1
	}
	if err := ethtoolCall(fd, name, data); err != nil {
		return fmt.Errorf("%s: set tx checksum offload: %w", name, err)
	}
	return nil
}

// mergesReceived reports whether the kernel merges what the interface receives (GRO).
func mergesReceived(fd int, name string) bool {
	data := []uint32{ethtoolGetGRO, 0}
	return ethtoolCall(fd, name, data) == nil && data[1] != 0
}

// receiveQueues returns the number of queues that the interface receives by.
func receiveQueues(fd int, name string) int {
	// struct ethtool_channels: the command, four limits, then rx, tx, other and combined.
	var data [9]uint32
	data[0] = ethtoolGetChannels
	if ethtoolCall(fd, name, data[:]) != nil {
		return 1 // a device that does not know has one
	}
	return max(1, int(data[5]+data[8]))
}
