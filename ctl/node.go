package ctl

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/olekukonko/tablewriter"
	"github.com/spf13/cobra"

	"margay/agent/api"
	"margay/vrouter/rpc"
)

func newNodeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "node",
		Short: "The state of this node's daemons: BGP, routes, counters",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newNodeStatusCommand(), newNodeRoutesCommand(), newNodeCountersCommand(), newNodeCheckSystemCommand(),
		newNodeDiagsCommand())
	return cmd
}

func newNodeStatusCommand() *cobra.Command {
	var (
		output string
		ready  bool
	)
	cmd := &cobra.Command{
		Use:   "status [NODE]",
		Short: "The BGP peers of this node, or of another, as calicoctl shows them, and whether it is ready",
		Long: `The BGP peers of this node, as calicoctl shows them, and whether it is ready; asked of the agent's socket.

With NODE, of another node: it is asked by way of the datastore, with a CalicoNodeStatus that its agent fills in, and that is
deleted again. A node whose agent does not answer within ten seconds is an error.`,
		Example: `  margayctl node status
  margayctl node status node2 -o json`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			ask := func() (api.Status, error) { return api.Get(ctx, agentSocket()) }
			if len(args) == 1 {
				ask = func() (api.Status, error) { return remoteStatus(cmd, args[0]) }
			}
			st, err := ask()
			if err != nil {
				return err
			}
			if output == "json" {
				err = printJSON(cmd.OutOrStdout(), st)
			} else {
				printNodeStatus(cmd.OutOrStdout(), st)
			}
			if err == nil && ready && !st.Ready {
				return fmt.Errorf("node %s is not ready: %s", st.Node, st.Reason)
			}
			return err
		},
	}
	addOutput(cmd, &output, "text", "text or json")
	cmd.Flags().BoolVar(&ready, "ready", false, "a node that is not ready is an error: exit status 1")
	return cmd
}

func printNodeStatus(w io.Writer, st api.Status) {
	state := "ready"
	if !st.Ready {
		state = "not ready: " + st.Reason
	}
	fmt.Fprintf(w, "Margay process is running.\n\nNode %s, %s on %s, AS %d, %s.\n", st.Node, st.Address, st.Underlay, st.ASNumber, state)
	if st.VRouter.Connected {
		fmt.Fprintf(w, "vRouter %s: %s, %d routes.\n", st.VRouter.Version, st.VRouter.Port, st.VRouter.Routes)
	} else {
		fmt.Fprintln(w, "vRouter: does not answer.")
	}
	for _, p := range st.VRouter.PathMTUs {
		age := time.Duration(p.Age) * time.Second
		fmt.Fprintf(w, "Path MTU to %s: %d, learned %s ago, tried again in %s.\n", p.Node, p.MTU, age, p.Expires.Sub(p.Learned)-age)
	}
	fmt.Fprintln(w, "\nIPv4 BGP status")
	printPeers(w, st.BGP, netip.Addr.Is4, "No IPv4 peers found.")
	fmt.Fprintln(w, "\nIPv6 BGP status")
	printPeers(w, st.BGP, netip.Addr.Is6, "No IPv6 peers found.")
	fmt.Fprintln(w)
}

func printPeers(w io.Writer, peers []api.Peer, family func(netip.Addr) bool, none string) {
	table := tablewriter.NewWriter(w)
	table.SetAutoWrapText(false) // a reason is one line
	table.SetHeader([]string{"Peer address", "Peer type", "State", "Since", "Info"})
	found := false
	for _, p := range peers {
		if !family(p.Address) {
			continue
		}
		found = true
		table.Append([]string{p.Address.String(), p.Kind, upState(p), since(p.Since, time.Now()), info(p)})
	}
	if !found {
		fmt.Fprintln(w, none)
		return
	}
	table.Render()
}

// upState is BIRD's word for the session, which calicoctl shows: up, start (not there yet).
func upState(p api.Peer) string {
	if p.State == "Established" {
		return "up"
	}
	return "start"
}

func info(p api.Peer) string {
	if p.LastError != "" && p.State != "Established" {
		return p.State + ": " + p.LastError
	}
	return p.State
}

// since is the time of day for the last day, the date before that, as BIRD writes it.
func since(t, now time.Time) string {
	if t.IsZero() {
		return "unknown"
	}
	if now.Sub(t) < 24*time.Hour {
		return t.Local().Format(time.TimeOnly)
	}
	return t.Local().Format(time.DateOnly)
}

// withVRouter runs f with a connection to this node's vRouter.
func withVRouter(cmd *cobra.Command, f func(ctx context.Context, c *rpc.Client) error) error {
	socket := vrouterSocket()
	if _, err := os.Stat(socket); err != nil {
		return fmt.Errorf("vrouter does not answer on %s: is it running on this node?", socket)
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
	defer cancel()
	c, err := rpc.Dial(socket)
	if err != nil {
		return err
	}
	defer c.Close()
	return f(ctx, c)
}

// routeRow is one line of `node routes`.
type routeRow struct {
	Prefix  netip.Prefix `json:"prefix"`
	Kind    string       `json:"kind"`
	Gateway netip.Addr   `json:"gateway"`
	// Gateways is all of them, where flows are spread over several.
	Gateways []netip.Addr `json:"gateways,omitempty"`
	Stale    bool         `json:"stale"`
}

func newRouteRow(e rpc.RouteEntry) routeRow {
	row := routeRow{Prefix: e.Prefix, Kind: e.NextHop.Kind.String(), Gateway: e.NextHop.Gateway, Stale: e.Stale}
	if e.NextHop.IsGroup() {
		row.Gateways = e.NextHop.Gateways()
	}
	return row
}

// gateways returns the column of that name: "-" for none, several separated by commas.
func (r routeRow) gateways() string {
	switch {
	case !r.Gateway.IsValid():
		return "-"
	case len(r.Gateways) == 0:
		return r.Gateway.String()
	}
	all := make([]string, len(r.Gateways))
	for i, a := range r.Gateways {
		all[i] = a.String()
	}
	return strings.Join(all, ",")
}

func newNodeRoutesCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "routes",
		Short: "The vRouter's table on this node: what is local, tunnelled, direct",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			return withVRouter(cmd, func(ctx context.Context, c *rpc.Client) error {
				entries, nodes, err := c.Routes(ctx)
				if err != nil {
					return err
				}
				rows := make([]routeRow, len(entries))
				for i, e := range entries {
					rows[i] = newRouteRow(e)
				}
				if output == "json" {
					return printJSON(cmd.OutOrStdout(), struct {
						Routes []routeRow   `json:"routes"`
						Nodes  []netip.Addr `json:"nodes"`
					}{rows, nodes})
				}
				tw := tabwriter.NewWriter(cmd.OutOrStdout(), 5, 1, 3, ' ', 0)
				fmt.Fprintln(tw, "PREFIX\tKIND\tGATEWAY\tSTALE\t")
				for _, r := range rows {
					fmt.Fprintf(tw, "%s\t%s\t%s\t%t\t\n", r.Prefix, r.Kind, r.gateways(), r.Stale)
				}
				return tw.Flush()
			})
		},
	}
	addOutput(cmd, &output, "text", "text or json")
	return cmd
}

func newNodeCountersCommand() *cobra.Command {
	var (
		output string
		all    bool
	)
	cmd := &cobra.Command{
		Use:   "counters",
		Short: "What the vRouter forwarded and dropped, by reason, the kernel's losses around it included",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			return withVRouter(cmd, func(ctx context.Context, c *rpc.Client) error {
				counters, err := c.Counters(ctx)
				if err != nil {
					return err
				}
				type row struct {
					Packets uint64 `json:"packets"`
					Bytes   uint64 `json:"bytes"`
				}
				if output == "json" {
					rows := make(map[string]row, len(counters))
					for _, c := range counters {
						rows[c.Name] = row{c.Packets, c.Bytes}
					}
					return printJSON(cmd.OutOrStdout(), rows)
				}
				tw := tabwriter.NewWriter(cmd.OutOrStdout(), 5, 1, 3, ' ', tabwriter.AlignRight)
				fmt.Fprintln(tw, "PACKETS\tBYTES\t   NAME")
				for _, c := range counters {
					if all || c.Packets > 0 {
						fmt.Fprintf(tw, "%d\t%d\t   %s\n", c.Packets, c.Bytes, strings.TrimSpace(c.Name))
					}
				}
				return tw.Flush()
			})
		},
	}
	addOutput(cmd, &output, "text", "text or json")
	cmd.Flags().BoolVar(&all, "all", false, "also the counters that are zero")
	return cmd
}
