package ctl

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"margay/agent/api"
	"margay/vrouter/packet"
)

var (
	here  = netip.MustParseAddr("10.244.1.0") // tunnel addresses
	there = netip.MustParseAddr("10.244.2.0")
)

// echoed is a way from node1 to node2 on which an echo was asked.
func echoed(e api.Echo) way {
	s := api.Segment{Node: "node1", Outcome: api.Forwarded, Echo: &e, Rungs: []api.Rung{{By: "agent", Name: "echo to the next node", Passed: true}}}
	if !e.Answered {
		s.Rungs[0].Doubtful = true
		s.Doubts = []api.Doubt{{By: "agent", Rung: s.Rungs[0].Name, Reason: "fabric_silent", Why: "nothing came back", Fix: "look there"}}
	}
	return way{Outcome: api.Delivered, Segments: []api.Segment{s, {Node: "node2", Outcome: api.Delivered}}}
}

// TestConfirm: silence on the way back is no doubt where an answer has just gone that way, as long, and free to be cut.
func TestConfirm(t *testing.T) {
	question := api.Echo{From: here, To: there, IPIP: true, Size: 1400, DF: true, Answered: true}
	silent := api.Echo{From: there, To: here, IPIP: true, Size: 1400}
	for name, c := range map[string]struct {
		change func(there, back *api.Echo)
		taken  bool
	}{
		"the same":               {func(_, _ *api.Echo) {}, true},
		"shorter":                {func(_, b *api.Echo) { b.Size = 84 }, true},
		"longer":                 {func(_, b *api.Echo) { b.Size = 1401 }, false},
		"not to be cut":          {func(_, b *api.Echo) { b.DF = true }, false},
		"unencapsulated":         {func(_, b *api.Echo) { b.IPIP = false }, false},
		"not answered":           {func(th, _ *api.Echo) { th.Answered = false }, false},
		"another node":           {func(_, b *api.Echo) { b.To = netip.MustParseAddr("10.244.3.0") }, false},
		"from somewhere else":    {func(_, b *api.Echo) { b.From = netip.MustParseAddr("10.244.3.0") }, false},
		"asked unencapsulated":   {func(th, _ *api.Echo) { th.IPIP = false }, false},
		"both were not answered": {func(th, b *api.Echo) { th.Answered, b.DF = false, true }, false},
	} {
		q, s := question, silent
		c.change(&q, &s)
		back := echoed(s)
		r := traceResult{There: echoed(q), Back: &back}
		r.confirm()
		if taken := len(back.Segments[0].Doubts) == 0; taken != c.taken || taken == back.Segments[0].Rungs[0].Doubtful {
			t.Errorf("%s: %+v: the doubt is taken back: %v, expected %v", name, back.Segments[0], taken, c.taken)
		}
	}
}

// TestJudge: a verdict is as certain as what it rests on.
func TestJudge(t *testing.T) {
	silent := api.Echo{From: here, To: there, IPIP: true, Size: 84}
	answered := silent
	answered.Answered = true
	dropped := way{Outcome: api.Dropped, At: "node2", By: "kernel", Rung: "routing", Why: "a blackhole", Fix: "take it away"}
	left := way{Outcome: api.Left}
	delivered := echoed(answered)
	for name, c := range map[string]struct {
		there  way
		back   *way
		status int
		line   string
	}{
		"both arrive":                      {echoed(answered), &delivered, 0, "arrives: "},
		"one way":                          {echoed(answered), nil, 0, "arrives: "},
		"doubtful, one way":                {echoed(silent), nil, exitUnknown, "unknown whether it arrives"},
		"doubtful, and the answer arrives": {echoed(silent), &delivered, exitUnknown, "unknown whether it arrives"},
		"it is dropped":                    {dropped, nil, exitNotArrived, "does not arrive: "},
		"the answer is dropped":            {echoed(answered), &dropped, exitNotArrived, "arrives, but the answer does not come back"},
		"doubtful, and the answer is dropped": {echoed(silent), &dropped, exitNotArrived,
			"may arrive, but the answer does not come back"},
		"the answer leaves":               {echoed(answered), &left, exitUnknown, "arrives, and the answer leaves the cluster"},
		"doubtful, and the answer leaves": {echoed(silent), &left, exitUnknown, "unknown whether it arrives, and the answer leaves"},
	} {
		r := traceResult{There: c.there, Back: c.back}
		r.judge()
		if r.Status != c.status || !strings.HasPrefix(r.Line, c.line) || (r.Status == 0) != (r.Verdict == "arrives") {
			t.Errorf("%s: %d, %s, %s: expected %d, %s", name, r.Status, r.Verdict, r.Line, c.status, c.line)
		}
	}
}

// TestUnmasquerade: an answer to a node's own address is for the pod again at the node that has rewritten the question, and nowhere
// else.
func TestUnmasquerade(t *testing.T) {
	pod, self, far := netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2")
	p := probe{proto: "udp", size: 60, ttl: 64}
	asked, rewritten, answer := p.build(pod, far, false), p.build(self, far, false), p.build(far, self, true)
	q := &way{packet: asked, Segments: []api.Segment{{Node: "node1", Packet: rewritten}, {Node: "node2", Packet: rewritten}}}
	got, fault := packet.ParseIPv4(q.unmasquerade("node1", answer))
	if fault != packet.FaultNone || got.Dst() != pod || got.Src() != far || got.TotalLen() != 60 {
		t.Errorf("%s: % x", fault, got)
	}
	plain := &way{packet: asked, Segments: []api.Segment{{Node: "node1", Packet: asked}, {Node: "node2", Packet: asked}}}
	own := &way{packet: p.build(netip.IPv4Unspecified(), far, false), Segments: []api.Segment{{Node: "node1", Packet: rewritten}}}
	for name, same := range map[string][]byte{
		"at another node":        q.unmasquerade("node2", answer),
		"a question":             (*way)(nil).unmasquerade("node1", answer),
		"not rewritten":          plain.unmasquerade("node1", answer),
		"the node's own":         own.unmasquerade("node1", answer),
		"to somebody else":       q.unmasquerade("node1", p.build(far, pod, true)),
		"what is no packet":      q.unmasquerade("node1", nil),
		"of a way without nodes": (&way{packet: asked}).unmasquerade("node1", answer),
	} {
		if !slices.Equal(same, answer) && !slices.Equal(same, p.build(far, pod, true)) && same != nil {
			t.Errorf("%s: % x", name, same)
		}
	}
}
