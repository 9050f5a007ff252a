package report

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"margay/bench/rig"
	"margay/bench/stat"
	"margay/bench/suite"
)

// Markdown writes the report for people. plots are the names of files beside it.
func (r *Report) Markdown(w io.Writer, plots []string) error {
	p := &printer{w: w}
	p.line("# Margay's benchmark")
	p.line("")
	p.line("%s, %s, %d processors, Linux %s, %s. Version %s. It took %.0f s.", r.Started.UTC().Format("2006-01-02 15:04 UTC"),
		r.Machine.Processor, r.Machine.Processors, r.Machine.Kernel, r.Machine.Go, r.Version, r.Seconds)
	p.line("")
	p.line("Every figure is the median of %d rounds (least to most) after a discarded one; one measurement lasts %s. The", r.Rounds, r.Window)
	p.line("method is in docs/bench.md.")
	p.line("")
	if r.Partial != "" {
		p.line("**This is a part of a run**: %s. What is not in it has not been measured.", strings.ReplaceAll(r.Partial, "\n", "; "))
		p.line("")
	}
	r.targets(p)
	for _, s := range r.scenarios {
		r.scenario(p, s, plots)
	}
	r.rest(p)
	return p.err
}

type printer struct {
	w   io.Writer
	err error
}

func (p *printer) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}

// Table writes the table of targets alone.
func (r *Report) Table(w io.Writer) error {
	p := &printer{w: w}
	r.targets(p)
	return p.err
}

func (r *Report) targets(p *printer) {
	p.line("## Targets")
	p.line("")
	p.line("| what | ours | ratio to the better peer, or figure | ratio to the other | at least | aim | verdict |")
	p.line("|---|---|---|---|---|---|---|")
	missed, judged := 0, 0
	var open []string
	for _, t := range r.Targets {
		if t.Verdict == NotMeasured {
			open = append(open, fmt.Sprintf("%s (%s)", t.What, t.Remark))
			continue
		}
		sign := "≥ "
		if t.Lower {
			sign = "≤ "
		}
		judged++
		ours, value, other := t.Ours, spread(t.Value)+" "+t.Unit, ""
		for i, peer := range t.Peers {
			text := fmt.Sprintf("%s × %s (%s)", spread(peer.Ratio), peer.Peer, peer.Figure)
			if i == 0 {
				ours, value = ours+": "+t.Figure, text
			} else {
				other += text
			}
		}
		verdict := t.Verdict
		if t.Remark != "" {
			verdict += " (" + t.Remark + ")"
		}
		p.line("| %s | %s | %s | %s | %s%s | %s%s | %s |", t.What, ours, value, other, sign, limit(t.Least), sign, limit(t.Aim), verdict)
		if t.Verdict == Missed {
			missed++
		}
	}
	p.line("")
	if missed > 0 {
		p.line("%d of the %d that were measured are missed. What holds them back is in docs/bench.md.", missed, judged)
		p.line("")
	}
	if len(open) > 0 {
		p.line("Not measured:")
		p.line("")
		for _, text := range open {
			p.line("- %s", text)
		}
		p.line("")
	}
}

func limit(v float64) string { return fmt.Sprint(v) }

func spread(s stat.Summary) string {
	if s.N == 1 || s.Min == s.Max {
		return stat.Number(s.Median)
	}
	return fmt.Sprintf("%s (%s–%s)", stat.Number(s.Median), stat.Number(s.Min), stat.Number(s.Max))
}

// scenario writes one scenario's table: a line for each path, a column for each metric and its ratio to the peer.
func (r *Report) scenario(p *printer, s suite.Scenario, plots []string) {
	j := judgement{r.Outcome}
	var paths []string
	for _, one := range r.Series {
		if one.Scenario == s.Name && !slices.Contains(paths, one.Path) {
			paths = append(paths, one.Path)
		}
	}
	failed := make(map[string]string) // path to why there is no figure of it
	for _, f := range r.Failures {
		if f.Scenario == s.Name && !slices.Contains(paths, f.Path) {
			failed[f.Path] = strings.ReplaceAll(f.Error, "\n", "; ")
		}
	}
	if len(paths)+len(failed) == 0 {
		return
	}
	p.line("## %s: %s", s.Name, s.Title)
	p.line("")
	head, rule := "| path |", "|---|"
	peers := make(map[string]*suite.Series)
	for _, m := range s.Metrics {
		head += fmt.Sprintf(" %s, %s |", m.Name, m.Unit)
		rule += "---|"
		if peers[m.Name] = r.peer(j, s, m); peers[m.Name] != nil {
			head += fmt.Sprintf(" × %s |", peers[m.Name].Path)
			rule += "---|"
		}
	}
	p.line("%s", head)
	p.line("%s", rule)
	for _, path := range paths {
		line := "| " + path + " |"
		for _, m := range s.Metrics {
			all := j.find(s.Name, m.Name, func(p string) bool { return p == path })
			cell, ratio := "", ""
			if len(all) == 1 {
				cell = spread(all[0].Summary)
				if strings.HasPrefix(s.Name, "udp") || strings.HasPrefix(s.Name, "imix") {
					if path != rig.KindWire && j.bound(all[0]) {
						cell += " generator-bound"
					}
				}
				if peer := peers[m.Name]; peer != nil && path != rig.KindWire {
					ratio = spread(stat.Summarise(stat.Ratios(all[0].Rounds, peer.Rounds)))
				}
			}
			line += " " + cell + " |"
			if peers[m.Name] != nil {
				line += " " + ratio + " |"
			}
		}
		p.line("%s", line)
	}
	for _, path := range slices.Sorted(maps.Keys(failed)) {
		p.line("| %s | not measured: %s%s", path, failed[path], strings.Repeat(" |", strings.Count(head, "|")-2))
	}
	p.line("")
	for _, plot := range plots {
		if strings.HasPrefix(plot, s.Name+".") && strings.HasSuffix(plot, ".svg") {
			p.line("![%s](%s)", s.Title, plot)
			p.line("")
		}
	}
}

// peer is whom a scenario's metric is compared with; a loss is not compared.
func (r *Report) peer(j judgement, s suite.Scenario, m suite.Metric) *suite.Series {
	if m.Name == "loss" {
		return nil
	}
	if peer := best(j.find(s.Name, m.Name, isPath(isPeer))); peer != nil {
		return peer
	}
	return best(j.find(s.Name, m.Name, func(p string) bool { return s.Peer != "" && p == s.Peer }))
}

// rest writes what the figures rest on.
func (r *Report) rest(p *printer) {
	if len(r.Ports) > 0 {
		p.line("## How the vRouters carried packets")
		p.line("")
		for _, path := range slices.Sorted(maps.Keys(r.Ports)) {
			p.line("- %s: %s", path, r.Ports[path])
		}
		p.line("")
	}
	if len(r.Alone) > 0 {
		p.line("## The generator")
		p.line("")
		for _, profile := range slices.Sorted(maps.Keys(r.Alone)) {
			alone, by := r.Alone[profile], ""
			if alone.Plain {
				by = ", by AF_PACKET for want of AF_XDP"
			}
			p.line("- %s: %s kpps with nothing in between%s, with %s of a processor; the sink took %s. From %s kpps on a rate is marked generator-bound.",
				profile, stat.Number(alone.Rate/1e3), by, stat.Number(alone.Generator), stat.Number(alone.Sink), stat.Number(alone.Rate/1e3/generatorBound))
		}
		p.line("")
	}
	if len(r.Failures) > 0 {
		p.line("## What failed")
		p.line("")
		p.line("A path that fails twice in a scenario is left out there.")
		p.line("")
		for _, f := range r.Failures {
			round := fmt.Sprintf("round %d", f.Round)
			if f.Round == 0 {
				round = "the discarded round"
			}
			p.line("- %s, %s, %s: %s", f.Scenario, cmp.Or(f.Path, "all of it"), round, strings.ReplaceAll(f.Error, "\n", "; "))
		}
		p.line("")
	}
	if len(r.Took) > 0 {
		p.line("## How long it took")
		p.line("")
		var all []string
		for _, s := range r.scenarios {
			if took, ok := r.Took[s.Name]; ok {
				all = append(all, fmt.Sprintf("%s %.0f s", s.Name, took.Seconds()))
			}
		}
		p.line("%s.", strings.Join(all, ", "))
		p.line("")
	}
	if len(r.Notes) > 0 {
		p.line("## Notes")
		p.line("")
		for _, n := range r.Notes {
			p.line("- %s", n)
		}
		p.line("")
	}
}
