package ctl

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"margay/datastore"
)

func newConvertCommand() *cobra.Command {
	var file, output string
	cmd := &cobra.Command{
		Use:   "convert -f FILE",
		Short: "Convert a manifest of Calico's v1 API (ipPool, bgpPeer, node) to v3; no datastore is asked",
		Example: `  margayctl convert -f v1.yaml > v3.yaml
  margayctl convert -f - -o json < v1.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output, "yaml", "json"); err != nil {
				return err
			}
			data, err := readInput(cmd, file)
			if err != nil {
				return invalid{err}
			}
			objs, err := datastore.ConvertV1(data)
			if errors.Is(err, datastore.ErrNoResources) {
				return fmt.Errorf("no resources specified in file %s", file)
			}
			if err != nil {
				return invalid{fmt.Errorf("%s: %w", file, err)}
			}
			var answers []found
			for _, obj := range objs {
				answers = append(answers, found{kind: datastore.KindOf(obj), objs: []datastore.Object{obj}})
			}
			return (&printer{format: output}).print(cmd.OutOrStdout(), answers)
		},
	}
	cmd.Flags().StringVarP(&file, "filename", "f", "", "the manifest; - for standard input")
	_ = cmd.MarkFlagRequired("filename") // fails only for a flag that does not exist
	addOutput(cmd, &output, "yaml", "yaml or json")
	return cmd
}
