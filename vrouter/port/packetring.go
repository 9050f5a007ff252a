package port

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// The ring of an AF_PACKET socket: some 4,000 slots, which hold 2.5 ms of the smallest packets at 1 Gbit/s and take 6.5 MiB
// for good. A slot holds a frame of the usual MTU behind the kernel's 76 bytes, and is no power of two long, so that
// the beginnings of slots, which is all there is of small packets, spread over the cache.
const (
	ringSlot   = 26 * 64
	ringBlock  = 64 << 10 // a multiple of every page size; slots do not go over its end
	ringBlocks = 104

	slotsOfBlock = ringBlock / ringSlot
	ringSlots    = ringBlocks * slotsOfBlock
)

// ringDoubt is how many looks in vain it takes until the socket is asked itself: an interface that went down is told
// there alone, and poll(2) returns at once until somebody has heard.
const ringDoubt = 16

// packetRing receives from an AF_PACKET socket with PACKET_VNET_HDR by a ring of slots that the kernel fills (TPACKET_V2;
// packet(7), PACKET_RX_RING). A look at it is no system call, and the kernel keeps no clone of the packet. What is longer than
// a slot the kernel queues to the socket besides (PACKET_COPY_THRESH) and marks the slot, so that the order is kept.
//
// recv is for one goroutine; everything else may be called from any.
type packetRing struct {
	reader packetReader // of what does not fit a slot, and of sockets without a ring
	next   int          // the slot to look at
	vain   int          // looks since something came

	short   atomic.Uint64          // packets whose slot holds only their beginning
	offered atomic.Pointer[[]byte] // a new socket's, which recv has not taken yet
	mu      sync.Mutex             // memory, whoever is not recv; recv when it changes it
	memory  []byte                 // nil: the socket has no ring
}

// prepare gives the socket fd, which is not bound yet, a ring, which the next recv changes to.
func (r *packetRing) prepare(fd int) error {
	for _, o := range []struct {
		name          string
		option, value int
	}{
		{"PACKET_VERSION", unix.PACKET_VERSION, unix.TPACKET_V2},
		{"PACKET_COPY_THRESH", unix.PACKET_COPY_THRESH, 1},
	} {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, o.option, o.value); err != nil {
			return fmt.Errorf("%s: %w", o.name, err)
		}
	}
	request := &unix.TpacketReq{Block_size: ringBlock, Block_nr: ringBlocks, Frame_size: ringSlot, Frame_nr: ringSlots}
	if err := unix.SetsockoptTpacketReq(fd, unix.SOL_PACKET, unix.PACKET_RX_RING, request); err != nil {
		return fmt.Errorf("PACKET_RX_RING: %w", err)
	}
	memory, err := unix.Mmap(fd, 0, ringBlock*ringBlocks, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map the ring: %w", err)
	}
	if unclaimed := r.offered.Swap(&memory); unclaimed != nil {
		_ = unix.Munmap(*unclaimed) // it is mapped: nothing can fail
	}
	return nil
}

// change takes over the ring that is offered.
func (r *packetRing) change() {
	memory := r.offered.Swap(nil)
	if memory == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.memory != nil {
		_ = unix.Munmap(r.memory)
	}
	r.memory, r.next, r.vain = *memory, 0, 0
}

// close frees the ring. Nobody receives any more.
func (r *packetRing) close() {
	r.change()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.memory != nil {
		_ = unix.Munmap(r.memory)
	}
	r.memory = nil
}

// ringHeader is what begins a slot, struct tpacket2_hdr of linux/if_packet.h. While status has TP_STATUS_USER the slot
// is ours.
type ringHeader struct {
	status  atomic.Uint32
	length  uint32 // of the frame, bytes
	present uint32 // of those in the slot
	frame   uint16 // where it begins; before it is the virtio-net header
}

// slot returns slot i, its header and all of it.
func (r *packetRing) slot(i int) (*ringHeader, []byte) {
	start := i/slotsOfBlock*ringBlock + i%slotsOfBlock*ringSlot
	b := r.memory[start : start+ringSlot : start+ringSlot]
	return (*ringHeader)(unsafe.Pointer(&b[0])), b
}

// after returns the slot after slot i.
func after(i int) int {
	if i++; i < ringSlots {
		return i
	}
	return 0
}

// recv takes what waits at the socket fd, as many packets as batch holds, in front of each of which are link bytes of
// link-layer header. It does not wait. The error says why there is nothing; nil says that the ring is empty.
func (r *packetRing) recv(fd, link int, batch []*vrouter.Packet) (int, error) {
	if r.offered.Load() != nil {
		r.change()
	}
	if r.memory == nil {
		return r.reader.recv(fd, link, batch)
	}
	n := 0
	for sum := 0; n < len(batch) && sum < readBytes; {
		header, slot := r.slot(r.next)
		status := header.status.Load()
		if status&unix.TP_STATUS_USER == 0 {
			break
		}
		if status&unix.TP_STATUS_COPY != 0 {
			got, err := r.long(fd, link, batch[n:], readBytes-sum)
			for _, p := range batch[n : n+got] {
				sum += p.Len
			}
			n += got
			if err != nil {
				return n, err
			}
			continue
		}
		if p := batch[n]; header.take(slot, link, p) {
			sum += p.Len
			n++
		} else {
			r.short.Add(1)
		}
		header.status.Store(unix.TP_STATUS_KERNEL)
		r.next = after(r.next)
	}
	if n > 0 {
		r.vain = 0
		return n, nil
	}
	if r.vain++; r.vain < ringDoubt {
		return 0, nil
	}
	r.vain = 0
	return r.reader.recv(fd, link, batch)
}

// take copies the packet out of its slot; false where it is not all there, because the socket had no room for the rest.
func (h *ringHeader) take(slot []byte, link int, p *vrouter.Packet) bool {
	frame, length := int(h.frame), int(h.length)
	if h.present != h.length || length < link || frame < vnetHeader || frame+length > len(slot) {
		return false
	}
	p.Off, p.Len = vrouter.Headroom, length-link
	p.Offload = parseVnet(slot[frame-vnetHeader:frame], link)
	copy(p.Buf[p.Off:], slot[frame+link:frame+length])
	return true
}

// long reads, from the socket itself, the packets of the marked slots that come next, of some limit bytes at most.
func (r *packetRing) long(fd, link int, batch []*vrouter.Packet, limit int) (int, error) {
	const marked = unix.TP_STATUS_USER | unix.TP_STATUS_COPY
	want := 0
	for i, sum := r.next, 0; want < min(len(batch), packetBatch) && sum < limit; i = after(i) {
		header, _ := r.slot(i)
		if header.status.Load()&marked != marked {
			break
		}
		sum += int(header.length)
		want++
	}
	n, err := r.reader.read(fd, link, batch[:want])
	free := n
	if err == unix.EAGAIN { // they went with a socket that was replaced
		free, err = want, nil
		r.short.Add(uint64(want))
	}
	for range free {
		header, _ := r.slot(r.next)
		header.status.Store(unix.TP_STATUS_KERNEL)
		r.next = after(r.next)
	}
	return n, err
}

// replaceSocket puts another receiving socket in the place of fd, under its number. What the old one has lost is in lost.
func replaceSocket(fd int, open func() (int, error), ring *packetRing, lost *socketLosses) error {
	next, err := open()
	if err != nil {
		return err
	}
	if err := ring.prepare(next); err != nil {
		return errors.Join(err, unix.Close(next))
	}
	lost.read(fd)
	return errors.Join(unix.Dup3(next, fd, unix.O_CLOEXEC), unix.Close(next))
}

// queue tells how full the ring and the buffer of its socket fd are: what is the fuller, because it is the one that packets
// will be lost for. ok is false where neither is known.
func (r *packetRing) queue(name string, fd int) (q vrouter.Queue, ok bool) {
	q.Name = name
	if m, has := socketMemory(fd); has {
		q.Used, q.Size, ok = uint64(m[memInfoReceiveUsed]), uint64(m[memInfoReceiveSize]), true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.memory == nil {
		return q, ok
	}
	var used uint64
	for i := range ringSlots {
		if header, _ := r.slot(i); header.status.Load()&unix.TP_STATUS_USER != 0 {
			used++
		}
	}
	if !ok || used*q.Size >= q.Used*ringSlots {
		q.Used, q.Size = used, ringSlots
	}
	return q, true
}
