package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"margay/datastore"
)

// manyTimeout bounds a command that may be about any number of resources; each talk with etcd has its own, shorter bound.
const manyTimeout = 10 * time.Minute

// outcome counts what became of the resources a command was about. All are tried, whatever became of the others.
type outcome struct {
	verb, past string // create, created
	total      int
	handled    int
	kind       string // of all of them; empty where there are several
	errs       []error
}

func newOutcome(verb, past string, objs []datastore.Object) *outcome {
	o := &outcome{verb: verb, past: past, total: len(objs)}
	for i, obj := range objs {
		switch kind := obj.Head().Kind; {
		case i == 0:
			o.kind = kind
		case o.kind != kind:
			o.kind = ""
		}
	}
	return o
}

// did notes one resource's end; it says whether to go on: not once etcd has stopped answering.
func (o *outcome) did(err error) bool {
	if err == nil {
		o.handled++
		return true
	}
	o.errs = append(o.errs, calicosWords(err))
	return !errors.Is(err, datastore.ErrUnreachable) && !errors.Is(err, context.Canceled)
}

// quoted is "'IPPool' " where there is one kind.
func (o *outcome) quoted() string {
	if o.kind == "" {
		return ""
	}
	return "'" + o.kind + "' "
}

// report says it as calicoctl says it.
func (o *outcome) report(w io.Writer) error {
	switch {
	case o.total == 0:
		fmt.Fprintln(w, "No resources specified")
		return nil
	case len(o.errs) == 0:
		fmt.Fprintf(w, "Successfully %s %d %sresource(s)\n", o.past, o.handled, o.quoted())
		return nil
	case o.handled > 0:
		fmt.Fprintf(w, "Partial success: %s the first %d out of %d %sresources:\n", o.past, o.handled, o.total, o.quoted())
		hit := "hit error"
		if o.verb == "apply" {
			hit = "hit error(s)" // calicoctl's two ways
		}
		return fmt.Errorf("%s: %v", hit, o.errs)
	case o.total == 1:
		return fmt.Errorf("failed to %s '%s' resource: %v", o.verb, o.kind, o.errs)
	}
	return fmt.Errorf("failed to %s any %sresources: %v", o.verb, o.quoted(), o.errs)
}

// nothing turns errNothing into calicoctl's sentence.
func nothing(cmd *cobra.Command, err error) error {
	if errors.Is(err, errNothing) {
		return new(outcome).report(cmd.OutOrStdout())
	}
	return err
}

func newCreateCommand() *cobra.Command {
	var skipExists bool
	cmd := newWriteCommand("create", "created", "Create resources from files, directories or standard input; those that exist are an error",
		func(ctx context.Context, s *datastore.Store, obj datastore.Object) error {
			err := datastore.CreateResource(ctx, s, obj)
			if skipExists && errors.Is(err, datastore.ErrExists) {
				return nil
			}
			return err
		})
	cmd.Flags().BoolVar(&skipExists, "skip-exists", false, "leave resources alone that exist already")
	return cmd
}

func newApplyCommand() *cobra.Command {
	return newWriteCommand("apply", "applied", "Create resources, or replace those that exist, from files, directories or standard input",
		func(ctx context.Context, s *datastore.Store, obj datastore.Object) error {
			_, err := datastore.ApplyResource(ctx, s, obj)
			return err
		})
}

func newReplaceCommand() *cobra.Command {
	return newWriteCommand("replace", "replaced", "Replace resources from files, directories or standard input; those that do not exist are an error",
		datastore.ReplaceResource)
}

// newWriteCommand makes a command that does something to each resource of its input.
func newWriteCommand(verb, past, short string, do func(context.Context, *datastore.Store, datastore.Object) error) *cobra.Command {
	return newWriteFunc(verb, past, short, do, true)
}

// newWriteFunc is newWriteCommand, where strict says that fields must be known, or stored just so.
func newWriteFunc(verb, past, short string, do func(context.Context, *datastore.Store, datastore.Object) error, strict bool) *cobra.Command {
	var in input
	cmd := &cobra.Command{
		Use:     verb + " -f FILE",
		Short:   short,
		Example: fmt.Sprintf("  margayctl %s -f pool.yaml\n  margayctl %s -f manifests/ --recursive\n  margayctl %s -f - < pool.yaml", verb, verb, verb),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			objs, err := in.read(cmd, true)
			if err != nil {
				return nothing(cmd, err)
			}
			return withStoreFor(cmd, manyTimeout, func(ctx context.Context, s *datastore.Store) error {
				if strict {
					// What is misspelt is found before anything is written.
					if err := datastore.CheckFields(ctx, s, objs...); err != nil {
						return invalid{err}
					}
				}
				if err := datastore.Initialize(ctx, s); err != nil {
					return calicosWords(err)
				}
				result := newOutcome(verb, past, objs)
				for _, obj := range objs {
					if !result.did(do(ctx, s, obj)) {
						break
					}
				}
				return result.report(cmd.OutOrStdout())
			})
		},
	}
	addInput(cmd, &in)
	_ = cmd.MarkFlagRequired("filename") // fails only for a flag that does not exist
	return cmd
}

func newValidateCommand() *cobra.Command {
	var in input
	cmd := &cobra.Command{
		Use:     "validate -f FILE",
		Short:   "Check resources from files, directories or standard input, without a datastore; every mistake is named",
		Example: "  margayctl validate -f pool.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			objs, err := in.read(cmd, false)
			if err != nil {
				return nothing(cmd, err)
			}
			result := newOutcome("validate", "validated", objs)
			result.handled = len(objs)
			return result.report(cmd.OutOrStdout())
		},
	}
	addInput(cmd, &in)
	_ = cmd.MarkFlagRequired("filename") // fails only for a flag that does not exist
	return cmd
}

func newDeleteCommand() *cobra.Command {
	var (
		in            input
		skipNotExists bool
	)
	cmd := &cobra.Command{
		Use:   "delete {KIND NAME… | -f FILE}",
		Short: "Delete resources by kind and name, or those that files, directories or standard input name",
		Example: `  margayctl delete ippool old-pool
  margayctl delete networkpolicy web db -n team-a
  margayctl delete -f manifests/ --skip-not-exists`,
		ValidArgsFunction: completeResources,
		RunE: func(cmd *cobra.Command, args []string) error {
			objs, err := in.named(cmd, args)
			if err != nil {
				return nothing(cmd, err)
			}
			return withStoreFor(cmd, manyTimeout, func(ctx context.Context, s *datastore.Store) error {
				result := newOutcome("delete", "deleted", objs)
				for _, obj := range objs {
					err := deleteObject(ctx, s, datastore.KindOf(obj), obj.Head().Path())
					if skipNotExists && errors.Is(err, datastore.ErrNotFound) {
						err = nil
					}
					if !result.did(err) {
						break
					}
				}
				return result.reportDeleted(cmd.OutOrStdout())
			})
		},
	}
	addInput(cmd, &in)
	cmd.Flags().BoolVarP(&skipNotExists, "skip-not-exists", "s", false, "resources that do not exist are no error")
	return cmd
}

// failedToDelete is calicoctl's, with its capital letter.
const failedToDelete = "Failed to delete"

// reportDeleted is report in calicoctl's words for delete: how many went, and a line for each that did not.
func (o *outcome) reportDeleted(w io.Writer) error {
	if o.handled > 0 {
		fmt.Fprintf(w, "Successfully deleted %d %sresource(s)\n", o.handled, o.quoted())
	}
	var errs []error
	for _, err := range o.errs {
		errs = append(errs, fmt.Errorf("%s %sresource: %w", failedToDelete, o.quoted(), err))
	}
	return errors.Join(errs...)
}

// named gives the resources that kind and names, or the files of -f, are about. Of those made from arguments only kind,
// namespace and name are filled.
func (in *input) named(cmd *cobra.Command, args []string) ([]datastore.Object, error) {
	switch {
	case len(in.files) > 0 && len(args) > 0:
		return nil, errors.New("arguments: expected KIND and NAME, or --filename, not both")
	case len(in.files) > 0:
		return in.read(cmd, true)
	case len(args) < 2:
		return nil, errors.New("arguments: expected KIND and at least one NAME, or --filename")
	}
	kind, err := datastore.LookupKind(args[0])
	if err != nil {
		return nil, err
	}
	var objs []datastore.Object
	for _, name := range args[1:] {
		if _, err := path(kind, in.namespace, name); err != nil {
			return nil, err
		}
		obj := kind.New()
		h := obj.Head()
		h.Metadata.Name = name
		if kind.Namespaced {
			h.Metadata.Namespace = in.namespace
			if in.namespace == "" {
				h.Metadata.Namespace = "default"
			}
		}
		objs = append(objs, obj)
	}
	return objs, nil
}
