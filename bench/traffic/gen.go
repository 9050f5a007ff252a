package traffic

import (
	"fmt"
	"net"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// batch is the number of packets that the generator gives the kernel in one call.
const batch = 64

// mmsghdr is struct mmsghdr of sendmmsg(2).
type mmsghdr struct {
	header unix.Msghdr
	length uint32
	_      [4]byte
}

// Generator sends frames on a device, by sendmmsg on an AF_PACKET socket that goes past the queueing discipline. XSKGenerator does
// the same for two thirds of the cost.
type Generator struct {
	fd       int
	board    *Board
	messages []mmsghdr
	pieces   []unix.Iovec
	sizes    []uint64
}

// NewGenerator opens the device of the calling thread's network namespace.
func NewGenerator(device string, f Frame, b *Board) (_ *Generator, err error) {
	link, frames, err := prepare(device, f)
	if err != nil {
		return nil, err
	}
	// Protocol 0: it receives nothing.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
		return nil, fmt.Errorf("PACKET_QDISC_BYPASS: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 8<<20); err != nil {
		return nil, fmt.Errorf("SO_SNDBUFFORCE: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: link.Index}); err != nil {
		return nil, fmt.Errorf("bind to %s: %w", device, err)
	}
	// The list of messages is long enough that a batch can begin at any frame.
	n := len(frames)
	g := &Generator{fd: fd, board: b}
	for i := range n + batch {
		g.pieces = append(g.pieces, unix.Iovec{Base: &frames[i%n][0], Len: uint64(len(frames[i%n]))})
		g.sizes = append(g.sizes, uint64(len(frames[i%n])-14))
	}
	g.messages = make([]mmsghdr, n+batch)
	for i := range g.messages {
		g.messages[i].header.Iov = &g.pieces[i]
		g.messages[i].header.Iovlen = 1
	}
	return g, nil
}

// prepare finds the device of the calling thread's network namespace, and makes the frames that a generator sends on it.
func prepare(device string, f Frame) (*net.Interface, [][]byte, error) {
	link, err := net.InterfaceByName(device)
	if err != nil {
		return nil, nil, fmt.Errorf("device %s: %w", device, err)
	}
	frames, err := f.frames()
	return link, frames, err
}

// Run sends while the board says so, at the board's rate, and returns only with an error.
func (g *Generator) Run() error {
	at, n := 0, len(g.messages)-batch
	return pace(g.board, batch, 100*time.Microsecond, func(packets int) (uint64, error) {
		count, err := g.send(at, packets)
		at = (at + count) % n
		return uint64(packets), err // also what it refused has had its turn
	})
}

// pace calls send while the board says so, at the board's rate: each time for so many packets as are due, at most burst, and
// not more often than once a tick. At no rate it calls send for burst packets again and again. It returns only with an error.
func pace(b *Board, burst uint64, tick time.Duration, send func(packets int) (uint64, error)) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// The kernel may otherwise round a sleep up by 50 µs.
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_TIMERSLACK: %w", err)
	}
	b.Live.Store(1)
	var (
		began      time.Time
		sent, rate uint64 // since began
	)
	for {
		if b.Run.Load() == 0 {
			began = time.Time{}
			b.Idle.Add(1)
			time.Sleep(time.Millisecond)
			continue
		}
		if r := b.Rate.Load(); began.IsZero() || r != rate {
			began, sent, rate = time.Now(), 0, r
		}
		want := burst
		if rate > 0 {
			due := uint64(time.Since(began).Seconds() * float64(rate))
			if due <= sent {
				sleep(tick)
				continue
			}
			want = min(due-sent, burst)
		}
		n, err := send(int(want))
		if err != nil {
			return err
		}
		sent += n
	}
}

func sleep(d time.Duration) {
	t := unix.NsecToTimespec(d.Nanoseconds())
	_ = unix.Nanosleep(&t, nil) // a signal shortens it, which does no harm
}

// send gives the kernel a batch and counts what it took.
func (g *Generator) send(at, n int) (int, error) {
	r, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(g.fd), uintptr(unsafe.Pointer(&g.messages[at])), uintptr(n), 0, 0, 0)
	switch errno {
	case 0:
	case unix.ENOBUFS, unix.EAGAIN, unix.EINTR:
		g.board.Refused.Add(1)
		return 1, nil // that packet is lost; go on with the next
	default:
		return 0, fmt.Errorf("sendmmsg: %w", errno)
	}
	var bytes uint64
	for i := range int(r) {
		bytes += g.sizes[at+i]
	}
	g.board.Packets.Add(uint64(r))
	g.board.Bytes.Add(bytes)
	return int(r), nil
}
