package ctl

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
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
	more    int         // flows that are not in there: a text does not show them
	Sample  *dropSample `json:"sample,omitempty"`
}

// podDrops counts the drops of one pair of addresses.
type podDrops struct {
	Source         netip.Addr `json:"source"`
	SourcePod      string     `json:"sourcePod,omitempty"`
	Destination    netip.Addr `json:"destination"`
	DestinationPod string     `json:"destinationPod,omitempty"`
	SentBy         string     `json:"sentBy,omitempty"` // the pod, where it is known and the source is another's
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
line for each of these. Every node is asked each --interval; of more than a thousand, one each millisecond.

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
	result, reasons := o.ask(ctx, cmd.ErrOrStderr(), f, nodes, only)
	if o.output == "json" {
		err = printJSON(cmd.OutOrStdout(), result)
	} else {
		err = result.print(cmd.OutOrStdout(), cmd.ErrOrStderr(), o.nothing(len(nodes), len(result.Errors), sortedKeys(reasons)))
	}
	if err == nil && len(result.Errors) > 0 {
		return ExitError{1}
	}
	return err
}

// ask asks the nodes, and returns besides which reasons there are, asked for or not. What nodes say is made rows of as it comes:
// the raw answers of thousands are not held. When ctx is done the rest is not asked.
func (o *dropsOptions) ask(ctx context.Context, errs io.Writer, f *fleet, nodes []string, only netip.Addr) (dropsResult, map[string]bool) {
	result := dropsResult{Drops: []reasonDrops{}, Errors: map[string]string{}}
	reasons := map[string]bool{}
	rows := make([][]reasonDrops, len(nodes))
	var (
		mu  sync.Mutex
		far progress
	)
	for _, n := range nodes {
		result.Errors[n] = "not asked: interrupted"
	}
	stop := far.report(errs, len(nodes))
	eachNode(ctx, nodes, func(i int, node string) {
		d, err := f.drops(ctx, node, 0)
		far.add(err)
		rows[i] = o.rows(f, d, only)
		mu.Lock()
		defer mu.Unlock()
		delete(result.Errors, node)
		switch {
		case err != nil:
			result.Errors[node] = err.Error()
		case d.VRouter != "":
			result.Errors[node] = d.VRouter
		}
		for _, c := range d.Counters {
			reasons[c.Reason] = true
		}
	})
	stop()
	for _, r := range rows {
		result.Drops = append(result.Drops, r...)
	}
	return result, reasons
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

// drops asks one node, for the samples whose number is greater than since.
func (f *fleet) drops(ctx context.Context, node string, since uint64) (d api.Drops, err error) {
	err = f.question(ctx, node, func(ctx context.Context, c *api.Client) error {
		d, err = c.Drops(ctx, since)
		return err
	})
	d.Node = node // whatever it says
	return d, err
}

// rows turns one node's answer into rows.
func (o *dropsOptions) rows(f *fleet, d api.Drops, only netip.Addr) []reasonDrops {
	var rows []reasonDrops
	for _, c := range d.Counters {
		if !o.shows(c.Reason) {
			continue
		}
		row := reasonDrops{Node: d.Node, By: c.By, Reason: c.Reason, Packets: c.Packets, Bytes: c.Bytes}
		row.Flows = f.flowsOf(d, c, only)
		if c.By == "vrouter" {
			row.Sample = f.sampleOf(d, c.Reason, only)
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
		if o.output != "json" && len(row.Flows) > maxFlows {
			row.more = len(row.Flows) - maxFlows
			row.Flows = slices.Clone(row.Flows[:maxFlows]) // and the rest need not be held
		}
		rows = append(rows, row)
	}
	slices.SortStableFunc(rows, func(a, b reasonDrops) int {
		return cmp.Or(-cmp.Compare(a.By, b.By), -cmp.Compare(a.Packets, b.Packets)) // the vRouter's first
	})
	return rows
}

func (f *fleet) flowsOf(d api.Drops, c api.Counter, only netip.Addr) []podDrops {
	var out []podDrops
	for _, fl := range d.Flows {
		if fl.Reason != c.Reason || cmp.Or(fl.By, "vrouter") != c.By || only.IsValid() && fl.Source != only && fl.Destination != only && fl.Pod != only {
			continue
		}
		p := podDrops{Source: fl.Source, SourcePod: f.podAt(fl.Source), Destination: fl.Destination, DestinationPod: f.podAt(fl.Destination)}
		if fl.Pod.IsValid() {
			p.SentBy = who(fl.Pod, f.podAt(fl.Pod))
		}
		at := slices.IndexFunc(out, func(o podDrops) bool {
			return o.Source == p.Source && o.Destination == p.Destination && o.SentBy == p.SentBy
		})
		if at < 0 { // workers count apart
			at = len(out)
			out = append(out, p)
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

// nothing says that there is none, of so many nodes with so many errors, and where a reason was asked for, which there are: it may
// have been another's name.
func (o *dropsOptions) nothing(nodes, errors int, reasons []string) string {
	where := ""
	if errors > 0 {
		where = " on the nodes that have answered"
	}
	switch {
	case errors > 0 && errors == nodes:
		return "" // the errors have said everything
	case o.reason == "":
		return "Nothing was dropped" + where + "."
	case len(reasons) == 0:
		return "Nothing was dropped" + where + ", for whatever reason."
	}
	return fmt.Sprintf("Nothing was dropped%s for the reason %q; there are drops for %s.", where, o.reason, few(reasons))
}

func (r *dropsResult) print(w, errs io.Writer, nothing string) error {
	var lines []string
	for _, n := range sortedKeys(r.Errors) {
		lines = append(lines, n+": "+r.Errors[n])
	}
	fewLines(errs, lines, "nodes could not be asked; -o json names them all")
	if len(r.Drops) == 0 && nothing == "" {
		return nil
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
		for _, f := range d.Flows {
			fmt.Fprintf(w, "  %d from %s to %s%s\n", f.Packets, who(f.Source, f.SourcePod), who(f.Destination, f.DestinationPod), sentBy(f.SentBy))
		}
		if d.more > 0 {
			fmt.Fprintf(w, "  and %d more pairs of addresses\n", d.more)
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

func sentBy(pod string) string {
	if pod == "" {
		return ""
	}
	return ", sent by " + pod
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
