package ipam

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"margay/datastore"
)

// endpointPrefix is where WorkloadEndpoints lie.
const endpointPrefix = "/calico/resources/v3/projectcalico.org/workloadendpoints/"

// decodeEndpoint reads which node's pod a WorkloadEndpoint is.
func decodeEndpoint(kv datastore.KV) (node string, err error) {
	var w struct {
		Spec struct {
			Node string `json:"node"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(kv.Value, &w); err != nil {
		return "", fmt.Errorf("%s: expected a WorkloadEndpoint: %w", kv.Key, datastore.JSONError(err))
	}
	return w.Spec.Node, nil
}

// vouchedNodes are the nodes that are in the datastore, or have a WorkloadEndpoint there.
func vouchedNodes(ctx context.Context, s *datastore.Store) (map[string]bool, error) {
	out := map[string]bool{}
	nodes, _, err := s.Keys(ctx, datastore.Nodes.Prefix())
	if err != nil {
		return nil, err
	}
	for _, kv := range nodes {
		out[strings.TrimPrefix(kv.Key, datastore.Nodes.Prefix())] = true
	}
	endpoints, _, err := s.List(ctx, endpointPrefix)
	if err != nil {
		return nil, err
	}
	for _, kv := range endpoints {
		node, err := decodeEndpoint(kv)
		if err != nil {
			return nil, err // it may be anybody's
		}
		out[node] = true
	}
	return out, nil
}
