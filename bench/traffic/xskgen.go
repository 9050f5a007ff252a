package traffic

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	xskChunk = 1 << 11 // bytes of memory for a frame
	xskRing  = 1 << 12 // places of each ring
	// xskBudget is XDP_MAX_TX_SKB_BUDGET (linux/if_xdp.h, Linux 6.17), how many packets the kernel sends in one call; before that it
	// is 32.
	xskBudget = 9
)

// XSKGenerator sends frames on a device by AF_XDP in copy mode: the kernel makes a socket buffer of each frame and gives it to the
// device at once, as with Generator's AF_PACKET, but reads the frames and their lengths from shared memory. There is no XDP
// program, so nothing changes for the device's other end.
type XSKGenerator struct {
	fd          int
	board       *Board
	memory      []byte
	sizes       []uint32 // of the frames, each at the beginning of its chunk
	places      []unix.XDPDesc
	sent        *atomic.Uint32 // the transmit ring's consumer
	ready       *atomic.Uint32 // its producer
	completed   *atomic.Uint32 // the completion ring's producer
	reclaimed   *atomic.Uint32 // its consumer
	at, written uint32
}

// NewXSKGenerator opens the device of the calling thread's network namespace.
func NewXSKGenerator(device string, f Frame, b *Board) (_ *XSKGenerator, err error) {
	link, frames, err := prepare(device, f)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("AF_XDP socket: %w", err)
	}
	g := &XSKGenerator{fd: fd, board: b}
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	g.memory, err = unix.Mmap(-1, 0, len(frames)*xskChunk, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("memory for frames: %w", err)
	}
	for i, frame := range frames {
		g.sizes = append(g.sizes, uint32(copy(g.memory[i*xskChunk:], frame)))
	}
	if err := g.rings(); err != nil {
		return nil, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 8<<20); err != nil {
		return nil, fmt.Errorf("SO_SNDBUFFORCE: %w", err)
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_XDP, xskBudget, batch) // an older kernel takes 32 at a time
	err = unix.Bind(fd, &unix.SockaddrXDP{Flags: unix.XDP_COPY, Ifindex: uint32(link.Index)})
	if err != nil {
		return nil, fmt.Errorf("bind to %s: %w", device, err)
	}
	return g, nil
}

// rings registers the memory and maps the two rings that a sender needs.
func (g *XSKGenerator) rings() error {
	umem := struct {
		address, length       uint64
		chunk, head, flags, _ uint32
	}{address: uint64(uintptr(unsafe.Pointer(&g.memory[0]))), length: uint64(len(g.memory)), chunk: xskChunk}
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(g.fd), unix.SOL_XDP, unix.XDP_UMEM_REG,
		uintptr(unsafe.Pointer(&umem)), unsafe.Sizeof(umem), 0)
	if errno != 0 {
		return fmt.Errorf("XDP_UMEM_REG: %w", errno)
	}
	// The kernel wants a fill ring, too, before it binds.
	for _, ring := range []int{unix.XDP_UMEM_FILL_RING, unix.XDP_UMEM_COMPLETION_RING, unix.XDP_TX_RING} {
		if err := unix.SetsockoptInt(g.fd, unix.SOL_XDP, ring, xskRing); err != nil {
			return fmt.Errorf("ring %d: %w", ring, err)
		}
	}
	var at unix.XDPMmapOffsets
	size := uint32(unsafe.Sizeof(at))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(g.fd), unix.SOL_XDP, unix.XDP_MMAP_OFFSETS,
		uintptr(unsafe.Pointer(&at)), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
		return fmt.Errorf("XDP_MMAP_OFFSETS: %w", errno)
	}
	ring := func(page int64, length int) ([]byte, error) {
		m, err := unix.Mmap(g.fd, page, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			err = fmt.Errorf("map a ring: %w", err)
		}
		return m, err
	}
	tx, err := ring(unix.XDP_PGOFF_TX_RING, int(at.Tx.Desc)+xskRing*int(unsafe.Sizeof(unix.XDPDesc{})))
	if err != nil {
		return err
	}
	completion, err := ring(unix.XDP_UMEM_PGOFF_COMPLETION_RING, int(at.Cr.Desc)+xskRing*8)
	if err != nil {
		return err
	}
	index := func(m []byte, at uint64) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&m[at])) }
	g.ready, g.sent = index(tx, at.Tx.Producer), index(tx, at.Tx.Consumer)
	g.completed, g.reclaimed = index(completion, at.Cr.Producer), index(completion, at.Cr.Consumer)
	g.places = unsafe.Slice((*unix.XDPDesc)(unsafe.Pointer(&tx[at.Tx.Desc])), xskRing)
	return nil
}

// Run sends while the board says so, at the board's rate, and returns only with an error.
func (g *XSKGenerator) Run() error {
	return pace(g.board, batch, 100*time.Microsecond, g.send)
}

// send gives the kernel a batch and counts what it took. A frame may be on its way several times at once: the kernel copies it.
func (g *XSKGenerator) send(packets int) (uint64, error) {
	g.reclaimed.Store(g.completed.Load())
	before := g.sent.Load()
	var bytes uint64
	for i := range uint32(packets) {
		frame := g.at
		if g.at++; g.at == uint32(len(g.sizes)) {
			g.at = 0
		}
		g.places[(g.written+i)%xskRing] = unix.XDPDesc{Addr: uint64(frame) * xskChunk, Len: g.sizes[frame]}
		bytes += uint64(g.sizes[frame] - 14)
	}
	g.written += uint32(packets)
	g.ready.Store(g.written)
	for g.sent.Load() != g.written {
		_, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(g.fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0, unix.EAGAIN, unix.EINTR, unix.ENOBUFS:
			g.reclaimed.Store(g.completed.Load())
		case unix.EBUSY:
			g.board.Refused.Add(1)
		default:
			return 0, fmt.Errorf("AF_XDP, sendto: %w", errno)
		}
	}
	g.board.Packets.Add(uint64(g.sent.Load() - before))
	g.board.Bytes.Add(bytes)
	return uint64(packets), nil
}
