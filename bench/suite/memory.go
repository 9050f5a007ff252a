package suite

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime/debug"
	"testing"
	"time"

	"margay/bench/table"
)

// The scenarios that need no network, and of some of them the paths, which are variants here.
const (
	Loop    = "loop"
	Lookup  = "lookup"
	Updates = "updates"
	Load    = "load"

	LoopFull      = "901,899 routes"
	UpdatesSingle = "1 in a transaction, 1 reader"
	LoadFull      = "901,899 routes"
	RTE           = "rte_lpm"
)

// memory returns those scenarios; Measure is nil, and Memory measures them.
func memory() []Scenario {
	nanos := Metric{Name: "time", Unit: "ns", Lower: true}
	return []Scenario{
		{Name: Loop, Title: "forwarding loop alone, in-memory ports, random destinations, ns a packet",
			Metrics: []Metric{nanos, {Name: "allocations", Unit: "in a million packets", Lower: true}}},
		{Name: Lookup, Title: "random lookups in the full table, batches of 64, ns a lookup", Peer: table.Peer, Metrics: []Metric{nanos}},
		{Name: Updates, Title: "route updates of the full table, thousands a second", Metrics: []Metric{{Name: "rate", Unit: "k/s"}}},
		{Name: Load, Title: "the full table into an empty FIB",
			Metrics: []Metric{{Name: "time", Unit: "s", Lower: true}, {Name: "memory", Unit: "MB", Lower: true}}},
	}
}

// Memory says how the scenarios without a network are run.
type Memory struct {
	Wanted   func(scenario string) bool
	Rounds   int
	Packets  int  // of one measurement of the loop; as many lookups, and a tenth as many updates
	RTELPM   bool // look addresses up in DPDK's rte_lpm too, whose load takes minutes
	Progress func(Progress)
}

// variant is one thing to be measured again and again.
type variant struct {
	name    string
	measure func() (Values, error)
	close   func() error
}

// Run measures in rounds that go through all variants of a scenario, the first discarded.
func (m Memory) Run(ctx context.Context) ([]Series, error) {
	var out []Series
	for _, s := range memory() {
		if !m.Wanted(s.Name) {
			continue
		}
		series, err := m.scenario(ctx, s)
		if err != nil {
			return out, fmt.Errorf("%s: %w", s.Name, err)
		}
		out = append(out, series...)
		debug.FreeOSMemory() // what the next one keeps is told from what this one has left
	}
	return out, nil
}

func (m Memory) scenario(ctx context.Context, s Scenario) (_ []Series, err error) {
	full, err := table.Real()
	if err != nil {
		return nil, err
	}
	var variants []variant
	switch s.Name {
	case Loop:
		variants, err = m.loops(full)
	case Lookup:
		variants, err = m.lookups(full)
	case Updates:
		variants, err = m.updates(full)
	case Load:
		variants = []variant{{name: LoadFull, measure: func() (Values, error) {
			took, kept, err := table.Load(full)
			return Values{"time": took.Seconds(), "memory": float64(kept) / 1e6}, err
		}}}
	}
	defer func() {
		for _, v := range variants {
			if v.close != nil && err == nil {
				err = v.close()
			}
		}
	}()
	if err != nil {
		return nil, err
	}
	all := make(map[string]map[string]*Series)
	for round := range m.Rounds + 1 {
		for i, v := range variants {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			values, err := v.measure()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", v.name, err)
			}
			if m.Progress != nil {
				m.Progress(Progress{Done: round*len(variants) + i + 1, Total: len(variants) * (m.Rounds + 1), Scenario: s.Name,
					Path: v.name, Round: round, Rounds: m.Rounds, Values: values, Metrics: s.Metrics})
			}
			if round > 0 {
				record(all, s, v.name, round, values)
			}
		}
	}
	var out []Series
	for _, v := range variants {
		for _, metric := range s.Metrics {
			if one := all[v.name][metric.Name]; one != nil {
				one.summarise()
				out = append(out, *one)
			}
		}
	}
	return out, nil
}

func (m Memory) loops(full []netip.Prefix) ([]variant, error) {
	var out []variant
	for _, t := range []struct {
		name     string
		prefixes []netip.Prefix
	}{{"1 route", table.Some(1)}, {"10,000 routes", table.Some(10_000)}, {LoopFull, full}} {
		l, err := table.NewLoop(t.prefixes)
		if err != nil {
			return nil, err
		}
		out = append(out, variant{name: t.name, measure: func() (Values, error) {
			began := time.Now()
			if err := l.Run(m.Packets); err != nil {
				return nil, err
			}
			took := time.Since(began)
			var failed error
			allocated := testing.AllocsPerRun(1, func() {
				if err := l.Run(1_000_000); err != nil {
					failed = err
				}
			})
			return Values{"time": float64(took.Nanoseconds()) / float64(m.Packets), "allocations": allocated}, failed
		}})
	}
	return out, nil
}

func (m Memory) lookups(full []netip.Prefix) ([]variant, error) {
	forms, err := table.NewForms(full)
	if err != nil {
		return nil, err
	}
	dst := table.Addresses(full, 1<<20)
	var out []variant
	for _, f := range forms.All {
		out = append(out, variant{name: f.Name, measure: func() (Values, error) {
			began := time.Now()
			f.LookupBatches(dst, m.Packets)
			return Values{"time": float64(time.Since(began).Nanoseconds()) / float64(m.Packets)}, nil
		}})
	}
	out[0].close = forms.Close
	if !m.RTELPM {
		return out, nil
	}
	peer, err := table.NewRTELPM(full, dst)
	if err == nil {
		err = peer.Check(forms, dst)
	}
	if err != nil {
		return out, errors.Join(err, forms.Close())
	}
	return append(out, variant{name: RTE, close: peer.Close, measure: func() (Values, error) {
		took, _, err := peer.Lookups(m.Packets)
		return Values{"time": float64(took.Nanoseconds()) / float64(m.Packets)}, err
	}}), nil
}

func (m Memory) updates(full []netip.Prefix) ([]variant, error) {
	var out []variant
	for _, v := range []struct {
		name           string
		batch, readers int
	}{{UpdatesSingle, 1, 1}, {"64 in a transaction, 1 reader", 64, 1}, {"1 in a transaction, no reader", 1, 0}} {
		out = append(out, variant{name: v.name, measure: func() (Values, error) {
			u, err := table.NewUpdates(full, v.readers)
			if err != nil {
				return nil, err
			}
			defer u.Close()
			n := m.Packets / 10
			began := time.Now()
			err = u.Run(n, v.batch)
			return Values{"rate": float64(n) / time.Since(began).Seconds() / 1e3}, err
		}})
	}
	return out, nil
}
