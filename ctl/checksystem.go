package ctl

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"margay/agent/api"
	"margay/check"
	"margay/vrouter/port"
	"margay/vrouter/rpc"
)

func newNodeCheckSystemCommand() *cobra.Command {
	var output string
	o := check.Options{}
	cmd := &cobra.Command{
		Use:   "checksystem",
		Short: "What on this node keeps Margay from working, or from being fast, and what to do about it",
		Long: `Looks at this node for what the daemons need and for what commonly breaks them: capabilities, veth, TUN, sockets, BPF, AF_XDP,
ip_forward, rp_filter, packet filters that drop forwarded packets or IP protocol 4, another IP-in-IP device or BGP
speaker, NetworkManager and systemd-networkd, MTUs that do not fit. What the drivers need is tried by the code with which
vrouter opens it. Nothing is changed. Run it as root, in the daemons' network namespace.

The exit status is 1 if something is found that keeps Margay from working ("fail"), and 0 otherwise, also with warnings.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			st, err := api.Get(ctx, agentSocket())
			o.Agent = err == nil
			if o.Agent && o.Underlay == "" {
				o.Underlay = st.Underlay
			}
			all := append(drivers(port.ProbeAll()), check.Host(o)...)
			if r, ok := tunnelTraffic(ctx); ok {
				all = append(all, r)
			}
			if output == "json" {
				err = printJSON(cmd.OutOrStdout(), all)
			} else {
				err = printChecks(cmd.OutOrStdout(), all)
			}
			if err != nil {
				return err
			}
			if check.Failed(all) {
				return ExitError{Code: 1}
			}
			return nil
		},
	}
	addOutput(cmd, &output, "text", "text or json")
	cmd.Flags().StringVar(&o.Underlay, "underlay", "", "the `interface` to the other nodes (default margay-agent's, or that of the default route)")
	cmd.Flags().StringVar(&o.Tunnel, "tun", "vr0", "the vRouter's `device`")
	return cmd
}

// drivers makes results of what the vRouter's drivers found.
func drivers(probes []port.Probe) []check.Result {
	all := make([]check.Result, len(probes))
	for i, p := range probes {
		all[i] = check.Result{Name: p.Name, Status: check.OK, Found: "for " + p.For}
		if p.Err == nil {
			continue
		}
		all[i].Status = check.Warn
		if p.Needed {
			all[i].Status = check.Fail
		}
		all[i].Found, all[i].Do = strings.ReplaceAll(p.Err.Error(), "\n", "; "), "without it there is no "+p.For
		if m := port.MissingOf(p.Err); m != nil {
			all[i].Found, all[i].Do = fmt.Sprintf("%s: %v", m.What, m.Err), m.Do
		}
	}
	return all
}

// fewPackets is how many packets to other nodes may be without an answer before that means something.
const fewPackets = 10

// tunnelTraffic tells from the vRouter's counters whether packets of protocol 4 come through between the nodes, which no
// look at this node alone can tell; false where no vRouter answers.
func tunnelTraffic(ctx context.Context) (check.Result, bool) {
	const name = "tunnel traffic"
	c, err := rpc.Dial(vrouterSocket())
	if err != nil {
		return check.Result{}, false
	}
	defer c.Close()
	counters, err := c.Counters(ctx)
	if err != nil {
		return check.Result{}, false
	}
	var sent, received uint64
	for _, n := range counters {
		switch {
		case n.Name == "forwarded_encap":
			sent = n.Packets
		case n.Name == "forwarded_decap", strings.HasPrefix(n.Name, "drop_outer_"), strings.HasPrefix(n.Name, "drop_inner_"):
			received += n.Packets
		}
	}
	if sent >= fewPackets && received == 0 {
		return check.Result{Name: name, Status: check.Warn, Found: fmt.Sprintf("the vRouter has sent %d packets to other nodes, and none has come", sent),
			Do: "let IP protocol 4 pass between the nodes: security groups and firewalls often know only TCP and UDP"}, true
	}
	return check.Result{Name: name, Status: check.OK, Found: fmt.Sprintf("%d packets sent to other nodes, %d received", sent, received)}, true
}

// printChecks writes a line for each result, and under those that are not well what to do.
func printChecks(w io.Writer, all []check.Result) error {
	wide := 0
	for _, r := range all {
		wide = max(wide, len(r.Name))
	}
	var b strings.Builder
	count := map[check.Status]int{}
	for _, r := range all {
		count[r.Status]++
		fmt.Fprintf(&b, "%-7s  %-*s  %s\n", strings.ToUpper(r.Status.String()), wide, r.Name, r.Found)
		if r.Do != "" {
			fmt.Fprintf(&b, "%-7s  %-*s  -> %s\n", "", wide, "", r.Do)
		}
	}
	fmt.Fprintf(&b, "\n%d ok, %d warnings, %d failures, %d unknown\n", count[check.OK], count[check.Warn], count[check.Fail], count[check.Unknown])
	_, err := io.WriteString(w, b.String())
	return err
}
