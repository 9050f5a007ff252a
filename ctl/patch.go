package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	jsonpatch "github.com/evanphx/json-patch"
	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"margay/datastore"
)

// editTries bounds the attempts of a read-change-write that keeps meeting other editors.
const editTries = 10

func newPatchCommand() *cobra.Command {
	var namespace, patch, kindOfPatch string
	cmd := &cobra.Command{
		Use:   "patch KIND NAME -p PATCH",
		Short: "Change some fields of a resource",
		Long: `Change some fields of a resource. A patch of type strategic (the default) or merge is a JSON merge patch (RFC 7396): null
removes a field, a list is replaced as a whole. One of type json is a list of operations (RFC 6902).`,
		Example: `  margayctl patch ippool default-ipv4-ippool -p '{"spec":{"ipipMode":"CrossSubnet"}}'
  margayctl patch node node1 --type json -p '[{"op":"remove","path":"/spec/bgp/asNumber"}]'`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: completeResources,
		RunE: func(cmd *cobra.Command, args []string) error {
			change, err := patcher(kindOfPatch, []byte(patch))
			if err != nil {
				return err
			}
			kind, err := datastore.LookupKind(args[0])
			if err != nil {
				return err
			}
			name, err := path(kind, namespace, args[1])
			if err != nil {
				return err
			}
			return withStore(cmd, func(ctx context.Context, s *datastore.Store) error {
				if err := edit(ctx, s, kind, name, change); err != nil {
					return fmt.Errorf("hit error: %w", calicosWords(err))
				}
				fmt.Fprintf(cmd.OutOrStdout(), "Successfully patched 1 '%s' resource\n", kind.Kind)
				return nil
			})
		},
	}
	addNamespace(cmd, &namespace)
	cmd.Flags().StringVarP(&patch, "patch", "p", "", "the patch, JSON or YAML")
	cmd.Flags().StringVarP(&kindOfPatch, "type", "t", "strategic", "strategic, merge or json")
	_ = cmd.MarkFlagRequired("patch") // fails only for a flag that does not exist
	return cmd
}

// patcher makes the change that a patch describes.
func patcher(kindOfPatch string, patch []byte) (func([]byte) ([]byte, error), error) {
	patch, err := yaml.YAMLToJSONStrict(patch)
	if err != nil {
		return nil, fmt.Errorf("--patch: expected JSON or YAML: %w", err)
	}
	switch kindOfPatch {
	case "strategic", "merge":
		var object map[string]any
		if err := json.Unmarshal(patch, &object); err != nil || object == nil {
			return nil, errors.New("--patch: expected an object such as {\"spec\":{…}}")
		}
		return func(doc []byte) ([]byte, error) { return jsonpatch.MergePatch(doc, patch) }, nil
	case "json":
		p, err := jsonpatch.DecodePatch(patch)
		if err != nil {
			return nil, errors.New("--patch: expected a list of operations such as [{\"op\":\"replace\",\"path\":\"/spec/…\",\"value\":…}]")
		}
		return p.Apply, nil
	}
	return nil, fmt.Errorf("--type %q: expected strategic, merge or json", kindOfPatch)
}

// edit reads a resource as it is stored, changes it and writes it back, again from the start when somebody else was
// faster. Kind, name and namespace must come out unchanged; so must resourceVersion, which makes it a condition.
func edit(ctx context.Context, s *datastore.Store, kind *datastore.Kind, name string, change func([]byte) ([]byte, error)) error {
	var conflict error
	for try := range editTries {
		old, err := datastore.GetObject(ctx, s, kind, name)
		if err != nil {
			return err
		}
		doc, err := datastore.Document(old)
		if err != nil {
			return err
		}
		before, err := json.Marshal(doc)
		if err != nil {
			return err
		}
		after, err := change(before)
		if err != nil {
			return err
		}
		objs, err := datastore.DecodeManifestFor(after, datastore.ManifestOptions{StoredFields: true})
		if err != nil {
			return err
		}
		if len(objs) != 1 || datastore.KindOf(objs[0]) != kind || objs[0].Head().Path() != name {
			return errors.New("kind, metadata.name and metadata.namespace: expected them unchanged")
		}
		// A version that the patch names is the one it was made for.
		asked := objs[0].Head().Metadata.ResourceVersion
		if asked == "" {
			objs[0].Head().Metadata.ResourceVersion = old.Head().Metadata.ResourceVersion
		} else if asked != old.Head().Metadata.ResourceVersion {
			return &datastore.ResourceError{Kind: kind.Kind, Name: name, Err: datastore.ErrConflict}
		}
		if conflict = datastore.UpdateResource(ctx, s, objs[0]); !errors.Is(conflict, datastore.ErrConflict) {
			return conflict
		}
		if err := datastore.Backoff(ctx, try); err != nil {
			return err
		}
	}
	return conflict
}
