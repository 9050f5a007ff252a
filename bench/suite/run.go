package suite

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"margay/bench/rig"
	"margay/bench/stat"
	"margay/bench/traffic"
)

// Config says what to run.
type Config struct {
	Scenarios []Scenario
	Paths     []rig.Path
	Rounds    int // that count; one more comes before them and is discarded
	Times     Times
	Rig       rig.Options
	Progress  func(Progress)
}

// Progress is told after each measurement.
type Progress struct {
	Done, Total    int
	Scenario, Path string
	Round          int // 0 is discarded
	Rounds         int
	Values         Values
	Metrics        []Metric
	Err            error
}

// Series is every value of one metric of one path in one scenario.
type Series struct {
	Metric
	Scenario string          `json:"scenario"`
	Path     string          `json:"path"`
	Rounds   map[int]float64 `json:"rounds"` // by round, from 1; the discarded one is not in it
	Summary  stat.Summary    `json:"summary"`
}

func (s *Series) summarise() { s.Summary = stat.Summarise(slices.Collect(maps.Values(s.Rounds))) }

// Failure is a path that could not be measured, and why.
type Failure struct {
	Scenario string `json:"scenario,omitempty"` // none: the path could not be set up
	Path     string `json:"path"`
	Error    string `json:"error"`
}

// Outcome is all that a run has measured.
type Outcome struct {
	Series   []Series          `json:"series"`
	Failures []Failure         `json:"failures,omitempty"`
	Notes    []string          `json:"notes,omitempty"`
	Ports    map[string]string `json:"ports"` // path to how its vRouter carries packets, in its own words
	// Limit is what the generator reaches with nothing in between, in packets per second; by profile.
	Limit map[traffic.Profile]float64 `json:"generator_limit"`
	Took  time.Duration               `json:"took_ns"`
}

// Run measures every scenario over every path that fits it. The rounds go through all paths, so that neighbours in time are
// compared, and each begins one path further on, so that none is always first. A path that fails is left out from there on;
// Run fails only when ctx ends, or when nothing could be measured.
func Run(ctx context.Context, c Config) (*Outcome, error) {
	r := &runner{Config: c, began: time.Now(), beds: make(map[bedKey]*rig.Bed), failed: make(map[bedKey]bool)}
	r.out.Ports = make(map[string]string)
	r.env = Env{Times: c.Times, Own: make(map[traffic.Profile]float64), OwnPaced: make(map[traffic.Profile]float64),
		Limit: make(map[traffic.Profile]float64), Note: r.note}
	for _, s := range c.Scenarios {
		r.total += len(r.fitting(s)) * (c.Rounds + 1)
	}
	err := r.run(ctx)
	err = errors.Join(err, r.close())
	if r.env.Disturbed > 0 {
		r.round = 1
		r.note("in %d of %d measurements other processes took more than 4 %% of the busy time, also when they were repeated",
			r.env.Disturbed, r.env.Measured)
	}
	r.out.Limit, r.out.Took = r.env.Limit, time.Since(r.began)
	return &r.out, err
}

type bedKey struct {
	path  string
	shape rig.Shape
}

type runner struct {
	Config
	out    Outcome
	env    Env
	began  time.Time
	beds   map[bedKey]*rig.Bed
	failed map[bedKey]bool
	done   int
	total  int
	round  int
}

func (r *runner) note(format string, args ...any) {
	if r.round == 0 {
		return
	}
	if text := fmt.Sprintf(format, args...); !slices.Contains(r.out.Notes, text) {
		r.out.Notes = append(r.out.Notes, text)
	}
}

func (r *runner) fitting(s Scenario) []rig.Path {
	var out []rig.Path
	for _, p := range r.Paths {
		if s.Fits(p) {
			out = append(out, p)
		}
	}
	return out
}

func (r *runner) run(ctx context.Context) error {
	for _, s := range r.Scenarios {
		series := make(map[string]map[string]*Series) // path, metric
		out := make(map[string]bool)
		for round := range r.Rounds + 1 {
			r.round = round
			for _, p := range order(r.fitting(s), round) {
				r.done++
				if out[p.Name] {
					continue
				}
				values, err := r.measure(ctx, s, p)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if r.Progress != nil {
					r.Progress(Progress{Done: r.done, Total: r.total, Scenario: s.Name, Path: p.Name, Round: round, Rounds: r.Rounds,
						Values: values, Metrics: s.Metrics, Err: err})
				}
				if err != nil {
					out[p.Name] = true
					r.out.Failures = append(r.out.Failures, Failure{s.Name, p.Name, err.Error()})
					continue
				}
				if round > 0 {
					record(series, s, p.Name, round, values)
				}
			}
		}
		for _, p := range r.fitting(s) {
			for _, m := range s.Metrics {
				if one := series[p.Name][m.Name]; one != nil {
					one.summarise()
					r.out.Series = append(r.out.Series, *one)
				}
			}
		}
		for key, b := range r.beds { // generator and sink are not needed in between
			if err := b.StopTraffic(); err != nil {
				return fmt.Errorf("%s: %w", key.path, err)
			}
		}
	}
	return nil
}

// order lets each round begin one path further on; the wire stays first, because the others are measured against it.
func order(paths []rig.Path, round int) []rig.Path {
	var wire, rest []rig.Path
	for _, p := range paths {
		if p.Kind == rig.KindWire {
			wire = append(wire, p)
		} else {
			rest = append(rest, p)
		}
	}
	if n := len(rest); n > 0 {
		rest = slices.Concat(rest[round%n:], rest[:round%n])
	}
	return append(wire, rest...)
}

func record(series map[string]map[string]*Series, s Scenario, path string, round int, values Values) {
	if series[path] == nil {
		series[path] = make(map[string]*Series)
	}
	for _, m := range s.Metrics {
		v, ok := values[m.Name]
		if !ok {
			continue
		}
		one := series[path][m.Name]
		if one == nil {
			one = &Series{Metric: m, Scenario: s.Name, Path: path, Rounds: make(map[int]float64)}
			series[path][m.Name] = one
		}
		one.Rounds[round] = v
	}
}

func (r *runner) measure(ctx context.Context, s Scenario, p rig.Path) (Values, error) {
	b, err := r.bed(ctx, p, s.Shape)
	if err != nil {
		return nil, err
	}
	values, err := s.Measure(ctx, &r.env, b)
	return values, errors.Join(err, b.StopTraffic())
}

// bed returns the path's bed, built when it is needed first.
func (r *runner) bed(ctx context.Context, p rig.Path, shape rig.Shape) (*rig.Bed, error) {
	if p.Kind == rig.KindWire {
		shape = rig.Edge
	}
	key := bedKey{p.Name, shape}
	if b := r.beds[key]; b != nil {
		return b, nil
	}
	if r.failed[key] {
		return nil, errors.New("could not be set up, see above")
	}
	b, err := rig.Build(ctx, r.Rig, p, shape)
	if err != nil {
		r.failed[key] = true
		return nil, err
	}
	r.beds[key] = b
	if r.out.Ports[p.Name], err = b.Describe(ctx); err != nil {
		return nil, err
	}
	if r.out.Ports[p.Name] == "" {
		delete(r.out.Ports, p.Name)
	}
	return b, nil
}

func (r *runner) close() error {
	var errs []error
	for _, b := range r.beds {
		errs = append(errs, b.Close())
	}
	return errors.Join(append(errs, rig.Done())...)
}
