package ctl

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"margay/datastore"
)

func newGetCommand() *cobra.Command {
	var (
		in     input
		all    bool
		export bool
		output string
	)
	cmd := &cobra.Command{
		Use:   "get {KIND [NAME…] | -f FILE}",
		Short: "Show resources: all of a kind, some by name, or those that files, directories or standard input name",
		Long: `Show resources: all of a kind, some by name, or those that files, directories or standard input name.

What -o yaml and -o json show can be given back to apply and replace: nothing is written where nothing was changed, and
an edit of what somebody else changed meanwhile is refused.`,
		Example: `  margayctl get ippools -o wide
  margayctl get networkpolicies --all-namespaces
  margayctl get nodes -o custom-columns=NAME,IPV4
  margayctl get ippools -o go-template='{{range .}}{{range .Items}}{{.ObjectMeta.Name}} {{.Spec.CIDR}}{{"\n"}}{{end}}{{end}}'`,
		ValidArgsFunction: completeResources,
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := newPrinter(output)
			if err != nil {
				return err
			}
			p.namespace, p.export = all || in.namespace != "", export
			q, err := in.query(cmd, args, all)
			if err != nil {
				return nothing(cmd, err)
			}
			return withStoreFor(cmd, manyTimeout, func(ctx context.Context, s *datastore.Store) error {
				answers, err := q.answer(ctx, s)
				if len(answers) == 0 {
					return err
				}
				p.asNumber = clusterAS(ctx, s)
				if printErr := p.print(cmd.OutOrStdout(), answers); printErr != nil {
					return printErr
				}
				return err
			})
		},
	}
	addInput(cmd, &in)
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "of all namespaces")
	cmd.Flags().BoolVar(&export, "export", false, "leave out namespace, uid, version and creation time of resources asked for by name")
	addOutput(cmd, &output, "ps", "ps, wide, yaml, json, name, go-template=…, go-template-file=… or custom-columns=HEADING,…")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"ps", "wide", "yaml", "json", "name", "go-template=",
		"go-template-file=", "custom-columns="}, cobra.ShellCompDirectiveNoFileComp|cobra.ShellCompDirectiveNoSpace)) // fails only for an unknown flag
	return cmd
}

// query is what get is asked for: a kind, or resources by name.
type query struct {
	kind      *datastore.Kind // nil where by name
	namespace string          // of a list; empty: all
	names     []datastore.Object
}

func (in *input) query(cmd *cobra.Command, args []string, all bool) (query, error) {
	if all && in.namespace != "" {
		return query{}, errors.New("cannot use both --namespace and --all-namespaces flags at the same time")
	}
	if len(in.files) > 0 || len(args) != 1 {
		objs, err := in.named(cmd, args)
		for _, obj := range objs {
			if kind := datastore.KindOf(obj); all && kind.Namespaced {
				return query{}, errors.New("cannot use --all-namespace flag for getting a single resource")
			} else if all {
				return query{}, fmt.Errorf("%s is not namespaced", kind.Kind)
			}
		}
		return query{names: objs}, err
	}
	kind, err := datastore.LookupKind(args[0])
	if err != nil {
		return query{}, fmt.Errorf("failed to get resources: %w", err)
	}
	q := query{kind: kind}
	switch {
	case !kind.Namespaced && (all || in.namespace != ""):
		return query{}, fmt.Errorf("%s is not namespaced", kind.Kind)
	case kind.Namespaced && !all && in.namespace == "":
		q.namespace = "default"
	default:
		q.namespace = in.namespace
	}
	return q, nil
}

// answer reads what was asked for. What could be read is returned beside the error.
func (q query) answer(ctx context.Context, s *datastore.Store) ([]found, error) {
	if q.kind != nil {
		var (
			a   = found{kind: q.kind, list: true}
			err error
		)
		if q.namespace != "" {
			a.objs, a.version, err = datastore.ListNamespace(ctx, s, q.kind, q.namespace)
		} else {
			a.objs, a.version, err = datastore.ListObjects(ctx, s, q.kind)
		}
		if err != nil && len(a.objs) == 0 {
			return nil, err
		}
		if q.kind == datastore.Tiers {
			sortByOrder(a.objs)
		}
		return []found{a}, err
	}
	var (
		answers []found
		errs    []error
	)
	for _, asked := range q.names {
		kind := datastore.KindOf(asked)
		obj, err := datastore.GetObject(ctx, s, kind, asked.Head().Path())
		if err != nil {
			errs = append(errs, calicosWords(err))
			continue
		}
		answers = append(answers, found{kind: kind, objs: []datastore.Object{obj}})
	}
	return answers, errors.Join(errs...)
}

// sortByOrder sorts tiers in the order in which they apply.
func sortByOrder(tiers []datastore.Object) {
	order := func(o datastore.Object) float64 {
		doc, err := datastore.Document(o)
		if err != nil {
			return math.Inf(1)
		}
		n, ok := lookup(doc, "spec.order").(json.Number)
		if !ok {
			return math.Inf(1)
		}
		f, _ := n.Float64() // out of range: infinite
		return f
	}
	slices.SortStableFunc(tiers, func(a, b datastore.Object) int { return cmp.Compare(order(a), order(b)) })
}

// clusterAS is the AS number of nodes that have none of their own.
func clusterAS(ctx context.Context, s *datastore.Store) string {
	c, err := datastore.GetResource[datastore.BGPConfiguration](ctx, s, "default")
	switch {
	case err == nil && c.Spec.ASNumber != nil:
		return fmt.Sprint(*c.Spec.ASNumber)
	case err == nil, errors.Is(err, datastore.ErrNotFound):
		return fmt.Sprint(datastore.DefaultASNumber)
	}
	return "unknown"
}

// completeResources completes KIND, then the names that there are.
func completeResources(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var out []string
	if len(args) == 0 {
		for _, kind := range datastore.Kinds() {
			out = append(out, kind.Plural)
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
	kind, err := datastore.LookupKind(args[0])
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	namespace, _ := cmd.Flags().GetString("namespace") // absent: none
	if namespace == "" && kind.Namespaced {
		namespace = "default"
	}
	err = withStoreFor(cmd, completionTimeout, func(ctx context.Context, s *datastore.Store) error {
		answers, err := query{kind: kind, namespace: namespace}.answer(ctx, s)
		for _, a := range answers {
			for _, obj := range a.objs {
				out = append(out, obj.Head().Metadata.Name)
			}
		}
		return err
	})
	if err != nil {
		return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveError
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// completeNodes completes the name of a node.
func completeNodes(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return completeResources(cmd, []string{datastore.Nodes.Plural}, prefix)
}

// completionTimeout is how long somebody who presses Tab waits for a datastore that does not answer.
const completionTimeout = 2 * time.Second
