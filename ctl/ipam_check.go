package ctl

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"margay/datastore"
	"margay/internal/version"
	"margay/ipam/audit"
)

// topNodes is how many nodes the check names by their number of addresses.
const topNodes = 20

func newIPAMCheckCommand() *cobra.Command {
	var (
		all, problems bool
		output        string
	)
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look for leaked addresses and contradictions in the store; exit status 1 if there are any",
		Long: `Compares blocks, handles, affinities and pools with each other and with who uses the addresses: the nodes' tunnels,
and the pods of those nodes that write WorkloadEndpoints. A pod on a node that writes none is taken for alive as long as
the node is in the datastore.

The report says what ` + "`margayctl ipam release --from-report FILE`" + ` would release.`,
		Example: `  margayctl ipam check --show-problem-ips
  margayctl ipam check --output report.json
  margayctl ipam check -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withStore(cmd, func(ctx context.Context, s *datastore.Store) error {
				report, err := audit.Check(ctx, s, version.String())
				if err != nil {
					return err
				}
				if err := writeCheck(cmd.OutOrStdout(), report, all, problems || all, output); err != nil {
					return err
				}
				if len(report.Problems) > 0 {
					return ExitError{1}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&all, "show-all-ips", false, "print every address that is looked at")
	cmd.Flags().BoolVar(&problems, "show-problem-ips", false, "print every problem")
	cmd.Flags().StringVarP(&output, "output", "o", "", `"json": the report on standard output instead of the text; else a file to write the report to`)
	return cmd
}

// writeCheck prints the text or the report, and writes the report's file.
func writeCheck(w io.Writer, r *audit.Report, all, problems bool, output string) error {
	if output == "json" {
		return printJSON(w, r)
	}
	printCheck(w, r, all, problems)
	if output == "" {
		return nil
	}
	var buf bytes.Buffer
	if err := printJSON(&buf, r); err != nil {
		return err
	}
	return os.WriteFile(output, buf.Bytes(), 0o600)
}

// printCheck prints calicoctl's text, with lines of ours where calicoctl does not look.
func printCheck(w io.Writer, r *audit.Report, all, problems bool) {
	line := func(format string, args ...any) { fmt.Fprintf(w, format+"\n", args...) }
	section := func(text string, kind audit.Kind) {
		found := r.Of(kind)
		if problems {
			for _, p := range found {
				line("  %s: %s", p.What, p.Detail)
			}
		}
		line(text, len(found))
	}
	line("Checking IPAM for inconsistencies...\n")
	line("Loading all IPAM blocks...")
	line("Found %d IPAM blocks.", len(r.Blocks))
	allocations := r.Sorted()
	for _, b := range r.Blocks {
		affinity := b.Affinity
		if affinity == "" {
			affinity = "<none>"
		}
		line(" IPAM block %s affinity=%s:", b.CIDR, affinity)
		for _, a := range allocations {
			if all && a.Block == b.CIDR {
				line("  %s allocated; attrs %s", a.IP, attrString(a))
			}
		}
	}
	line("IPAM blocks record %d allocations.\n", len(allocations))
	line("Loading all IPAM pools...")
	for _, p := range r.Pools {
		line("  %s", p)
	}
	line("Found %d active IP pools.\n", len(r.Pools))
	line("Loading all nodes and workload endpoints.")
	for _, o := range r.Owners {
		if all {
			line("  %s belongs to %s", o.Addr, o.Name)
		}
	}
	line("Workloads and nodes are using %d IPs.", len(r.Owners))
	if r.Unknown > 0 {
		line("%d IPs belong to pods of nodes that write no workload endpoints; they are taken to be in use.", r.Unknown)
	}
	line("")
	line("Looking for top (up to %d) nodes by allocations...", topNodes)
	if nodes := r.ByNode(); len(nodes) > 0 {
		for _, n := range nodes[:min(topNodes, len(nodes))] {
			line("  %s has %d allocations", n.Node, n.Count)
		}
		line("Node with most allocations has %d; median is %d", nodes[0].Count, nodes[len(nodes)/2].Count)
	}
	line("")
	line("Scanning for IPs that are allocated but not actually in use...")
	section("Found %d IPs that are allocated in IPAM but not actually in use.", audit.LeakedAddress)
	line("Scanning for IPs that are in use by a workload or node but not allocated in IPAM...")
	section("Found %d in-use IPs that are not in active IP pools.", audit.AddressOutsidePools)
	section("Found %d in-use IPs that are in active IP pools but have no corresponding IPAM allocation.", audit.AddressNotAllocated)
	section("Found %d allocated IPs that are in no IP pool.", audit.AllocationOutsidePool)
	section("Found %d IPs that more than one block has allocated.\n", audit.DuplicateAddress)
	line("Scanning for IPAM handles with no matching IPs...")
	section(fmt.Sprintf("Found %%d handles with no matching IPs (and %d handles with matches).", r.Handles), audit.LeakedHandle)
	section("Found %d handles that count other IPs than they have.", audit.HandleMismatch)
	line("Scanning for IPs with missing handle...")
	section("Found %d handles mentioned in blocks with no matching handle resource.", audit.MissingHandle)
	section("Found %d IPs that are allocated to no handle.", audit.AddressWithoutHandle)
	line("Scanning for affinities and blocks that do not match...")
	section("Found %d affinities without their block.", audit.AffinityWithoutBlock)
	section("Found %d blocks without their affinity.", audit.BlockWithoutAffinity)
	line("Validating IPAMBlock structures...")
	section("Found %d invalid IPAMBlocks.", audit.InvalidBlock)
	section("Found %d keys that cannot be read.", audit.Malformed)
	line("Check complete; found %d problems.", len(r.Problems))
}
