package report

import (
	"fmt"
	"strings"

	"margay/bench/rig"
	"margay/bench/stat"
	"margay/bench/suite"
	"margay/bench/table"
)

// The verdicts on a target.
const (
	AimReached  = "aim reached"
	Reached     = "reached"
	Missed      = "MISSED"
	NotMeasured = "not measured"
)

// Row is one target and what became of it.
type Row struct {
	What    string       `json:"what"`
	Ours    string       `json:"ours,omitempty"` // path or form
	Figure  string       `json:"figure,omitempty"`
	Peer    string       `json:"peer,omitempty"` // the same, of whom it is compared with
	Against string       `json:"peer_figure,omitempty"`
	Value   stat.Summary `json:"value"` // a ratio where there is a peer, else the figure itself
	Unit    string       `json:"unit"`
	Least   float64      `json:"at_least"` // at most where lower is better
	Aim     float64      `json:"aim"`
	Lower   bool         `json:"lower_is_better"`
	Verdict string       `json:"verdict"`
	Remark  string       `json:"remark,omitempty"`
}

// decide sets the verdict by the median.
func (r *Row) decide() {
	meets := func(limit float64) bool {
		if r.Lower {
			return r.Value.Median <= limit
		}
		return r.Value.Median >= limit
	}
	switch {
	case r.Value.N == 0:
		r.Verdict = NotMeasured
	case meets(r.Aim):
		r.Verdict = AimReached
	case meets(r.Least):
		r.Verdict = Reached
	default:
		r.Verdict = Missed
	}
}

// judge draws up the table of targets.
func judge(o *suite.Outcome) []Row {
	j := judgement{o}
	// With tc the packets do not come to the vRouter: a path of its own.
	best := func(p rig.Path) bool { return p.Kind == rig.KindVRouter && !p.NoBPF && p.IO != "tc" }
	tc := func(p rig.Path) bool { return p.Kind == rig.KindVRouter && p.IO == "tc" }
	attached := func(attach, io string) func(rig.Path) bool {
		return func(p rig.Path) bool { return best(p) && p.Attach == attach && (io == "" || p.IO == io) }
	}
	rows := []Row{
		j.ratio("TCP bulk, two nodes, 1 flow, best attachment / kernel VXLAN", "tcp1", "rate", best, 0.8, 1),
		j.ratio("the same, 4 flows", "tcp4", "rate", best, 0.8, 1),
		j.ratio("1 flow, TSO and GSO off and GRO on at the underlay", "tcp1-off", "rate", best, 0.8, 1),
		j.ratio("the same, 4 flows", "tcp4-off", "rate", best, 0.8, 1),
		j.ratio("TCP bulk, two nodes, 1 flow, NET_ADMIN and NET_RAW alone / kernel VXLAN", "tcp1", "rate",
			func(p rig.Path) bool { return p.NoBPF }, 0.15, 0.4),
		j.ratio("CPU for a small UDP packet, one node, veth / kernel VXLAN", "udp-lossless", "cpu", attached("veth", ""), 1.3, 0.9),
		j.ratio("the same, direct with AF_XDP", "udp-lossless", "cpu", attached("direct", "xdp"), 1, 0.5),
		j.ratio("rate of small UDP, one node, direct with AF_XDP / kernel VXLAN", "udp", "rate", attached("direct", "xdp"), 1.75, 3),
		j.ratio("request/response p50, two nodes, best attachment / kernel VXLAN", "rr", "p50", best, 1.8, 1.2),
		j.ratio("in the kernel, direct with tc: TCP bulk, two nodes, 1 flow / kernel VXLAN", "tcp1", "rate", tc, 1, 1),
		j.ratio("the same, TSO and GSO off and GRO on at the underlay", "tcp1-off", "rate", tc, 1, 1),
		j.ratio("the same, request/response p50", "rr", "p50", tc, 1.2, 1.2),
		j.ratio("the same, CPU for a small UDP packet", "udp-lossless", "cpu", tc, 0.9, 0.9),
		j.figure("forwarding loop alone, full table, random destinations", suite.Loop, suite.LoopFull, "time", 60, 30),
		j.figure("allocations in the loop, in a million packets", suite.Loop, suite.LoopFull, "allocations", 0, 0),
		j.speedup("random lookups in batches, full table: bart.Fast's time / ours", table.Peer, 12, 28),
		j.slowdown("the same: our time / rte_lpm's bulk lookup", suite.RTE, 2, 1.2),
		j.figure("route updates while a reader runs at full speed", suite.Updates, suite.UpdatesSingle, "rate", 200, 1000),
		j.figure("full table into the FIB, time", suite.Load, suite.LoadFull, "time", 2, 0.5),
		j.figure("full table into the FIB, memory", suite.Load, suite.LoadFull, "memory", 150, 80),
	}
	for i := range rows {
		rows[i].decide()
	}
	return rows
}

type judgement struct{ o *suite.Outcome }

// find returns the series of a scenario's metric whose path is wanted.
func (j judgement) find(scenario, metric string, want func(path string) bool) []suite.Series {
	var out []suite.Series
	for _, s := range j.o.Series {
		if s.Scenario == scenario && s.Name == metric && want(s.Path) {
			out = append(out, s)
		}
	}
	return out
}

// better tells which of two summaries is.
func better(a, b stat.Summary, lower bool) bool {
	if lower {
		return a.Median < b.Median
	}
	return a.Median > b.Median
}

// best returns the best of some series, nil of none.
func best(all []suite.Series) *suite.Series {
	var out *suite.Series
	for i := range all {
		if out == nil || better(all[i].Summary, out.Summary, all[i].Lower) {
			out = &all[i]
		}
	}
	return out
}

func isPath(want func(rig.Path) bool) func(string) bool {
	return func(text string) bool {
		p, err := rig.ParsePath(text)
		return err == nil && want(p)
	}
}

// isPeer is the kernel's VXLAN, whether one processor works on it or all: the better of them is what we are measured by.
func isPeer(p rig.Path) bool { return p.Kind == rig.KindVXLAN }

// ratio compares ours with the best of the peers, round by round. Of ours it takes the one whose ratio is the best: in rounds
// that something has disturbed the ratio tells more than the figure.
func (j judgement) ratio(what, scenario, metric string, ours func(rig.Path) bool, least, aim float64) Row {
	row := Row{What: what, Unit: "×", Least: least, Aim: aim, Lower: metric != "rate"}
	peer := best(j.find(scenario, metric, isPath(isPeer)))
	if peer == nil {
		row.Remark = "needs such a path and vxlan in the run, and scenario " + scenario
		return row
	}
	row.Remark = "needs such a path in the run"
	for _, our := range j.find(scenario, metric, isPath(ours)) {
		value := stat.Summarise(stat.Ratios(our.Rounds, peer.Rounds))
		if value.N == 0 || row.Value.N > 0 && !better(value, row.Value, row.Lower) {
			continue
		}
		row.Value, row.Remark = value, ""
		row.Ours, row.Figure = our.Path, figure(our)
		row.Peer, row.Against = peer.Path, figure(*peer)
		if metric == "rate" && strings.HasPrefix(scenario, "udp") && j.bound(our) {
			row.Remark = "generator-bound"
		}
	}
	return row
}

// generatorBound is how far the generator's own limit has to be above a rate for the rate to be the path's.
const generatorBound = 1.5

// bound tells whether a packet rate is so near to what the generator reaches with nothing in between that it may be the
// generator's.
func (j judgement) bound(s suite.Series) bool {
	profile := suite.ProfileOf(s.Scenario)
	limit := j.o.Limit[profile]
	return s.Name == "rate" && limit > 0 && s.Summary.Median*1e3*generatorBound > limit
}

// figure judges a figure without a peer.
func (j judgement) figure(what, scenario, path, metric string, least, aim float64) Row {
	row := Row{What: what, Least: least, Aim: aim, Lower: metric != "rate"}
	all := j.find(scenario, metric, func(p string) bool { return p == path })
	if len(all) == 0 {
		row.Remark = "needs scenario " + scenario
		return row
	}
	s := all[0]
	row.Unit, row.Value, row.Ours, row.Figure = s.Unit, s.Summary, path, figure(s)
	return row
}

// lookups returns our form's series and another's.
func (j judgement) lookups(peer string) (ours, other *suite.Series) {
	is := func(name string) func(string) bool { return func(p string) bool { return p == name } }
	return best(j.find(suite.Lookup, "time", is(table.Ours))), best(j.find(suite.Lookup, "time", is(peer)))
}

func (j judgement) speedup(what, peer string, least, aim float64) Row {
	row := Row{What: what, Unit: "×", Least: least, Aim: aim}
	if ours, other := j.lookups(peer); ours != nil && other != nil {
		row.Ours, row.Figure, row.Peer, row.Against = ours.Path, figure(*ours), other.Path, figure(*other)
		row.Value = stat.Summarise(stat.Ratios(other.Rounds, ours.Rounds))
	} else {
		row.Remark = "needs scenario " + suite.Lookup
	}
	return row
}

func (j judgement) slowdown(what, peer string, least, aim float64) Row {
	row := Row{What: what, Unit: "×", Least: least, Aim: aim, Lower: true}
	if ours, other := j.lookups(peer); ours != nil && other != nil {
		row.Ours, row.Figure, row.Peer, row.Against = ours.Path, figure(*ours), other.Path, figure(*other)
		row.Value = stat.Summarise(stat.Ratios(ours.Rounds, other.Rounds))
	} else {
		row.Remark = "opt-in: --rte-lpm, it takes minutes to load"
	}
	return row
}

// figure writes a series' median with its unit.
func figure(s suite.Series) string {
	return fmt.Sprintf("%s %s", stat.Number(s.Summary.Median), s.Unit)
}
