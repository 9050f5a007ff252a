package suite

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

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
	var all []subject
	for _, name := range []string{"vxlan", "wire", "tun", "route"} {
		all = append(all, subject{name: name, leads: name == rig.KindWire})
	}
	var got [][]string
	for round := range 3 {
		var names []string
		for _, s := range order(all, round) {
			names = append(names, s.name)
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
	told, saved := Progress{}, 0
	out, err := Run(t.Context(), Config{Scenarios: memory(), Rounds: 1, Packets: 64 * 100, Progress: func(p Progress) { told = p },
		Save: func(o *Outcome) error {
			if o.Partial == "" {
				t.Error("a run that goes on is not marked as partial")
			}
			saved++
			return nil
		}})
	if err != nil || out.Partial != "" || len(out.Failures) > 0 {
		t.Fatalf("%v, %q, %+v", err, out.Partial, out.Failures)
	}
	series := out.Series
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
	if told.Done == 0 || told.Done != told.Total || told.Left != 0 || saved != 2*len(memory()) {
		t.Errorf("saved %d times, and in the end was told %+v", saved, told)
	}
}

// failing has two paths, a and b; measure is called with the path's name and the round.
func failing(ctx context.Context, measure func(path string, call int) (Values, error)) (*Outcome, error) {
	r := &runner{Config: Config{Rounds: 3}, began: time.Now()}
	r.out.Took = make(map[string]time.Duration)
	s := Scenario{Name: "one", Metrics: []Metric{rate}, variants: 2, Cost: func(Times) time.Duration { return time.Second }}
	calls := make(map[string]int)
	var all []subject
	for _, name := range []string{"a", "b"} {
		all = append(all, subject{name: name, measure: func(context.Context) (Values, error) {
			calls[name]++
			return measure(name, calls[name])
		}})
	}
	err := r.rounds(ctx, s, all)
	return &r.out, err
}

// TestFailure: a path that fails once is tried again, one that fails twice no more; the others go on.
func TestFailure(t *testing.T) {
	most := 0
	out, err := failing(t.Context(), func(path string, call int) (Values, error) {
		if path == "a" {
			return Values{"rate": float64(call)}, nil
		}
		most = max(most, call)
		if call == 1 || call == 3 {
			return nil, errors.New("broken")
		}
		return Values{"rate": 1}, nil
	})
	if err != nil || most != 3 || len(out.Series) != 2 || out.Series[0].Summary.N != 3 || out.Series[1].Summary.N != 1 {
		t.Errorf("%v, %d calls, %+v", err, most, out.Series)
	}
	want := []Failure{{Scenario: "one", Path: "b", Round: 0, Error: "broken"}, {Scenario: "one", Path: "b", Round: 2, Error: "broken"}}
	if diff := cmp.Diff(want, out.Failures); diff != "" {
		t.Error(diff)
	}
}

// TestWithin: a run behind its time makes the least rounds, and what it leaves out is no more to do; one in time makes them all.
func TestWithin(t *testing.T) {
	for _, c := range []struct {
		within time.Duration
		want   int // calls, the discarded round's included
	}{{0, 6}, {time.Hour, 6}, {time.Second, 4}} {
		s := Scenario{Name: "one", Metrics: []Metric{rate}, variants: 2, Cost: func(Times) time.Duration { return time.Second }}
		r := &runner{Config: Config{Scenarios: []Scenario{s}, Rounds: 5, Least: 3, Within: c.within}, began: time.Now().Add(-time.Minute)}
		r.plan()
		calls := 0
		one := func(context.Context) (Values, error) { calls++; return Values{"rate": 1}, nil }
		err := r.rounds(t.Context(), s, []subject{{name: "a", measure: one}, {name: "b", measure: one}})
		if err != nil || calls != 2*c.want || r.done != calls || r.total != calls || r.ahead != 0 || (len(r.out.Notes) > 0) != (c.want < 6) {
			t.Errorf("within %v: %d calls, %d of %d done, %v ahead, notes %q, %v", c.within, calls, r.done, r.total, r.ahead, r.out.Notes, err)
		}
	}
}

// TestEnd: what was measured before the end, also in the round that did not end, is kept.
func TestEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	out, err := failing(ctx, func(path string, call int) (Values, error) {
		if path == "b" && call == 3 {
			cancel()
			return nil, ctx.Err()
		}
		return Values{"rate": 1}, nil
	})
	if !errors.Is(err, context.Canceled) || len(out.Failures) > 0 || len(out.Series) != 2 || out.Series[0].Summary.N != 2 || out.Series[1].Summary.N != 1 {
		t.Errorf("%v, %+v, %+v", err, out.Series, out.Failures)
	}
}

func TestScenarios(t *testing.T) {
	seen := make(map[string]bool)
	for _, s := range Scenarios() {
		cost := s.Cost(Times{Warm: time.Second, Window: time.Second, Step: time.Second, Steps: 1})
		if seen[s.Name] || s.Title == "" || len(s.Metrics) == 0 || cost <= 0 {
			t.Errorf("scenario %+v: expected a name of its own, a title, metrics and a cost", s)
		}
		seen[s.Name] = true
	}
}
