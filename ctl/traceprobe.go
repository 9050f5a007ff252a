package ctl

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"margay/agent/api"
	"margay/vrouter/packet"
)

const (
	// One packet may be lost to a full queue, or to ARP: only several say that none arrives.
	maxProbes = 4
	probeWait = 700 * time.Millisecond // for each
	quiet     = 100 * time.Millisecond // without a sighting, once enough has been seen
)

// probing is what became of a packet that was sent for real.
type probing struct {
	Sent     int    `json:"sent"`
	Arrived  bool   `json:"arrived"`
	Answered bool   `json:"answered"`
	Refused  string `json:"refused,omitempty"` // by the kernel that was to send it
	Told     string `json:"told,omitempty"`    // the ICMP error that the sender got
	Error    string `json:"error,omitempty"`   // why it could not be tried
	// Blind are nodes of the way that did not watch, with the reason.
	Blind     map[string]string `json:"blind,omitempty"`
	Sightings []api.Sighting    `json:"sightings"`

	mu             sync.Mutex
	news           chan struct{}
	path           []string // the nodes, in the order of the way there
	source, target place
	reached        bool // an ICMP error says that the destination has it
}

// probe sends the packet of a trace, and judges anew by what is seen.
func (f *fleet) probe(ctx context.Context, r *traceResult, p *probe, oneWay bool) {
	p.mark = uint16(1 + rand.IntN(1<<16-1))
	o := &probing{Sightings: []api.Sighting{}, news: make(chan struct{}, 1), source: r.Source, target: r.Destination, Blind: map[string]string{}}
	r.Probe = o
	for _, s := range r.There.Segments {
		o.path = append(o.path, s.Node)
	}
	if n := len(r.There.Segments); n > 0 && r.There.Outcome == api.Delivered { // a filter may have rewritten the destination
		if arrived, fault := packet.ParseIPv4(r.There.Segments[n-1].Packet); fault == packet.FaultNone {
			o.target.Address, o.target.Node = arrived.Dst(), r.There.Segments[n-1].Node
		}
	}
	for _, n := range []string{r.Source.Node, r.Destination.Node} {
		if n != "" && !slices.Contains(o.path, n) {
			o.path = append(o.path, n)
		}
	}
	o.run(ctx, f, p.build(r.Source.Address, r.Destination.Address, false), oneWay || p.proto != "icmp" && p.proto != "tcp")
	slices.SortStableFunc(o.Sightings, func(a, b api.Sighting) int {
		return cmp.Or(-cmp.Compare(a.What, b.What), o.rank(a)-o.rank(b), a.Time.Compare(b.Time))
	})
	r.judgeProbe(oneWay || p.proto != "icmp" && p.proto != "tcp")
}

// rank says how far on its way a packet was, when it was seen: by node, and within a node by what it passes in turn. Clocks of
// several machines, and sockets of several namespaces, do not say.
func (o *probing) rank(s api.Sighting) int {
	const stages = 8
	node, from := slices.Index(o.path, s.Node), o.source
	if s.What == api.SawAnswer {
		node, from = len(o.path)-1-node, o.target
	}
	stage := 0
	switch {
	case s.Pod != "" && s.Pod == from.Address.String():
	case s.Pod != "":
		stage = 5
	case s.Outer != "" && !s.Outgoing:
		stage = 1
	case s.Outer == "" && !s.Outgoing:
		stage = 2
	case s.Outer == "":
		stage = 3
	default:
		stage = 4
	}
	return node*stages + stage
}

// run starts the watches, and sends until enough has been seen.
func (o *probing) run(ctx context.Context, f *fleet, pkt []byte, oneWay bool) {
	ctx, cancel := context.WithTimeout(ctx, maxProbes*probeWait+2*agentTimeout)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	began := make(chan struct{}, len(o.path))
	for _, node := range o.path {
		wg.Go(func() {
			first := sync.OnceFunc(func() { began <- struct{}{} })
			c, err := f.client(node)
			if err == nil {
				err = c.WatchProbe(ctx, api.ProbeRequest{Packet: pkt, Inside: []netip.Addr{o.source.Address, o.target.Address}}, func(s api.Sighting) {
					first()
					o.saw(s)
				})
			}
			if err != nil && ctx.Err() == nil {
				o.mu.Lock()
				o.Blind[node] = err.Error()
				o.mu.Unlock()
			}
			first()
		})
	}
	for range o.path {
		select {
		case <-began:
		case <-time.After(agentTimeout):
		}
	}
	c, err := f.client(o.source.Node)
	if err != nil {
		o.Error = err.Error()
		return
	}
	for ; o.Sent < maxProbes && !o.settled(oneWay); o.wait(oneWay) {
		reply, err := c.SendProbe(ctx, api.ProbeRequest{Packet: pkt, Entry: o.source.Entry})
		if err != nil {
			o.Error = err.Error()
			return
		}
		if o.Refused = reply.Refused; o.Refused != "" {
			return
		}
		o.Sent++
	}
	// The nodes tell one by one: what the others have seen of the last packet is on its way.
	for {
		select {
		case <-o.news:
		case <-time.After(quiet):
			return
		}
	}
}

// wait gives one packet its time.
func (o *probing) wait(oneWay bool) {
	for limit := time.After(probeWait); !o.settled(oneWay); {
		select {
		case <-o.news:
		case <-limit:
			return
		}
	}
}

// settled reports whether nothing more has to be seen.
func (o *probing) settled(oneWay bool) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.Answered || o.Told != "" || oneWay && o.Arrived
}

// saw takes in one sighting.
func (o *probing) saw(s api.Sighting) {
	if s.What == "" {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.Sightings = append(o.Sightings, s)
	at := func(p place) bool {
		if s.Outgoing || s.Outer != "" || s.Node != p.Node {
			return false
		}
		return p.Entry == api.EntryHost && s.Pod == "" || p.Entry == api.EntryPod && s.Pod == p.Address.String()
	}
	switch {
	case s.What == api.SawProbe && at(o.target):
		o.Arrived = true
	case s.What == api.SawAnswer && at(o.source):
		o.Arrived, o.Answered = true, true // whatever the watch there has still to tell
	case s.What == api.SawError && at(o.source):
		o.Told = fmt.Sprintf("%s by ICMP type %d code %d", s.From, s.Type, s.Code)
		if s.MTU > 0 {
			o.Told += fmt.Sprintf(", MTU %d", s.MTU)
		}
		const unreachable, protocol, port = 3, 2, 3
		o.reached = s.Type == unreachable && (s.Code == protocol || s.Code == port) && s.From == o.target.Address
	}
	select {
	case o.news <- struct{}{}:
	default:
	}
}

// last is the furthest that one kind of packet was seen.
func (o *probing) last(what string) (s api.Sighting, ok bool) {
	for _, x := range o.Sightings {
		if x.What == what && (!ok || o.rank(x) >= o.rank(s)) {
			s, ok = x, true
		}
	}
	return s, ok
}

// place says where a sighting was.
func (o *probing) place(s api.Sighting) string {
	text := "coming in by " + s.Interface
	if s.Outgoing {
		text = "leaving by " + s.Interface
	}
	if s.Pod != "" {
		text += " in the pod " + s.Pod
	}
	if s.Outer != "" {
		text += ", in IP-in-IP from " + s.Outer
	}
	return fmt.Sprintf("at %s, %s", s.Node, text)
}

// lost says where a packet was seen last, and what is next to look at.
func (o *probing) lost(what string, path []string) (why, fix string) {
	s, ok := o.last(what)
	if !ok {
		return "nowhere", "look at the pod that sends it"
	}
	why = o.place(s)
	i := slices.Index(path, s.Node)
	switch {
	case s.Outer != "" && s.Outgoing && i >= 0 && i+1 < len(path):
		return why + fmt.Sprintf(", and nothing on %s", path[i+1]),
			fmt.Sprintf("look between %s and %s for a filter of IP protocol 4, and for an MTU of less than %d bytes", s.Node, path[i+1], s.Length)
	case s.Pod != "" && !s.Outgoing:
		return why, "look inside the pod, for a filter or for who should answer"
	}
	return why, fmt.Sprintf("look at %s: `margayctl drops --node %s`", s.Node, s.Node)
}

// judgeProbe replaces the verdict by what was seen, and leaves what the trace has said as a note where that is another. Where
// both say that it does not arrive, the trace knows better why.
func (r *traceResult) judgeProbe(oneWay bool) {
	o, before := r.Probe, *r
	route := fmt.Sprintf("%s → %s", r.Source, r.Destination)
	say := func(verdict string, status int, format string, args ...any) {
		r.Verdict, r.Status, r.Line = verdict, status, fmt.Sprintf(format, args...)
	}
	// The trace's reason holds when it is about what comes behind the furthest place at which the packet was seen.
	inPod := r.There.At == o.target.Node && r.There.By == "pod"
	explained := before.Status == exitNotArrived && (!o.Arrived || r.There.Outcome == api.Delivered || inPod)
	why, fix := o.lost(api.SawProbe, o.path)
	switch {
	case o.Error != "":
		r.Notes = append(r.Notes, "no packet was sent: "+o.Error)
		if before.Status != exitNotArrived {
			say("unknown", exitUnknown, "unknown whether it arrives: %s: no packet could be sent: %s", route, o.Error)
		}
	case o.Answered:
		say("arrives", 0, "arrives: %s, and the answer comes back: a real packet was answered", route)
	case o.reached:
		say("arrives", 0, "arrives: %s: a real packet did, and the destination says that nobody listens: %s", route, o.Told)
	case explained && o.Refused != "":
		r.Notes = append(r.Notes, "the sender's kernel refuses to send a real packet: "+o.Refused)
	case explained && o.Told != "":
		r.Notes = append(r.Notes, "the sender of a real packet was told by "+o.Told)
	case explained:
		r.Notes = append(r.Notes, fmt.Sprintf("of %d real packets none was answered: the last was seen %s", o.Sent, why))
	case o.Refused != "":
		say("does not arrive", exitNotArrived, "does not arrive: %s: at %s: the sender's kernel refuses to send it: %s", route, r.Source.Node, o.Refused)
	case o.Told != "":
		say("does not arrive", exitNotArrived, "does not arrive: %s: the sender of a real packet was told by %s", route, o.Told)
	case o.Arrived && oneWay:
		if r.There.Outcome == api.Delivered && !r.doubtIn(o.target.Node) { // what is inside the pod nothing else has proved
			say("arrives", 0, "arrives: %s: a real packet did", route)
		}
	case o.Arrived:
		why, fix := o.lost(api.SawAnswer, reversed(o.path))
		if _, any := o.last(api.SawAnswer); !any {
			why, fix = "the destination does not answer", "look there for a filter, and for who should answer"
		}
		say("does not arrive", exitNotArrived, "arrives, but the answer does not come back: %s: of %d real packets: %s. To mend it: %s", route, o.Sent, why, fix)
	case r.There.Outcome == api.Left:
		say(before.Verdict, exitUnknown, "unknown whether it arrives: %s: of %d real packets none was answered; the last was seen %s", route, o.Sent, why)
	case len(o.Blind) > 0:
		say("unknown", exitUnknown, "unknown whether it arrives: %[1]s: of %[2]d real packets none was answered, and %[4]s did not watch; the last was seen %[3]s. To find out: see whether %[4]s is up, and why its agent did not watch, below", route, o.Sent,
			why, strings.Join(sortedKeys(o.Blind), ", "))
	default:
		say("does not arrive", exitNotArrived, "does not arrive: %s: of %d real packets none did: the last was seen %s. To mend it: %s", route, o.Sent, why, fix)
	}
	if before.Line != r.Line && (before.Status != r.Status || r.Status != 0) {
		r.Notes = append(r.Notes, "without a real packet: "+before.Line)
	}
}

// doubtIn reports whether the way there has a doubt about a node.
func (r *traceResult) doubtIn(node string) bool {
	return slices.ContainsFunc(r.There.Segments, func(s api.Segment) bool { return s.Node == node && len(s.Doubts) > 0 })
}

func reversed(path []string) []string {
	out := slices.Clone(path)
	slices.Reverse(out)
	return out
}

// print lists the sightings.
func (o *probing) print(w io.Writer) error {
	if o == nil {
		return nil
	}
	fmt.Fprintf(w, "\nprobe: %d sent, arrived: %t, answered: %t\n", o.Sent, o.Arrived, o.Answered)
	for _, n := range sortedKeys(o.Blind) {
		fmt.Fprintf(w, "  %s did not watch: %s\n", n, o.Blind[n])
	}
	tw := tabwriter.NewWriter(w, 0, 1, 2, ' ', 0)
	said := map[string]bool{} // one line of the several packets that were sent
	for _, s := range o.Sightings {
		line := s.What + "\t" + o.place(s)
		if !said[line] {
			said[line] = true
			fmt.Fprintf(tw, "  %s\t%s\n", s.Time.Local().Format("15:04:05.000000"), line)
		}
	}
	return tw.Flush()
}
