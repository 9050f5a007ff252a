package port

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// bypass is a way past the kernel's stack, beside the AF_PACKET socket of a port: an XDP program on its interface, and
// AF_XDP sockets, one for each of the queues the interface receives by. It can be opened, moved and closed while the
// port receives and sends; a nil bypass has nothing and takes nothing.
//
// A port of several queues has a bypass for each, among which the sockets are shared out in turn. The first opens and
// closes for all.
type bypass struct {
	space   *namespace // the first's
	options XDPOptions // the first's
	epoll   int        // readable when something has come, to the AF_PACKET socket or to the others
	more    []*bypass  // of the first: the others

	// Opening and closing, which the port does one at a time.
	opened  atomic.Pointer[bypassSockets] // of the first: all that there are
	before  atomic.Uint64                 // dropped by sockets that are closed
	current atomic.Pointer[bypassSockets] // this queue's

	// What Recv and Send are using at this moment.
	receiving, sending atomic.Pointer[bypassSockets]
}

// XDPOptions say how AF_XDP sockets are to be.
type XDPOptions struct {
	BusyPoll int // how many microseconds a system call may look for packets at the device; 0: interrupts bring them
	Frames   int // how many packets a socket holds that wait for us, a power of two; 0: DefaultFrames
}

// frames returns how many there are to be.
func (o XDPOptions) frames() int {
	if o.Frames == 0 {
		return DefaultFrames
	}
	return o.Frames
}

// bypassPlace is where a bypass is.
type bypassPlace struct {
	name   string
	index  int // of the interface
	mtu    int // of the interface, bytes
	queues int // of the interface, to receive by
	mac    [6]byte
	// wired says that packets come over a wire: checksums are finished, or else wrong.
	wired bool
	// address is that of the packets that match is for; the zero value where it is for all.
	address [4]byte
}

// bypassSockets are the sockets on one interface; immutable but for next.
type bypassSockets struct {
	place   bypassPlace
	program *xdp
	list    []*xsk
	next    int // Recv's: the socket to look at next
}

// newBypass tells at start whether the kernel has what is needed.
func newBypass(queues int, o XDPOptions) (_ *bypass, err error) {
	if err := probeXDP(o); err != nil {
		return nil, err
	}
	b := &bypass{options: o, epoll: -1}
	for range queues - 1 {
		b.more = append(b.more, &bypass{epoll: -1})
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	if b.space, err = thisNamespace(); err != nil {
		return nil, err
	}
	for _, q := range b.all() {
		if q.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// all returns the queues' bypasses, this one first.
func (b *bypass) all() []*bypass { return append([]*bypass{b}, b.more...) }

// probeXDP asks the kernel for an AF_XDP socket, its memory and a program, and gives all back.
func probeXDP(o XDPOptions) error {
	x := &xsk{}
	var err error
	if x.fd, err = unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return explainXSK("AF_XDP socket", err)
	}
	program, err := newXDP(1, nil)
	if err != nil {
		return errors.Join(err, x.close())
	}
	x.frame = smallFrame
	if err = x.register(o.frames() + sendFrames); err != nil {
		err = explainXSK("memory of the AF_XDP socket", err)
	}
	return errors.Join(err, program.close(), x.close())
}

// watch makes epoll readable when fd is. Without AF_XDP there is no epoll.
func (b *bypass) watch(fd int) error {
	if b == nil {
		return nil
	}
	if err := unix.EpollCtl(b.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// open moves the bypass to another place, or leaves it where it is when it is there already. match is for newXDP.
func (b *bypass) open(at bypassPlace, match asm.Instructions) error {
	if s := b.opened.Load(); s != nil && s.place == at && b.intact() {
		return nil
	}
	b.shut()
	return b.inSpace(func() error {
		s, err := b.openSockets(at, match)
		if err != nil {
			return fmt.Errorf("%s: %w", at.name, err)
		}
		b.opened.Store(s)
		for i, q := range b.all() {
			q.current.Store(s.share(i, len(b.more)+1))
		}
		return nil
	})
}

// share returns the part of queue i of so many.
func (s *bypassSockets) share(i, of int) *bypassSockets {
	part := &bypassSockets{place: s.place, program: s.program}
	for ; i < len(s.list); i += of {
		part.list = append(part.list, s.list[i])
	}
	return part
}

// inSpace runs f on a thread in the namespace that the bypass was made in.
func (b *bypass) inSpace(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		switched, err := b.space.enter()
		if err == nil {
			err = f()
		}
		if !switched {
			runtime.UnlockOSThread() // otherwise the thread ends with the goroutine
		}
		done <- err
	}()
	return <-done
}

func (b *bypass) openSockets(at bypassPlace, match asm.Instructions) (_ *bypassSockets, err error) {
	s := &bypassSockets{place: at}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.program, err = newXDP(at.queues, match); err != nil {
		return nil, err
	}
	if err := s.program.attach(at.index); err != nil {
		return nil, err
	}
	for queue := range at.queues {
		o := xskOptions{index: at.index, queue: queue, mtu: at.mtu, receive: b.options.frames(), send: sendFrames, busyPoll: b.options.BusyPoll}
		var x *xsk
		err := whileBusy(queuePatience, func() (err error) { x, err = openXSK(o); return err })
		if err != nil {
			return nil, err
		}
		s.list = append(s.list, x)
		if err := s.program.set(queue, x); err != nil {
			return nil, err
		}
		if err := b.all()[queue%(len(b.more)+1)].watch(x.fd); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// whileBusy opens an AF_XDP socket. The kernel lets go of a queue some time after the socket that had it was closed: not before all
// its processors have passed a grace period and a worker thread of its own has run, which a busy machine puts off.
func whileBusy(patience time.Duration, open func() error) error {
	err := open()
	for end := time.Now().Add(patience); errors.Is(err, unix.EBUSY) && time.Now().Before(end); {
		_, _ = unix.Poll(nil, busyPause)
		err = open()
	}
	return err
}

const (
	// queuePatience is how long a queue is waited for without which the port cannot work.
	queuePatience = 10 * time.Second
	// podPatience is that for a pod's, which AF_PACKET serves as well while other pods wait.
	podPatience = 200 * time.Millisecond
	// busyPause is the time between two tries, in milliseconds.
	busyPause = 10
)

// intact reports whether the program still is where it was put.
func (b *bypass) intact() bool {
	s := b.opened.Load()
	return s != nil && s.program.attached(s.place.index)
}

// generic reports whether the kernel runs the program behind the driver.
func (b *bypass) generic() bool {
	s := b.opened.Load()
	return s != nil && !s.program.native
}

// shut closes the sockets once nobody uses them any more, and takes the program off.
func (b *bypass) shut() {
	s := b.opened.Swap(nil)
	if s == nil {
		return
	}
	for _, q := range b.all() {
		part := q.current.Swap(nil)
		for part != nil && (q.receiving.Load() == part || q.sending.Load() == part) {
			_, _ = unix.Poll(nil, 1)
		}
	}
	b.before.Add(s.dropped())
	// What closing says does not matter: it is gone.
	_ = s.close()
}

func (s *bypassSockets) dropped() (sum uint64) {
	for _, x := range s.list {
		sum += x.dropped()
	}
	return sum
}

func (s *bypassSockets) close() error {
	var errs []error
	if s.program != nil {
		errs = append(errs, s.program.close())
	}
	for _, x := range s.list {
		errs = append(errs, x.close())
	}
	return errors.Join(errs...)
}

// use returns the sockets and notes in user that they are used, so that shut leaves them alone.
func (b *bypass) use(user *atomic.Pointer[bypassSockets]) *bypassSockets {
	for {
		s := b.current.Load()
		user.Store(s)
		if b.current.Load() == s {
			return s
		}
	}
}

// receive takes what the sockets have, without waiting.
func (b *bypass) receive(batch []*vrouter.Packet) int {
	s := b.use(&b.receiving)
	n := 0
	if s != nil {
		for range s.list {
			n += s.list[s.next].receive(batch[n:], ethernetHeader)
			if n == len(batch) {
				break
			}
			s.next = (s.next + 1) % len(s.list)
		}
		if !s.place.wired || !s.program.native {
			for _, p := range batch[:n] {
				markUnfinished(p)
			}
		}
	}
	b.receiving.Store(nil)
	return n
}

// hold returns the socket to send by on the interface index, nil where this queue has none. release follows.
func (b *bypass) hold(index int) *xsk {
	if b == nil {
		return nil
	}
	if s := b.use(&b.sending); s != nil && s.place.index == index && len(s.list) > 0 {
		return s.list[0]
	}
	b.sending.Store(nil)
	return nil
}

// release sends what the socket that hold has returned holds, and gives it back.
func (b *bypass) release(x *xsk, drained *waiter) {
	if x != nil {
		x.flush(drained)
		b.sending.Store(nil)
	}
}

// dropped returns how many packets the kernel could not hand over.
func (b *bypass) dropped() uint64 {
	if b == nil {
		return 0
	}
	sum := b.before.Load()
	if s := b.opened.Load(); s != nil {
		sum += s.dropped()
	}
	return sum
}

// String describes for people how the interface is read.
func (b *bypass) String() string {
	s := b.opened.Load()
	if s == nil {
		return "not open"
	}
	mode, copies := "generic", "copy"
	if s.program.native {
		mode = "native"
	}
	if s.list[0].zeroCopy {
		copies = "zero-copy"
	}
	text := mode + ", " + copies
	if s.place.queues > 1 {
		text += fmt.Sprintf(", %d queues", s.place.queues)
	}
	if b.options.BusyPoll > 0 {
		text += ", busy polling"
	}
	return text
}

func (b *bypass) close() error {
	b.shut()
	var errs []error
	for _, q := range b.all() {
		if q.epoll >= 0 {
			errs = append(errs, unix.Close(q.epoll))
		}
	}
	if b.space != nil {
		errs = append(errs, b.space.close())
	}
	return errors.Join(errs...)
}
