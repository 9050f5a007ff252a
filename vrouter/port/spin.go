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
// It is used by one goroutine. The zero value never looks twice.
type spinner struct {
	longest time.Duration // 0: never
	looking bool          // the next wait begins with looking
	began   time.Time     // of the present wait; the zero time: there is none
}

// again reports whether to look once more; after false the caller sleeps. A look aside that lasts, because others have work
// for this processor, ends the wait like any other: what has come meanwhile has come late.
func (s *spinner) again() bool {
	if s.longest == 0 {
		return false
	}
	now := time.Now()
	if s.began.IsZero() {
		s.began = now
	}
	if !s.looking || now.Sub(s.began) > s.longest {
		return false
	}
	_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	return true
}

// found ends a wait: there are packets.
func (s *spinner) found() {
	if !s.began.IsZero() {
		s.looking = time.Since(s.began) <= s.longest
		s.began = time.Time{}
	}
}
