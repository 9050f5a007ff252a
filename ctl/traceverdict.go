package ctl

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"margay/agent/api"
)

// What a trace concludes from what the nodes have said, and how it is printed.

// confirm takes back what a node doubts, on the way back, about the network between it and the next one, where that one's echo has
// been answered on the way there: the answer went the way of this node's echo, without DF, and with it of a packet like it.
func (r *traceResult) confirm() {
	for i := range r.Back.Segments {
		s := &r.Back.Segments[i]
		if s.Echo == nil || s.Echo.DF || !slices.ContainsFunc(r.There.Segments, func(there api.Segment) bool {
			e := there.Echo
			return e != nil && e.Answered && e.IPIP && s.Echo.IPIP && e.From == s.Echo.To && e.To == s.Echo.From && e.Size >= s.Echo.Size
		}) {
			continue
		}
		for _, d := range s.Doubts {
			at := slices.IndexFunc(s.Rungs, func(g api.Rung) bool { return g.Doubtful && g.Name == d.Rung })
			if strings.HasPrefix(d.Reason, "fabric_") && at >= 0 {
				s.Rungs[at].Doubtful = false
				s.Rungs[at].Detail += fmt.Sprintf("; but the answer to the echo from %s went this way", s.Echo.To)
			}
		}
		s.Doubts = slices.DeleteFunc(s.Doubts, func(d api.Doubt) bool { return strings.HasPrefix(d.Reason, "fabric_") })
	}
}

// doubts reports whether the way has a doubt whose reason begins with some letters.
func (w *way) doubts(reason string) bool {
	return slices.ContainsFunc(w.Segments, func(s api.Segment) bool {
		return slices.ContainsFunc(s.Doubts, func(d api.Doubt) bool { return strings.HasPrefix(d.Reason, reason) })
	})
}

// judge writes the verdict and the first line.
func (r *traceResult) judge() {
	for _, w := range []*way{&r.There, r.Back} {
		if w == nil {
			continue
		}
		for _, s := range w.Segments {
			r.Notes = append(r.Notes, s.Caveats...)
		}
	}
	route := fmt.Sprintf("%s → %s", r.Source, r.Destination)
	doubt, at := r.doubt()
	switch {
	case r.There.Outcome == api.Left:
		r.Verdict, r.Status = "leaves the cluster", exitUnknown
		last := r.There.Segments[len(r.There.Segments)-1]
		r.Line = fmt.Sprintf("leaves the cluster: %s, at %s by %s to %s; what becomes of it there is not known here", route, last.Node, last.Via, last.Next)
	case r.There.Outcome != api.Delivered:
		r.Verdict, r.Status, r.Line = r.There.verdict(route, "does not arrive")
	case (r.Back == nil || r.Back.Outcome == api.Delivered) && doubt != nil:
		r.Verdict, r.Status = "unknown", exitUnknown
		r.Line = fmt.Sprintf("unknown whether it arrives: %s: at %s, %s, %s: %s", route, at, doubt.By, doubt.Rung, doubt.Why)
		if doubt.Fix != "" {
			r.Line += ". To find out: " + doubt.Fix
		}
	case r.Back == nil:
		r.Verdict, r.Line = "arrives", "arrives: "+route
	case r.Back.Outcome == api.Delivered:
		r.Verdict, r.Line = "arrives", "arrives: "+route+", and the answer comes back"
	case r.Back.Outcome == api.Left:
		r.Verdict, r.Status = "unknown", exitUnknown
		r.Line = "arrives, and the answer leaves the cluster: " + route
		if r.There.doubts("") {
			r.Line = "unknown whether it arrives, and the answer leaves the cluster: " + route
			r.Notes = append(r.Notes, fmt.Sprintf("whether it arrives is unknown: at %s, %s, %s: %s", at, doubt.By, doubt.Rung, doubt.Why))
		}
	case doubt != nil && r.There.doubts(""):
		r.Verdict, r.Status, r.Line = r.Back.verdict(route, "may arrive, but the answer does not come back")
		r.Notes = append(r.Notes, fmt.Sprintf("whether it arrives is unknown: at %s, %s, %s: %s", at, doubt.By, doubt.Rung, doubt.Why))
	default:
		r.Verdict, r.Status, r.Line = r.Back.verdict(route, "arrives, but the answer does not come back")
	}
}

// doubt returns the first doubt on the way, with the node that has it.
func (r *traceResult) doubt() (d *api.Doubt, node string) {
	for _, w := range []*way{&r.There, r.Back} {
		if w == nil {
			continue
		}
		for _, s := range w.Segments {
			if len(s.Doubts) > 0 {
				return &s.Doubts[0], s.Node
			}
		}
	}
	return nil, ""
}

func (w *way) verdict(route, what string) (verdict string, code int, line string) {
	verdict, code = "does not arrive", exitNotArrived
	if w.Outcome == api.Unknown {
		verdict, code, what = "unknown", exitUnknown, "unknown whether it arrives"
	}
	line = fmt.Sprintf("%s: %s: at %s, %s, %s: %s", what, route, w.At, w.By, w.Rung, w.Why)
	if w.Fix != "" {
		line += ". To mend it: " + w.Fix
	}
	return verdict, code, line
}

// print writes the verdict, and the rungs node by node.
func (r *traceResult) print(w io.Writer) error {
	fmt.Fprintln(w, r.Line)
	for _, n := range r.Notes {
		fmt.Fprintln(w, "note:", n)
	}
	fmt.Fprintf(w, "\nthere: %s\n", r.Packet)
	if err := r.There.print(w); err != nil {
		return err
	}
	if r.Back != nil {
		fmt.Fprintln(w, "\nback:")
		if err := r.Back.print(w); err != nil {
			return err
		}
	}
	return r.Probe.print(w)
}

func (w *way) print(out io.Writer) error {
	for _, s := range w.Segments {
		fmt.Fprintf(out, "  %s (%s): %s\n", s.Node, s.Address, s.Outcome)
		tw := tabwriter.NewWriter(out, 0, 1, 2, ' ', 0)
		for _, r := range s.Rungs {
			mark := "ok"
			switch {
			case !r.Passed:
				mark = "NO"
			case r.Doubtful:
				mark = "??"
			}
			fmt.Fprintf(tw, "    %s\t%s\t%s\t%s\n", mark, r.By, r.Name, r.Detail)
		}
		if err := tw.Flush(); err != nil {
			return err
		}
	}
	if w.Reason == "agent_silent" {
		fmt.Fprintf(out, "  %s: %s\n", w.At, w.Why)
	}
	return nil
}
