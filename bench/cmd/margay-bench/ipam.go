package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"margay/bench/addr"
)

// ipamScenarios are the words of `margay-bench ipam`, in the order in which they run.
var ipamScenarios = []string{"assign", "claim", "add", "pods", "sim"}

// ipamOutcome is what `-o json` prints.
type ipamOutcome struct {
	Rows        []addr.Row       `json:"rows,omitempty"`
	Simulations []addr.SimResult `json:"simulations,omitempty"`
}

func newIPAMCommand() *cobra.Command {
	var (
		rounds, nodes int
		ops           int64
		limit         time.Duration
		bin, output   string
	)
	cmd := &cobra.Command{
		Use:   "ipam [" + strings.Join(ipamScenarios, "|") + "]…",
		Short: "Addresses: assignment, claims, CNI ADD and many pods beside their peers, and the simulation of large clusters",
		Long: `assign   an address out of a node's own block, beside a bare transaction of etcd
claim    a block beside 5,000 nodes' blocks, beside one beside 5; also with pools that are 95 % full
add      CNI ADD, beside upstream's ptp with host-local (built through the Go module proxy)
pods     3 nodes × 110 pods at once, until every pod has reached every other
sim      nodes that take and give back addresses while agents die, connections break, etcd restarts and clocks jump

add and pods need root, and the binaries of ` + "`make build`" + `.`,
		ValidArgs: ipamScenarios,
		Args:      cobra.OnlyValidArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("--output %q: expected table or json", output)
			}
			if len(args) == 0 {
				args = ipamScenarios
			}
			var out ipamOutcome
			err := runIPAM(cmd.Context(), &out, args, rounds, bin, addr.Simulation{Nodes: nodes, Workers: 32, Ops: ops, Time: limit, Cuts: 40})
			// What was measured is printed, whatever came after it.
			if output == "json" {
				e := json.NewEncoder(os.Stdout)
				e.SetIndent("", "  ")
				return errors.Join(err, e.Encode(out))
			}
			if len(out.Rows) > 0 {
				err = errors.Join(err, addr.Print(os.Stdout, out.Rows))
			}
			for _, s := range out.Simulations {
				printSimulation(s)
			}
			return err
		},
	}
	f := cmd.Flags()
	f.IntVar(&rounds, "rounds", 0, "`number` of rounds that count (default: each scenario's own)")
	f.StringVar(&bin, "bin", "bin", "`directory` with vrouter, margay-agent and margay-cni")
	f.IntVar(&nodes, "nodes", 0, "`number` of nodes of the simulation (default: 1,000 and then 5,000)")
	f.Int64Var(&ops, "ops", 100_000, "the simulation ends after so many `operations`")
	f.DurationVar(&limit, "limit", 8*time.Minute, "or after so long a `time`")
	f.StringVarP(&output, "output", "o", "table", "table or json")
	return cmd
}

func runIPAM(ctx context.Context, out *ipamOutcome, scenarios []string, rounds int, bin string, sim addr.Simulation) error {
	say := func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
	bin, err := filepath.Abs(bin)
	if err != nil {
		return err
	}
	if removed, err := addr.Sweep(); err != nil {
		return err
	} else if len(removed) > 0 {
		say("swept what a killed run had left: %s", strings.Join(removed, " "))
	}
	or := func(def int) int {
		if rounds > 0 {
			return rounds
		}
		return def
	}
	measures := map[string][]func() ([]addr.Row, error){
		"assign": {func() ([]addr.Row, error) { return addr.Assign(ctx, or(500), true) }, func() ([]addr.Row, error) { return addr.Assign(ctx, or(1000), false) }},
		"claim":  {one(func() (addr.Row, error) { return addr.Claim(ctx, or(40), false) }), one(func() (addr.Row, error) { return addr.Claim(ctx, or(40), true) })},
		"add":    {one(func() (addr.Row, error) { return addr.Attach(ctx, or(50), bin) })},
		"pods":   {one(func() (addr.Row, error) { return addr.Pods(ctx, 3, 110, or(3), bin) })},
	}
	for _, name := range ipamScenarios {
		if !slices.Contains(scenarios, name) {
			continue
		}
		for _, measure := range measures[name] {
			began := time.Now()
			rows, err := measure()
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			out.Rows = append(out.Rows, rows...)
			for _, row := range rows {
				say("[%s] %s: %s", time.Since(began).Round(time.Second), row.What, row.Verdict)
			}
		}
		if name != "sim" {
			continue
		}
		sizes := []int{1000, 5000}
		if sim.Nodes > 0 {
			sizes = []int{sim.Nodes}
		}
		for _, n := range sizes {
			sim.Nodes = n
			sim.Progress = func(r addr.SimResult) {
				say("simulation of %d nodes: %d of %d operations, %d kills, %d etcd restarts, %d problems", n, r.Ops, sim.Ops, r.Kills, r.Restarts, len(r.Problems))
			}
			r, err := sim.Run(ctx)
			if err != nil {
				return fmt.Errorf("simulation of %d nodes: %w", n, err)
			}
			if out.Simulations = append(out.Simulations, r); len(r.Problems) > 0 {
				return fmt.Errorf("simulation of %d nodes: %d problems", n, len(r.Problems))
			}
		}
	}
	return nil
}

// one is a measurement that has one row.
func one(measure func() (addr.Row, error)) func() ([]addr.Row, error) {
	return func() ([]addr.Row, error) {
		row, err := measure()
		return []addr.Row{row}, err
	}
}

func printSimulation(s addr.SimResult) {
	fmt.Printf("simulation of %d nodes: %d operations in %s, %d kills, %d met an etcd that was away, %d etcd restarts, %d nodes died\n", s.Nodes, s.Ops,
		s.Took.Round(time.Second), s.Kills, s.Away, s.Restarts, s.Deaths)
	fmt.Printf("  %d refused, %d borrowed, %d blocks taken over; at the end %d addresses in %d blocks, %d collected\n", s.Refused, s.Borrowed,
		s.TakenOver, s.Held, s.Blocks, s.Collected)
	fmt.Printf("  leaks %d, duplicates %d, lost %d\n", s.Leaks, s.Duplicates, s.Lost)
	for _, p := range s.Problems {
		fmt.Printf("  PROBLEM %s\n", p)
	}
}
