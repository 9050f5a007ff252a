package report

import (
	"bytes"
	"encoding/json"
	"image/png"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"margay/bench/stat"
	"margay/bench/suite"
	"margay/bench/table"
	"margay/bench/traffic"
)

// outcome is one in which every kind of verdict occurs.
func outcome() *suite.Outcome {
	o := &suite.Outcome{
		Limit:    map[traffic.Profile]float64{traffic.Small: 700_000},
		Ports:    map[string]string{"direct+xdp": "in its own words"},
		Failures: []suite.Failure{{Scenario: "rr", Path: "wireguard", Error: "a\nb"}},
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
	for part, want := range map[string]Row{
		"1 flow, best attachment": {Ours: "direct", Peer: "vxlan", Value: stat.Summary{N: 3, Median: 0.9, Min: 0.9, Max: 0.9}, Verdict: Reached},
		"TSO and GSO off":         {Ours: "direct", Peer: "vxlan", Value: stat.Summary{N: 1, Median: 1.2, Min: 1.2, Max: 1.2}, Verdict: AimReached},
		"NET_ADMIN and NET_RAW":   {Ours: "tun+nobpf", Peer: "vxlan", Value: stat.Summary{N: 3, Median: 0.1, Min: 0.1, Max: 0.1}, Verdict: Missed},
		"veth / kernel VXLAN":     {Ours: "veth", Peer: "vxlan", Value: stat.Summary{N: 1, Median: 1.35, Min: 1.35, Max: 1.35}, Verdict: Missed},
		"the same, direct":        {Ours: "direct+xdp", Peer: "vxlan", Value: stat.Summary{N: 1, Median: 0.45, Min: 0.45, Max: 0.45}, Verdict: AimReached},
		"rate of small UDP":       {Ours: "direct+xdp", Peer: "vxlan+rps", Value: stat.Summary{N: 1, Median: 1.8, Min: 1.8, Max: 1.8}, Verdict: Reached, Remark: "generator-bound"},
		"forwarding loop alone":   {Ours: suite.LoopFull, Value: stat.Summary{N: 1, Median: 45, Min: 45, Max: 45}, Verdict: Reached},
		"allocations":             {Ours: suite.LoopFull, Value: stat.Summary{N: 1, Median: 1, Min: 1, Max: 1}, Verdict: Missed},
		"bart.Fast":               {Ours: table.Ours, Peer: table.Peer, Value: stat.Summary{N: 2, Median: 25, Min: 20, Max: 30}, Verdict: Reached},
		"request/response":        {Verdict: NotMeasured},
		"rte_lpm":                 {Verdict: NotMeasured},
	} {
		got := find(part)
		if got.Ours != want.Ours || got.Peer != want.Peer || got.Value != want.Value || got.Verdict != want.Verdict {
			t.Errorf("%s: %+v, expected %+v", part, got, want)
		}
		if want.Remark != "" && got.Remark != want.Remark || got.Verdict == NotMeasured && got.Remark == "" {
			t.Errorf("%s: remark %q, expected %q", part, got.Remark, want.Remark)
		}
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
	for _, want := range []string{"3 of 16 targets are missed", "## tcp1: ", "| vxlan+rps | 8.00 (7.00–9.00) |", "![TCP bulk, two nodes, 1 flow](tcp1.svg)",
		"- direct+xdp: in its own words", "- small: 700 kpps", "630 generator-bound", "- rr, wireguard: a; b", "- a note"} {
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
	if len(back.Targets) != 16 || back.Outcome == nil || len(back.Series) != len(outcome().Series) || back.Series[0].Unit != "Gbit/s" {
		t.Errorf("report.json: %+v", back)
	}
}
