package vrouter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"margay/vrouter/packet"
)

// Rung is one step of a ladder, as Trace has found it.
type Rung struct {
	Name   string // what was asked
	Detail string // what was found; may be empty
	Passed bool
}

// Traced is what the ladder does with a packet.
type Traced struct {
	Verdict Verdict
	Reason  Reason // for VerdictDrop
	Rungs   []Rung // as far as the packet came
	Packet  []byte // for VerdictForward: as it is sent
	Out     Out    // for VerdictForward: where to
	// Pieces is how many packets leave, if it had to be split: Packet is the first.
	Pieces int
	// Answer is the ICMP error that the sender is told by; nil: none. Its source is 0.0.0.0 where the kernel chooses it.
	Answer []byte
	// OutInterface is the host's side of the pod's interface, for OutPod.
	OutInterface string
	// Carrier says who would carry out what the ladder decides. LeftAlone says why it is a worker where programs in the kernel
	// forward other packets, or why it is the kernel, which the ladder is not asked about then.
	Carrier   Carrier
	LeftAlone string
	// Inside says of CarrierTC that the packet is put behind the pod's interface, on the pod's own side.
	Inside bool
	// Route is the longest match for the inner destination, Back that for the inner source; the zero Route where there is
	// none, or nobody came to ask.
	Route, Back Route
}

// Out is where a packet leaves the vRouter.
type Out string

// The ways out.
const (
	OutHost     Out = "host" // vr0: the node's kernel
	OutUnderlay Out = "underlay"
	OutPod      Out = "pod" // a pod's own interface
)

// ErrNoSwitch is returned for Transit where the vRouter does not have the pods' own interfaces.
var ErrNoSwitch = errors.New("the pods' packets come by the kernel")

// rung is a step of a ladder: the reasons that end there.
type rung struct {
	name    string
	reasons []Reason
	detail  func(*tracing) string
}

// ladders are the rungs in the order in which ladder.go asks them; that is what makes those before the one that ends it
// passed ones. TestRungsAreInTheLaddersOrder holds them to it.
var ladders = map[Direction][]rung{
	Encap: {
		{"this node is configured", []Reason{ReasonNotConfigured}, nil},
		{"a valid IPv4 header", []Reason{ReasonNotIPv4, ReasonMalformed, ReasonBadChecksum}, nil},
		{"route to the destination", []Reason{ReasonNoRoute, ReasonNoPod, ReasonDirectRoute, ReasonBlackhole, ReasonGatewaySelf},
			func(t *tracing) string { return routeText(t.Route) }},
		{"no tunnel in the tunnel", []Reason{ReasonNestedTunnel}, nil},
		{"it fits, or may be split", []Reason{ReasonOffloadUnsupported, ReasonPacketTooBig}, (*tracing).room},
		{"encapsulate (IP-in-IP)", nil, (*tracing).outer},
	},
	Decap: {
		{"this node is configured", []Reason{ReasonNotConfigured}, nil},
		{"a valid outer header, protocol 4", []Reason{ReasonOffloadUnsupported, ReasonOuterMalformed}, nil},
		{"for this node, and whole", []Reason{ReasonOuterNotForUs, ReasonOuterFragment}, nil},
		{"from a node of the cluster", []Reason{ReasonOuterSourceNode}, func(t *tracing) string { return t.from.String() }},
		{"a valid inner packet, no tunnel in the tunnel", []Reason{ReasonECNIllegal, ReasonInnerMalformed, ReasonNestedTunnel}, nil},
		{"the way back to the source leads to that node", []Reason{ReasonInnerSource},
			func(t *tracing) string { return routeText(t.Back) }},
		{"the destination is this node's", []Reason{ReasonInnerDestination},
			func(t *tracing) string { return routeText(t.Route) }},
		{"take the outer header off", nil, nil},
	},
	Transit: {
		{"this node is configured", []Reason{ReasonNotConfigured}, nil},
		{"a valid IPv4 header", []Reason{ReasonNotIPv4, ReasonMalformed, ReasonBadChecksum}, nil},
		{"the source is the pod's own address", []Reason{ReasonSpoofed}, nil},
		{"route to the destination", []Reason{ReasonNoRoute, ReasonNoPod, ReasonDirectRoute, ReasonBlackhole, ReasonGatewaySelf},
			func(t *tracing) string { return routeText(t.Route) }},
		{"no tunnel in the tunnel", []Reason{ReasonNestedTunnel}, nil},
		{"time to live", []Reason{ReasonTTLExpired}, nil},
		{"it fits, or may be split", []Reason{ReasonOffloadUnsupported, ReasonPacketTooBig}, (*tracing).room},
		{"way out", nil, (*tracing).way},
	},
}

// tracing is one trace under way.
type tracing struct {
	Traced
	state  *state
	length int        // of the packet that goes in, in bytes
	from   netip.Addr // the outer source
}

// outer describes the outer header that the packet has got.
func (t *tracing) outer() string {
	o, fault := packet.ParseIPv4(t.Packet)
	if fault != 0 || o.Protocol() != packet.ProtocolIPIP {
		return ""
	}
	return fmt.Sprintf("%s to %s, %d bytes, TTL %d, TOS %#02x", o.Src(), o.Dst(), o.TotalLen(), o.TTL(), o.TOS())
}

// room compares the packet with the way to its next hop.
func (t *tracing) room() string {
	mtu := t.state.config.MTU
	g := t.Route.NextHop.Gateway
	if o, fault := packet.ParseIPv4(t.Packet); fault == 0 { // of several gateways the one that was taken
		g = o.Dst()
	}
	if g.Is4() {
		b := g.As4()
		mtu = t.state.mtuTo(binary.BigEndian.Uint32(b[:]))
	}
	text := fmt.Sprintf("%d bytes, MTU %d", t.length, mtu)
	if t.Pieces > 1 {
		text += fmt.Sprintf(": %d pieces", t.Pieces)
	}
	return text
}

// way describes where a packet from a pod goes.
func (t *tracing) way() string {
	switch t.Out {
	case OutUnderlay:
		return "IP-in-IP, " + t.outer()
	case OutPod:
		return "the pod's interface " + t.OutInterface
	}
	return "to the kernel, by vr0: not plain forwarding between pods"
}

func routeText(r Route) string {
	if !r.Prefix.IsValid() {
		return "none"
	}
	return r.Prefix.String() + " " + r.NextHop.String()
}

// Trace walks a ladder with the packet b, which begins with its IP header, and says what became of it. Encap is for what
// comes by vr0, Decap by the underlay, Transit from a pod by its own interface, with ErrNoSwitch where the vRouter has none.
// It is the workers' own code that decides, on a worker that is connected to nothing: nothing is sent and nothing counted.
// Other errors say that b cannot be a packet.
func (r *Router) Trace(d Direction, b []byte) (Traced, error) {
	ladder, ok := ladders[d]
	if !ok {
		return Traced{}, fmt.Errorf("direction %d: expected encap, decap or transit", d)
	}
	if len(b) == 0 || len(b) > MaxPacket {
		return Traced{}, fmt.Errorf("packet: %d bytes: expected 1 to %d", len(b), MaxPacket)
	}
	t := tracing{state: r.state.Load(), length: len(b)}
	p := NewPacket()
	p.Len = copy(p.Buf[p.Off:], b)
	inner := p.Bytes()
	if outer, fault := packet.ParseIPv4(inner); fault == 0 && d == Decap {
		t.from, inner = outer.Src(), outer.Payload()
	}
	var src uint32
	if v, fault := packet.ParseIPv4(inner); fault == 0 {
		t.Route, _ = r.table.Match(v.Dst())
		t.Back, _ = r.table.Match(v.Src())
		src = v.SrcU32()
	}
	w := r.newScratch(d)
	if w.switched != nil {
		switch d {
		case Encap:
			p.In = HostInterface
		case Decap:
			p.In = UnderlayInterface
		default:
			if p.In = w.switched.Pods().find(src); p.In == noInterface {
				return Traced{}, ErrNoSwitch
			}
		}
	} else if d == Transit {
		return Traced{}, ErrNoSwitch
	}
	if port, ok := r.steering(); ok && d == Transit {
		if why := port.LeavesToKernel(b); why != "" {
			t.Verdict, t.Packet, t.Pieces, t.Out = VerdictForward, slices.Clone(b), 1, OutHost
			t.Carrier, t.LeftAlone = CarrierKernel, why
			return t.Traced, nil
		}
	}
	w.view = view{routes: r.table.Forwarding(), state: t.state}
	w.walk([]*Packet{p})
	first := w.out.(*nowhere).first
	if len(w.outgoing) > 0 && first == nil {
		first = w.outgoing[0]
	}
	switch answers := append(w.replies, w.podReplies...); {
	case p.Drop != ReasonNotSet || first == nil:
		t.Reason = p.Drop
		if len(answers) > 0 {
			t.Answer = slices.Clone(answers[0].Bytes())
		}
	default:
		t.Verdict, t.Packet, t.Pieces = VerdictForward, slices.Clone(first.Bytes()), p.Sent
		r.traceOut(w, first, &t.Traced)
	}
	t.climb(ladder)
	t.Carrier = CarrierWorker
	if port, ok := r.programs(); ok && d != Encap {
		if t.LeftAlone, t.Inside = port.LeavesAlone(d, b); t.LeftAlone == "" {
			t.Carrier = CarrierTC
		}
	}
	return t.Traced, nil
}

// programs returns the port that has programs forward packets without a worker, if there is one.
func (r *Router) programs() (Programs, bool) {
	for _, w := range r.Workers() {
		if port, ok := w.in.(Programs); ok {
			return port, port.HasPrograms()
		}
	}
	return nil, false
}

// steering returns the port that leaves pods' packets to the kernel before a worker sees them, if there is one.
func (r *Router) steering() (Steering, bool) {
	for _, w := range r.Workers() {
		if port, ok := w.in.(Steering); ok {
			return port, true
		}
	}
	return nil, false
}

// traceOut says where a forwarded packet leaves.
func (r *Router) traceOut(w *Worker, p *Packet, t *Traced) {
	switch {
	case w.direction == Encap, w.direction == Transit && p.Out == UnderlayInterface:
		t.Out = OutUnderlay
	case w.direction == Decap, p.Out == HostInterface:
		t.Out = OutHost
	default:
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], w.switched.Pods().address(p.Out))
		r.mu.Lock()
		defer r.mu.Unlock()
		t.Out = OutPod
		if pod := r.pods.pods[netip.AddrFrom4(a)]; pod != nil {
			t.OutInterface = pod.name
		}
	}
}

// climb lists the rungs up to the one at which the packet ended.
func (t *tracing) climb(ladder []rung) {
	for _, step := range ladder {
		found := Rung{Name: step.name, Passed: t.Verdict == VerdictForward || !slices.Contains(step.reasons, t.Reason)}
		if step.detail != nil {
			found.Detail = step.detail(t)
		}
		t.Rungs = append(t.Rungs, found)
		if !found.Passed {
			return
		}
	}
	if t.Verdict != VerdictForward { // a reason that the ladder above does not name
		t.Rungs = []Rung{{Name: "the ladder", Detail: t.Reason.String()}}
	}
}

// newScratch returns a worker for one packet that no port feeds and whose counters nobody reads: of direction d, or a Transit
// worker where the router has one, because that one does it all.
func (r *Router) newScratch(d Direction) *Worker {
	w := &Worker{router: r, direction: d, out: &nowhere{}}
	for _, real := range r.Workers() {
		if real.switched != nil {
			w.direction = Transit
			w.kernel.others = append(w.kernel.others, real.kernel.own)
		}
		if real.reply != nil && real.direction == w.direction {
			w.reply = w.out
		}
	}
	if len(w.kernel.others) > 0 {
		w.switched, w.kernel.own = r.takenPods(), new(flowSet)
	}
	w.makeRoom(1)
	return w
}

// takenPods is a port that has the pods of the real one, whose own table belongs to its worker's thread; where it does not tell,
// all those that the control plane has told of.
func (r *Router) takenPods() SwitchPort {
	if port, ok := r.steering(); ok {
		return &podTable{pods: port.Taken()}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var addresses []netip.Addr
	for _, p := range r.pods.all() {
		addresses = append(addresses, p.Address)
	}
	return &podTable{pods: NewPods(addresses, nil)}
}

type podTable struct {
	SwitchPort
	pods *Pods
}

func (t *podTable) Pods() *Pods { return t.pods }

// nowhere is the port of a scratch worker. What is sent on it before the trace is over, the pieces of a very long packet, it
// forgets but for the first.
type nowhere struct {
	Port
	first *Packet
}

func (n *nowhere) Send(batch []*Packet) {
	for _, p := range batch {
		if n.first == nil {
			n.first = &Packet{Buf: slices.Clone(p.Buf), Off: p.Off, Len: p.Len, In: p.In, Out: p.Out}
		}
		p.Sent = 1
	}
}
