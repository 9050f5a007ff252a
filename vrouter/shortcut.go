package vrouter

import (
	"encoding/binary"
	"net/netip"
)

// Terms are what becomes of a plain packet beside where its route leads, for a port that has the kernel forward such
// packets itself. They are immutable.
type Terms struct {
	Configured bool
	Config     Config
	Options    Options

	state *state
}

// MTU returns the length in bytes of the longest packet that can be sent into the tunnel to gateway, an IPv4 address.
func (t Terms) MTU(gateway netip.Addr) int {
	b := gateway.As4()
	return t.state.mtuTo(binary.BigEndian.Uint32(b[:]))
}

// IsNode reports whether a is a node of this cluster.
func (t Terms) IsNode(a netip.Addr) bool { return t.state.isNode(a) }

// Terms returns them as they are now.
func (r *Router) Terms() Terms {
	s := r.state.Load()
	return Terms{Configured: s.configured, Config: s.config, Options: s.options, state: s}
}

// OnTerms names the function that is told whenever Terms returns others than before. It must not call the router, nor
// block.
func (r *Router) OnTerms(tell func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.termsTo = tell
}

// store hands next to the workers, and says so to who asked to be told. r.mu is held.
func (r *Router) store(next *state) {
	r.state.Store(next)
	if r.termsTo != nil {
		r.termsTo()
	}
}

// OnCapture names the function that is told whether captures run: then all packets have to come to a worker. It must not
// call the router, nor block.
func (r *Router) OnCapture(tell func(running bool)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.capturesTo = tell
}

// tellCaptures tells who asked to be told. r.mu is held.
func (r *Router) tellCaptures() {
	if r.capturesTo != nil {
		r.capturesTo(len(r.captures) > 0)
	}
}

// KindTo returns what becomes of a packet to a by its route alone; false: there is none.
func (r *Router) KindTo(a netip.Addr) (Kind, bool) {
	route, found := r.table.Match(a)
	return route.NextHop.Kind, found
}

// Carried is what a port has forwarded without a worker: packets, superpackets as the segments they stand for, and the
// bytes of both as a worker would count them.
type Carried struct{ Encap, Decap, Local Counter }

// Programs is a port that may have programs in the kernel forward some packets without a worker. Its methods may be called
// from any goroutine at any time.
type Programs interface {
	// HasPrograms reports whether it does.
	HasPrograms() bool
	// Carried returns what they have forwarded.
	Carried() Carried
	// LeavesAlone says why the programs would not forward the packet b, which begins with its IP header, as things stand:
	// d is Transit for one that a pod sends, and Decap for one from the underlay. It is empty for one that they forward, and
	// inside says then that they put it behind a pod's interface, on the pod's own side.
	LeavesAlone(d Direction, b []byte) (why string, inside bool)
}

// Steering is a SwitchPort that leaves a part of what pods send to the kernel, which takes it from the pod's interface: no worker
// sees it. Its methods may be called from any goroutine at any time.
type Steering interface {
	// Taken returns the pods whose interfaces the port has now.
	Taken() *Pods
	// LeavesToKernel says why a packet b that such a pod sends, which begins with its IP header, is the kernel's as things stand.
	// It is empty for one that a worker, or a program of Programs, gets.
	LeavesToKernel(b []byte) string
}

// Carrier is who carries out what the ladder decides about a packet.
type Carrier string

// The carriers.
const (
	CarrierWorker Carrier = "user space" // a worker
	CarrierTC     Carrier = "tc"         // BPF programs at tc, before the kernel's stack sees the packet
	CarrierKernel Carrier = "kernel"     // its stack, which has the packet from the pod's interface
)

// countCarried adds what a port has forwarded by itself.
func countCarried(p Port, forwarded *[pathCount]Counter) {
	c, ok := p.(Programs)
	if !ok {
		return
	}
	carried := c.Carried()
	for path, add := range map[path]Counter{pathEncap: carried.Encap, pathDecap: carried.Decap, pathLocal: carried.Local} {
		forwarded[path].Packets += add.Packets
		forwarded[path].Bytes += add.Bytes
	}
}
