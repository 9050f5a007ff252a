package port

import (
	"time"

	"golang.org/x/sys/unix"
)

// spinner says how long to look for packets again and again before it is worth sleeping. Being woken takes longer than
// most waits between two packets of a flow, on a virtual machine ten times as long. So what came soon after the last wait
// began makes the next one begin with looking, and what came late makes the next one sleep at once: a port without
// traffic costs nothing. Between two looks others may run, so that looking takes no processor from anybody.
//
// Where packets come one after the other, it is worth more to sleep at once: they gather meanwhile, and many are cheaper
// together than each by itself.
//
// It is used by one goroutine. The zero value never looks twice.
type spinner struct {
	longest time.Duration // 0: never
	looking bool          // the present wait is one of looking
	short   bool          // the last wait was short
	began   time.Time     // of the present wait; the zero time: there is none
	last    time.Time     // when the wait before began
	packets int           // that have come since
}

// stream is how long it takes from packet to packet at most where they come one after the other.
const stream = 10 * time.Microsecond

// again reports whether to look once more; after false the caller sleeps. A look aside that lasts, because others have work
// for this processor, ends the wait like any other: what has come meanwhile has come late.
func (s *spinner) again() bool {
	if s.longest == 0 {
		return false
	}
	now := time.Now()
	if s.began.IsZero() {
		s.looking = s.short && now.Sub(s.last) > stream*time.Duration(s.packets)
		s.began, s.last, s.packets = now, now, 0
	}
	if !s.looking || now.Sub(s.began) > s.longest {
		return false
	}
	_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	return true
}

// found takes note of n packets that have come. They end a wait, if there was one.
func (s *spinner) found(n int) {
	s.packets += n
	if !s.began.IsZero() {
		s.short = time.Since(s.began) <= s.longest
		s.began = time.Time{}
	}
}
