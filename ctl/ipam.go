package ctl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/olekukonko/tablewriter"
	"github.com/spf13/cobra"

	"margay/datastore"
	"margay/ipam"
)

func newIPAMCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ipam",
		Short: "The cluster's addresses",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newIPAMShowCommand(), newIPAMCheckCommand(), newIPAMReleaseCommand(), newIPAMSplitCommand(), newIPAMConfigureCommand())
	return cmd
}

func newIPAMShowCommand() *cobra.Command {
	var (
		blocks, borrowed, configuration bool
		address, output                 string
	)
	cmd := &cobra.Command{
		Use:   "show",
		Short: "How much of each pool is in use, or who holds an address",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			return withStore(cmd, func(ctx context.Context, s *datastore.Store) error {
				w := cmd.OutOrStdout()
				switch {
				case address != "":
					return showAddress(ctx, w, s, address, output)
				case borrowed:
					return showBorrowed(ctx, w, s, output)
				case configuration:
					return showConfiguration(ctx, w, s, output)
				}
				// What could be read is shown, whatever could not.
				pools, err := ipam.Usage(ctx, s)
				switch {
				case err != nil && len(pools) == 0:
				case output == "json":
					err = errors.Join(err, printJSON(w, pools))
				default:
					printUsage(w, pools, blocks)
				}
				return err
			})
		},
	}
	cmd.Flags().StringVar(&address, "ip", "", "who holds this address")
	cmd.Flags().BoolVar(&blocks, "show-blocks", false, "also the blocks of each pool")
	cmd.Flags().BoolVar(&borrowed, "show-borrowed", false, "the addresses that nodes have out of other nodes' blocks")
	cmd.Flags().BoolVar(&configuration, "show-configuration", false, "the IPAM configuration in force")
	cmd.MarkFlagsMutuallyExclusive("ip", "show-blocks", "show-borrowed", "show-configuration")
	addOutput(cmd, &output, "text", "text or json")
	return cmd
}

// printUsage prints calicoctl's table.
func printUsage(w io.Writer, pools []ipam.PoolUsage, blocks bool) {
	table := tablewriter.NewWriter(w)
	table.SetHeader([]string{"Grouping", "CIDR", "IPs Total", "IPs in use", "IPs Free"})
	row := func(kind, cidr string, total, inUse float64) {
		table.Append([]string{kind, cidr, fmt.Sprintf("%.5g", total), cell(inUse, total), cell(total-inUse, total)})
	}
	// In the order of the keys, as calicoctl does: pools by name, blocks by what is written.
	pools = slices.Clone(pools)
	slices.SortStableFunc(pools, func(a, b ipam.PoolUsage) int {
		if a.CIDR.IsValid() != b.CIDR.IsValid() {
			return cmp.Compare(b.CIDR.Bits(), a.CIDR.Bits()) // -1 where there is none
		}
		return strings.Compare(a.Name, b.Name)
	})
	for _, p := range pools {
		if p.CIDR.IsValid() { // blocks that have lost their pool have no row of their own
			row("IP Pool", p.CIDR.String(), p.Total, p.InUse)
		}
		if !blocks {
			continue
		}
		list := slices.Clone(p.Blocks)
		slices.SortFunc(list, func(a, b ipam.BlockUsage) int { return strings.Compare(a.CIDR.String(), b.CIDR.String()) })
		for _, b := range list {
			row("Block", b.CIDR.String(), float64(b.Total), float64(b.InUse))
		}
	}
	table.Render()
}

// cell is calicoctl's "n (p%)".
func cell(n, total float64) string {
	return fmt.Sprintf("%.5g (%.f%%)", n, 100*n/total)
}
