package ctl

import (
	"encoding/json"

	"github.com/spf13/cobra"

	"margay/datastore"
)

func newConvertCommand() *cobra.Command {
	var (
		in     input
		output string
	)
	cmd := &cobra.Command{
		Use:   "convert -f FILE",
		Short: "Convert manifests of Calico's v1 API (ipPool, bgpPeer, node) to v3; no datastore is asked",
		Example: `  margayctl convert -f v1.yaml > v3.yaml
  margayctl convert -f - -o json < v1.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "yaml", "json"); err != nil {
				return err
			}
			objs, err := in.convert(cmd)
			if err != nil {
				return nothing(cmd, err)
			}
			v, err := converted(objs)
			if err != nil {
				return err
			}
			return printDocument(cmd.OutOrStdout(), output, v)
		},
	}
	addFiles(cmd, &in)
	_ = cmd.MarkFlagRequired("filename") // fails only for a flag that does not exist
	addOutput(cmd, &output, "yaml", "yaml or json")
	return cmd
}

// convert reads all v1 manifests. Nothing is returned if anything in any of them is wrong.
func (in *input) convert(cmd *cobra.Command) ([]datastore.Object, error) {
	return in.each(func(file string) ([]datastore.Object, error) {
		data, err := readInput(cmd, file)
		if err != nil {
			return nil, err
		}
		return datastore.ConvertV1(data)
	})
}

// converted is what convert prints, in calicoctl's form: a resource, or a List of several.
func converted(objs []datastore.Object) (any, error) {
	items := make([]json.RawMessage, len(objs))
	for i, obj := range objs {
		doc, err := datastore.Document(obj)
		if err != nil {
			return nil, err
		}
		if meta, ok := doc["metadata"].(map[string]any); ok {
			meta["creationTimestamp"] = nil
		}
		if items[i], err = datastore.OrderedJSON(obj, doc); err != nil {
			return nil, err
		}
	}
	if len(items) == 1 {
		return items[0], nil
	}
	return struct {
		Kind       string            `json:"kind"`
		APIVersion string            `json:"apiVersion"`
		Metadata   struct{}          `json:"metadata"`
		Items      []json.RawMessage `json:"items"`
	}{"List", "v1", struct{}{}, items}, nil
}
