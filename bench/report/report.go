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
	return &Report{Outcome: o, scenarios: scenarios, Targets: judge(o), Seconds: o.Took.Seconds()}
}

// JSON writes the report as JSON.
func (r *Report) JSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// Write puts report.json, report.md and the plots into a directory, and returns the files' names. What an earlier run has
// left there under these names is replaced.
func (r *Report) Write(dir string) (files []string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	plots, err := r.plots(dir)
	if err != nil {
		return nil, fmt.Errorf("plots: %w", err)
	}
	for name, write := range map[string]func(io.Writer) error{
		"report.json": r.JSON,
		"report.md":   func(w io.Writer) error { return r.Markdown(w, plots) },
	} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		if err := errors.Join(write(f), f.Close()); err != nil {
			return nil, err
		}
	}
	return append([]string{"report.md", "report.json"}, plots...), nil
}
