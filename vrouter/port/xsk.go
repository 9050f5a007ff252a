package port

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// xskOptions say what AF_XDP socket to open.
type xskOptions struct {
	index int // of the interface
	queue int // of the interface
	mtu   int // of the interface, bytes: a frame has to hold it
	// frames to receive in and to send from, powers of two. Each takes 2 KiB of locked memory, or 4.
	receive, send int
	// busyPoll is how many microseconds a system call may look for packets at the device; 0: interrupts bring them.
	busyPoll int
}

// DefaultFrames is what Options.Frames is unless somebody says otherwise. Where the threads of a machine with two processors
// were all at work, 1,024 frames lost 3 % of 330,000 packets per second, and 4,096 none (docs/ports.md).
const DefaultFrames = 4096

// From how few frames a socket still works well, a batch on its way each way, to how many.
const (
	minFrames = 128
	maxFrames = 1 << 16
)

// Frames to send from. What is sent is copied, and the frame free again, before flush returns, unless a device does
// without copies: then they are as many as such a device's ring.
const (
	sendFrames    = 2048
	podSendFrames = 256
)

// busyPollBudget is how many packets one busy poll takes from the device.
const busyPollBudget = 64

// xsk is an AF_XDP socket on one queue of an interface, with frames of its own (UMEM). What the program of xdp.go
// redirects to it comes out of receive; frames handed to next and queue leave when flush is called. It is a part of
// ports: receive is for the goroutine that receives, next, queue and flush are for the one that sends.
type xsk struct {
	fd       int
	zeroCopy bool
	polls    bool
	mtu      int    // of the interface, in bytes
	frame    int    // size of a frame in bytes, a power of two
	memory   []byte // frames: first those to receive in, then those to send from

	rx         *xskRing[unix.XDPDesc]
	tx         *xskRing[unix.XDPDesc]
	fill       *xskRing[uint64]
	completion *xskRing[uint64]

	free   []uint64 // frames to send in
	queued int      // descriptors in tx that flush has not yet published

	mapped sync.Mutex // held while the rings are unmapped, or looked at by others than the worker
	closed bool
}

// Sizes of frames, and what the kernel takes of each for XDP (XDP_PACKET_HEADROOM).
const (
	smallFrame   = 2048
	largeFrame   = 4096
	xdpHeadroom  = 256
	xskMaxFrames = largeFrame - xdpHeadroom
)

// frameFor returns the size of the frames that hold packets of mtu bytes and their Ethernet header.
func frameFor(mtu int) (int, error) {
	for _, size := range []int{smallFrame, largeFrame} {
		if mtu+ethernetHeader <= size-xdpHeadroom {
			return size, nil
		}
	}
	return 0, fmt.Errorf("its MTU is %d: at most %d bytes fit an AF_XDP frame", mtu, xskMaxFrames-ethernetHeader)
}

// openXSK opens a socket in the calling thread's namespace. It receives nothing until xdp.set has put it into the
// program's map.
func openXSK(o xskOptions) (_ *xsk, err error) {
	x := &xsk{fd: -1, mtu: o.mtu}
	defer func() {
		if err != nil {
			err = errors.Join(err, x.close())
		}
	}()
	if x.frame, err = frameFor(o.mtu); err != nil {
		return nil, &Missing{What: "AF_XDP socket", Err: err, Do: doPacket}
	}
	x.fd, err = unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, explainXSK("AF_XDP socket", err)
	}
	if err := x.register(o.receive + o.send); err != nil {
		return nil, explainXSK("memory of the AF_XDP socket", err)
	}
	if err := x.mapRings(o.receive, o.send); err != nil {
		return nil, explainXSK("rings of the AF_XDP socket", err)
	}
	if o.busyPoll > 0 {
		if err := x.busyPoll(o.busyPoll); err != nil {
			return nil, &Missing{What: "busy polling of the AF_XDP socket", Err: err, Do: "it needs Linux 5.11 and NET_ADMIN: leave --busy-poll out"}
		}
	}
	if err := enlarge(x.fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF); err != nil {
		return nil, err
	}
	// The kernel tries zero-copy first, and copies where the driver cannot.
	address := &unix.SockaddrXDP{Flags: unix.XDP_USE_NEED_WAKEUP, Ifindex: uint32(o.index), QueueID: uint32(o.queue)}
	if err := unix.Bind(x.fd, address); err != nil {
		return nil, explainXSK(fmt.Sprintf("AF_XDP socket on queue %d", o.queue), err)
	}
	if options, err := unix.GetsockoptInt(x.fd, unix.SOL_XDP, unix.XDP_OPTIONS); err == nil {
		x.zeroCopy = options&unix.XDP_OPTIONS_ZEROCOPY != 0
	}
	return x, nil
}

const doPacket = "choose --io packet"

// explainXSK makes a refusal of the kernel a Missing.
func explainXSK(what string, err error) error {
	do := doPacket
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		do = "add the capabilities NET_RAW, NET_ADMIN and BPF, or " + doPacket
	case errors.Is(err, unix.EAFNOSUPPORT):
		do = "a kernel with CONFIG_XDP_SOCKETS is needed, or " + doPacket
	case errors.Is(err, unix.ENOBUFS):
		do = "raise the limit of locked memory (ulimit -l), add the capability IPC_LOCK, lower --xdp-frames, or " + doPacket
	case errors.Is(err, unix.EBUSY):
		do = "another AF_XDP socket, maybe another vrouter's, has the queue: stop that one, or " + doPacket
	}
	return &Missing{What: what, Err: unwrapErrno(err), Do: do}
}

// register gives the kernel the memory of n frames.
func (x *xsk) register(n int) (err error) {
	x.memory, err = unix.Mmap(-1, 0, n*x.frame, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	umem := unix.XDPUmemReg{Addr: uint64(uintptr(unsafe.Pointer(&x.memory[0]))), Len: uint64(len(x.memory)), Size: uint32(x.frame)}
	return setsockopt(x.fd, unix.XDP_UMEM_REG, unsafe.Pointer(&umem), unsafe.Sizeof(umem))
}

// mapRings makes the four rings, and hands the frames to receive in to the kernel.
func (x *xsk) mapRings(receive, send int) (err error) {
	for _, ring := range []struct{ option, size int }{
		{unix.XDP_UMEM_FILL_RING, receive}, {unix.XDP_RX_RING, receive},
		{unix.XDP_UMEM_COMPLETION_RING, send}, {unix.XDP_TX_RING, send},
	} {
		if err := unix.SetsockoptInt(x.fd, unix.SOL_XDP, ring.option, ring.size); err != nil {
			return err
		}
	}
	var at unix.XDPMmapOffsets
	length := uint32(unsafe.Sizeof(at))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(x.fd), unix.SOL_XDP, unix.XDP_MMAP_OFFSETS,
		uintptr(unsafe.Pointer(&at)), uintptr(unsafe.Pointer(&length)), 0); errno != 0 {
		return errno
	}
	if x.fill, err = mapRing[uint64](x.fd, unix.XDP_UMEM_PGOFF_FILL_RING, at.Fr, receive); err != nil {
		return err
	}
	if x.completion, err = mapRing[uint64](x.fd, unix.XDP_UMEM_PGOFF_COMPLETION_RING, at.Cr, send); err != nil {
		return err
	}
	if x.rx, err = mapRing[unix.XDPDesc](x.fd, unix.XDP_PGOFF_RX_RING, at.Rx, receive); err != nil {
		return err
	}
	if x.tx, err = mapRing[unix.XDPDesc](x.fd, unix.XDP_PGOFF_TX_RING, at.Tx, send); err != nil {
		return err
	}
	for i := range receive {
		*x.fill.place(i) = uint64(i * x.frame)
	}
	x.fill.gave(receive)
	x.free = make([]uint64, 0, send)
	for i := range send {
		x.free = append(x.free, uint64((receive+i)*x.frame))
	}
	return nil
}

// busyPoll makes system calls on the socket drive the device's queue.
func (x *xsk) busyPoll(microseconds int) error {
	for _, option := range [][2]int{
		{unix.SO_PREFER_BUSY_POLL, 1}, {unix.SO_BUSY_POLL, microseconds}, {unix.SO_BUSY_POLL_BUDGET, busyPollBudget},
	} {
		if err := unix.SetsockoptInt(x.fd, unix.SOL_SOCKET, option[0], option[1]); err != nil {
			return err
		}
	}
	x.polls = true
	return nil
}

func setsockopt(fd, option int, value unsafe.Pointer, length uintptr) error {
	if _, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_XDP, uintptr(option), uintptr(value), length, 0); errno != 0 {
		return errno
	}
	return nil
}

// receive copies frames that have come into the packets at the front of batch, without their link bytes of link-layer
// header, and returns how many. It does not wait.
func (x *xsk) receive(batch []*vrouter.Packet, link int) int {
	n := min(x.rx.filled(), len(batch))
	if n == 0 {
		// The device may have found no frame to receive in, and looks again only when called; or the call polls it.
		if x.polls || x.fill.sleeps() {
			_, _, _ = unix.Syscall6(unix.SYS_RECVFROM, uintptr(x.fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
		}
		return 0
	}
	for i := range n {
		d, p := x.rx.place(i), batch[i]
		got := copy(p.Buf[vrouter.Headroom-link:], x.memory[d.Addr:d.Addr+uint64(d.Len)])
		p.Off, p.Len, p.Offload = vrouter.Headroom, max(got-link, 0), vrouter.Offload{}
		*x.fill.place(i) = d.Addr &^ uint64(x.frame-1)
	}
	x.fill.gave(n)
	x.rx.took(n)
	return n
}

// next returns the frame to write the next packet to, link-layer header first, or nil while all are on their way.
func (x *xsk) next() []byte {
	if len(x.free) == 0 && !x.reclaim() {
		return nil
	}
	at := x.free[len(x.free)-1]
	return x.memory[at : at+uint64(x.frame)]
}

// queue takes the frame that next has returned, with length bytes in it, to be sent by flush.
func (x *xsk) queue(length int) {
	at := x.free[len(x.free)-1]
	x.free = x.free[:len(x.free)-1]
	*x.tx.place(x.queued) = unix.XDPDesc{Addr: at, Len: uint32(length)}
	x.queued++
}

// send takes a single packet to be sent by flush, behind the Ethernet header, and notes the outcome with it.
func (x *xsk) send(p *vrouter.Packet, ethernet []byte) {
	b, o := p.Bytes(), &p.Offload
	if len(b) > x.mtu {
		p.Drop = vrouter.ReasonSendTooBig
		return
	}
	if o.NeedsChecksum && !packet.CompleteChecksum(b, int(o.ChecksumStart), int(o.ChecksumOffset)) {
		p.Drop = vrouter.ReasonMalformed
		return
	}
	f := x.next()
	if f == nil {
		p.Drop = vrouter.ReasonSendQueueFull
		return
	}
	x.queue(copy(f, ethernet) + copy(f[len(ethernet):], b))
	p.Sent++
}

// reclaim takes back the frames that have been sent, and reports whether there were any.
func (x *xsk) reclaim() bool {
	n := x.completion.filled()
	for i := range n {
		x.free = append(x.free, *x.completion.place(i))
	}
	if n > 0 {
		x.completion.took(n)
	}
	return n > 0
}

// flush sends what queue has taken. A full device is waited for with patience of w, if there is one; what it has not
// taken then goes with the next flush. ENETDOWN, ENXIO and the like are no matter: the port looks after its interface.
func (x *xsk) flush(w *waiter) {
	if x == nil {
		return
	}
	if x.queued > 0 {
		x.tx.gave(x.queued)
		x.queued = 0
	}
	waited := false
	for before := x.tx.consumer.Load(); before != x.tx.local && x.tx.sleeps(); {
		_, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(x.fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if x.zeroCopy {
			break // the device is awake now, and goes on by itself
		}
		now := x.tx.consumer.Load()
		if now == before {
			if w == nil || waited || errno != unix.EAGAIN && errno != unix.EBUSY && errno != unix.ENOBUFS {
				break
			}
			waited = true
			x.reclaim()
			w.wait(x.fd, unix.POLLOUT, sendPatience)
		}
		before = now
	}
	x.reclaim()
}

// dropped returns how many frames the kernel could not hand over.
func (x *xsk) dropped() uint64 {
	var s unix.XDPStatistics
	length := uint32(unsafe.Sizeof(s))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(x.fd), unix.SOL_XDP, unix.XDP_STATISTICS,
		uintptr(unsafe.Pointer(&s)), uintptr(unsafe.Pointer(&length)), 0); errno != 0 {
		return 0
	}
	return s.Rx_dropped + s.Rx_ring_full
}

// close frees the socket and its memory. Nobody uses it any more.
func (x *xsk) close() error {
	x.mapped.Lock()
	defer x.mapped.Unlock()
	x.closed = true
	errs := []error{x.rx.close(), x.tx.close(), x.fill.close(), x.completion.close()}
	if x.fd >= 0 {
		errs = append(errs, unix.Close(x.fd))
	}
	if x.memory != nil {
		errs = append(errs, unix.Munmap(x.memory))
	}
	return errors.Join(errs...)
}
