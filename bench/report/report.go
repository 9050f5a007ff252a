package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"margay/bench/suite"
)

// Report is a whole run.
type Report struct {
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Seconds float64   `json:"seconds"`
	Machine Machine   `json:"machine"`
	Rounds  int       `json:"rounds"`
	Window  string    `json:"window"`
	Targets []Row     `json:"targets"`
	*suite.Outcome

	scenarios []suite.Scenario
}

// Machine is where it ran.
type Machine struct {
	Processor  string `json:"processor"`
	Processors int    `json:"processors"`
	Kernel     string `json:"kernel"`
	Go         string `json:"go"`
}

// New draws up the report of an outcome. scenarios gives the order and the titles.
func New(o *suite.Outcome, scenarios []suite.Scenario) *Report {
	return &Report{Outcome: o, scenarios: scenarios, Targets: judge(o)}
}

// Renew draws the targets up again, from an outcome that has more by now.
func (r *Report) Renew(o *suite.Outcome) { r.Outcome, r.Targets = o, judge(o) }

// JSON writes the report as JSON.
func (r *Report) JSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// Write puts report.json, report.md and the plots into a directory, and returns the files' names. A report of a run that goes on
// may be written too, again and again: whoever reads the files finds a whole one each time. An earlier run's are replaced.
func (r *Report) Write(dir string) (files []string, err error) {
	if err := r.WriteText(dir); err != nil {
		return nil, err
	}
	plots, err := r.plots(dir)
	if err != nil {
		return nil, fmt.Errorf("plots: %w", err)
	}
	return append([]string{"report.md", "report.json"}, plots...), r.text(dir, plots)
}

// WriteText writes the report without plots, which take longer, and removes those of an earlier run.
func (r *Report) WriteText(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, s := range suite.Scenarios() {
		for _, name := range plotNames(s) {
			if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	return r.text(dir, nil)
}

func (r *Report) text(dir string, plots []string) error {
	err := replace(filepath.Join(dir, "report.json"), r.JSON)
	return errors.Join(err, replace(filepath.Join(dir, "report.md"), func(w io.Writer) error { return r.Markdown(w, plots) }))
}

// replace writes a file beside the one of that name, and then puts it in its place.
func replace(name string, write func(io.Writer) error) error {
	f, err := os.Create(name + ".new")
	if err != nil {
		return err
	}
	if err := errors.Join(write(f), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
