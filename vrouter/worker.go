package vrouter

import (
	"errors"
	"runtime"
	"sync/atomic"

	"margay/vrouter/fib"
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
	asked     []asked
	addresses []uint32
	hops      []fib.Hop
	outer     packet.Outer
	tallies   tallies
	notes     dropNotes
	taps      atomic.Pointer[taps] // nil while nobody captures
}

// asked is a packet between the two halves of its ladder.
type asked struct {
	p     *Packet
	inner packet.IPv4
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
		asked:     make([]asked, 0, batchSize),
		addresses: make([]uint32, 0, 2*batchSize),
		hops:      make([]fib.Hop, 2*batchSize),
	}
	for i := range w.packets {
		w.packets[i] = NewPacket()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	// A new slice, because Counters reads the old one outside the lock.
	r.workers = append(r.workers[:len(r.workers):len(r.workers)], w)
	for _, c := range r.captures {
		c.attach(w)
	}
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
	v := view{routes: w.router.table.Forwarding(), state: w.router.state.Load()}
	taps := w.taps.Load()
	if taps != nil {
		taps.before(w.packets[:n])
	}
	w.walk(&v, w.packets[:n])
	w.send()
	if taps != nil {
		taps.after(w.packets[:n])
	}
	return nil
}

// walk takes a batch up the worker's ladder.
func (w *Worker) walk(v *view, batch []*Packet) {
	w.outgoing = w.outgoing[:0]
	if w.direction == Encap {
		w.encap(v, batch)
	} else {
		w.decap(v, batch)
	}
}

// send sends what the ladder let through, and counts it.
func (w *Worker) send() {
	if len(w.outgoing) == 0 {
		return
	}
	w.out.Send(w.outgoing)
	var packets, bytes uint64
	for _, p := range w.outgoing {
		if p.Drop != ReasonNotSet {
			w.drop(p, p.Drop)
			continue
		}
		packets += uint64(p.Sent)
		bytes += uint64(p.Len)
	}
	w.tallies.forwarded.add(packets, bytes)
}

// encap walks the first ladder with a batch, and gathers what it lets through.
func (w *Worker) encap(v *view, batch []*Packet) {
	w.asked, w.addresses = w.asked[:0], w.addresses[:0]
	for _, p := range batch {
		inner, reason := v.encapParse(p)
		if inner == nil {
			w.drop(p, reason)
			continue
		}
		w.asked = append(w.asked, asked{p, inner})
		w.addresses = append(w.addresses, inner.DstU32())
	}
	v.routes.LookupBatch(w.addresses, w.hops)
	for i, a := range w.asked {
		verdict, reason := v.encap(a.p, a.inner, w.hops[i], &w.outer)
		if verdict != VerdictForward {
			w.drop(a.p, reason)
			continue
		}
		w.outgoing = append(w.outgoing, a.p)
	}
}

// decap does the same with the second, which asks for two addresses of each packet.
func (w *Worker) decap(v *view, batch []*Packet) {
	w.asked, w.addresses = w.asked[:0], w.addresses[:0]
	for _, p := range batch {
		inner, reason := v.decapParse(p)
		if inner == nil {
			w.drop(p, reason)
			continue
		}
		w.asked = append(w.asked, asked{p, inner})
		w.addresses = append(w.addresses, inner.SrcU32(), inner.DstU32())
	}
	v.routes.LookupBatch(w.addresses, w.hops)
	for i, a := range w.asked {
		verdict, reason := v.decap(a.p, a.inner, w.hops[2*i], w.hops[2*i+1])
		if verdict != VerdictForward {
			w.drop(a.p, reason)
			continue
		}
		w.outgoing = append(w.outgoing, a.p)
	}
}

// drop counts a packet that a ladder or a port has dropped, and takes notes of it. No ladder changes the length of what it
// drops.
func (w *Worker) drop(p *Packet, reason Reason) {
	p.Drop = reason
	w.tallies.dropped[reason].add(1, uint64(p.Len))
	w.notes.note(p, reason)
}
