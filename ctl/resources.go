package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	jsonpatch "github.com/evanphx/json-patch"
	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"margay/datastore"
)

func newGetCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "get KIND [NAME…]",
		Short: "Show resources: ippools, nodes, bgppeers, bgpconfigurations, clusterinformations",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output, "ps", "wide", "yaml", "json", "name"); err != nil {
				return err
			}
			kind, err := datastore.LookupKind(args[0])
			if err != nil {
				return err
			}
			return withStore(cmd, func(ctx context.Context, s *datastore.Store) error {
				objs, err := fetch(ctx, s, kind, args[1:])
				if err != nil && len(objs) == 0 {
					return err
				}
				if printErr := printObjects(cmd.OutOrStdout(), kind, objs, len(args) == 2, output); printErr != nil {
					return printErr
				}
				return err
			})
		},
	}
	addOutput(cmd, &output, "ps", "ps, wide, yaml, json or name")
	return cmd
}

// fetch reads the named resources, or all of a kind. What could be read is returned beside the error.
func fetch(ctx context.Context, s *datastore.Store, kind *datastore.Kind, names []string) ([]datastore.Object, error) {
	if len(names) == 0 {
		objs, _, err := datastore.ListObjects(ctx, s, kind)
		return objs, err
	}
	var (
		objs []datastore.Object
		errs []error
	)
	for _, name := range names {
		obj, err := datastore.GetObject(ctx, s, kind, name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		objs = append(objs, obj)
	}
	return objs, errors.Join(errs...)
}

func printObjects(w io.Writer, kind *datastore.Kind, objs []datastore.Object, single bool, output string) error {
	switch output {
	case "name":
		for _, o := range objs {
			fmt.Fprintf(w, "%s/%s\n", strings.ToLower(kind.Kind), o.Head().Metadata.Name)
		}
		return nil
	case "json", "yaml":
		var v any = map[string]any{"kind": kind.Kind + "List", "apiVersion": datastore.APIVersion, "items": objs}
		if single && len(objs) == 1 {
			v = objs[0]
		}
		if output == "json" {
			return printJSON(w, v)
		}
		out, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		_, err = w.Write(out)
		return err
	}
	tw := tabwriter.NewWriter(w, 5, 1, 3, ' ', 0)
	heads, row := columns(kind, output == "wide")
	fmt.Fprintln(tw, strings.Join(heads, "\t")+"\t")
	for _, o := range objs {
		fmt.Fprintln(tw, strings.Join(row(o), "\t")+"\t")
	}
	return tw.Flush()
}

// columns are calicoctl's tables; the plain one of a kind is the name, or as much as a screen is wide.
func columns(kind *datastore.Kind, wide bool) ([]string, func(datastore.Object) []string) {
	name := func(o datastore.Object) string { return o.Head().Metadata.Name }
	switch {
	case kind == datastore.IPPools && wide:
		return []string{"NAME", "CIDR", "NAT", "IPIPMODE", "VXLANMODE", "DISABLED", "DISABLEBGPEXPORT", "SELECTOR", "ASSIGNMENTMODE"},
			func(o datastore.Object) []string {
				s := o.(*datastore.IPPool).Spec
				return []string{name(o), s.CIDR, fmt.Sprint(s.NATOutgoing), s.IPIPMode, s.VXLANMode, fmt.Sprint(s.Disabled),
					fmt.Sprint(s.DisableBGPExport), s.NodeSelector, s.AssignmentMode}
			}
	case kind == datastore.IPPools:
		return []string{"NAME", "CIDR", "SELECTOR"}, func(o datastore.Object) []string {
			s := o.(*datastore.IPPool).Spec
			return []string{name(o), s.CIDR, s.NodeSelector}
		}
	case kind == datastore.Nodes && wide:
		return []string{"NAME", "ASN", "IPV4", "IPV6"}, func(o datastore.Object) []string {
			b := o.(*datastore.Node).Spec.BGP
			if b == nil {
				return []string{name(o), "", "", ""}
			}
			as := fmt.Sprintf("(%d)", datastore.DefaultASNumber)
			if b.ASNumber != nil {
				as = fmt.Sprint(*b.ASNumber)
			}
			return []string{name(o), as, b.IPv4Address, b.IPv6Address}
		}
	case kind == datastore.BGPPeers:
		return []string{"NAME", "PEERIP", "NODE", "ASN"}, func(o datastore.Object) []string {
			s := o.(*datastore.BGPPeer).Spec
			node := s.Node
			if node == "" {
				node = s.NodeSelector
			}
			if node == "" {
				node = "(global)"
			}
			return []string{name(o), s.PeerIP, node, fmt.Sprint(s.ASNumber)}
		}
	}
	return []string{"NAME"}, func(o datastore.Object) []string { return []string{name(o)} }
}

// readManifest reads -f: a file, or standard input for "-".
func readManifest(cmd *cobra.Command, file string) ([]datastore.Object, error) {
	var (
		data []byte
		err  error
	)
	if file == "-" {
		data, err = io.ReadAll(cmd.InOrStdin())
	} else {
		data, err = os.ReadFile(file)
	}
	if err != nil {
		return nil, err
	}
	objs, err := datastore.DecodeManifest(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return objs, nil
}

// newApplyCommand makes "apply" (create or replace) and "create" (only what is not there yet).
func newApplyCommand(verb string) *cobra.Command {
	var file string
	short := map[string]string{"apply": "Create resources, or replace them", "create": "Create resources that are not there yet"}
	past := map[string]string{"apply": "applied", "create": "created"}[verb]
	cmd := &cobra.Command{
		Use:   verb + " -f FILE",
		Short: short[verb] + ", from YAML or JSON",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			objs, err := readManifest(cmd, file)
			if err != nil {
				return err
			}
			return withStore(cmd, func(ctx context.Context, s *datastore.Store) error {
				for i, o := range objs {
					if verb == "apply" {
						_, err = datastore.ApplyResource(ctx, s, o)
					} else {
						err = datastore.CreateResource(ctx, s, o)
					}
					if err != nil {
						return fmt.Errorf("%w (%d of %d resources %s)", err, i, len(objs), past)
					}
				}
				fmt.Fprintf(cmd.OutOrStdout(), "Successfully %s %d resource(s)\n", past, len(objs))
				return nil
			})
		},
	}
	cmd.Flags().StringVarP(&file, "filename", "f", "", "the manifest; - for standard input")
	_ = cmd.MarkFlagRequired("filename") // fails only for a flag that does not exist
	return cmd
}

func newPatchCommand() *cobra.Command {
	var patch string
	cmd := &cobra.Command{
		Use:     "patch KIND NAME -p PATCH",
		Short:   "Change some fields of a resource, by a JSON merge patch (RFC 7396)",
		Example: `  margayctl patch ippool default-ipv4-ippool -p '{"spec":{"ipipMode":"CrossSubnet"}}'`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, err := datastore.LookupKind(args[0])
			if err != nil {
				return err
			}
			return withStore(cmd, func(ctx context.Context, s *datastore.Store) error {
				if err := patchObject(ctx, s, kind, args[1], []byte(patch)); err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "Successfully patched 1 '%s' resource\n", kind.Kind)
				return nil
			})
		},
	}
	cmd.Flags().StringVarP(&patch, "patch", "p", "", "the patch, JSON or YAML")
	_ = cmd.MarkFlagRequired("patch") // fails only for a flag that does not exist
	return cmd
}

func patchObject(ctx context.Context, s *datastore.Store, kind *datastore.Kind, name string, patch []byte) error {
	patch, err := yaml.YAMLToJSON(patch)
	if err != nil {
		return fmt.Errorf("--patch: expected JSON or YAML: %w", err)
	}
	old, err := datastore.GetObject(ctx, s, kind, name)
	if err != nil {
		return err
	}
	before, err := json.Marshal(old)
	if err != nil {
		return err
	}
	after, err := jsonpatch.MergePatch(before, patch)
	if err != nil {
		return fmt.Errorf("--patch: expected an object such as {\"spec\":{…}}: %w", err)
	}
	objs, err := datastore.DecodeManifest(after)
	if err != nil {
		return fmt.Errorf("--patch: %w", err)
	}
	if len(objs) != 1 || objs[0].Head().Kind != kind.Kind || objs[0].Head().Metadata.Name != name {
		return errors.New("--patch: kind and metadata.name: expected them unchanged")
	}
	return datastore.UpdateResource(ctx, s, objs[0])
}

func newDeleteCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "delete KIND NAME…",
		Short: "Delete resources",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, err := datastore.LookupKind(args[0])
			if err != nil {
				return err
			}
			return withStore(cmd, func(ctx context.Context, s *datastore.Store) error {
				for i, name := range args[1:] {
					if err := datastore.DeleteObject(ctx, s, kind, name); err != nil {
						return fmt.Errorf("%w (%d of %d resources deleted)", err, i, len(args)-1)
					}
				}
				fmt.Fprintf(cmd.OutOrStdout(), "Successfully deleted %d '%s' resource(s)\n", len(args)-1, kind.Kind)
				return nil
			})
		},
	}
}
