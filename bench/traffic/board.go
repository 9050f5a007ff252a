package traffic

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Board is shared by the benchmark and one generator or sink. The benchmark writes Rate and Run, the other the rest.
type Board struct {
	Run  atomic.Uint32 // 1: send
	Live atomic.Uint32 // 1: the process is ready
	Rate atomic.Uint64 // packets per second, 0: as fast as it can
	// Plain is 1 if the generator sends by AF_PACKET, because there is no AF_XDP.
	Plain atomic.Uint32
	_     [44]byte

	Idle    atomic.Uint64 // how often the process, about every millisecond, has found nothing to do
	Packets atomic.Uint64 // sent, or received whole
	Bytes   atomic.Uint64 // of the IP packets, inner ones where there is an outer
	Refused atomic.Uint64 // packets that the kernel did not take from the generator
	Bad     atomic.Uint64 // received with a wrong checksum or length
	Sealed  atomic.Uint64 // received encrypted: counted, not verified
	Other   atomic.Uint64 // received, but nothing of ours
	Missed  atomic.Uint64 // lost by the sink itself, because its ring was full
}

const boardSize = 4096

// NewBoard makes a board, and the file that a child process opens it by.
func NewBoard() (*Board, *os.File, error) {
	fd, err := unix.MemfdCreate("margay-bench", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "board")
	if err := f.Truncate(boardSize); err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	b, err := OpenBoard(f)
	if err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	return b, f, nil
}

// OpenBoard maps the board of a file that NewBoard made. It stays mapped until Close.
func OpenBoard(f *os.File) (*Board, error) {
	b, err := unix.Mmap(int(f.Fd()), 0, boardSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the board: %w", err)
	}
	return (*Board)(unsafe.Pointer(&b[0])), nil
}

// Close unmaps the board; nothing of it may be used afterwards.
func (b *Board) Close() error {
	return unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(b)), boardSize))
}
