package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"margay/datastore"
	"margay/internal/version"
	"margay/ipam"
	"margay/ipam/audit"
)

func newIPAMReleaseCommand() *cobra.Command {
	var (
		address string
		node    string
		reports []string
		force   bool
	)
	cmd := &cobra.Command{
		Use:   "release",
		Short: "Release one address, all that a node left behind, or what reports of `ipam check` call leaked",
		Example: `  margayctl ipam release --ip=10.244.0.5
  margayctl ipam release --node=node3
  margayctl ipam release --from-report=report.json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withStore(cmd, func(ctx context.Context, s *datastore.Store) error {
				if len(reports) > 0 {
					return releaseReports(ctx, cmd.OutOrStdout(), s, reports, force)
				}
				if node != "" {
					return releaseNode(ctx, cmd.OutOrStdout(), s, node, force)
				}
				addr, err := parseAddress(address)
				if err != nil {
					return err
				}
				err = ipam.New(s, "", nil).ReleaseAddress(ctx, ipam.Release{Addr: addr})
				if errors.Is(err, ipam.ErrNotAssigned) {
					return fmt.Errorf("IP address %s is not assigned", addr)
				}
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "Successfully released IP address %s\n", addr)
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&address, "ip", "", "the address to release")
	cmd.Flags().StringArrayVar(&reports, "from-report", nil, "release what this report, and every other one given, calls leaked")
	cmd.Flags().StringVar(&node, "node", "", "release all addresses and blocks of this node, which is gone for good")
	cmd.Flags().BoolVar(&force, "force", false, "though the datastore is not locked, another version wrote the report, or the Node is still there")
	cmd.MarkFlagsOneRequired("ip", "node", "from-report")
	cmd.MarkFlagsMutuallyExclusive("ip", "node", "from-report")
	return cmd
}

// releaseNode frees what a node left behind, unless the node is still in the datastore.
func releaseNode(ctx context.Context, w io.Writer, s *datastore.Store, node string, force bool) error {
	_, err := datastore.GetResource[datastore.Node](ctx, s, node)
	switch {
	case err == nil && !force:
		return fmt.Errorf("node %s is still in the datastore. Either delete it (`margayctl delete node %s`), or re-run with --force", node, node)
	case err != nil && !errors.Is(err, datastore.ErrNotFound):
		return err
	}
	released, err := ipam.New(s, "", nil).ReleaseNode(ctx, node)
	if err != nil {
		return fmt.Errorf("released %d IP addresses of node %s, then: %w", len(released), node, err)
	}
	fmt.Fprintf(w, "Successfully released %d IP addresses of node %s\n", len(released), node)
	return nil
}

// releaseReports releases what all the reports say is leaked, and nothing that has changed since.
func releaseReports(ctx context.Context, w io.Writer, s *datastore.Store, files []string, force bool) error {
	reports, err := readReports(ctx, w, s, files, force)
	if err != nil {
		return err
	}
	addrs, handles, err := leakedInAll(reports)
	if err != nil {
		return err
	}
	failed := releaseAddresses(ctx, w, s, addrs)
	failed += deleteHandles(ctx, w, s, handles)
	if failed > 0 {
		return fmt.Errorf("%d of %d could not be released", failed, len(addrs)+len(handles))
	}
	fmt.Fprintln(w, "You may now unlock the data store.")
	return nil
}

// readReports reads the reports and refuses what must not be acted on: calicoctl's conditions.
func readReports(ctx context.Context, w io.Writer, s *datastore.Store, files []string, force bool) ([]audit.Report, error) {
	var guid, revision string
	locked := false
	info, err := datastore.GetResource[datastore.ClusterInformation](ctx, s, "default")
	switch {
	case err == nil:
		guid, revision, locked = info.Spec.ClusterGUID, info.Metadata.ResourceVersion, !info.Ready()
	case !errors.Is(err, datastore.ErrNotFound):
		return nil, err
	}
	var out []audit.Report
	current := false
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var r audit.Report
		if err := json.Unmarshal(raw, &r); err != nil {
			return nil, fmt.Errorf("report %s: expected what `ipam check --output` writes: %w", file, datastore.JSONError(err))
		}
		if r.ClusterGUID != guid {
			return nil, fmt.Errorf("cluster does not match the provided report (%s): mismatched cluster GUID. Refusing to release", file)
		}
		if r.Version != version.String() {
			if !force {
				return nil, fmt.Errorf("the provided report (%s) was produced using a different version (%s) of margayctl. Refusing to release", file, r.Version)
			}
			fmt.Fprintln(w, "WARNING: Report was produced using a different version of margayctl. Ignoring due to --force option")
		}
		current = current || r.ClusterInfoRevision == revision
		out = append(out, r)
	}
	if !current {
		return nil, errors.New("the provided reports are all stale - at least one should be up-to-date. Please generate a new report while the data store is locked and try again")
	}
	if !locked {
		if !force {
			return nil, errors.New("data store is not locked. Either lock the data store, or re-run with --force")
		}
		fmt.Fprintln(w, "WARNING: Data store is not locked. Ignoring due to --force option")
	}
	return out, nil
}

// leakedInAll is what every report calls leaked, unchanged between them.
func leakedInAll(reports []audit.Report) (map[string]ipam.Release, map[string]int64, error) {
	var addrs map[string]ipam.Release
	var handles map[string]int64
	for _, r := range reports {
		nextAddrs, nextHandles := map[string]ipam.Release{}, map[string]int64{}
		for _, list := range r.Allocations {
			for _, a := range list {
				if a == nil || a.InUse || a.CoolingDown {
					continue
				}
				addr, err := parseAddress(a.IP)
				if err != nil {
					return nil, nil, fmt.Errorf("report: allocation: %w", err)
				}
				old, seen := addrs[a.IP]
				if addrs == nil || seen && (old.Sequence == nil || a.SequenceNumber == nil || *old.Sequence == *a.SequenceNumber) {
					nextAddrs[a.IP] = ipam.Release{Addr: addr, Handle: a.Handle, Sequence: a.SequenceNumber}
				}
			}
		}
		for _, h := range r.LeakedHandles {
			rev, err := strconv.ParseInt(h.Revision, 10, 64)
			if err != nil {
				return nil, nil, fmt.Errorf("report: handle %s: revision %q: expected a number", h.ID, h.Revision)
			}
			if old, seen := handles[h.ID]; handles == nil || seen && old == rev {
				nextHandles[h.ID] = rev
			}
		}
		addrs, handles = nextAddrs, nextHandles
	}
	return addrs, handles, nil
}

// releaseAddresses returns how many could not be released for another reason than having changed since the report.
func releaseAddresses(ctx context.Context, w io.Writer, s *datastore.Store, addrs map[string]ipam.Release) (failed int) {
	if len(addrs) == 0 {
		fmt.Fprintln(w, "Report didn't contain any leaked IPs to clean up.")
		return 0
	}
	fmt.Fprintf(w, "Releasing %d old IPs...\n", len(addrs))
	alloc := ipam.New(s, "", nil)
	var released, gone, changed int
	for _, ip := range slices.Sorted(maps.Keys(addrs)) {
		err := alloc.ReleaseAddress(ctx, addrs[ip])
		switch {
		case err == nil:
			released++
		case errors.Is(err, ipam.ErrNotAssigned):
			gone++
		case errors.Is(err, ipam.ErrReassigned):
			changed++
		default:
			failed++
			fmt.Fprintf(w, "Releasing %s failed: %s.\n", ip, err)
		}
	}
	fmt.Fprintf(w, "Released %d IPs successfully\n", released)
	if gone > 0 {
		fmt.Fprintf(w, "%d addresses marked as leaked in the report had already been cleaned up.\n", gone)
	}
	if changed > 0 {
		fmt.Fprintf(w, "%d addresses have changed hands since the report and were left alone.\n", changed)
	}
	return failed
}

func deleteHandles(ctx context.Context, w io.Writer, s *datastore.Store, handles map[string]int64) (failed int) {
	if len(handles) == 0 {
		fmt.Fprintln(w, "Report didn't contain any handles to clean up.")
		return 0
	}
	fmt.Fprintf(w, "Deleting %d handles...\n", len(handles))
	var released, skipped int
	for _, id := range slices.Sorted(maps.Keys(handles)) {
		err := ipam.DeleteHandle(ctx, s, id, handles[id])
		switch {
		case err == nil:
			released++
		case errors.Is(err, datastore.ErrConflict), errors.Is(err, datastore.ErrNotFound):
			skipped++
		default:
			failed++
			fmt.Fprintf(w, "Deleting handle %s failed: %s.\n", id, err)
		}
	}
	fmt.Fprintf(w, "Released %d handles; %d skipped; %d errors.\n", released, skipped, failed)
	return failed
}

func newIPAMConfigureCommand() *cobra.Command {
	var strict, limit string
	cmd := &cobra.Command{
		Use:   "configure",
		Short: "Change the IPAM configuration of the cluster",
		Example: `  margayctl ipam configure --strictaffinity=true
  margayctl ipam configure --strictaffinity=true --max-blocks-per-host=4`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var changes []func(*ipam.Config)
			var said []string
			if strict != "" {
				v, err := strconv.ParseBool(strict)
				if err != nil {
					return fmt.Errorf("--strictaffinity %q: expected true or false", strict)
				}
				changes = append(changes, func(c *ipam.Config) { c.StrictAffinity = v })
				said = append(said, fmt.Sprintf("Successfully set StrictAffinity to: %t", v))
			}
			if limit != "" {
				v, err := strconv.Atoi(limit)
				if err != nil || v < 0 {
					return fmt.Errorf("--max-blocks-per-host %q: expected a number, 0 for no limit", limit)
				}
				changes = append(changes, func(c *ipam.Config) { c.MaxBlocksPerHost = v })
				said = append(said, fmt.Sprintf("Successfully set MaxBlocksPerHost to: %d", v))
			}
			return withStore(cmd, func(ctx context.Context, s *datastore.Store) error {
				err := ipam.ChangeConfig(ctx, s, func(c *ipam.Config) {
					for _, change := range changes {
						change(c)
					}
				})
				if err != nil {
					return err
				}
				for _, line := range said {
					fmt.Fprintln(cmd.OutOrStdout(), line)
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&strict, "strictaffinity", "", "true: no node takes addresses out of another's block; false: it may")
	cmd.Flags().StringVar(&limit, "max-blocks-per-host", "", "how many blocks a node may have, 0 for no limit")
	cmd.MarkFlagsOneRequired("strictaffinity", "max-blocks-per-host")
	return cmd
}
