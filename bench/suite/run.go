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
	Packets   int  // of one measurement of the loop; as many lookups, and a tenth as many updates
	RTELPM    bool // look addresses up in DPDK's rte_lpm too, whose load takes minutes
	Rig       rig.Options
	Progress  func(Progress)
	// Save is called after each round with all that has been measured until then; it must not keep the outcome.
	Save func(*Outcome) error
}

// Progress is told after each measurement.
type Progress struct {
	Done, Total    int
	Left           time.Duration // estimated, until the run's end
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

// Failure is a measurement that failed, and why.
type Failure struct {
	Scenario string `json:"scenario"`
	Path     string `json:"path,omitempty"` // none: the whole scenario
	Round    int    `json:"round"`          // 0 is the discarded one
	Error    string `json:"error"`
}

// Outcome is all that a run has measured.
type Outcome struct {
	Partial  string            `json:"partial,omitempty"` // why it is not the whole run, if it is not
	Series   []Series          `json:"series"`
	Failures []Failure         `json:"failures,omitempty"`
	Notes    []string          `json:"notes,omitempty"`
	Ports    map[string]string `json:"ports"` // path to how its vRouter carries packets, in its own words
	// Alone is what generator and sink do with nothing in between; by profile.
	Alone map[traffic.Profile]Alone `json:"generator_alone,omitempty"`
	// Took is how long each scenario took.
	Took map[string]time.Duration `json:"took_ns"`
}

// Alone is what generator and sink do with nothing in between, in the round in which they reached most.
type Alone struct {
	Rate      float64 `json:"rate"`      // packets per second
	Generator float64 `json:"generator"` // processors that its process kept busy, the kernel's work for each packet included
	Sink      float64 `json:"sink"`
	Plain     bool    `json:"plain,omitempty"` // without AF_XDP
}

// Run measures every scenario over every path that fits it. The rounds go through all paths, so that neighbours in time are
// compared, and each begins one path further on, so that none is always first. A measurement that fails is kept as a Failure, the
// path is set up anew and tried once more in the next round. The outcome is never nil: when ctx ends, it has what there is.
func Run(ctx context.Context, c Config) (*Outcome, error) {
	r := &runner{Config: c, began: time.Now(), beds: make(map[bedKey]*rig.Bed), failed: make(map[bedKey]error)}
	r.out.Ports, r.out.Took = make(map[string]string), make(map[string]time.Duration)
	r.env = Env{Times: c.Times, Own: make(map[traffic.Profile]float64), OwnPaced: make(map[traffic.Profile]float64),
		Alone: make(map[traffic.Profile]Alone), Note: r.note}
	r.out.Alone = r.env.Alone
	r.plan()
	err := r.run(ctx)
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	err = errors.Join(err, r.close())
	r.out.Partial = ""
	if err != nil {
		r.out.Partial = fmt.Sprintf("ended after %d of %d measurements: %v", r.done, r.total, err)
	}
	if r.env.Disturbed > 0 {
		r.round = 1
		r.note("in %d of %d measurements other processes took more than 4 %% of the busy time, also when they were repeated",
			r.env.Disturbed, r.env.Measured)
	}
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
	beds   map[bedKey]*rig.Bed
	failed map[bedKey]error // why a bed could not be built
	began  time.Time
	done   int
	total  int
	round  int
	// What the measurements should take, by Scenario.Cost: those that are over, and those to come.
	spent, ahead time.Duration
}

func (r *runner) note(format string, args ...any) {
	if r.round == 0 {
		return
	}
	if text := fmt.Sprintf(format, args...); !slices.Contains(r.out.Notes, text) {
		r.out.Notes = append(r.out.Notes, text)
	}
}

// plan counts what there is to do.
func (r *runner) plan() {
	for _, s := range r.Scenarios {
		r.expect(s, r.expected(s))
	}
}

// expected is how many subjects a scenario has, as far as can be told before they are made.
func (r *runner) expected(s Scenario) int {
	if s.Measure != nil {
		return len(r.fitting(s))
	}
	return s.variants
}

// expect adds n subjects of a scenario to what there is to do.
func (r *runner) expect(s Scenario, n int) {
	r.total += n * (r.Rounds + 1)
	r.ahead += time.Duration(n) * (s.Cost(r.Times.discarded()) + time.Duration(r.Rounds)*s.Cost(r.Times))
}

// left estimates the time until the run's end by what its measurements have taken so far, compared with what they should take;
// while there are few of them that they took as long as they should weighs more.
func (r *runner) left() time.Duration {
	const trust = 5 * time.Second
	return time.Duration(float64(r.ahead) * float64(time.Since(r.began)+trust) / float64(r.spent+trust))
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
		began := time.Now()
		err := r.scenario(ctx, s)
		r.out.Took[s.Name] = time.Since(began)
		if err != nil {
			return err
		}
	}
	return nil
}

// subject is what is measured again and again: a path or, where there is no network, a variant.
type subject struct {
	name    string
	leads   bool // every round begins with it
	measure func(context.Context) (Values, error)
}

// subjects returns those of a scenario, and what to call when they are no more needed.
func (r *runner) subjects(s Scenario) (_ []subject, release func() error, err error) {
	if s.Measure == nil {
		if err := r.close(); err != nil { // what needs no network is measured without beds beside it
			return nil, nil, err
		}
		return r.memory(s)
	}
	var out []subject
	for _, p := range r.fitting(s) {
		out = append(out, subject{name: p.Name, leads: p.Kind == rig.KindWire,
			measure: func(ctx context.Context) (Values, error) { return r.measure(ctx, s, p) }})
	}
	return out, r.rest, nil
}

// scenario measures one. It fails only when ctx ends, or the outcome cannot be saved.
func (r *runner) scenario(ctx context.Context, s Scenario) error {
	r.round = 0
	all, release, err := r.subjects(s)
	r.expect(s, len(all)-r.expected(s))
	if err != nil {
		r.fail(s, "", err)
		return ctx.Err()
	}
	defer func() {
		if failed := release(); failed != nil {
			r.fail(s, "", failed)
		}
	}()
	return r.rounds(ctx, s, all)
}

// rounds measures all subjects of a scenario in turn, again and again.
func (r *runner) rounds(ctx context.Context, s Scenario, all []subject) error {
	before := r.out.Series
	series := make(map[string]map[string]*Series) // path, metric
	failures := make(map[string]int)
	for round := range r.Rounds + 1 {
		r.round, r.env.Times = round, r.Times
		if round == 0 {
			r.env.Times = r.Times.discarded()
		}
		for _, one := range order(all, round) {
			if failures[one.name] < 2 {
				values, err := one.measure(ctx)
				if ctx.Err() != nil {
					r.out.Series = slices.Concat(before, gather(series, s, all))
					return ctx.Err()
				}
				if err != nil {
					failures[one.name]++
					r.fail(s, one.name, err)
				} else if round > 0 {
					record(series, s, one.name, round, values)
				}
				r.count(s)
				r.tell(Progress{Scenario: s.Name, Path: one.name, Round: round, Values: values, Metrics: s.Metrics, Err: err})
			} else {
				r.count(s)
			}
		}
		r.out.Series = slices.Concat(before, gather(series, s, all))
		if r.Save != nil {
			r.out.Partial = fmt.Sprintf("%d of %d measurements are made", r.done, r.total)
			if err := r.Save(&r.out); err != nil {
				return err
			}
		}
	}
	return nil
}

// count notes that a measurement is over.
func (r *runner) count(s Scenario) {
	r.done++
	r.spent, r.ahead = r.spent+s.Cost(r.env.Times), r.ahead-s.Cost(r.env.Times)
}

func (r *runner) tell(p Progress) {
	if r.Progress != nil {
		p.Done, p.Total, p.Left, p.Rounds = r.done, r.total, r.left(), r.Rounds
		r.Progress(p)
	}
}

func (r *runner) fail(s Scenario, path string, err error) {
	r.out.Failures = append(r.out.Failures, Failure{Scenario: s.Name, Path: path, Round: r.round, Error: err.Error()})
}

// order lets each round begin one subject further on; those that lead stay first, because the others are measured against them.
func order(all []subject, round int) []subject {
	var leading, rest []subject
	for _, s := range all {
		if s.leads {
			leading = append(leading, s)
		} else {
			rest = append(rest, s)
		}
	}
	if n := len(rest); n > 0 {
		rest = slices.Concat(rest[round%n:], rest[:round%n])
	}
	return append(leading, rest...)
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

// gather returns a scenario's series in the order of its subjects and metrics.
func gather(series map[string]map[string]*Series, s Scenario, all []subject) (out []Series) {
	for _, one := range all {
		for _, m := range s.Metrics {
			if got := series[one.name][m.Name]; got != nil {
				got.Summary = stat.Summarise(slices.Collect(maps.Values(got.Rounds)))
				out = append(out, *got)
			}
		}
	}
	return out
}

// measure makes one measurement over a path. After an error the bed is taken down, so that the next one finds a new one.
func (r *runner) measure(ctx context.Context, s Scenario, p rig.Path) (Values, error) {
	key := bedKey{p.Name, s.Shape}
	if p.Kind == rig.KindWire {
		key.shape = rig.Edge
	}
	b, err := r.bed(ctx, p, key)
	if err != nil {
		return nil, err
	}
	values, err := s.Measure(ctx, &r.env, b)
	if err = errors.Join(err, b.StopTraffic()); err != nil {
		delete(r.beds, key)
		err = errors.Join(err, b.Close())
	}
	return values, err
}

// bed returns the path's bed, built when it is needed first.
func (r *runner) bed(ctx context.Context, p rig.Path, key bedKey) (*rig.Bed, error) {
	if b := r.beds[key]; b != nil {
		return b, nil
	}
	if err := r.failed[key]; err != nil {
		return nil, err
	}
	b, err := rig.Build(ctx, r.Rig, p, key.shape)
	if err != nil {
		r.failed[key] = err
		return nil, err
	}
	r.beds[key] = b
	text, err := b.Describe(ctx)
	if text != "" {
		r.out.Ports[p.Name] = text
	}
	return b, err
}

// rest ends generators and sinks, which are not needed in between.
func (r *runner) rest() error {
	var errs []error
	for key, b := range r.beds {
		if err := b.StopTraffic(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key.path, err))
		}
	}
	return errors.Join(errs...)
}

func (r *runner) close() error {
	var errs []error
	for _, b := range r.beds {
		errs = append(errs, b.Close())
	}
	clear(r.beds)
	return errors.Join(append(errs, rig.Done())...)
}
