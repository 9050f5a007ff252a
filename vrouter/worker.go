package vrouter

import (
	"errors"
	"runtime"

	"margay/vrouter/packet"
)

// batchSize is the number of packets a worker takes at once. A full batch of superpackets is 4 MiB of buffers.
const batchSize = 64

// Worker carries packets from one port to another, in one direction. It is locked to its thread and runs to
// completion: between Recv and Send there is no channel, lock, allocation, map or log line.
type Worker struct {
	router    *Router
	direction Direction
	in, out   Port
	packets   []*Packet
	outgoing  []*Packet
	outer     packet.Outer
	tallies   tallies
}

// NewWorker returns a worker that receives from in, walks the ladder of direction and sends on out. Its counters are
// part of the router's from now on. The worker is the only one that receives from in and that sends on out.
func (r *Router) NewWorker(direction Direction, in, out Port) *Worker {
	w := &Worker{
		router:    r,
		direction: direction,
		in:        in,
		out:       out,
		packets:   make([]*Packet, batchSize),
		outgoing:  make([]*Packet, 0, batchSize),
	}
	for i := range w.packets {
		w.packets[i] = NewPacket()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	// A new slice, because Counters reads the old one outside the lock.
	r.workers = append(r.workers[:len(r.workers):len(r.workers)], w)
	return w
}

// Run forwards until the port it receives from is stopped, and then returns nil; any other error of that port ends it.
func (w *Worker) Run() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for {
		if err := w.turn(); err != nil {
			if errors.Is(err, ErrStopped) {
				return nil
			}
			return err
		}
	}
}

// turn is one Recv, the ladder for each packet, and one Send.
func (w *Worker) turn() error {
	for _, p := range w.packets {
		p.Reset()
	}
	n, err := w.in.Recv(w.packets)
	if err != nil {
		return err
	}
	v := view{routes: w.router.table.Load(), state: w.router.state.Load()}
	w.outgoing = w.outgoing[:0]
	for _, p := range w.packets[:n] {
		length := uint64(p.Len)
		var verdict Verdict
		var reason Reason
		if w.direction == Encap {
			verdict, reason = v.encap(p, &w.outer)
		} else {
			verdict, reason = v.decap(p)
		}
		if verdict != VerdictForward {
			w.tallies.dropped[reason].add(1, length)
			continue
		}
		w.outgoing = append(w.outgoing, p)
	}
	if len(w.outgoing) == 0 {
		return nil
	}
	w.out.Send(w.outgoing)
	var packets, bytes uint64
	for _, p := range w.outgoing {
		if p.Drop != ReasonNotSet {
			w.tallies.dropped[p.Drop].add(1, uint64(p.Len))
			continue
		}
		packets += uint64(p.Sent)
		bytes += uint64(p.Len)
	}
	w.tallies.forwarded.add(packets, bytes)
	return nil
}
