package suite

import (
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"margay/bench/rig"
)

// TestSearch has a path that loses what is above its capacity.
func TestSearch(t *testing.T) {
	for _, capacity := range []float64{90_000, 200_000, 400_000} {
		at := func(rate float64) rig.Blast {
			got := min(rate, capacity)
			return rig.Blast{Offered: rate, Received: got, Got: uint64(got), Loss: 1 - got/rate}
		}
		flat := at(600_000)
		found, err := search(flat, 8, func(rate float64) (rig.Blast, error) { return at(rate), nil })
		if err != nil || found > capacity/(1-maxLoss) || found < 0.97*capacity {
			t.Errorf("capacity %v: found %v, %v", capacity, found, err)
		}
	}
	loses := func(float64) (rig.Blast, error) { return rig.Blast{Loss: 0.5, Got: 1}, nil }
	if at, err := search(rig.Blast{Offered: 10, Received: 5}, 4, loses); err == nil {
		t.Errorf("a path that always loses: %v", at)
	}
	broken := errors.New("broken")
	if _, err := search(rig.Blast{Offered: 10, Received: 5}, 4, func(float64) (rig.Blast, error) { return rig.Blast{}, broken }); !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
}

// TestOrder: in as many rounds as there are paths each is first once, behind the wire.
func TestOrder(t *testing.T) {
	var paths []rig.Path
	for _, name := range []string{"vxlan", "wire", "tun", "route"} {
		p, err := rig.ParsePath(name)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, p)
	}
	var got [][]string
	for round := range 3 {
		var names []string
		for _, p := range order(paths, round) {
			names = append(names, p.Name)
		}
		got = append(got, names)
	}
	want := [][]string{{"wire", "vxlan", "tun", "route"}, {"wire", "tun", "route", "vxlan"}, {"wire", "route", "vxlan", "tun"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestMemory runs each scenario without a network once, small.
func TestMemory(t *testing.T) {
	told := 0
	m := Memory{Rounds: 1, Packets: 64 * 100, Wanted: func(string) bool { return true }, Progress: func(Progress) { told++ }}
	series, err := m.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]bool)
	for _, s := range series {
		found[fmt.Sprint(s.Scenario, "/", s.Path, "/", s.Name)] = true
		if s.Summary.N != 1 || s.Summary.Median <= 0 && s.Name != "allocations" {
			t.Errorf("%+v", s)
		}
	}
	for _, want := range []string{"loop/901,899 routes/time", "loop/901,899 routes/allocations", "lookup/bart.Fast/time", "lookup/Forwarding/time",
		"updates/1 in a transaction, 1 reader/rate", "load/901,899 routes/time", "load/901,899 routes/memory"} {
		if !found[want] {
			t.Errorf("%s is missing: %v", want, found)
		}
	}
	if told == 0 {
		t.Error("no progress was told")
	}
}

func TestScenarios(t *testing.T) {
	seen := make(map[string]bool)
	for _, s := range Scenarios() {
		if seen[s.Name] || s.Title == "" || len(s.Metrics) == 0 {
			t.Errorf("scenario %+v: expected a name of its own, a title and metrics", s)
		}
		seen[s.Name] = true
	}
}
