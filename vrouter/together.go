package vrouter

import (
	"errors"
	"fmt"
	"runtime"
)

// PollPort is a Port for workers that share a thread.
type PollPort interface {
	Port
	// Poll is Recv without waiting: it returns how many packets there were, maybe none. One goroutine at a time calls either.
	Poll(batch []*Packet) int
}

// Waiter waits for the ports of several workers at once. One goroutine uses it.
type Waiter interface {
	// Wait is told how many packets the last look at the ports has found, and returns when it is time for another. The error
	// is ErrStopped once the ports are stopped; any other is final.
	Wait(found int) error
}

// RunTogether is Worker.Run for several workers on one thread, which take batches in turn: one thread to be woken in place of
// several. They receive from PollPorts.
func RunTogether(wait Waiter, workers ...*Worker) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ports := make([]PollPort, len(workers))
	for i, w := range workers {
		var ok bool
		if ports[i], ok = w.in.(PollPort); !ok {
			return fmt.Errorf("%s cannot share a thread: expected a port that can be polled", w.in.Name())
		}
	}
	for found := 0; ; {
		if err := wait.Wait(found); err != nil {
			if errors.Is(err, ErrStopped) {
				return nil
			}
			return err
		}
		found = 0
		for i, w := range workers {
			if n := ports[i].Poll(w.packets); n > 0 {
				w.carry(n)
				w.reset()
				found += n
			}
		}
	}
}
