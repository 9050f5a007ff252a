package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"margay/agent/api"
	"margay/datastore"
	"margay/internal/version"
	"margay/vrouter/rpc"
)

// versionInfo is what `margayctl version -o json` prints.
type versionInfo struct {
	Client         string `json:"client"`
	GitCommit      string `json:"gitCommit,omitempty"`
	ClusterVersion string `json:"clusterVersion,omitempty"`
	ClusterType    string `json:"clusterType,omitempty"`
	Agent          string `json:"agent,omitempty"`
	VRouter        string `json:"vrouter,omitempty"`
}

// versionTimeout is how long `version` waits for a datastore or a daemon.
const versionTimeout = 2 * time.Second

func newVersionCommand() *cobra.Command {
	var (
		output string
		client bool
		poll   time.Duration
	)
	cmd := &cobra.Command{
		Use:   "version",
		Short: "The version of margayctl, of the cluster, and of this node's daemons where they answer",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			if poll < 0 || poll > 0 && output == "json" {
				return errors.New("--poll: expected a duration such as 1m, and text as output")
			}
			v := versionInfo{Client: version.String(), GitCommit: gitCommit()}
			var clusterErr error
			if !client {
				clusterErr = v.ofCluster(cmd)
				v.ofDaemons(cmd.Context())
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), v)
			}
			v.print(cmd.OutOrStdout(), client, clusterErr)
			if client || poll == 0 {
				return nil
			}
			return v.poll(cmd, poll)
		},
	}
	addOutput(cmd, &output, "text", "text or json")
	cmd.Flags().BoolVar(&client, "client", false, "margayctl's own version alone; nothing else is asked")
	cmd.Flags().DurationVar(&poll, "poll", 0, "go on, look at the cluster's version so often, and print it when it changes")
	return cmd
}

func (v versionInfo) print(w io.Writer, client bool, clusterErr error) {
	fmt.Fprintf(w, "Client Version:    %s\nGit commit:        %s\n", v.Client, v.GitCommit)
	if client {
		return
	}
	if clusterErr != nil {
		fmt.Fprintf(w, "Unable to detect installed Calico version\n")
	} else {
		fmt.Fprintf(w, "Cluster Version:   %s\nCluster Type:      %s\n", v.ClusterVersion, v.ClusterType)
	}
	fmt.Fprintf(w, "Agent Version:     %s\nvRouter Version:   %s\n", orNone(v.Agent), orNone(v.VRouter))
}

// poll prints the cluster's version and type whenever they change, until it is interrupted.
func (v versionInfo) poll(cmd *cobra.Command, period time.Duration) error {
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	for {
		select {
		case <-cmd.Context().Done():
			return nil
		case <-ticker.C:
		}
		was := v
		if err := v.ofCluster(cmd); err != nil {
			v.ClusterVersion, v.ClusterType = "", "" // to be said again when it is known again
			fmt.Fprintln(cmd.ErrOrStderr(), "unable to retrieve Cluster Version or Type:", err)
			continue
		}
		if v.ClusterVersion != was.ClusterVersion {
			fmt.Fprintln(cmd.OutOrStdout(), "Cluster Version:  ", v.ClusterVersion)
		}
		if v.ClusterType != was.ClusterType {
			fmt.Fprintln(cmd.OutOrStdout(), "Cluster Type:     ", v.ClusterType)
		}
	}
}

// ofCluster fills in what ClusterInformation says; where it says nothing that is "unknown", as with calicoctl.
func (v *versionInfo) ofCluster(cmd *cobra.Command) error {
	return withStoreFor(cmd, versionTimeout, func(ctx context.Context, s *datastore.Store) error {
		v.ClusterVersion, v.ClusterType = "unknown", "unknown"
		info, err := datastore.GetResource[datastore.ClusterInformation](ctx, s, "default")
		if errors.Is(err, datastore.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if info.Spec.CalicoVersion != "" {
			v.ClusterVersion = info.Spec.CalicoVersion
		}
		if info.Spec.ClusterType != "" {
			v.ClusterType = info.Spec.ClusterType
		}
		return nil
	})
}

func (v *versionInfo) ofDaemons(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	if st, err := api.Get(ctx, agentSocket()); err == nil {
		v.Agent = st.Version
	}
	if c, err := rpc.Dial(vrouterSocket()); err == nil {
		defer c.Close()
		if st, err := c.Status(ctx); err == nil {
			v.VRouter = st.Version
		}
	}
}

// gitCommit is the commit that the binary was built from, where the Go toolchain noted it.
func gitCommit() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return ""
}

func orNone(s string) string {
	if s == "" {
		return "(not running here)"
	}
	return s
}
