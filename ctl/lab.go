package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"os/signal"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"margay/lab"
)

// newLabCommand returns `margayctl lab`, which works on the labs of this machine.
func newLabCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "A whole cluster on this machine, made of network namespaces",
		Long: `A lab is a cluster of nodes and pods, each a network namespace that "ip netns exec" can enter: NAME-node1,
NAME-node1-pod1 and so on, with the underlay between the nodes in NAME-underlay (bridge br0). Every node runs the real
vrouter and margay-agent; pods are attached by executing margay-cni as a container runtime does.

Nodes and pods may be named in full (lab-node1-pod1) or without the lab's name (node1-pod1).`,
		Example: `  margayctl lab up --nodes 3 --pods 2
  margayctl lab exec node1-pod1 -- ping -c 3 10.244.1.2
  ip netns exec lab-node1 margayctl node status
  margayctl lab down`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringVar(&name, "name", lab.DefaultName, "the lab's name")
	cmd.AddCommand(newLabUpCommand(&name), newLabDownCommand(&name), newLabStatusCommand(&name), newLabEnvCommand(&name),
		newLabExecCommand(&name), newLabRestartCommand(&name), newLabStopCommand(&name), newLabStartCommand(&name),
		newLabAddPodCommand(&name), newLabDelPodCommand(&name), newLabPingCommand(&name))
	return cmd
}

// onLab opens the lab and runs f on it.
func onLab(name string, f func(*lab.Lab) error) error {
	l, err := lab.Host{}.Open(name)
	if err != nil {
		return err
	}
	return f(l)
}

func newLabUpCommand(name *string) *cobra.Command {
	var o lab.Options
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Build a lab; returns when every pod reaches every other",
		Long: `Builds a lab and returns when every pod reaches every other pod, or says what did not come up and where its log
is. A lab that fails, or is interrupted, is removed again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Name, o.Progress = *name, cmd.ErrOrStderr()
			// A terminal that closes must not leave half a lab behind either.
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGHUP)
			defer stop()
			l, err := lab.Host{}.Up(ctx, o)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "lab %q is up: see `margayctl lab status --name %s`\n", l.Name(), l.Name())
			return nil
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.Nodes, "nodes", 3, fmt.Sprintf("how many nodes, up to %d", lab.MaxNodes))
	f.IntVar(&o.Pods, "pods", 2, fmt.Sprintf("how many pods on each node, up to %d", lab.MaxPods))
	f.IntVar(&o.MTU, "mtu", lab.DefaultMTU, "MTU of the underlay, in bytes")
	f.StringVar(&o.Pool, "pool", "10.244.0.0/16", "the pods' addresses, as a prefix")
	f.StringVar(&o.IPIPMode, "ipip-mode", "Always", "encapsulation between nodes: Always, CrossSubnet or Never")
	f.IntVar(&o.BlockSize, "block-size", 26, "prefix length of the blocks that nodes get, 20 to 32")
	f.StringVar(&o.Attach, "attach", "", "how packets come to the vrouters: tun, tun-plain, veth, direct or auto (default: the vrouter's)")
	f.StringVar(&o.IO, "io", "", "how the vrouters read and write interfaces: packet, xdp or (with direct) tc (default: the vrouter's)")
	f.IntVar(&o.Queues, "queues", 0, fmt.Sprintf("how many queues the vrouters have, up to %d (default: the vrouter's)", lab.MaxQueues))
	f.IntVar(&o.Threads, "threads-per-queue", 0, "how many threads each queue of the vrouters has: 1 or 2 (default: the vrouter's)")
	f.BoolVar(&o.NoNAT, "no-nat", false, "no masquerade for pods that leave the cluster (natOutgoing: false)")
	f.StringVar(&o.BinDir, "bin-dir", "", "where vrouter, margay-agent and margay-cni are (default: beside margayctl)")
	f.BoolVar(&o.KeepOnFailure, "keep-on-failure", false, "leave a lab that does not come up as it is")
	return cmd
}

func newLabDownCommand(name *string) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Remove a lab and everything it has left, also after a crash",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if all {
				return lab.Host{}.DownAll(cmd.ErrOrStderr())
			}
			return lab.Host{}.Down(*name, cmd.ErrOrStderr())
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "remove every lab of this machine")
	return cmd
}

func newLabStatusCommand(name *string) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Nodes, pods, processes and addresses of a lab",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			return onLab(*name, func(l *lab.Lab) error {
				st, err := l.Status()
				if err != nil {
					return err
				}
				if output == "json" {
					return printJSON(cmd.OutOrStdout(), st)
				}
				return printLabStatus(cmd.OutOrStdout(), st)
			})
		},
	}
	addOutput(cmd, &output, "text", "text or json")
	return cmd
}

func printLabStatus(w io.Writer, st lab.Status) error {
	fmt.Fprintf(w, "lab %s is %s; underlay %s in namespace %s, etcd %s\nfiles and logs: %s\n\n",
		st.Name, st.State, st.Subnet, st.Underlay, st.Etcd[0], st.Dir)
	t := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	fmt.Fprintln(t, "NAMESPACE\tADDRESS\tSTATE\tVROUTER\tAGENT")
	for _, n := range st.Nodes {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", n.NetNS, n.Address, n.State, pidText(n.PIDs.VRouter), pidText(n.PIDs.Agent))
		for _, p := range n.Pods {
			fmt.Fprintf(t, "%s\t%s\t\t\t\n", p.NetNS, p.Address)
		}
	}
	return t.Flush()
}

func pidText(pid int) string {
	if pid == 0 {
		return "-"
	}
	return fmt.Sprintf("pid %d", pid)
}

func newLabEnvCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use:     "env",
		Short:   "Shell commands that point tools at the lab's datastore",
		Example: `  eval "$(margayctl lab env)"; margayctl get nodes`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return onLab(*name, func(l *lab.Lab) error {
				env, err := l.Env()
				fmt.Fprint(cmd.OutOrStdout(), env)
				return err
			})
		},
	}
}

func newLabExecCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use:                   "exec POD|NODE -- COMMAND [ARG…]",
		Short:                 "Run a command in the network namespace of a pod or node; its exit status is passed on",
		Args:                  cobra.MinimumNArgs(2),
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return onLab(*name, func(l *lab.Lab) error {
				err := l.Exec(args[0], args[1:])
				if errors.Is(err, exec.ErrNotFound) { // the shells' status for it; 1 would look like the command's own
					fmt.Fprintln(cmd.ErrOrStderr(), "margayctl:", err)
					return ExitError{Code: 127}
				}
				return err
			})
		},
	}
}

// timed runs one operation on a node and says what was done and how long it took.
func timed(cmd *cobra.Command, what string, f func(context.Context) error) error {
	begin := time.Now()
	if err := f(cmd.Context()); err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "✓ %s (%.1f s)\n", what, time.Since(begin).Seconds())
	return nil
}

func newLabRestartCommand(name *string) *cobra.Command {
	var hard bool
	cmd := &cobra.Command{
		Use:   "restart {NODE vrouter|agent | etcd}",
		Short: "Restart a daemon of a node, or the lab's etcd, also one that is dead; returns when it serves",
		Args:  cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			etcd := args[0] == "etcd" && len(args) == 1
			if !etcd && len(args) != 2 {
				return fmt.Errorf("restart %s: expected a node and vrouter or agent, or etcd alone", args[0])
			}
			return onLab(*name, func(l *lab.Lab) error {
				if etcd {
					return timed(cmd, "etcd restarted", func(ctx context.Context) error { return l.RestartEtcd(ctx, hard) })
				}
				return timed(cmd, args[1]+" of "+args[0]+" restarted", func(ctx context.Context) error {
					return l.Restart(ctx, args[0], args[1], hard)
				})
			})
		},
	}
	cmd.Flags().BoolVar(&hard, "hard", false, "kill -9 instead of a clean stop")
	return cmd
}

func newLabStopCommand(name *string) *cobra.Command {
	var hard bool
	cmd := &cobra.Command{
		Use:   "stop NODE",
		Short: "Stop a node: its agent ends the BGP sessions, then the vrouter stops; its pods keep their namespaces",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return onLab(*name, func(l *lab.Lab) error {
				return timed(cmd, args[0]+" stopped", func(ctx context.Context) error { return l.StopNode(ctx, args[0], hard) })
			})
		},
	}
	cmd.Flags().BoolVar(&hard, "hard", false, "power loss: off the network and dead at once, nobody is told")
	return cmd
}

func newLabStartCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use:   "start NODE",
		Short: "Start a stopped node; returns when it is ready",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return onLab(*name, func(l *lab.Lab) error {
				return timed(cmd, args[0]+" started", func(ctx context.Context) error { return l.StartNode(ctx, args[0]) })
			})
		},
	}
}

func newLabAddPodCommand(name *string) *cobra.Command {
	var (
		count  int
		output string
	)
	cmd := &cobra.Command{
		Use:   "add-pod NODE",
		Short: "Attach more pods to a node, and print each one's address and the time of its ADD",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			return onLab(*name, func(l *lab.Lab) error {
				added, err := l.AddPods(cmd.Context(), args[0], count)
				if output == "json" {
					if jsonErr := printJSON(cmd.OutOrStdout(), added); err == nil {
						err = jsonErr
					}
					return err
				}
				for _, p := range added {
					fmt.Fprintf(cmd.OutOrStdout(), "%s\t%s\t%.1f ms\n", p.Name, p.Address, float64(p.Took.Microseconds())/1000)
				}
				return err
			})
		},
	}
	cmd.Flags().IntVar(&count, "count", 1, "how many")
	addOutput(cmd, &output, "text", "text or json")
	return cmd
}

func newLabDelPodCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use:   "del-pod POD…",
		Short: "Detach pods and remove their namespaces",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return onLab(*name, func(l *lab.Lab) error { return l.RemovePods(cmd.Context(), args...) })
		},
	}
}

func newLabPingCommand(name *string) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "ping",
		Short: "Check that every pod reaches every other; prints who does not, and exits 1",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return onLab(*name, func(l *lab.Lab) error {
				ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
				defer cancel()
				lost, err := l.Unreachable(ctx)
				if err != nil {
					return err
				}
				for _, line := range lost {
					fmt.Fprintln(cmd.OutOrStdout(), line)
				}
				if len(lost) > 0 {
					return ExitError{Code: 1}
				}
				fmt.Fprintln(cmd.OutOrStdout(), "every pod reaches every other")
				return nil
			})
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "how long an answer may take")
	return cmd
}
