package datastore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// checkReferences refuses a resource that names another one which is not there, where Calico refuses it too.
func checkReferences(ctx context.Context, s *Store, obj Object) error {
	peer, ok := obj.(*BGPPeer)
	if !ok || len(peer.Spec.Filters) == 0 {
		return nil
	}
	keys := make([]string, len(peer.Spec.Filters))
	for i, name := range peer.Spec.Filters {
		keys[i] = BGPFilters.Key(name)
	}
	found, err := s.Existing(ctx, keys...)
	if err != nil {
		return err
	}
	for i, name := range peer.Spec.Filters {
		if !slices.Contains(found, keys[i]) {
			return fmt.Errorf("spec.filters[%d] %q: expected a BGPFilter that exists", i, name)
		}
	}
	return nil
}

// UnsupportedError says that something cannot be done with a resource, whatever its state, in calicoctl's words.
type UnsupportedError struct{ Operation, Name, Why string }

func (e UnsupportedError) Error() string {
	return fmt.Sprintf("operation %s is not supported on %s: %s", e.Operation, e.Name, e.Why)
}

// checkDelete refuses to delete what others stand on: the tiers that every cluster has, and a tier with policies in it.
func checkDelete(ctx context.Context, s *Store, k *Kind, name string) error {
	if k == Profiles && name == allowProfile {
		return UnsupportedError{"Delete", name, fmt.Sprintf("The profile %q is a default provided by Calico and cannot be deleted", name)}
	}
	if k != Tiers {
		return nil
	}
	if name == defaultTier || name == adminTier {
		return UnsupportedError{"Delete", name, fmt.Sprintf("Cannot delete %s tier", name)}
	}
	for _, kind := range []*Kind{NetworkPolicies, GlobalNetworkPolicies, StagedNetworkPolicies, StagedGlobalNetworkPolicies} {
		objs, _, err := ListObjects(ctx, s, kind)
		if err != nil {
			return err
		}
		for _, obj := range objs {
			doc, err := Document(obj)
			if err != nil {
				return err
			}
			if tier, _ := at(doc, []string{"spec", "tier"}); tier == name {
				return UnsupportedError{"delete", name, "Cannot delete a non-empty tier"}
			}
		}
	}
	return nil
}

// allowProfile is a profile that Calico's components know without its being stored.
const allowProfile = "projectcalico-default-allow"

// adminTier and baselineTier hold Kubernetes' administrators' policies.
const (
	adminTier    = "adminnetworkpolicy"
	baselineTier = "baselineadminnetworkpolicy"
)

// Initialize makes what every datastore of Calico's has, where it is missing: the ClusterInformation with an identity of
// its own, and three tiers. What is there stays as it is.
func Initialize(ctx context.Context, s *Store) error {
	ready := true
	info := NewClusterInformation("default")
	info.Spec.ClusterGUID, info.Spec.DatastoreReady = strings.ReplaceAll(newUID(), "-", ""), &ready
	objs := []Object{info, tier(defaultTier, "1000000", "Deny"), tier(adminTier, "1000", "Pass"), tier(baselineTier, "10000000", "Pass")}
	keys := make([]string, len(objs))
	for i, obj := range objs {
		keys[i] = obj.kind().Key(obj.Head().Path())
	}
	found, err := s.Existing(ctx, keys...)
	if err != nil {
		return err
	}
	for i, obj := range objs {
		if slices.Contains(found, keys[i]) {
			continue
		}
		if err := CreateResource(ctx, s, obj); err != nil && !errors.Is(err, ErrExists) {
			return err
		}
	}
	return nil
}

func tier(name, order, action string) *Resource {
	t := Tiers.New().(*Resource)
	t.Metadata.Name = name
	t.Spec = fmt.Appendf(nil, `{"order":%s,"defaultAction":%q}`, order, action)
	return t
}
