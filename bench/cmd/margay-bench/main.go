// Command margay-bench measures Margay beside its peers. `make bench` runs it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"margay/bench/report"
	"margay/bench/rig"
	"margay/bench/stat"
	"margay/bench/suite"
	"margay/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends it at once
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "margay-bench: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

type options struct {
	short           bool
	rteLPM          bool
	only, scenarios []string
	rounds          int
	window          time.Duration
	vrouter         string
	wireguard       string
	results         string
	output          string
}

// What is measured when nothing is named.
var (
	fullPaths = []string{"route", "vxlan", "vxlan+rps", "wireguard", "tun-plain", "tun", "tun+nobpf", "veth", "veth+xdp", "veth+nobpf",
		"direct", "direct+xdp", "direct+tc"}
	shortPaths     = []string{"vxlan", "vxlan+rps", "tun+nobpf", "veth", "direct+xdp", "direct+tc"}
	shortScenarios = []string{"tcp1", "tcp1-off", "rr", "udp", "udp-lossless", suite.Loop, suite.Lookup, suite.Updates, suite.Load}
)

func newCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "margay-bench",
		Short: "Measures Margay beside its peers, in network namespaces of its own",
		Long: `margay-bench measures Margay beside its peers: kernel routing, kernel VXLAN,
wireguard-go (which also encrypts), and the portable attachment tun-plain.

It builds pods and nodes as network namespaces, measures every path in turn, in
rounds of which the first is discarded, and writes a table of the targets, JSON, a
Markdown page and plots. The method is in docs/bench.md. It needs root, and the Go
toolchain for what it builds: the vrouter of the checkout it stands in, and
wireguard-go.

A path is route, vxlan, wireguard or an attachment of the vrouter (tun, tun-plain,
veth, direct); then +rps with route and vxlan (every processor works on what
arrives), +xdp, +packet (--io) or +nobpf (capabilities NET_ADMIN and NET_RAW alone)
with an attachment; then @BINARY for another vrouter than this checkout's.`,
		Example: `  margay-bench --short
  margay-bench --only vxlan,tun,tun@/tmp/other/vrouter --scenario tcp1,udp`,
		Args: cobra.NoArgs, Version: version.String(), SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.SetVersionTemplate(version.Line("margay-bench") + "\n")
	f := cmd.Flags()
	f.BoolVar(&o.short, "short", false, "two minutes instead of fifteen: fewer paths, scenarios and rounds")
	f.BoolVar(&o.rteLPM, "rte-lpm", false, "look up in DPDK's rte_lpm too: it needs gcc, pkg-config and libdpdk-dev, and minutes to load")
	f.StringSliceVar(&o.only, "only", nil, "`paths` to measure (default "+strings.Join(fullPaths, ",")+")")
	f.StringSliceVar(&o.scenarios, "scenario", nil, "`scenarios` to run: "+strings.Join(names(suite.Scenarios()), ", ")+" (default all)")
	f.IntVar(&o.rounds, "rounds", 5, "`number` of rounds that count; one more is discarded")
	f.DurationVar(&o.window, "window", 350*time.Millisecond, "how long one measurement lasts")
	f.StringVar(&o.vrouter, "vrouter", "", "vrouter `binary` (default: built from the checkout)")
	f.StringVar(&o.wireguard, "wireguard", "", "wireguard-go `binary` (default: built, version "+wireguardVersion+")")
	f.StringVar(&o.results, "results", "", "`directory` for report.md, report.json and the plots (default: none are written)")
	f.StringVarP(&o.output, "output", "o", "table", "what to print: table (targets), markdown (everything) or json")
	cmd.AddCommand(children()...)
	cmd.AddCommand(newIPAMCommand())
	return cmd
}

func (o *options) run(ctx context.Context, stdout, stderr io.Writer) (err error) {
	if !slices.Contains([]string{"table", "markdown", "json"}, o.output) {
		return fmt.Errorf("--output %q: expected table, markdown or json", o.output)
	}
	if o.rounds < 1 || o.window < 50*time.Millisecond {
		return fmt.Errorf("--rounds %d, --window %v: expected at least 1 and 50ms", o.rounds, o.window)
	}
	paths, scenarios, err := o.choose()
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("network namespaces need root: run it with sudo")
	}
	started := time.Now()
	if removed, err := rig.Sweep(); err != nil {
		return err
	} else if len(removed) > 0 {
		fmt.Fprintf(stderr, "swept what a killed run had left: %s\n", strings.Join(removed, " "))
	}
	tools, err := o.build(ctx, stderr, paths, scenarios)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tools.remove()) }()
	r := report.New(&suite.Outcome{}, scenarios)
	r.Version, r.Started, r.Rounds, r.Window = version.String(), started, o.rounds, o.window.String()
	if r.Machine, err = thisMachine(); err != nil {
		return err
	}
	c := suite.Config{Scenarios: scenarios, Paths: paths, Rounds: o.rounds, Packets: 3_000_000, RTELPM: o.rteLPM, Rig: tools.Options,
		Times: suite.Times{Warm: o.window / 3, Window: o.window, Step: o.window / 2, Steps: 5}, Progress: progress(stderr)}
	if o.results != "" {
		c.Save = func(out *suite.Outcome) error {
			r.Renew(out)
			r.Seconds = time.Since(started).Seconds()
			return r.WriteText(o.results)
		}
	}
	out, failed := suite.Run(ctx, c)
	if len(out.Series) == 0 {
		return errors.Join(failed, fmt.Errorf("nothing was measured: %v", out.Failures))
	}
	r.Renew(out)
	r.Seconds = time.Since(started).Seconds()
	return errors.Join(failed, o.write(r, stdout, stderr))
}

// write puts the report where the flags say, also that of a run which was interrupted.
func (o *options) write(r *report.Report, stdout, stderr io.Writer) error {
	if o.results != "" {
		files, err := r.Write(o.results)
		if err != nil {
			return err
		}
		fmt.Fprintf(stderr, "wrote %s to %s\n", strings.Join(files, " "), o.results)
	}
	switch o.output {
	case "json":
		return r.JSON(stdout)
	case "markdown":
		return r.Markdown(stdout, nil)
	}
	return r.Table(stdout)
}

func names(all []suite.Scenario) []string {
	var out []string
	for _, s := range all {
		out = append(out, s.Name)
	}
	return out
}

// choose returns the paths and scenarios that are asked for. The wire is always among the paths.
func (o *options) choose() (paths []rig.Path, scenarios []suite.Scenario, err error) {
	only, wanted := o.only, o.scenarios
	if only == nil {
		only = fullPaths
	}
	if o.short {
		if o.only == nil {
			only = shortPaths
		}
		if wanted == nil {
			wanted = shortScenarios
		}
		o.rounds, o.window = min(o.rounds, 2), min(o.window, 200*time.Millisecond)
	}
	for _, text := range append([]string{rig.KindWire}, only...) {
		p, err := rig.ParsePath(text)
		if err != nil {
			return nil, nil, fmt.Errorf("--only: %w", err)
		}
		if !slices.Contains(paths, p) {
			paths = append(paths, p)
		}
	}
	all := suite.Scenarios()
	for _, name := range wanted {
		if !slices.Contains(names(all), name) {
			return nil, nil, fmt.Errorf("--scenario %q: expected some of %s", name, strings.Join(names(all), ", "))
		}
	}
	for _, s := range all {
		if wanted == nil || slices.Contains(wanted, s.Name) {
			scenarios = append(scenarios, s)
		}
	}
	return paths, scenarios, nil
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
		fmt.Fprintf(w, "[%s, %s left, %d of %d] %-13s %-15s %-14s%s\n", minutes(time.Since(began)), minutes(p.Left), p.Done, p.Total,
			p.Scenario, p.Path, round, text.String())
	}
}

// minutes writes a duration as minutes and seconds.
func minutes(d time.Duration) string {
	s := int(d.Round(time.Second).Seconds())
	return fmt.Sprintf("%d:%02d", s/60, s%60)
}
