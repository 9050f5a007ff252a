package port

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// waiter waits for a file descriptor, and can be told to stop from any goroutine.
type waiter struct {
	spinner
	event   int // eventfd; readable for ever once stopped
	stopped atomic.Bool
	fds     [2]unix.PollFd
}

func newWaiter() (*waiter, error) {
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	return &waiter{event: event}, nil
}

// stop ends the present wait and every later one.
func (w *waiter) stop() {
	w.stopped.Store(true)
	// The counter cannot overflow: every call adds one to 64 bits. A failed write is impossible on a valid eventfd.
	_, _ = unix.Write(w.event, []byte{1, 0, 0, 0, 0, 0, 0, 1})
}

func (w *waiter) close() error { return unix.Close(w.event) }

// wait blocks until fd has one of events, or stop was called, or timeout milliseconds are over (-1: never). It reports
// whether fd is ready, an error state included.
func (w *waiter) wait(fd int, events int16, timeout int) bool {
	w.fds[0] = unix.PollFd{Fd: int32(fd), Events: events}
	w.fds[1] = unix.PollFd{Fd: int32(w.event), Events: unix.POLLIN}
	for {
		_, err := unix.Poll(w.fds[:], timeout)
		if err == unix.EINTR {
			continue // a signal of the Go runtime; the timeout starts anew, which no caller minds
		}
		return err == nil && w.fds[0].Revents != 0
	}
}
