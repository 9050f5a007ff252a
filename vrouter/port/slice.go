package port

import "golang.org/x/sys/unix"

// workerSlice is the time slice that a worker asks for, in nanoseconds: the least that the kernel grants.
const workerSlice = 100_000

// shortenSlice asks the scheduler to give the calling thread the processor for a short time at once, and so the sooner: its
// share stays what it is. A worker does little at a time, and meanwhile packets come that nobody reads: of two milliseconds
// and more, which others get by default, each costs many of them. And what a thread gives away by sched_yield is the rest of
// its slice, which then is little too.
//
// Linux 6.12 does that for the normal policy (a custom slice, sched(7)); elsewhere nothing happens, and a refusal changes
// nothing either.
func shortenSlice() {
	a, err := unix.SchedGetAttr(0, 0)
	if err != nil || a.Policy != unix.SCHED_NORMAL {
		return
	}
	a.Runtime = workerSlice
	_ = unix.SchedSetAttr(0, a, 0)
}
