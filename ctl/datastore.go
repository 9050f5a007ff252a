package ctl

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"margay/datastore"
)

func newDatastoreCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "datastore",
		Short: "The datastore as a whole",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	migrate := &cobra.Command{
		Use:   "migrate",
		Short: "Move a datastore's contents from one etcd to another",
		Long: `Move a datastore's contents from one etcd to another:

  margayctl -c old.cfg datastore migrate lock
  margayctl -c old.cfg datastore migrate export > datastore.yaml
  margayctl -c new.cfg datastore migrate import -f datastore.yaml
  margayctl -c new.cfg datastore migrate unlock

A locked datastore allocates no addresses. Import leaves the new one locked.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	migrate.AddCommand(newLockCommand("lock", "Keep addresses from being allocated", false), newLockCommand("unlock", "Let addresses be allocated again", true),
		newMigrateExportCommand(), newMigrateImportCommand())
	cmd.AddCommand(migrate)
	return cmd
}

func newLockCommand(verb, short string, ready bool) *cobra.Command {
	return &cobra.Command{
		Use:   verb,
		Short: short + ": clusterinformations/default, spec.datastoreReady",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withStore(cmd, func(ctx context.Context, s *datastore.Store) error {
				if err := setReady(ctx, s, ready); err != nil {
					return fmt.Errorf("error updating ClusterInformation for %sing: %w", verb, calicosWords(err))
				}
				fmt.Fprintf(cmd.OutOrStdout(), "Datastore %sed.\n", verb)
				return nil
			})
		},
	}
}

// setReady locks or unlocks the datastore. To lock one that has no ClusterInformation yet, it makes one.
func setReady(ctx context.Context, s *datastore.Store, ready bool) error {
	set := func(info *datastore.ClusterInformation) error {
		info.Spec.DatastoreReady = &ready
		return nil
	}
	err := datastore.ModifyResource(ctx, s, "default", set)
	if ready || !errors.Is(err, datastore.ErrNotFound) {
		return err
	}
	info := datastore.NewClusterInformation("default")
	_ = set(info) // never fails
	if err := datastore.CreateResource(ctx, s, info); !errors.Is(err, datastore.ErrExists) {
		return err
	}
	return datastore.ModifyResource(ctx, s, "default", set)
}

// locked refuses what needs the datastore to stand still.
func locked(ctx context.Context, s *datastore.Store) error {
	info, err := datastore.GetResource[datastore.ClusterInformation](ctx, s, "default")
	if err != nil && !errors.Is(err, datastore.ErrNotFound) {
		return fmt.Errorf("error while checking if datastore was locked: %w", calicosWords(err))
	}
	if err != nil || info.Ready() {
		return errors.New("datastore is not locked. Run the `margayctl datastore migrate lock` command in order to begin migration")
	}
	return nil
}
