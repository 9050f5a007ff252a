package port

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// joint waits for both ports of a queue at once, on the one thread that both directions have. It implements vrouter.Waiter.
type joint struct {
	*waiter
	readers [2]reader
	fds     [3]unix.PollFd // the readers', and the waiter's
}

// join makes one thread do for both directions of each queue.
func (p *Ports) join() error {
	underlay := p.Underlay.queues()
	for i, device := range p.Device.queues() {
		w, err := newWaiter()
		if err != nil {
			return err
		}
		p.joints = append(p.joints, &joint{waiter: w, readers: [2]reader{device, underlay[i]}})
	}
	return nil
}

// Threads returns what each thread is to run: a worker, or the two of a queue. workers are those of Workers.
func (p *Ports) Threads(workers []*vrouter.Worker) []func() error {
	var threads []func() error
	for i, j := range p.joints {
		threads = append(threads, func() error { return vrouter.RunTogether(j, workers[2*i:2*i+2]...) })
	}
	if threads == nil {
		for _, w := range workers {
			threads = append(threads, w.Run)
		}
	}
	return threads
}

// Wait implements vrouter.Waiter.
func (j *joint) Wait(found int) error {
	switch {
	case j.stopped.Load():
		return vrouter.ErrStopped
	case found > 0:
		j.found(found)
		return nil
	case j.again():
		return nil
	}
	for i, r := range j.readers {
		j.fds[i] = unix.PollFd{Fd: int32(r.readFD()), Events: unix.POLLIN}
	}
	j.fds[len(j.readers)] = unix.PollFd{Fd: int32(j.event), Events: unix.POLLIN}
	n, err := unix.Poll(j.fds[:], rebindInterval)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("poll: %w", err)
	}
	if n == 0 && err == nil {
		for _, r := range j.readers {
			r.tend()
		}
	}
	return nil
}

// Poll implements vrouter.PollPort.
func (t *TUN) Poll(batch []*vrouter.Packet) int { return t.recvReady(batch) }

// Poll implements vrouter.PollPort.
func (v *Veth) Poll(batch []*vrouter.Packet) int { return v.recvReady(batch) }

// Poll implements vrouter.PollPort.
func (u *Underlay) Poll(batch []*vrouter.Packet) int { return u.recvReady(batch) }
