package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"margay/datastore"
)

func newLabelCommand() *cobra.Command {
	var (
		namespace         string
		overwrite, remove bool
	)
	cmd := &cobra.Command{
		Use:   "label KIND NAME {KEY=VALUE | KEY --remove}",
		Short: "Set or remove a label of a resource",
		Example: `  margayctl label nodes node1 rack=r1
  margayctl label nodes node1 rack=r2 --overwrite
  margayctl label nodes node1 rack --remove`,
		Args:              cobra.ExactArgs(3),
		ValidArgsFunction: completeResources,
		RunE: func(cmd *cobra.Command, args []string) error {
			key, value, isPair := strings.Cut(args[2], "=")
			if isPair == remove || key == "" || strings.Contains(value, "=") {
				return fmt.Errorf("invalid label %s: expected KEY=VALUE, or KEY with --remove", args[2])
			}
			kind, err := datastore.LookupKind(args[0])
			if err != nil {
				return fmt.Errorf("failed to get %s %s, error %w", args[0], args[1], err)
			}
			name, err := path(kind, namespace, args[1])
			if err != nil {
				return err
			}
			done := "set label %s on"
			err = withStore(cmd, func(ctx context.Context, s *datastore.Store) error {
				return edit(ctx, s, kind, name, func(doc []byte) ([]byte, error) {
					old, err := labelsOf(doc)
					if err != nil {
						return nil, err
					}
					was, there := old[key]
					change := any(value)
					switch {
					case remove && !there:
						return nil, fmt.Errorf("cannot remove label of %s %s, key %s does not exist", args[0], args[1], key)
					case remove:
						change, done = nil, "removed label %s from"
					case there && was != value && !overwrite:
						return nil, fmt.Errorf("failed to update label of %s %s, key %s is already present. please use '--overwrite' to set a new value",
							args[0], args[1], key)
					case there:
						done = "updated label %s on"
					}
					patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": map[string]any{key: change}}})
					if err != nil {
						return nil, err
					}
					apply, err := patcher("merge", patch)
					if err != nil {
						return nil, err
					}
					return apply(doc)
				})
			})
			switch {
			case errors.Is(err, datastore.ErrNotFound):
				return fmt.Errorf("%s %s not found", args[0], args[1])
			case errors.Is(err, datastore.ErrConflict):
				return fmt.Errorf("failed to update %s %s, label not changed: %w", args[0], args[1], calicosWords(err))
			case err != nil:
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Successfully "+done+" %s %s\n", key, args[0], args[1])
			return nil
		},
	}
	addNamespace(cmd, &namespace)
	cmd.Flags().BoolVar(&overwrite, "overwrite", false, "give a label that is there another value")
	cmd.Flags().BoolVar(&remove, "remove", false, "remove the label")
	return cmd
}

func labelsOf(doc []byte) (map[string]string, error) {
	var head struct {
		Metadata struct {
			Labels map[string]string `json:"labels"`
		} `json:"metadata"`
	}
	err := json.Unmarshal(doc, &head)
	return head.Metadata.Labels, err
}
