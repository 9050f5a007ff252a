package report

import (
	"fmt"
	"slices"
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
	Peers   []Comparison `json:"peers,omitempty"` // the first one decides
	Value   stat.Summary `json:"value"`           // the ratio to that peer where there is one, else the figure itself
	Unit    string       `json:"unit"`
	Least   float64      `json:"at_least"` // at most where lower is better
	Aim     float64      `json:"aim"`
	Lower   bool         `json:"lower_is_better"`
	Verdict string       `json:"verdict"`
	Remark  string       `json:"remark,omitempty"`
}

// Comparison is what a target's path is compared with.
type Comparison struct {
	Peer   string       `json:"peer"`
	Figure string       `json:"figure"`
	Ratio  stat.Summary `json:"ratio"`
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

// judge draws up the table of targets. Where the best attachment counts there are two rows: for the best of those whose packets
// come to user space, and for the one whose packets BPF programs carry in the kernel, which is compared but stands for itself.
func judge(o *suite.Outcome) []Row {
	j := judgement{o}
	user := func(p rig.Path) bool { return p.Kind == rig.KindVRouter && !p.NoBPF && !p.Shortcut() }
	attached := func(attach, io string) func(rig.Path) bool {
		return func(p rig.Path) bool { return user(p) && p.Attach == attach && (io == "" || p.IO == io) }
	}
	var rows []Row
	best := func(what, scenario, metric string, least, aim float64) {
		rows = append(rows, j.ratio(what+", best in user space / kernel VXLAN", scenario, metric, user, least, aim),
			j.ratio(what+", with the kernel's shortcut / kernel VXLAN", scenario, metric, rig.Path.Shortcut, least, aim))
	}
	best("TCP bulk, two nodes, 1 flow", "tcp1", "rate", 0.8, 1)
	best("TCP bulk, two nodes, 4 flows", "tcp4", "rate", 0.8, 1)
	best("TCP bulk, 1 flow, TSO and GSO off and GRO on at the underlay", "tcp1-off", "rate", 0.8, 1)
	best("TCP bulk, 4 flows, TSO and GSO off and GRO on at the underlay", "tcp4-off", "rate", 0.8, 1)
	rows = append(rows,
		j.ratio("TCP bulk, two nodes, 1 flow, NET_ADMIN and NET_RAW alone / kernel VXLAN", "tcp1", "rate",
			func(p rig.Path) bool { return p.NoBPF }, 0.15, 0.4),
		j.ratio("CPU for a small UDP packet, one node, veth / kernel VXLAN", "udp-lossless", "cpu", attached("veth", ""), 1.3, 0.9),
		j.ratio("CPU for a small UDP packet, one node, direct with AF_XDP / kernel VXLAN", "udp-lossless", "cpu", attached("direct", "xdp"), 1, 0.5),
		j.ratio("CPU for a small UDP packet, one node, with the kernel's shortcut / kernel VXLAN", "udp-lossless", "cpu", rig.Path.Shortcut, 1, 0.5),
		j.ratio("rate of small UDP, one node, direct with AF_XDP / kernel VXLAN", "udp", "rate", attached("direct", "xdp"), 1.75, 3),
		j.ratio("rate of small UDP, one node, with the kernel's shortcut / kernel VXLAN", "udp", "rate", rig.Path.Shortcut, 1.75, 3),
	)
	best("request/response p50, two nodes", "rr", "p50", 1.8, 1.2)
	rows = append(rows,
		j.figure("forwarding loop alone, full table, random destinations", suite.Loop, suite.LoopFull, "time", 60, 30),
		j.figure("allocations in the loop, in a million packets", suite.Loop, suite.LoopFull, "allocations", 0, 0),
		j.speedup("random lookups in batches, full table: bart.Fast's time / ours", table.Peer, 12, 28),
		j.slowdown("the same: our time / rte_lpm's bulk lookup", suite.RTE, 2, 1.2),
		j.figure("route updates while a reader runs at full speed", suite.Updates, suite.UpdatesSingle, "rate", 200, 1000),
		j.figure("full table into the FIB, time", suite.Load, suite.LoadFull, "time", 2, 0.5),
		j.figure("full table into the FIB, memory", suite.Load, suite.LoadFull, "memory", 150, 80),
	)
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

// isPeer is the kernel's VXLAN, whether one processor works on it or all: the better of them decides, the other is told.
func isPeer(p rig.Path) bool { return p.Kind == rig.KindVXLAN }

// ratio compares ours with the best of the peers, round by round. Of ours it takes the one whose ratio is the best: in rounds
// that something has disturbed the ratio tells more than the figure.
func (j judgement) ratio(what, scenario, metric string, ours func(rig.Path) bool, least, aim float64) Row {
	row := Row{What: what, Unit: "×", Least: least, Aim: aim, Lower: metric != "rate"}
	peers := j.find(scenario, metric, isPath(isPeer))
	slices.SortStableFunc(peers, func(a, b suite.Series) int {
		switch {
		case better(a.Summary, b.Summary, row.Lower):
			return -1
		case better(b.Summary, a.Summary, row.Lower):
			return 1
		}
		return 0
	})
	if len(peers) == 0 {
		row.Remark = "needs such a path and vxlan in the run, and scenario " + scenario
		return row
	}
	row.Remark = "needs such a path in the run"
	for _, our := range j.find(scenario, metric, isPath(ours)) {
		value := stat.Summarise(stat.Ratios(our.Rounds, peers[0].Rounds))
		if value.N == 0 || row.Value.N > 0 && !better(value, row.Value, row.Lower) {
			continue
		}
		row.Value, row.Remark = value, ""
		row.Ours, row.Figure, row.Peers = our.Path, figure(our), nil
		for _, peer := range peers {
			row.Peers = append(row.Peers, compare(our, peer))
		}
		if metric == "rate" && strings.HasPrefix(scenario, "udp") && j.bound(our) {
			row.Remark = "generator-bound"
		}
	}
	return row
}

// compare divides a series by its peer's.
func compare(our, peer suite.Series) Comparison {
	return Comparison{Peer: peer.Path, Figure: figure(peer), Ratio: stat.Summarise(stat.Ratios(our.Rounds, peer.Rounds))}
}

// generatorBound is how far the generator's own limit has to be above a rate for the rate to be the path's.
const generatorBound = 1.5

// bound tells whether a packet rate is so near to what the generator reaches with nothing in between that it may be the
// generator's.
func (j judgement) bound(s suite.Series) bool {
	profile := suite.ProfileOf(s.Scenario)
	limit := j.o.Alone[profile].Rate
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
		row.Ours, row.Figure, row.Value = ours.Path, figure(*ours), stat.Summarise(stat.Ratios(other.Rounds, ours.Rounds))
		row.Peers = []Comparison{{Peer: other.Path, Figure: figure(*other), Ratio: row.Value}}
	} else {
		row.Remark = "needs scenario " + suite.Lookup
	}
	return row
}

func (j judgement) slowdown(what, peer string, least, aim float64) Row {
	row := Row{What: what, Unit: "×", Least: least, Aim: aim, Lower: true}
	if ours, other := j.lookups(peer); ours != nil && other != nil {
		row.Ours, row.Figure, row.Value = ours.Path, figure(*ours), stat.Summarise(stat.Ratios(ours.Rounds, other.Rounds))
		row.Peers = []Comparison{compare(*ours, *other)}
	} else {
		row.Remark = "opt-in: --rte-lpm, it takes minutes to load"
	}
	return row
}

// figure writes a series' median with its unit.
func figure(s suite.Series) string {
	return fmt.Sprintf("%s %s", stat.Number(s.Summary.Median), s.Unit)
}
