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
	)
	cmd := &cobra.Command{
		Use:   "version",
		Short: "The version of margayctl, of the cluster, and of this node's daemons where they answer",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
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
			return nil
		},
	}
	addOutput(cmd, &output, "text", "text or json")
	cmd.Flags().BoolVar(&client, "client", false, "margayctl's own version alone; nothing else is asked")
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
