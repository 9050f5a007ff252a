// Package ctl is margayctl: calicoctl's verbs over Calico's datastore, the node's own state, and the lab.
//
// root.go builds the command tree; each command has a file of its own. Commands print what was asked for on standard
// output and everything else on standard error, return errors that end up as one line, and know -o json.
package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"margay/datastore"
	"margay/internal/version"
	"margay/lab"
)

// callTimeout bounds one command's talk with etcd or a daemon.
const callTimeout = 15 * time.Second

// defaultRunDir is where a node's daemons have their sockets.
const defaultRunDir = "/run/margay"

// NewCommand returns margayctl's command tree.
func NewCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "margayctl",
		Short: "Operate a Margay cluster: resources, addresses, BGP, and a lab on one machine",
		Long: `margayctl speaks calicoctl's language over Calico's own datastore, asks the daemons of a node about themselves, and
builds whole clusters out of network namespaces ("margayctl lab").

The datastore is found as calicoctl finds it: in the file of --config, or else by DATASTORE_TYPE=etcdv3, ETCD_ENDPOINTS,
ETCD_CA_CERT_FILE, ETCD_CERT_FILE and ETCD_KEY_FILE, then in /etc/calico/calicoctl.cfg. Inside a namespace of a lab
("ip netns exec lab-node1 margayctl …") the lab's datastore and that node's daemons are used.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version.String(),
	}
	cmd.SetVersionTemplate(version.Line("margayctl") + "\n")
	cmd.PersistentFlags().StringP("config", "c", "", "the file that says where the datastore is, whatever the environment says (default "+datastore.ConfigFile+", after the environment)")
	cmd.PersistentFlags().Bool("allow-version-mismatch", false, "accepted for scripts written for calicoctl: margayctl refuses no version")
	cmd.AddCommand(newVersionCommand(), newGetCommand(), newApplyCommand(), newCreateCommand(), newReplaceCommand(), newPatchCommand(),
		newDeleteCommand(), newLabelCommand(), newValidateCommand(), newIPAMCommand(), newNodeCommand(),
		newDatastoreCommand(), newExportCommand(), newImportCommand(), newConvertCommand(),
		newTraceCommand(), newDropsCommand(), newCaptureCommand(), newLabCommand())
	return cmd
}

// ExitError ends margayctl with a status of its own and without a message: everything has been said.
type ExitError struct{ Code int }

// Error implements error.
func (e ExitError) Error() string { return fmt.Sprintf("exit status %d", e.Code) }

// statusError is an error with an exit status of its own.
type statusError struct {
	error
	code int
}

// withStatus gives an error an exit status, unless it has one.
func withStatus(code int, err error) error {
	if err == nil || errors.As(err, new(ExitError)) {
		return err
	}
	return statusError{err, code}
}

// Unwrap returns the error itself.
func (e statusError) Unwrap() error { return e.error }

// Main runs margayctl and returns its exit status.
func Main(ctx context.Context, args []string, stderr io.Writer) int {
	cmd := NewCommand()
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if exit := (ExitError{}); errors.As(err, &exit) {
		return exit.Code
	}
	fmt.Fprintln(stderr, "margayctl:", strings.ReplaceAll(err.Error(), "\n", "; "))
	if s := (statusError{}); errors.As(err, &s) {
		return s.code
	}
	return 1
}

// openStore connects to the datastore that the environment, the configuration file or the surrounding lab names.
func openStore(ctx context.Context, cmd *cobra.Command) (*datastore.Store, error) {
	file, err := cmd.Flags().GetString("config")
	if err != nil {
		return nil, err
	}
	var cfg datastore.Config
	if file != "" {
		cfg, err = datastore.ConfigFromFile(file)
	} else {
		cfg, err = datastore.ConfigFromEnv()
	}
	if err != nil {
		return nil, err
	}
	if len(cfg.Endpoints) == 0 && file == "" {
		if here, ok := lab.Current(); ok {
			cfg.Endpoints = here.Endpoints
		}
	}
	return datastore.Open(ctx, cfg)
}

// runDir returns where this node's sockets are: MARGAY_RUN_DIR, the surrounding lab node's, or the default.
func runDir() string {
	if dir := os.Getenv("MARGAY_RUN_DIR"); dir != "" {
		return dir
	}
	if here, ok := lab.Current(); ok && here.RunDir != "" {
		return here.RunDir
	}
	return defaultRunDir
}

func agentSocket() string   { return filepath.Join(runDir(), "agent.sock") }
func vrouterSocket() string { return filepath.Join(runDir(), "vrouter.sock") }

// withStore runs f with an open datastore and a deadline.
func withStore(cmd *cobra.Command, f func(ctx context.Context, s *datastore.Store) error) error {
	return withStoreFor(cmd, callTimeout, f)
}

// withStoreFor is withStore with a deadline of its own.
func withStoreFor(cmd *cobra.Command, timeout time.Duration, f func(ctx context.Context, s *datastore.Store) error) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
	defer cancel()
	s, err := openStore(ctx, cmd)
	if err != nil {
		return err
	}
	defer s.Close()
	return f(ctx, s)
}

// printJSON writes v, indented.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func addOutput(cmd *cobra.Command, output *string, def, help string) {
	cmd.Flags().StringVarP(output, "output", "o", def, "output format: "+help)
}

// checkOutput refuses a format that the command does not know.
func checkOutput(got string, known ...string) error {
	for _, k := range known {
		if got == k {
			return nil
		}
	}
	return fmt.Errorf("--output %q: expected one of %v", got, known)
}
