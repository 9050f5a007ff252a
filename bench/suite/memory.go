package suite

import (
	"context"
	"errors"
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

// memory returns those scenarios; their Measure is nil, and their subjects come from runner.memory.
func memory() []Scenario {
	nanos := Metric{Name: "time", Unit: "ns", Lower: true}
	cost := func(d time.Duration) func(Times) time.Duration { return func(Times) time.Duration { return d } }
	return []Scenario{
		{Name: Loop, Title: "forwarding loop alone, in-memory ports, random destinations, ns a packet", variants: 3, Cost: cost(300 * time.Millisecond),
			Metrics: []Metric{nanos, {Name: "allocations", Unit: "in a million packets", Lower: true}}},
		{Name: Lookup, Title: "random lookups in the full table, batches of 64, ns a lookup", Peer: table.Peer, variants: 6,
			Cost: cost(150 * time.Millisecond), Metrics: []Metric{nanos}},
		{Name: Updates, Title: "route updates of the full table, thousands a second", variants: 3, Cost: cost(700 * time.Millisecond),
			Metrics: []Metric{{Name: "rate", Unit: "k/s"}}},
		{Name: Load, Title: "the full table into an empty FIB", variants: 1, Cost: cost(700 * time.Millisecond),
			Metrics: []Metric{{Name: "time", Unit: "s", Lower: true}, {Name: "memory", Unit: "MB", Lower: true}}},
	}
}

// memory makes the subjects of a scenario without a network.
func (r *runner) memory(s Scenario) (all []subject, release func() error, err error) {
	full, err := table.Real()
	if err != nil {
		return nil, nil, err
	}
	var closers []func() error
	release = func() error {
		var errs []error
		for _, f := range closers {
			errs = append(errs, f())
		}
		debug.FreeOSMemory() // what the next scenario keeps is told from what this one has left
		return errors.Join(errs...)
	}
	switch s.Name {
	case Loop:
		all, err = r.loops(full)
	case Lookup:
		all, closers, err = r.lookups(full)
	case Updates:
		all = r.updates(full)
	case Load:
		all = []subject{{name: LoadFull, measure: func(context.Context) (Values, error) {
			took, kept, err := table.Load(full)
			return Values{"time": took.Seconds(), "memory": float64(kept) / 1e6}, err
		}}}
	}
	if err != nil {
		return nil, nil, errors.Join(err, release())
	}
	return all, release, nil
}

func (r *runner) loops(full []netip.Prefix) ([]subject, error) {
	var out []subject
	for _, t := range []struct {
		name     string
		prefixes []netip.Prefix
	}{{"1 route", table.Some(1)}, {"10,000 routes", table.Some(10_000)}, {LoopFull, full}} {
		l, err := table.NewLoop(t.prefixes)
		if err != nil {
			return nil, err
		}
		out = append(out, subject{name: t.name, measure: func(context.Context) (Values, error) {
			began := time.Now()
			if err := l.Run(r.Packets); err != nil {
				return nil, err
			}
			took := time.Since(began)
			var failed error
			allocated := testing.AllocsPerRun(1, func() {
				if err := l.Run(1_000_000); err != nil {
					failed = err
				}
			})
			return Values{"time": float64(took.Nanoseconds()) / float64(r.Packets), "allocations": allocated}, failed
		}})
	}
	return out, nil
}

func (r *runner) lookups(full []netip.Prefix) (out []subject, closers []func() error, err error) {
	forms, err := table.NewForms(full)
	if err != nil {
		return nil, nil, err
	}
	closers = append(closers, forms.Close)
	dst := table.Addresses(full, 1<<20)
	for _, f := range forms.All {
		out = append(out, subject{name: f.Name, measure: func(context.Context) (Values, error) {
			began := time.Now()
			f.LookupBatches(dst, r.Packets)
			return Values{"time": float64(time.Since(began).Nanoseconds()) / float64(r.Packets)}, nil
		}})
	}
	if !r.RTELPM {
		return out, closers, nil
	}
	peer, err := table.NewRTELPM(full, dst)
	if err == nil {
		closers = append(closers, peer.Close)
		err = peer.Check(forms, dst)
	}
	return append(out, subject{name: RTE, measure: func(context.Context) (Values, error) {
		if err != nil { // it could not be made, or gives other answers: the other forms are measured all the same
			return nil, err
		}
		took, _, err := peer.Lookups(r.Packets)
		return Values{"time": float64(took.Nanoseconds()) / float64(r.Packets)}, err
	}}), closers, nil
}

func (r *runner) updates(full []netip.Prefix) (out []subject) {
	for _, v := range []struct {
		name           string
		batch, readers int
	}{{UpdatesSingle, 1, 1}, {"64 in a transaction, 1 reader", 64, 1}, {"1 in a transaction, no reader", 1, 0}} {
		out = append(out, subject{name: v.name, measure: func(context.Context) (Values, error) {
			u, err := table.NewUpdates(full, v.readers)
			if err != nil {
				return nil, err
			}
			defer u.Close()
			n := r.Packets / 10
			began := time.Now()
			err = u.Run(n, v.batch)
			return Values{"rate": float64(n) / time.Since(began).Seconds() / 1e3}, err
		}})
	}
	return out
}
