package port_test

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"margay/vrouter/port"
)

// TestWorkerThread: a worker has short slices where the kernel has such a thing, and everything else as before.
func TestWorkerThread(t *testing.T) {
	done := make(chan struct{})
	go func() { // the thread ends with the goroutine
		defer close(done)
		runtime.LockOSThread()
		before, err := unix.SchedGetAttr(0, 0)
		if err != nil {
			t.Error(err)
			return
		}
		if err := port.WorkerThread(nil, 0); err != nil {
			t.Error(err)
		}
		after, err := unix.SchedGetAttr(0, 0)
		if err != nil {
			t.Error(err)
			return
		}
		want := *before
		if before.Runtime != 0 { // Linux 6.12
			want.Runtime = 100_000
		}
		if *after != want {
			t.Errorf("the scheduler's attributes are %+v: expected %+v", *after, want)
		}
		if err := port.WorkerThread([]int{1023}, 0); err == nil {
			t.Error("pinned to a CPU that is not there")
		}
	}()
	<-done
}
