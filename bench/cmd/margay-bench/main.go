// Command margay-bench measures Margay beside its peers. `make bench` runs it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"margay/bench/rig"
	"margay/bench/stat"
	"margay/bench/suite"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "margay-bench: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

type options struct {
	only, scenarios []string
	rounds          int
	window          time.Duration
	vrouter         string
	output          string
}

func newCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "margay-bench",
		Short: "Measures Margay beside its peers, in network namespaces of its own",
		Args:  cobra.NoArgs, SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd.Context()) },
	}
	f := cmd.Flags()
	f.StringSliceVar(&o.only, "only", []string{"route", "vxlan", "vxlan+rps", "tun"}, "`paths` to measure")
	f.StringSliceVar(&o.scenarios, "scenario", nil, "`scenarios` to run; all if none is named")
	f.IntVar(&o.rounds, "rounds", 5, "`number` of rounds that count; one more is discarded")
	f.DurationVar(&o.window, "window", 800*time.Millisecond, "how long one measurement lasts")
	f.StringVar(&o.vrouter, "vrouter", "", "vrouter `binary`; none: built from this checkout")
	f.StringVarP(&o.output, "output", "o", "text", "text or json")
	cmd.AddCommand(children()...)
	return cmd
}

func (o *options) run(ctx context.Context) (err error) {
	if o.output != "text" && o.output != "json" {
		return fmt.Errorf("--output %q: expected text or json", o.output)
	}
	if os.Geteuid() != 0 {
		return errors.New("network namespaces need root: run it with sudo")
	}
	c := suite.Config{Rounds: o.rounds, Progress: progress(os.Stderr)}
	c.Times = suite.Times{Warm: o.window / 3, Window: o.window, Step: o.window / 2, Steps: 7}
	names := append([]string{rig.KindWire}, o.only...)
	for _, text := range slices.Compact(names) {
		p, err := rig.ParsePath(text)
		if err != nil {
			return fmt.Errorf("--only: %w", err)
		}
		c.Paths = append(c.Paths, p)
	}
	if c.Scenarios, err = choose(o.scenarios); err != nil {
		return err
	}
	if removed, err := rig.Sweep(); err != nil {
		return err
	} else if len(removed) > 0 {
		fmt.Fprintf(os.Stderr, "swept what a killed run had left: %s\n", strings.Join(removed, " "))
	}
	dir, err := os.MkdirTemp("", "margay-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if c.Rig.Self, err = os.Executable(); err != nil {
		return err
	}
	if c.Rig.VRouter = o.vrouter; o.vrouter == "" {
		c.Rig.VRouter = filepath.Join(dir, "vrouter")
		build := exec.CommandContext(ctx, "go", "build", "-o", c.Rig.VRouter, "margay/cmd/vrouter")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("build vrouter (name one by --vrouter, or stand in the checkout): %w: %s", err, out)
		}
	}
	out, err := suite.Run(ctx, c)
	if err != nil {
		return err
	}
	if o.output == "json" {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(out)
	}
	table(os.Stdout, out)
	return nil
}

// choose returns the scenarios that are named, all if none is.
func choose(names []string) ([]suite.Scenario, error) {
	all := suite.Scenarios()
	if len(names) == 0 {
		return all, nil
	}
	var out []suite.Scenario
	var known []string
	for _, s := range all {
		known = append(known, s.Name)
		if slices.Contains(names, s.Name) {
			out = append(out, s)
		}
	}
	for _, n := range names {
		if !slices.Contains(known, n) {
			return nil, fmt.Errorf("--scenario %q: expected some of %s", n, strings.Join(known, ", "))
		}
	}
	return out, nil
}

// progress prints a line for each measurement.
func progress(w io.Writer) func(suite.Progress) {
	began := time.Now()
	return func(p suite.Progress) {
		var text strings.Builder
		for _, m := range p.Metrics {
			if v, ok := p.Values[m.Name]; ok {
				fmt.Fprintf(&text, "  %s %s", stat.Number(v), m.Unit)
			}
		}
		if p.Err != nil {
			fmt.Fprintf(&text, "  %s", strings.ReplaceAll(p.Err.Error(), "\n", "; "))
		}
		round := fmt.Sprintf("round %d of %d", p.Round, p.Rounds)
		if p.Round == 0 {
			round = "discarded"
		}
		fmt.Fprintf(w, "[%3.0f s, %d of %d] %-13s %-15s %-14s%s\n", time.Since(began).Seconds(), p.Done, p.Total, p.Scenario, p.Path, round, text.String())
	}
}

// table prints every series.
func table(w io.Writer, out *suite.Outcome) {
	for _, s := range out.Series {
		fmt.Fprintf(w, "%-14s %-16s %-5s %10s %s  (%s to %s)\n", s.Scenario, s.Path, s.Name, stat.Number(s.Summary.Median), s.Unit,
			stat.Number(s.Summary.Min), stat.Number(s.Summary.Max))
	}
	for path, words := range out.Ports {
		fmt.Fprintf(w, "%s: %s\n", path, words)
	}
	for _, f := range out.Failures {
		fmt.Fprintf(w, "FAILED %s %s: %s\n", f.Scenario, f.Path, strings.ReplaceAll(f.Error, "\n", "; "))
	}
	for _, n := range out.Notes {
		fmt.Fprintf(w, "NOTE %s\n", n)
	}
}
