package report

import (
	"bytes"
	"encoding/json"
	"image/png"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"margay/bench/stat"
	"margay/bench/suite"
	"margay/bench/table"
	"margay/bench/traffic"
)

// outcome is one in which every kind of verdict occurs.
func outcome() *suite.Outcome {
	o := &suite.Outcome{
		Alone:    map[traffic.Profile]suite.Alone{traffic.Small: {Rate: 700_000, Generator: 0.99, Sink: 0.25}},
		Ports:    map[string]string{"direct+xdp": "in its own words"},
		Failures: []suite.Failure{{Scenario: "rr", Path: "wireguard", Error: "a\nb"}, {Scenario: "tcp1", Path: "veth", Round: 2, Error: "broken"}},
		Took:     map[string]time.Duration{"tcp1": 70 * time.Second},
		Notes:    []string{"a note"},
	}
	scenarios := make(map[string]suite.Scenario)
	for _, s := range suite.Scenarios() {
		scenarios[s.Name] = s
	}
	add := func(scenario, path, metric string, values ...float64) {
		s := suite.Series{Scenario: scenario, Path: path, Rounds: make(map[int]float64)}
		for _, m := range scenarios[scenario].Metrics {
			if m.Name == metric {
				s.Metric = m
			}
		}
		for i, v := range values {
			s.Rounds[i+1] = v
		}
		s.Summary = stat.Summarise(values)
		o.Series = append(o.Series, s)
	}
	add("tcp1", "vxlan", "rate", 10, 20, 30)
	add("tcp1", "vxlan+rps", "rate", 9, 8, 7)
	add("tcp1", "tun", "rate", 5, 5, 5)
	add("tcp1", "direct", "rate", 9, 18, 27)
	add("tcp1", "direct+tc", "rate", 12, 22, 36)
	add("tcp1", "tun+nobpf", "rate", 1, 2, 3)
	add("tcp1-off", "vxlan", "rate", 10)
	add("tcp1-off", "direct", "rate", 12)
	add("udp", "wire", "rate", 700)
	add("udp", "vxlan", "rate", 280)
	add("udp", "vxlan+rps", "rate", 350)
	add("udp", "direct+xdp", "rate", 630)
	add("udp-lossless", "vxlan", "cpu", 2000)
	add("udp-lossless", "direct+xdp", "cpu", 900)
	add("udp-lossless", "veth", "cpu", 2700)
	add(suite.Loop, suite.LoopFull, "time", 45)
	add(suite.Loop, suite.LoopFull, "allocations", 1)
	add(suite.Lookup, table.Peer, "time", 200, 210)
	add(suite.Lookup, table.Ours, "time", 10, 7)
	return o
}

func TestVerdicts(t *testing.T) {
	rows := New(outcome(), suite.Scenarios()).Targets
	find := func(part string) Row {
		for _, r := range rows {
			if strings.Contains(r.What, part) {
				return r
			}
		}
		t.Fatalf("no row %q", part)
		return Row{}
	}
	one := func(v float64) stat.Summary { return stat.Summary{N: 1, Median: v, Min: v, Max: v} }
	three := func(v, least, most float64) stat.Summary { return stat.Summary{N: 3, Median: v, Min: least, Max: most} }
	vxlan := func(path string, ratio stat.Summary) Comparison { return Comparison{Peer: path, Ratio: ratio} }
	for part, want := range map[string]Row{
		"1 flow, best in user space": {Ours: "direct", Value: three(0.9, 0.9, 0.9), Verdict: Reached,
			Peers: []Comparison{vxlan("vxlan", three(0.9, 0.9, 0.9)), vxlan("vxlan+rps", three(2.25, 1, 27.0/7))}},
		"TSO and GSO off": {Ours: "direct", Value: one(1.2), Verdict: AimReached, Peers: []Comparison{vxlan("vxlan", one(1.2))}},
		"NET_ADMIN and NET_RAW": {Ours: "tun+nobpf", Value: three(0.1, 0.1, 0.1), Verdict: Missed,
			Peers: []Comparison{vxlan("vxlan", three(0.1, 0.1, 0.1)), vxlan("vxlan+rps", three(0.25, 1.0/9, 3.0/7))}},
		"veth / kernel VXLAN":                  {Ours: "veth", Value: one(1.35), Verdict: Missed, Peers: []Comparison{vxlan("vxlan", one(1.35))}},
		"packet, one node, direct with AF_XDP": {Ours: "direct+xdp", Value: one(0.45), Verdict: AimReached, Peers: []Comparison{vxlan("vxlan", one(0.45))}},
		"rate of small UDP, one node, direct":  {Ours: "direct+xdp", Value: one(1.8), Verdict: Reached, Remark: "generator-bound", Peers: []Comparison{vxlan("vxlan+rps", one(1.8)), vxlan("vxlan", one(2.25))}},
		"forwarding loop alone":                {Ours: suite.LoopFull, Value: one(45), Verdict: Reached},
		"allocations":                          {Ours: suite.LoopFull, Value: one(1), Verdict: Missed},
		"bart.Fast": {Ours: table.Ours, Value: stat.Summary{N: 2, Median: 25, Min: 20, Max: 30}, Verdict: Reached,
			Peers: []Comparison{{Peer: table.Peer, Ratio: stat.Summary{N: 2, Median: 25, Min: 20, Max: 30}}}},
		"request/response": {Verdict: NotMeasured},
		"rte_lpm":          {Verdict: NotMeasured},
	} {
		got := find(part)
		for i := range got.Peers {
			if got.Peers[i].Figure == "" {
				t.Errorf("%s: %s has no figure", part, got.Peers[i].Peer)
			}
			got.Peers[i].Figure = ""
		}
		if got.Ours != want.Ours || !slices.Equal(got.Peers, want.Peers) || got.Value != want.Value || got.Verdict != want.Verdict {
			t.Errorf("%s: %+v, expected %+v", part, got, want)
		}
		if want.Remark != "" && got.Remark != want.Remark || got.Verdict == NotMeasured && got.Remark == "" {
			t.Errorf("%s: remark %q, expected %q", part, got.Remark, want.Remark)
		}
	}
	// The kernel's shortcut, however fast, stands in a row of its own.
	if got := rows[1]; got.Ours != "direct+tc" || got.Value != three(1.2, 1.1, 1.2) || got.Verdict != AimReached {
		t.Errorf("%+v", got)
	}
}

// TestPartial: a report of a run that goes on says so, has no plots, and leaves none of an earlier run's.
func TestPartial(t *testing.T) {
	dir := t.TempDir()
	r := New(outcome(), suite.Scenarios())
	if _, err := r.Write(dir); err != nil {
		t.Fatal(err)
	}
	o := outcome()
	o.Partial = "3 of 10 measurements are made"
	r.Renew(o)
	if err := r.WriteText(dir); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{filepath.Join(dir, "report.json"), filepath.Join(dir, "report.md")}; !slices.Equal(files, want) {
		t.Errorf("%v, expected %v", files, want)
	}
	page, err := os.ReadFile(filepath.Join(dir, "report.md"))
	if err != nil || !strings.Contains(string(page), "**This is a part of a run**: 3 of 10 measurements") || strings.Contains(string(page), "![") {
		t.Errorf("%v: %s", err, page)
	}
}

// TestWrite: every file is there, the pictures can be read, the page has every section, and the JSON comes back.
func TestWrite(t *testing.T) {
	dir := t.TempDir()
	files, err := New(outcome(), suite.Scenarios()).Write(dir)
	if err != nil {
		t.Fatal(err)
	}
	pictures := 0
	for _, name := range files {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		switch filepath.Ext(name) {
		case ".png":
			if _, err := png.Decode(bytes.NewReader(b)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			pictures++
		case ".svg":
			if !bytes.Contains(b, []byte("<svg")) {
				t.Errorf("%s is no SVG", name)
			}
		}
	}
	if pictures < 5 {
		t.Errorf("%d pictures in %v", pictures, files)
	}
	page, err := os.ReadFile(filepath.Join(dir, "report.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"3 of the 10 that were measured are missed", "## tcp1: ", "| vxlan+rps | 8.00 (7.00–9.00) |", "![TCP bulk, two nodes, 1 flow](tcp1.svg)",
		"- direct+xdp: in its own words", "- small: 700 kpps with nothing in between, with 0.990 of a processor; the sink took 0.250. From 467 kpps on", "630 generator-bound", "- rr, wireguard, the discarded round: a; b", "- tcp1, veth, round 2: broken", "- a note",
		"| wireguard | not measured: a; b | |\n", "| veth | not measured: broken |", "0.900 × vxlan (20.0 Gbit/s) | 2.25 (1.00–3.86) × vxlan+rps (8.00 Gbit/s) |",
		"tcp1 70 s."} {
		if !strings.Contains(string(page), want) {
			t.Errorf("report.md has no %q:\n%s", want, page)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "report.json"))
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	if len(back.Targets) != len(New(outcome(), nil).Targets) || back.Outcome == nil || len(back.Series) != len(outcome().Series) || back.Series[0].Unit != "Gbit/s" {
		t.Errorf("report.json: %+v", back)
	}
}
