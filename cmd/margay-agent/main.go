// Command margay-agent is the control plane of one node, and, as `margay-agent etcd`, the datastore of a cluster that
// has only one machine.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"margay/agent"
	"margay/agent/api"
	"margay/datastore"
	"margay/datastore/embedded"
	"margay/internal/monitor"
	"margay/internal/version"
	"margay/ipam"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "margay-agent:", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	var (
		cfg   agent.Config
		flags datastore.Config
		level string
		watch monitor.Config
	)
	cmd := &cobra.Command{
		Use:   "margay-agent",
		Short: "The control plane of one Margay node",
		Long: `margay-agent registers this node in the datastore, holds the BGP sessions, assigns addresses, serves the CNI
plugin, and programs the kernel's routes and the vRouter beside it, which it finds at RUN-DIR/vrouter.sock.

SIGTERM is a clean stop: the peers are told and drop this node's routes at once. An agent that dies instead is
covered by BGP graceful restart: packets flow on, and the next agent takes over what it finds.

Environment, where the flag is not given: NODENAME, ETCD_ENDPOINTS, ETCD_CA_CERT_FILE, ETCD_CERT_FILE, ETCD_KEY_FILE,
IP_AUTODETECTION_METHOD.`,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version.String(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logger(level)
			if err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return fmt.Errorf("it changes this node's routes: run it as root, with CAP_NET_ADMIN, CAP_SYS_ADMIN and CAP_NET_BIND_SERVICE")
			}
			if cfg.Datastore, err = datastoreConfig(flags); err != nil {
				return err
			}
			if text := os.Getenv("IPAM_GRACE_PERIOD"); text != "" && !cmd.Flags().Changed("ipam-grace-period") {
				if cfg.IPAMGrace, err = time.ParseDuration(text); err != nil {
					return fmt.Errorf("IPAM_GRACE_PERIOD %q: expected a duration such as 15m", text)
				}
			}
			cfg.Log = log
			registry := monitor.NewRegistry("agent")
			cfg.Metrics = registry
			watched, err := monitor.Listen(watch, registry, log)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(cmd.Context())
			done := make(chan struct{})
			go func() {
				watched.Serve(ctx)
				close(done)
			}()
			err = agent.Run(ctx, cfg)
			cancel()
			<-done
			return err
		},
	}
	cmd.SetVersionTemplate(version.Line("margay-agent") + "\n")
	f := cmd.Flags()
	f.StringVar(&cfg.Node, "node", defaultNode(), "this node's name in the datastore")
	f.StringVar(&cfg.RunDir, "run-dir", "/run/margay", "where the sockets are: vrouter.sock, agent.sock, cni.sock")
	f.StringVar(&cfg.StateDir, "state-dir", "/var/lib/margay", "what must survive a restart")
	f.StringVar(&cfg.Autodetection, "ip-autodetection-method", envOr("IP_AUTODETECTION_METHOD", "first-found"),
		"how this node's address is found: first-found, interface=REGEXP, can-reach=ADDRESS, cidr=PREFIX")
	f.IntVar(&cfg.BGPPort, "bgp-port", 179, "TCP port of BGP, here and at the peers")
	f.DurationVar(&cfg.HoldTime, "bgp-hold-time", 90*time.Second, "a peer silent for so long is gone")
	f.DurationVar(&cfg.RestartTime, "bgp-restart-time", 120*time.Second, "how long peers keep this node's routes while its agent is dead (RFC 4724)")
	f.DurationVar(&cfg.SyncTimeout, "sync-timeout", 20*time.Second, "how long routes of before a restart wait for a peer's End-of-RIB")
	f.IntVar(&cfg.DiagPort, "diag-port", api.DefaultDiagPort, "TCP port, on the node's address, for margayctl's trace, drops and capture from other nodes; 0: none")
	f.DurationVar(&cfg.IPAMGrace, "ipam-grace-period", ipam.DefaultGrace,
		"how long an address or block must be nobody's before it is given back; 0: it never is (environment: IPAM_GRACE_PERIOD)")
	f.StringVar(&cfg.GoBGPSocket, "gobgp-socket", "", "serve GoBGP's gRPC API on this unix socket, for the gobgp command; empty: no")
	f.StringSliceVar(&flags.Endpoints, "etcd-endpoints", nil, "etcd's client URLs, separated by commas")
	f.StringVar(&flags.CACert, "etcd-ca-cert-file", "", "CA that signed etcd's certificate (PEM)")
	f.StringVar(&flags.Cert, "etcd-cert-file", "", "client certificate (PEM)")
	f.StringVar(&flags.Key, "etcd-key-file", "", "client key (PEM)")
	watch.Add(f)
	cmd.PersistentFlags().StringVar(&level, "log-level", "info", "debug, info, warn or error")
	cmd.AddCommand(newEtcdCommand(&level))
	cmd.CompletionOptions.HiddenDefaultCmd = true
	return cmd
}

func newEtcdCommand(level *string) *cobra.Command {
	var cfg embedded.Config
	cmd := &cobra.Command{
		Use:   "etcd",
		Short: "Run the datastore of a cluster that has one machine",
		Long: `A single etcd member, embedded: for a lab, or where one machine is all there is. It is a process of its own, so
that no agent's death takes it along. A real cluster brings its own etcd.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logger(*level)
			if err != nil {
				return err
			}
			cfg.Log = log
			return embedded.Serve(cmd.Context(), cfg)
		},
	}
	cmd.Flags().StringVar(&cfg.Dir, "data-dir", "/var/lib/margay/etcd", "where etcd keeps its data")
	cmd.Flags().StringSliceVar(&cfg.ClientURLs, "listen-client", nil, "client URLs to listen on (default http://127.0.0.1:2379, or https where there is a certificate)")
	cmd.Flags().StringVar(&cfg.CertFile, "cert-file", "", "the server's certificate (PEM): clients speak TLS")
	cmd.Flags().StringVar(&cfg.KeyFile, "key-file", "", "the server's key (PEM)")
	cmd.Flags().StringVar(&cfg.ClientCAFile, "client-ca-file", "", "CA (PEM) that has to have signed a client's certificate; empty: clients need none")
	return cmd
}

// datastoreConfig takes the flags, and the environment and Calico's file for what they leave open.
func datastoreConfig(flags datastore.Config) (datastore.Config, error) {
	if len(flags.Endpoints) > 0 {
		return flags, nil
	}
	return datastore.ConfigFromEnv()
}

func logger(level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level %q: expected debug, info, warn or error", level)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})), nil
}

func defaultNode() string {
	name, err := os.Hostname()
	if err != nil {
		name = "localhost"
	}
	return strings.ToLower(envOr("NODENAME", name))
}

func envOr(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}
