package vrouter

import (
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync/atomic"

	"margay/vrouter/fib"
	"margay/vrouter/packet"
)

// batchSize is the number of packets a worker takes at once. A full batch of superpackets is 4 MiB of buffers.
const batchSize = 64

// Worker carries packets from one port to another, in one direction, or among the interfaces of one SwitchPort. It is
// locked to its thread and runs to completion: between Recv and Send there is no channel, lock, allocation, map or log
// line.
type Worker struct {
	router    *Router
	direction Direction
	in, out   Port
	switched  SwitchPort // in and out of a Transit worker
	kernel    flowSets   // see transit
	packets   []*Packet
	used      int // how many of packets are not as Reset leaves them
	outgoing  []*Packet
	asked     []asked
	addresses []uint32
	hops      []fib.Hop
	view      view // of the turn
	outer     outer
	tallies   tallies
	splitting splitting
	answerer  *answerer
	reply     Port // nil: nobody is told
	replies   []*Packet
	// podReplies go by the interface of the pod that they are for, on out.
	podReplies []*Packet
	notes      dropNotes
	taps       atomic.Pointer[taps] // nil while nobody captures
}

// asked is a packet between the two halves of its ladder.
type asked struct {
	p     *Packet
	inner packet.IPv4
}

// NewSwitch returns a worker that carries packets among the interfaces of port. It is the only one that receives and
// sends on it. rewritten are flows whose packets come back to the kernel, because it rewrites what it sends of them.
func (r *Router) NewSwitch(port SwitchPort, rewritten ...Flow) *Worker {
	return r.NewSwitches([]SwitchPort{port}, rewritten...)[0]
}

// NewSwitches is NewSwitch for the queues of one port. Both directions of a flow may come by different ones.
func (r *Router) NewSwitches(queues []SwitchPort, rewritten ...Flow) []*Worker {
	sets := make([]*flowSet, len(queues))
	for i := range sets {
		sets[i] = new(flowSet)
	}
	for _, f := range rewritten {
		sets[0].add(f.word())
	}
	workers := make([]*Worker, len(queues))
	for i, port := range queues {
		others := slices.Delete(slices.Clone(sets), i, i+1)
		workers[i] = r.newWorker(&Worker{direction: Transit, in: port, out: port, switched: port, kernel: flowSets{sets[i], others}})
	}
	return workers
}

// NewWorker returns a worker that receives from in, walks the ladder of direction and sends on out. Its counters are
// part of the router's from now on. The worker is the only one that receives from in and that sends on out.
func (r *Router) NewWorker(direction Direction, in, out Port) *Worker {
	return r.newWorker(&Worker{direction: direction, in: in, out: out})
}

func (r *Router) newWorker(w *Worker) *Worker {
	w.router = r
	w.packets = newPackets(batchSize)
	w.makeRoom(batchSize)
	w.outer.counter = uint16(rand.Uint32()) // not where every other worker and node begins
	r.mu.Lock()
	defer r.mu.Unlock()
	// A new slice, because Counters reads the old one outside the lock.
	r.workers = append(r.workers[:len(r.workers):len(r.workers)], w)
	for _, c := range r.captures {
		c.attach(w)
	}
	return w
}

// makeRoom makes what a walk with n packets needs.
func (w *Worker) makeRoom(n int) {
	w.outgoing = make([]*Packet, 0, 2*n) // a batch, and the pieces
	w.asked = make([]asked, n)
	w.addresses = make([]uint32, 2*n)
	w.hops = make([]fib.Hop, 2*n)
	w.answerer = newAnswerer()
	w.replies = make([]*Packet, 0, n)
	w.podReplies = make([]*Packet, 0, n)
}

// SetReply names the port on which the worker sends the ICMP errors about what it receives, beside its other port: it
// is the only one that sends there. Their source is 0.0.0.0, for the port to choose. Without it there are none. To be
// called before Run.
func (w *Worker) SetReply(reply Port) { w.reply = reply }

// Direction returns which ladder the worker walks.
func (w *Worker) Direction() Direction { return w.direction }

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
	w.reset()
	n, err := w.in.Recv(w.packets)
	if err != nil {
		return err
	}
	w.carry(n)
	return nil
}

// reset empties the packets of the last turn.
func (w *Worker) reset() {
	for _, p := range w.packets[:w.used] {
		p.Reset()
	}
	w.used = 0
}

// carry is the rest of a turn that has received n packets.
func (w *Worker) carry(n int) {
	taps := w.taps.Load()
	if taps != nil {
		taps.before(w.packets[:n])
	}
	w.forward(n)
	if taps != nil {
		taps.after(w.packets[:n])
	}
}

// forward is carry as if nobody could capture.
func (w *Worker) forward(n int) {
	w.used = n
	w.tallies.countBatch(n)
	w.view = view{routes: w.router.table.Forwarding(), state: w.router.state.Load()}
	w.walk(w.packets[:n])
	w.flush()
}

// walk takes a batch up the worker's ladder.
func (w *Worker) walk(batch []*Packet) {
	w.outer.begin(w.view.state)
	switch w.direction {
	case Encap:
		w.encap(&w.view, batch)
	case Decap:
		w.decap(&w.view, batch)
	default:
		w.transit(&transit{w.view, w.switched.Pods(), &w.kernel}, batch)
	}
}

// flush sends what the ladder has let through, and what it answers.
func (w *Worker) flush() {
	w.sendReplies(w.reply, w.replies)
	w.sendReplies(w.out, w.podReplies)
	w.replies, w.podReplies = w.replies[:0], w.podReplies[:0]
	w.splitting.used = 0
	if len(w.outgoing) == 0 {
		return
	}
	w.out.Send(w.outgoing)
	var sums [pathCount]struct{ packets, bytes uint64 }
	for _, p := range w.outgoing {
		if p.Drop != ReasonNotSet {
			w.drop(p, p.Drop)
			continue
		}
		s := &sums[w.path(p)]
		s.packets += uint64(p.Sent)
		s.bytes += uint64(p.Len)
	}
	for i := range sums {
		if s := &sums[i]; s.packets > 0 {
			w.tallies.forwarded[i].add(s.packets, s.bytes)
		}
	}
	w.outgoing = w.outgoing[:0]
}

// path names the way that a packet has gone.
func (w *Worker) path(p *Packet) path {
	switch {
	case w.direction != Transit:
		return path(w.direction)
	case p.Out == UnderlayInterface:
		return pathEncap
	case p.In == UnderlayInterface:
		return pathDecap
	case p.Out == HostInterface:
		return pathHost
	}
	return pathLocal
}

// transit walks the ladders with a batch from any interfaces. What comes from the underlay asks
// for two addresses.
func (w *Worker) transit(t *transit, batch []*Packet) {
	all, addresses, n, m := w.asked[:len(batch)], w.addresses[:2*len(batch)], 0, 0
	for _, p := range batch {
		var inner packet.IPv4
		var reason Reason
		switch p.In {
		case HostInterface:
			inner, reason = t.hostParse(p)
		case UnderlayInterface:
			inner, reason = t.decapParse(p)
		default:
			inner, reason = t.podParse(p)
		}
		if inner == nil {
			w.drop(p, reason)
			continue
		}
		all[n], addresses[m] = asked{p, inner}, inner.DstU32()
		n, m = n+1, m+1
		if p.In == UnderlayInterface {
			addresses[m] = inner.SrcU32()
			m++
		}
	}
	t.routes.LookupBatch(addresses[:m], w.hops)
	next := 0
	for i := range all[:n] {
		a := &all[i]
		var verdict Verdict
		var reason Reason
		hop := t.toward(w.hops[next], a.inner)
		next++
		switch a.p.In {
		case HostInterface:
			a.p.Out = UnderlayInterface
			verdict, reason = t.encap(a.p, a.inner, hop, &w.outer)
		case UnderlayInterface:
			outer := packet.IPv4(a.p.Bytes())
			verdict, reason = t.decap(a.p, outer, a.inner, w.hops[next], hop)
			next++
			w.noteECN(outer, a.inner, verdict)
			if verdict == VerdictForward {
				t.arrived(a.p, a.inner)
			}
		default:
			verdict, reason = t.pod(a.p, a.inner, hop, &w.outer)
		}
		w.settle(a, hop, verdict, reason)
	}
}

// encap walks the first ladder with a batch, and gathers what it lets through.
func (w *Worker) encap(v *view, batch []*Packet) {
	all, addresses, n := w.asked[:len(batch)], w.addresses[:len(batch)], 0
	for _, p := range batch {
		inner, reason := v.encapParse(p)
		if inner == nil {
			w.drop(p, reason)
			continue
		}
		all[n], addresses[n] = asked{p, inner}, inner.DstU32()
		n++
	}
	hops := w.hops[:n]
	v.routes.LookupBatch(addresses[:n], hops)
	for i := range hops {
		a := &all[i]
		hop := v.toward(hops[i], a.inner)
		verdict, reason := v.encap(a.p, a.inner, hop, &w.outer)
		w.settle(a, hop, verdict, reason)
	}
}

// decap does the same with the second, which asks for two addresses of each packet.
func (w *Worker) decap(v *view, batch []*Packet) {
	all, addresses, n := w.asked[:len(batch)], w.addresses[:2*len(batch)], 0
	for _, p := range batch {
		inner, reason := v.decapParse(p)
		if inner == nil {
			w.drop(p, reason)
			continue
		}
		all[n], addresses[2*n], addresses[2*n+1] = asked{p, inner}, inner.SrcU32(), inner.DstU32()
		n++
	}
	hops := w.hops[:2*n]
	v.routes.LookupBatch(addresses[:2*n], hops)
	for i := range all[:n] {
		a := &all[i]
		outer := packet.IPv4(a.p.Bytes())
		verdict, reason := v.decap(a.p, outer, a.inner, hops[2*i], hops[2*i+1])
		w.noteECN(outer, a.inner, verdict)
		if verdict == VerdictForward && v.tooLong(a.p, a.inner) {
			verdict = VerdictSplit
		}
		w.settle(a, 0, verdict, reason)
	}
}

// noteECN counts what the tunnel's exit should take note of (RFC 6040, 4.2) in what it lets through.
func (w *Worker) noteECN(outer, inner packet.IPv4, verdict Verdict) {
	if verdict == VerdictForward && packet.UnusedECN(outer, inner) {
		w.tallies.more[moreECNUnused].add(1, uint64(len(inner)))
	}
}

// settle does with a packet on its way to hop what the ladder has decided.
func (w *Worker) settle(a *asked, hop fib.Hop, verdict Verdict, reason Reason) {
	if verdict == VerdictForward {
		w.outgoing = append(w.outgoing, a.p)
		return
	}
	w.refuse(a, hop, verdict, reason)
}

// refuse is settle for what cannot go as it is.
//
//go:noinline
func (w *Worker) refuse(a *asked, hop fib.Hop, verdict Verdict, reason Reason) {
	if verdict == VerdictSplit {
		w.split(a.p, a.inner, hop)
		return
	}
	w.drop(a.p, reason)
	w.answer(a.p, a.inner, hop, reason)
}

// drop counts a packet that a ladder or a port has dropped, and takes notes of it. No ladder changes the length of what it
// drops.
func (w *Worker) drop(p *Packet, reason Reason) {
	p.Drop = reason
	w.tallies.dropped[reason].add(1, uint64(p.Len))
	var pod uint32
	if reason == ReasonSpoofed {
		pod = w.switched.Pods().address(p.In)
	}
	w.notes.note(p, reason, pod)
}
