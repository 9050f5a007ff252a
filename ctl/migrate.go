package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"margay/datastore"
)

// ipamPrefix is where blocks, affinities, handles and IPAM's configuration lie.
const ipamPrefix = "/calico/ipam/v2/"

// section separates the parts of a migration file: resources as YAML, the ClusterInformation and IPAM's keys as JSON.
const section = "===\n"

func newMigrateExportCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "export",
		Short: "Print the whole datastore, which must be locked: all resources as YAML, and IPAM's data",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withStoreFor(cmd, manyTimeout, func(ctx context.Context, s *datastore.Store) error {
				if err := locked(ctx, s); err != nil {
					return err
				}
				out := cmd.OutOrStdout()
				if err := exportResources(ctx, s, out); err != nil {
					return err
				}
				info, err := datastore.GetObject(ctx, s, datastore.ClusterInformations, "default")
				if err != nil {
					return calicosWords(err)
				}
				doc, err := exported(info)
				if err != nil {
					return err
				}
				kvs, _, err := s.List(ctx, ipamPrefix)
				if err != nil {
					return err
				}
				keys := map[string]json.RawMessage{}
				for _, kv := range kvs {
					if !json.Valid(kv.Value) {
						return fmt.Errorf("%s: stored value: expected JSON", kv.Key)
					}
					keys[kv.Key] = kv.Value
				}
				fmt.Fprint(out, section)
				if err := printJSON(out, doc); err != nil {
					return err
				}
				fmt.Fprint(out, section)
				return printJSON(out, keys)
			})
		},
	}
}

func newExportCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "export",
		Short: "Print all resources as YAML that applies elsewhere",
		Long: `Print all resources of all kinds and namespaces as YAML that "margayctl apply" or "margayctl import" takes elsewhere.
ClusterInformation is left out: a cluster has its own. Addresses in use are IPAM's; "datastore migrate export" has them too.`,
		Example: "  margayctl export > cluster.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withStoreFor(cmd, manyTimeout, func(ctx context.Context, s *datastore.Store) error {
				return exportResources(ctx, s, cmd.OutOrStdout())
			})
		},
	}
}

// exportResources prints a document for each resource but ClusterInformation. A stored value that cannot be understood
// is an error: an export that lacks something is none.
func exportResources(ctx context.Context, s *datastore.Store, w io.Writer) error {
	// What others stand on comes first.
	kinds := datastore.Kinds()
	slices.SortStableFunc(kinds, func(a, b *datastore.Kind) int { return rankOf(a) - rankOf(b) })
	for _, kind := range kinds {
		if kind == datastore.ClusterInformations {
			continue
		}
		objs, _, err := datastore.ListObjects(ctx, s, kind)
		if err != nil {
			return err
		}
		for _, obj := range objs {
			doc, err := exported(obj)
			if err != nil {
				return err
			}
			raw, err := yaml.Marshal(doc)
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(w, "%s---\n", raw); err != nil {
				return err
			}
		}
	}
	return nil
}

// rankOf is 0 for tiers, which policies name.
func rankOf(kind *datastore.Kind) int {
	if kind == datastore.Tiers {
		return 0
	}
	return 1
}

// exported is the resource without what belongs to the datastore it lies in.
func exported(obj datastore.Object) (map[string]any, error) {
	doc, err := datastore.ExportDocument(obj)
	if err != nil {
		return nil, err
	}
	if meta, ok := doc["metadata"].(map[string]any); ok {
		for _, key := range []string{"uid", "resourceVersion", "creationTimestamp"} {
			delete(meta, key)
		}
	}
	return doc, nil
}

func newImportCommand() *cobra.Command {
	var skipExists bool
	cmd := newWriteFunc("import", "imported", "Create the resources of an export; fields that this version does not know are kept",
		func(ctx context.Context, s *datastore.Store, obj datastore.Object) error {
			err := datastore.RestoreResource(ctx, s, obj)
			if skipExists && errors.Is(err, datastore.ErrExists) {
				return nil
			}
			return err
		}, false)
	cmd.Flags().BoolVar(&skipExists, "skip-exists", false, "leave resources alone that exist already")
	return cmd
}

func newMigrateImportCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "import -f FILE",
		Short: "Fill an empty datastore with what \"datastore migrate export\" printed; it is left locked",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, err := readMigration(cmd, file)
			if err != nil {
				return err
			}
			return withStoreFor(cmd, manyTimeout, func(ctx context.Context, s *datastore.Store) error {
				if err := empty(ctx, s); err != nil {
					return err
				}
				if err := setReady(ctx, s, false); err != nil {
					return fmt.Errorf("error while attempting to lock the datastore for import: %w", calicosWords(err))
				}
				return m.store(ctx, s, cmd.OutOrStdout())
			})
		},
	}
	cmd.Flags().StringVarP(&file, "filename", "f", "", "the file; - for standard input")
	_ = cmd.MarkFlagRequired("filename") // fails only for a flag that does not exist
	return cmd
}

// migration is a migration file, read.
type migration struct {
	objs []datastore.Object
	info *datastore.ClusterInformation
	ipam map[string]json.RawMessage
}

func readMigration(cmd *cobra.Command, file string) (*migration, error) {
	data, err := readInput(cmd, file)
	if err != nil {
		return nil, err
	}
	// Where there are no resources, the file begins with the separator.
	parts := bytes.Split(append([]byte("\n"), data...), []byte("\n"+section))
	if len(parts) != 3 {
		return nil, fmt.Errorf("imported file: %s is improperly formatted: expected three parts, got %d. Try recreating with 'margayctl datastore migrate export'", file, len(parts))
	}
	m := &migration{}
	m.objs, err = datastore.DecodeManifestFor(parts[0], datastore.ManifestOptions{StoredFields: true})
	if err != nil && !errors.Is(err, datastore.ErrNoResources) {
		return nil, fmt.Errorf("%s: resources: %w", file, err)
	}
	infos, err := datastore.DecodeManifestFor(parts[1], datastore.ManifestOptions{StoredFields: true})
	if err != nil {
		return nil, fmt.Errorf("%s: cluster information: %w", file, err)
	}
	info, ok := infos[0].(*datastore.ClusterInformation)
	if !ok || len(infos) != 1 {
		return nil, fmt.Errorf("%s: cluster information: expected one ClusterInformation", file)
	}
	m.info = info
	if err := json.Unmarshal(parts[2], &m.ipam); err != nil {
		return nil, fmt.Errorf("%s: IPAM: expected an object of keys and values: %w", file, datastore.JSONError(err))
	}
	for key := range m.ipam {
		if !strings.HasPrefix(key, ipamPrefix) {
			return nil, fmt.Errorf("%s: IPAM: key %q: expected it to begin with %s", file, key, ipamPrefix)
		}
	}
	return m, nil
}

// empty refuses a datastore that has anything of a cluster in it, but for the ClusterInformation.
func empty(ctx context.Context, s *datastore.Store) error {
	for _, kind := range datastore.Kinds() {
		if kind == datastore.ClusterInformations {
			continue
		}
		kvs, _, err := s.Keys(ctx, kind.Prefix())
		if err != nil {
			return err
		}
		if len(kvs) > 0 {
			return fmt.Errorf("datastore already has Calico resources: found existing Calico %s resource. Import into an empty one", kind.Kind)
		}
	}
	kvs, _, err := s.Keys(ctx, ipamPrefix)
	if err == nil && len(kvs) > 0 {
		err = errors.New("datastore already has Calico resources: found existing IPAM resources. Import into an empty one")
	}
	return err
}

func (m *migration) store(ctx context.Context, s *datastore.Store, w io.Writer) error {
	// First, because it says which Calico's layout the policies have.
	err := datastore.ModifyResource(ctx, s, "default", func(info *datastore.ClusterInformation) error {
		ready := info.Spec.DatastoreReady
		info.Spec = m.info.Spec
		info.Spec.DatastoreReady = ready
		return nil
	})
	if err != nil {
		return fmt.Errorf("failed to update cluster information: %w", calicosWords(err))
	}
	result := newOutcome("import", "imported", m.objs)
	for _, obj := range m.objs {
		if !result.did(datastore.RestoreResource(ctx, s, obj)) {
			break
		}
	}
	if err := result.report(w); err != nil {
		return fmt.Errorf("failed to import v3 resources: %w", err)
	}
	for i, key := range slices.Sorted(maps.Keys(m.ipam)) {
		var value bytes.Buffer
		if err := json.Compact(&value, m.ipam[key]); err != nil {
			return err
		}
		if _, err := s.Create(ctx, key, value.Bytes()); err != nil {
			return fmt.Errorf("hit error: %w (%d of %d IPAM resources applied)", err, i, len(m.ipam))
		}
	}
	fmt.Fprintf(w, "Successfully applied %d IPAM resource(s)\nThe datastore is locked: `margayctl datastore migrate unlock` opens it.\n", len(m.ipam))
	return nil
}
