package ctl

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"margay/agent/api"
)

// reasonDrops is one row of drops: a reason at a node.
type reasonDrops struct {
	Node    string      `json:"node"`
	By      string      `json:"by"`
	Reason  string      `json:"reason"`
	Packets uint64      `json:"packets"`
	Bytes   uint64      `json:"bytes,omitempty"`
	Flows   []podDrops  `json:"flows,omitempty"` // the most first
	Sample  *dropSample `json:"sample,omitempty"`
}

// podDrops counts the drops of one pair of addresses.
type podDrops struct {
	Source         netip.Addr `json:"source"`
	SourcePod      string     `json:"sourcePod,omitempty"`
	Destination    netip.Addr `json:"destination"`
	DestinationPod string     `json:"destinationPod,omitempty"`
	Packets        uint64     `json:"packets"`
	Bytes          uint64     `json:"bytes"`
}

// dropSample is a dropped packet, decoded.
type dropSample struct {
	Node      string    `json:"node"`
	Time      time.Time `json:"time"`
	Direction string    `json:"direction"`
	Reason    string    `json:"reason"`
	Length    int       `json:"length"`
	Decoded   string    `json:"decoded"`
	Packet    []byte    `json:"packet"`
}

// dropsResult is what `margayctl drops -o json` prints.
type dropsResult struct {
	Drops  []reasonDrops     `json:"drops"`
	Errors map[string]string `json:"errors,omitempty"` // by node: what could not be asked
}

// kernelDrops is one line of --watch -o json about a counter of the kernel's: what it has counted since the last look.
type kernelDrops struct {
	Node    string    `json:"node"`
	Time    time.Time `json:"time"` // of the look
	By      string    `json:"by"`
	Reason  string    `json:"reason"`
	Packets uint64    `json:"packets"`
}

// unmissed are reasons that are shown only with --all: what pods without IPv6 send for it of their own accord.
var unmissed = []string{"pod_ipv6_discovery"}

// shows reports whether a reason is asked for.
func (o *dropsOptions) shows(reason string) bool {
	return reason == o.reason || o.reason == "" && (o.all || !slices.Contains(unmissed, reason))
}

type dropsOptions struct {
	nodes  []string
	pod    string
	reason string
	all    bool
	watch  bool
	every  time.Duration
	output string
}

func newDropsCommand() *cobra.Command {
	var o dropsOptions
	cmd := &cobra.Command{
		Use:   "drops",
		Short: "What was dropped, by reason, node and pod, with a sample packet each, the kernel's losses included",
		Long: `drops asks every node what its vRouter and the kernel around it have dropped since they began to count. For each reason
of the vRouter's it shows whose packets they were, and the last one of them; what the kernel dropped comes as its counters.

With --watch it goes on, and prints each dropped packet that is sampled (of each reason at most four a second, so that
drops cost nothing), and each counter of the kernel's that has moved. -o json prints one document, or with --watch one
line for each of these.

IPv6 discovery and group reports of pods that have no IPv6, which are dropped and nobody misses, come only with --all.

The exit status is 1 when a node could not be asked.`,
		Example: `  margayctl drops
  margayctl drops --node lab-node1 --pod lab-node1-pod1
  margayctl drops --watch --reason no_route`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(o.output, "text", "json"); err != nil {
				return err
			}
			if o.every < 100*time.Millisecond {
				return fmt.Errorf("--interval %s: expected at least 100ms", o.every)
			}
			for _, counter := range []string{"drop_", "kernel_"} { // as metrics and `node counters` have it
				o.reason = strings.TrimPrefix(o.reason, counter)
			}
			return o.run(cmd)
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&o.nodes, "node", nil, "only these `nodes`")
	f.StringVar(&o.pod, "pod", "", "only what this `pod` (or address) sent or was to get")
	f.StringVar(&o.reason, "reason", "", "only this `reason`, as the table names it, or its counter (drop_no_route)")
	f.BoolVar(&o.all, "all", false, "also what nobody misses: IPv6 discovery of pods that have no IPv6")
	f.BoolVar(&o.watch, "watch", false, "go on, and print what is dropped from now on")
	f.DurationVar(&o.every, "interval", time.Second, "how often --watch asks")
	addOutput(cmd, &o.output, "text", "text or json")
	return cmd
}

func (o *dropsOptions) run(cmd *cobra.Command) error {
	ctx := cmd.Context()
	open, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	f, err := openFleet(open, cmd)
	if err != nil {
		return err
	}
	nodes, err := f.choose(o.nodes)
	if err != nil {
		return err
	}
	var only netip.Addr
	if o.pod != "" {
		p, err := f.find(o.pod)
		if err != nil {
			return fmt.Errorf("--pod: %w", err)
		}
		only = p.Address
	}
	if o.watch {
		return o.follow(ctx, cmd, f, nodes, only)
	}
	result := dropsResult{Drops: []reasonDrops{}, Errors: map[string]string{}}
	reasons := map[string]bool{} // that the nodes have packets for, asked for or not
	for i, a := range f.askDrops(ctx, nodes, nil) {
		if a.err != nil {
			result.Errors[nodes[i]] = a.err.Error()
			continue
		}
		if a.drops.VRouter != "" {
			result.Errors[nodes[i]] = a.drops.VRouter
		}
		result.Drops = append(result.Drops, o.rows(f, a.drops, only)...)
		for _, c := range a.drops.Counters {
			reasons[c.Reason] = true
		}
	}
	if o.output == "json" {
		err = printJSON(cmd.OutOrStdout(), result)
	} else {
		err = result.print(cmd.OutOrStdout(), cmd.ErrOrStderr(), o.nothing(sortedKeys(reasons)))
	}
	if err == nil && len(result.Errors) > 0 {
		return ExitError{1}
	}
	return err
}

// choose checks names of nodes, and returns all there are for none.
func (f *fleet) choose(names []string) ([]string, error) {
	all := f.names()
	for _, n := range names {
		if !slices.Contains(all, n) {
			return nil, fmt.Errorf("node %q: expected one of %s", n, few(all))
		}
	}
	if len(names) == 0 {
		return all, nil
	}
	return names, nil
}

// few lists names for a line that somebody reads: not thousands of them.
func few(names []string) string {
	const most = 12
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// dropsAnswer is what one node said.
type dropsAnswer struct {
	drops api.Drops
	err   error
}

// askDrops asks the nodes, all at once; since holds the last sample that is known of each.
func (f *fleet) askDrops(ctx context.Context, nodes []string, since []uint64) []dropsAnswer {
	answers := make([]dropsAnswer, len(nodes))
	eachNode(nodes, func(i int, node string) {
		c, err := f.client(node)
		if err != nil {
			answers[i].err = err
			return
		}
		ctx, cancel := context.WithTimeout(ctx, agentTimeout)
		defer cancel()
		var from uint64
		if since != nil {
			from = since[i]
		}
		answers[i].drops, answers[i].err = c.Drops(ctx, from)
	})
	return answers
}

// rows turns one node's answer into rows.
func (o *dropsOptions) rows(f *fleet, d api.Drops, only netip.Addr) []reasonDrops {
	var rows []reasonDrops
	for _, c := range d.Counters {
		if !o.shows(c.Reason) {
			continue
		}
		row := reasonDrops{Node: d.Node, By: c.By, Reason: c.Reason, Packets: c.Packets, Bytes: c.Bytes}
		if c.By == "vrouter" {
			row.Flows, row.Sample = f.flowsOf(d, c.Reason, only), f.sampleOf(d, c.Reason, only)
		}
		if only.IsValid() {
			// Of a pod only what is counted by flow is known.
			if len(row.Flows) == 0 && row.Sample == nil {
				continue
			}
			row.Packets, row.Bytes = 0, 0
			for _, fl := range row.Flows {
				row.Packets, row.Bytes = row.Packets+fl.Packets, row.Bytes+fl.Bytes
			}
		}
		rows = append(rows, row)
	}
	slices.SortStableFunc(rows, func(a, b reasonDrops) int {
		return cmp.Or(-cmp.Compare(a.By, b.By), -cmp.Compare(a.Packets, b.Packets)) // the vRouter's first
	})
	return rows
}

func (f *fleet) flowsOf(d api.Drops, reason string, only netip.Addr) []podDrops {
	var out []podDrops
	for _, fl := range d.Flows {
		if fl.Reason != reason || only.IsValid() && fl.Source != only && fl.Destination != only {
			continue
		}
		at := slices.IndexFunc(out, func(p podDrops) bool { return p.Source == fl.Source && p.Destination == fl.Destination })
		if at < 0 { // workers count apart
			at = len(out)
			out = append(out, podDrops{Source: fl.Source, SourcePod: f.podAt(fl.Source), Destination: fl.Destination, DestinationPod: f.podAt(fl.Destination)})
		}
		out[at].Packets += fl.Packets
		out[at].Bytes += fl.Bytes
	}
	slices.SortStableFunc(out, func(a, b podDrops) int { return -cmp.Compare(a.Packets, b.Packets) })
	return out
}

// sampleOf returns the last sample for a reason.
func (f *fleet) sampleOf(d api.Drops, reason string, only netip.Addr) *dropSample {
	for _, s := range slices.Backward(d.Samples) {
		if s.Reason == reason && concerns(s.Packet, only) {
			out := sampleFrom(d.Node, s)
			return &out
		}
	}
	return nil
}

func sampleFrom(node string, s api.DropSample) dropSample {
	return dropSample{Node: node, Time: s.Time, Direction: s.Direction, Reason: s.Reason, Length: s.Length,
		Decoded: describe(s.Packet, s.Length), Packet: s.Packet}
}

// concerns reports whether an address is in a packet, in the outer header or the inner; every packet concerns the invalid one.
func concerns(b []byte, addr netip.Addr) bool {
	for ; addr.IsValid() && len(b) >= ipHeader && b[0]>>4 == 4; b = b[min(max(int(b[0]&0x0f)<<2, ipHeader), len(b)):] {
		if netip.AddrFrom4([4]byte(b[12:16])) == addr || netip.AddrFrom4([4]byte(b[16:20])) == addr {
			return true
		}
		if b[9] != 4 {
			break
		}
	}
	return !addr.IsValid()
}

// maxFlows is how many flows of a reason the text shows.
const maxFlows = 5

// nothing says that there is none, and where a reason was asked for, which there are: it may have been another's name.
func (o *dropsOptions) nothing(reasons []string) string {
	switch {
	case o.reason == "":
		return "Nothing was dropped."
	case len(reasons) == 0:
		return "Nothing was dropped, for whatever reason."
	}
	return fmt.Sprintf("Nothing was dropped for the reason %q; there are drops for %s.", o.reason, few(reasons))
}

func (r *dropsResult) print(w, errs io.Writer, nothing string) error {
	for _, n := range sortedKeys(r.Errors) {
		fmt.Fprintf(errs, "%s: %s\n", n, r.Errors[n])
	}
	if len(r.Drops) == 0 {
		_, err := fmt.Fprintln(w, nothing)
		return err
	}
	tw := tabwriter.NewWriter(w, 5, 1, 3, ' ', 0)
	fmt.Fprintln(tw, "NODE\tBY\tREASON\tPACKETS\tBYTES\t")
	for _, d := range r.Drops {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%s\t\n", d.Node, d.By, d.Reason, d.Packets, byteCount(d))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, d := range r.Drops {
		if len(d.Flows) == 0 && d.Sample == nil {
			continue
		}
		fmt.Fprintf(w, "\n%s, %s:\n", d.Node, d.Reason)
		for i, f := range d.Flows {
			if i == maxFlows {
				fmt.Fprintf(w, "  and %d more pairs of addresses\n", len(d.Flows)-maxFlows)
				break
			}
			fmt.Fprintf(w, "  %d from %s to %s\n", f.Packets, who(f.Source, f.SourcePod), who(f.Destination, f.DestinationPod))
		}
		if s := d.Sample; s != nil {
			fmt.Fprintf(w, "  last seen %s (%s): %s\n", s.Time.Local().Format(time.DateTime), s.Direction, s.Decoded)
		}
	}
	return nil
}

func byteCount(d reasonDrops) string {
	if d.Bytes == 0 {
		return "-" // the kernel counts packets only
	}
	return fmt.Sprint(d.Bytes)
}

func who(a netip.Addr, pod string) string {
	switch {
	case !a.IsValid():
		return "no address"
	case pod != "":
		return fmt.Sprintf("%s (%s)", pod, a)
	}
	return a.String()
}

// follow prints what is dropped from now on, until ctx is done, which is how it is meant to end.
func (o *dropsOptions) follow(ctx context.Context, cmd *cobra.Command, f *fleet, nodes []string, only netip.Addr) error {
	out, errs := cmd.OutOrStdout(), cmd.ErrOrStderr()
	since := make([]uint64, len(nodes))
	kernel := make([]map[string]uint64, len(nodes))
	silent := make([]string, len(nodes))
	for first := true; ; first = false {
		for i, a := range f.askDrops(ctx, nodes, since) {
			if ctx.Err() != nil {
				return nil
			}
			if problem := a.problem(); problem != silent[i] { // a state that lasts is said once
				if silent[i] = problem; problem != "" {
					fmt.Fprintf(errs, "%s: %s\n", nodes[i], problem)
				} else {
					fmt.Fprintf(errs, "%s: answers again\n", nodes[i])
				}
			}
			if a.err != nil {
				continue
			}
			if err := o.news(out, f, a.drops, only, &since[i], kernel, i, first); err != nil {
				return err
			}
		}
		if first {
			fmt.Fprintf(errs, "watching %s; stop with Ctrl-C\n", few(nodes))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(o.every):
		}
	}
}

func (a *dropsAnswer) problem() string {
	if a.err != nil {
		return a.err.Error()
	}
	return a.drops.VRouter
}

// news prints the samples that are new, and the kernel's counters that have moved; of the first answer nothing.
func (o *dropsOptions) news(out io.Writer, f *fleet, d api.Drops, only netip.Addr, since *uint64, kernel []map[string]uint64, i int, first bool) error {
	for _, s := range d.Samples {
		*since = s.Number
		if first || !concerns(s.Packet, only) || o.reason != "" && s.Reason != o.reason {
			continue
		}
		sample := sampleFrom(d.Node, s)
		if o.output == "json" {
			if err := json.NewEncoder(out).Encode(sample); err != nil {
				return err
			}
			continue
		}
		if _, err := fmt.Fprintf(out, "%s %s %s: %s\n", s.Time.Local().Format("15:04:05.000"), d.Node, s.Reason, sample.Decoded); err != nil {
			return err
		}
	}
	before := kernel[i]
	kernel[i] = map[string]uint64{}
	for _, c := range d.Counters {
		if c.By != "kernel" {
			continue
		}
		kernel[i][c.Reason] = c.Packets
		if before == nil || c.Packets <= before[c.Reason] || only.IsValid() || !o.shows(c.Reason) {
			continue
		}
		if o.output == "json" {
			if err := json.NewEncoder(out).Encode(kernelDrops{d.Node, time.Now(), c.By, c.Reason, c.Packets - before[c.Reason]}); err != nil {
				return err
			}
			continue
		}
		if _, err := fmt.Fprintf(out, "%s %s %s: %d more, by the kernel\n", time.Now().Format("15:04:05.000"), d.Node, c.Reason, c.Packets-before[c.Reason]); err != nil {
			return err
		}
	}
	return nil
}
