package ctl

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"margay/datastore"
)

func newIPAMSplitCommand() *cobra.Command {
	var cidr, name, output string
	cmd := &cobra.Command{
		Use:   "split NUMBER",
		Short: "Replace a pool by a number of smaller ones of equal size; the datastore must be locked",
		Long: `Replaces the pool, in one step, by NUMBER pools of equal size (a power of two, 2 to 64) with its settings, named
split-<pool>-0 and so on. Addresses and blocks stay as they are. Lock the datastore before and unlock it afterwards.`,
		Example: `  margayctl datastore migrate lock
  margayctl ipam split 4 --name=default-ipv4-ippool
  margayctl datastore migrate unlock`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output, "text", "json"); err != nil {
				return err
			}
			parts, err := strconv.Atoi(args[0])
			if err != nil {
				return fmt.Errorf("NUMBER %q: expected a power of two", args[0])
			}
			if name == "" && cidr == "" {
				return errors.New("no name or CIDR provided. Provide a name or CIDR to denote the IP pool to split")
			}
			return withStore(cmd, func(ctx context.Context, s *datastore.Store) error {
				pool, err := datastore.FindPool(ctx, s, name, cidr)
				if errors.Is(err, datastore.ErrNotFound) {
					return fmt.Errorf("unable to find IP pool %s covering the specified CIDR %s", name, cidr)
				}
				if err != nil {
					return err
				}
				made, err := datastore.SplitPool(ctx, s, pool.Metadata.Name, parts)
				if errors.Is(err, datastore.ErrNotLocked) {
					return errors.New("datastore is not locked. Run the `margayctl datastore migrate lock` command in order to split the IP pools")
				}
				if err != nil {
					return err
				}
				w := cmd.OutOrStdout()
				if output == "json" {
					return printJSON(w, made)
				}
				fmt.Fprintf(w, "IP Pool %s was successfully split into %d smaller pools.\n", pool.Metadata.Name, parts)
				for _, p := range made {
					fmt.Fprintf(w, "Created %s with CIDR %s.\n", p.Metadata.Name, p.Spec.CIDR)
				}
				fmt.Fprintln(w, "The datastore is locked: `margayctl datastore migrate unlock` opens it.")
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "the pool's name")
	cmd.Flags().StringVar(&cidr, "cidr", "", "the pool's CIDR")
	cmd.MarkFlagsMutuallyExclusive("name", "cidr")
	addOutput(cmd, &output, "text", "text or json")
	return cmd
}
