package ctl

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"margay/agent/api"
	"margay/vrouter/packet"
)

// Exit statuses of trace: 0 only for a packet that arrives, and 2 for a trace that could not be made.
const (
	exitNotArrived = 1
	exitNoTrace    = 2
	exitUnknown    = 3
)

// maxHops bounds a trace, as a loop between nodes would have no end.
const maxHops = 16

// way is a packet's way from one end to the other.
type way struct {
	Segments []api.Segment `json:"nodes"`
	Outcome  api.Outcome   `json:"outcome"` // of the last
	At       string        `json:"at"`      // the last node that was asked, or should have been
	By       string        `json:"by,omitempty"`
	Rung     string        `json:"rung,omitempty"`
	Reason   string        `json:"reason,omitempty"`
	Why      string        `json:"why,omitempty"`
	Fix      string        `json:"fix,omitempty"`

	packet []byte // as it begins
}

// traceResult is what `margayctl trace -o json` prints.
type traceResult struct {
	Verdict     string   `json:"verdict"` // arrives, does not arrive, unknown, leaves the cluster
	Status      int      `json:"status"`  // the exit status
	Line        string   `json:"line"`
	Source      place    `json:"source"`
	Destination place    `json:"destination"`
	Packet      string   `json:"packet"`
	There       way      `json:"there"`
	Back        *way     `json:"back,omitempty"`
	Probe       *probing `json:"probe,omitempty"`
	Notes       []string `json:"notes,omitempty"`
}

func newTraceCommand() *cobra.Command {
	var (
		p      probe
		oneWay bool
		noEcho bool
		send   bool
		output string
	)
	cmd := &cobra.Command{
		Use:   "trace SOURCE DESTINATION",
		Short: "The path a packet would take through every node and back, rung by rung, and why it does not arrive",
		Long: `trace asks every node on the way what it would do with a packet, without sending it: the vRouter walks its own
forwarding ladder with it, and the kernel is asked for its routes, the reverse path filter included. What the kernel
decides is marked kernel, what the vRouter decides vrouter. What lies between two nodes is asked by an ICMP echo as long as
the packet, which the one sends to the other the same way, by IP-in-IP from tunnel address to tunnel address; --no-echo
does without.

SOURCE and DESTINATION are addresses, pods (NAME or NAMESPACE/NAME) or nodes; DESTINATION may also lie outside.

The first line is the verdict: that the packet arrives and the answer comes back, or where it ends, why, and what would
mend it. The exit status is 0 only if it arrives; 1 if it does not; 2 if no trace could be made (a wrong argument, no
datastore); 3 if it cannot be told: somebody could not be asked, or the packet leaves the cluster, where nobody can be.
The first line says then what could not be told, and how to find out.

With --probe the packet is sent for real, out of the pod, and watched for on all nodes of its way and inside both pods. Then
the verdict is what was seen, and what lies between the nodes is part of it.`,
		Example: `  margayctl trace lab-node1-pod1 lab-node2-pod1
  margayctl trace 10.244.1.2 10.244.2.5 --proto tcp --dport 443
  margayctl trace default/web-0 node2 --size 1500 --df -o json
  margayctl trace lab-node1-pod1 lab-node2-pod1 --size 1480 --df --probe`,
		Args: func(cmd *cobra.Command, args []string) error {
			return withStatus(exitNoTrace, cobra.ExactArgs(2)(cmd, args))
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			defer func() { err = withStatus(exitNoTrace, err) }()
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			if err := p.check(); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 4*callTimeout)
			defer cancel()
			f, err := openFleet(ctx, cmd)
			if err != nil {
				return err
			}
			f.noEcho = noEcho || send // what is sent for real says more
			r, err := runTrace(ctx, f, &p, args[0], args[1], oneWay)
			if err != nil {
				return err
			}
			if send {
				f.probe(ctx, r, &p, oneWay)
			}
			if output == "json" {
				err = printJSON(cmd.OutOrStdout(), r)
			} else {
				err = r.print(cmd.OutOrStdout())
			}
			if err == nil && r.Status != 0 {
				return ExitError{r.Status}
			}
			return err
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return withStatus(exitNoTrace, err) })
	p.flags(cmd)
	cmd.Flags().BoolVar(&oneWay, "one-way", false, "do not ask for the way back")
	cmd.Flags().BoolVar(&noEcho, "no-echo", false, "do not have the nodes of the way ping each other: what lies between them is not asked then")
	cmd.Flags().BoolVar(&send, "probe", false, "send the packet for real, and watch for it and its answer on every node of the way")
	addOutput(cmd, &output, "text", "text or json")
	return cmd
}

func runTrace(ctx context.Context, f *fleet, p *probe, from, to string, oneWay bool) (*traceResult, error) {
	src, err := f.find(from)
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	dst, err := f.find(to)
	if err != nil {
		return nil, fmt.Errorf("destination: %w", err)
	}
	if src.Node == "" {
		return nil, fmt.Errorf("source: %s belongs to no pod and no node of the cluster: it is in no block of the datastore", from)
	}
	if from == src.Name && src.Entry == api.EntryHost {
		src.Address = netip.IPv4Unspecified() // what the node's own kernel takes
	}
	r := &traceResult{Source: src, Destination: dst}
	r.Packet = describe(p.build(src.Address, dst.Address, false), p.size)
	r.There = f.follow(ctx, src, p.build(src.Address, dst.Address, false), dst.Address, nil)
	f.note(r, src.Address)
	f.note(r, dst.Address)
	if r.There.Outcome == api.Delivered && !oneWay {
		last := r.There.Segments[len(r.There.Segments)-1]
		arrived, fault := packet.ParseIPv4(last.Packet)
		if fault != packet.FaultNone {
			return nil, fmt.Errorf("%s: the agent gave a packet that is none: %s", last.Node, fault)
		}
		back := dst
		back.Node, back.Address = last.Node, arrived.Dst()
		back.Entry = api.EntryHost
		if strings.HasPrefix(last.Via, "cali") {
			back.Entry = api.EntryPod
		}
		// The way back through a network that has kept silent need not be asked, too.
		f.noEcho = f.noEcho || r.There.doubts("fabric_")
		w := f.follow(ctx, back, p.build(arrived.Dst(), arrived.Src(), true), arrived.Src(), &r.There)
		r.Back = &w
		r.confirm()
	}
	r.judge()
	return r, nil
}

// follow asks node after node; question, for an answer, is the way that the packet went to which it is one.
func (f *fleet) follow(ctx context.Context, from place, pkt []byte, dst netip.Addr, question *way) (w way) {
	node, entry := from.Node, from.Entry
	w.packet = pkt
	for range maxHops {
		w.At = node
		pkt = question.unmasquerade(node, pkt)
		s, err := f.ask(ctx, node, api.TraceRequest{Entry: entry, Packet: pkt, State: question.state(node), Question: question.carrier(node), NoEcho: f.noEcho})
		if err != nil {
			w.Outcome, w.Reason, w.Why = api.Unknown, "agent_silent", err.Error()
			w.By, w.Rung = "agent", "asking it"
			w.Fix = "start the agent of " + node + ", and see that its --diag-port can be reached from here"
			if _, ok := f.members[node]; !ok {
				w.Fix = "the datastore has no Node " + node + " either: start its agent, which registers it"
			} else if n := len(w.Segments); errors.Is(err, api.ErrUnreachable) && n > 0 && w.Segments[n-1].Echo != nil && !w.Segments[n-1].Echo.Answered {
				w.Why += fmt.Sprintf(", and nothing answered the echoes of %s", w.Segments[n-1].Node)
				w.Fix = "see whether " + node + " is up, and then whether its agent runs"
			} else if !errors.Is(err, api.ErrUnreachable) { // it has answered, and refused
				w.Fix = "see what it says; where versions differ, upgrade the older one of margayctl and the agent of " + node
			}
			return w
		}
		if n := len(w.Segments); n > 0 {
			if w.misdirected(w.Segments[n-1], s); w.Outcome == api.Dropped {
				return w
			}
		}
		w.Segments = append(w.Segments, s)
		w.Outcome, w.Reason, w.Why, w.Fix = s.Outcome, s.Reason, s.Why, s.Fix
		if n := len(s.Rungs); n > 0 {
			w.By, w.Rung = s.Rungs[n-1].By, s.Rungs[n-1].Name
		}
		if s.Outcome != api.Forwarded {
			f.refine(&w, dst)
			return w
		}
		next, ok := f.nodeAt(s.Next)
		if !ok {
			w.At, w.By, w.Rung = s.Next.String(), "datastore", "the next node"
			w.Outcome, w.Reason = api.Unknown, "not_a_node"
			w.Why = fmt.Sprintf("%s sends it to %s, which is no node in the datastore", node, s.Next)
			w.Fix = "start the agent there: it registers its node"
			return w
		}
		node, entry, pkt = next, api.EntryUnderlay, s.Packet
	}
	w.Outcome, w.Reason, w.Why = api.Dropped, "loop", fmt.Sprintf("after %d nodes it has not arrived: it goes in a circle", maxHops)
	w.Fix = "compare `margayctl node routes` of the nodes"
	return w
}

// state is what a node's connection tracker takes a packet for: nil is the way of a first packet.
func (w *way) state(node string) api.ConnState {
	switch {
	case w == nil:
		return api.StateNew
	case slices.ContainsFunc(w.Segments, func(s api.Segment) bool { return s.Node == node }):
		return api.StateEstablished
	}
	return api.StateUnknown
}

// carrier is who has carried the packet through a node, as far as it has said so: the kernel where it has had a part in it.
func (w *way) carrier(node string) (c api.Carrier) {
	if w == nil {
		return api.CarrierUnknown
	}
	for _, s := range w.Segments {
		if s.Node == node && c != api.CarrierKernel {
			c = s.Carrier
		}
	}
	return c
}

// unmasquerade gives an answer the destination back that the question's source was before the node rewrote it, as its connection
// tracker does.
func (w *way) unmasquerade(node string, answer []byte) []byte {
	if w == nil {
		return answer
	}
	before := innermost(w.packet)
	for _, s := range w.Segments {
		after := innermost(s.Packet)
		if a, fault := packet.ParseIPv4(answer); s.Node == node && before != nil && after != nil && fault == packet.FaultNone && a.Dst() == after.Src() &&
			before.Src() != after.Src() && !before.Src().IsUnspecified() {
			return withDestination(a, before.Src())
		}
		before = after
	}
	return answer
}

// innermost is the packet inside IP-in-IP, or a packet itself; nil for what is none.
func innermost(b []byte) packet.IPv4 {
	p, fault := packet.ParseIPv4(b)
	if fault == packet.FaultNone && p.Protocol() == packet.ProtocolIPIP {
		p, fault = packet.ParseIPv4(p.Payload())
	}
	if fault != packet.FaultNone {
		return nil
	}
	return p
}

// withDestination returns a copy of p that is for another address; the transport's checksum, which no trace asks for, stays.
func withDestination(p packet.IPv4, to netip.Addr) []byte {
	out := slices.Clone(p)
	copy(out[16:20], to.AsSlice())
	out[10], out[11] = 0, 0
	binary.BigEndian.PutUint16(out[10:], packet.Checksum(out[:out.HeaderLen()], 0))
	return out
}

// misdirected ends the way where a node has a hardware address for the next one that is not the one it has. An entry that ARP
// has made may be a router's that answers for others; a permanent one somebody has written.
func (w *way) misdirected(from, to api.Segment) {
	if !from.Pinned || from.Next != to.Address || to.MAC == "" || from.NextMAC == to.MAC {
		return
	}
	w.At, w.By, w.Rung = from.Node, "kernel", "the neighbour"
	w.Outcome, w.Reason = api.Dropped, "neighbour"
	w.Why = fmt.Sprintf("%s has the permanent entry %s for %s on %s, and %s has %s", from.Node, from.NextMAC, from.Next, from.Via, to.Node, to.MAC)
	w.Fix = fmt.Sprintf("ip neigh del %s dev %s, on %s", from.Next, from.Via, from.Node)
}

func (f *fleet) ask(ctx context.Context, node string, req api.TraceRequest) (api.Segment, error) {
	c, err := f.client(node)
	if err != nil {
		return api.Segment{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, agentTimeout)
	defer cancel()
	s, err := c.Trace(ctx, req)
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("margay-agent of %s %w within %s", node, api.ErrUnreachable, agentTimeout)
	}
	return s, err
}

// refine adds what only the datastore knows about a packet that found no way.
func (f *fleet) refine(w *way, dst netip.Addr) {
	switch w.Reason {
	case "no_route", "blackhole", "no_such_pod", "no_kernel_route", "no_pod":
	default:
		return
	}
	p := f.at(dst)
	pool := f.pool(dst)
	switch {
	case pool == nil:
		w.Why += fmt.Sprintf("; %s is in no pool", dst)
		return
	case p.Block == "":
		w.Why += fmt.Sprintf("; %s is in pool %s, and no node has a block with it", dst, pool.Metadata.Name)
		w.Fix = "nothing has this address: ask for another"
		return
	case !p.Given:
		w.Why += fmt.Sprintf("; IPAM has not given %s out (block %s of %s)", dst, p.Block, orNobody(p.Owner))
		w.Fix = "no pod has this address: ask for another, or start the pod"
		return
	}
	w.Why += fmt.Sprintf("; %s is %s on %s", dst, orText(p.Name, "in use"), orNobody(p.Node))
	if _, ok := f.members[p.Node]; p.Node != "" && !ok {
		w.Why += ", which is not in the datastore"
		w.Reason = "node_not_in_datastore"
		w.Fix = "restart the agent of " + p.Node + ": it registers its node"
	} else if pool.Spec.DisableBGPExport && w.Reason == "no_route" {
		w.Why += fmt.Sprintf(", and pool %s has disableBGPExport", pool.Metadata.Name)
		w.Fix = "set spec.disableBGPExport of the pool to false"
	}
}

func orNobody(name string) string { return orText(name, "nobody") }

func orText(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// note remarks what is unusual about an address without stopping packets.
func (f *fleet) note(r *traceResult, addr netip.Addr) {
	if p := f.pool(addr); p != nil && p.Spec.Disabled {
		r.Notes = append(r.Notes, fmt.Sprintf("pool %s of %s is disabled: it gives out no new addresses, and packets flow", p.Metadata.Name, addr))
	}
}
