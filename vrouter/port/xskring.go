package port

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// xskRing is one of the four rings that an AF_XDP socket shares with the kernel: one side produces, the other consumes,
// each moves its own index and reads the other's. E is what a place holds: a frame's address, or a descriptor.
type xskRing[E any] struct {
	memory   []byte
	producer *atomic.Uint32
	consumer *atomic.Uint32
	flags    *atomic.Uint32
	places   []E // a power of two of them
	local    uint32
}

// mapRing maps the ring that begins at page offset of the socket, with size places.
func mapRing[E any](fd int, page int64, at unix.XDPRingOffset, size int) (*xskRing[E], error) {
	var e E
	length := int(at.Desc) + size*int(unsafe.Sizeof(e))
	memory, err := unix.Mmap(fd, page, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map a ring: %w", err)
	}
	return &xskRing[E]{
		memory:   memory,
		producer: (*atomic.Uint32)(unsafe.Pointer(&memory[at.Producer])),
		consumer: (*atomic.Uint32)(unsafe.Pointer(&memory[at.Consumer])),
		flags:    (*atomic.Uint32)(unsafe.Pointer(&memory[at.Flags])),
		places:   unsafe.Slice((*E)(unsafe.Pointer(&memory[at.Desc])), size),
	}, nil
}

// place returns the place i further than local.
func (r *xskRing[E]) place(i int) *E { return &r.places[(r.local+uint32(i))&uint32(len(r.places)-1)] }

// filled returns how many places the kernel has filled and we have not read.
func (r *xskRing[E]) filled() int { return int(r.producer.Load() - r.local) }

// took gives n places back to the kernel, on a ring that we read.
func (r *xskRing[E]) took(n int) {
	r.local += uint32(n)
	r.consumer.Store(r.local)
}

// gave hands n places to the kernel, on a ring that we fill.
func (r *xskRing[E]) gave(n int) {
	r.local += uint32(n)
	r.producer.Store(r.local)
}

// sleeps reports whether the kernel wants a system call before it looks at the ring.
func (r *xskRing[E]) sleeps() bool { return r.flags.Load()&unix.XDP_RING_NEED_WAKEUP != 0 }

func (r *xskRing[E]) close() error {
	if r == nil {
		return nil
	}
	return unix.Munmap(r.memory)
}
