package ctl

import (
	"context"
	"errors"
	"net/netip"

	"margay/agent/api"
	"margay/datastore"
	"margay/ipam"
)

// deleteObject deletes a resource as calicoctl does: with a node what is about that node alone, its workload endpoints with
// their addresses, its host endpoints, its BGP peers and its configurations; a pool only after it was disabled. Other
// addresses of the node stay: its pods may live on, and what they have must not be given out again.
func deleteObject(ctx context.Context, s *datastore.Store, kind *datastore.Kind, name string) error {
	switch kind {
	case datastore.IPPools:
		// Whoever gives out addresses sees first that there are none of this pool any more, and then that it is gone.
		err := datastore.ModifyResource(ctx, s, name, func(p *datastore.IPPool) error { p.Spec.Disabled = true; return nil })
		if errors.Is(err, datastore.ErrNotFound) || errors.Is(err, datastore.ErrUnreachable) {
			return err
		}
		// Any other error is about what the pool says, and does not keep it.
	case datastore.Nodes:
		if _, err := datastore.GetObject(ctx, s, kind, name); errors.Is(err, datastore.ErrNotFound) {
			return err
		}
		if err := deleteOfNode(ctx, s, name); err != nil {
			return err
		}
	}
	return datastore.DeleteObject(ctx, s, kind, name)
}

func deleteOfNode(ctx context.Context, s *datastore.Store, node string) error {
	for _, kind := range []*datastore.Kind{datastore.WorkloadEndpoints, datastore.HostEndpoints, datastore.BGPPeers} {
		objs, _, err := datastore.ListObjects(ctx, s, kind)
		if err != nil {
			return err
		}
		for _, obj := range objs {
			doc, err := datastore.Document(obj)
			if err != nil {
				return err
			}
			if lookup(doc, "spec.node") != node {
				continue
			}
			if kind == datastore.WorkloadEndpoints {
				if err := releaseEndpoint(ctx, s, doc); err != nil {
					return err
				}
			}
			if err := gone(datastore.DeleteObject(ctx, s, kind, obj.Head().Path())); err != nil {
				return err
			}
		}
	}
	// Where its agent answered; one that still lives writes it anew, with its Node.
	if kv, err := s.Get(ctx, api.DiagNodes+node); err == nil {
		err = s.Delete(ctx, kv.Key, kv.Revision)
		if err != nil && !errors.Is(err, datastore.ErrNotFound) && !errors.Is(err, datastore.ErrConflict) {
			return err
		}
	} else if !errors.Is(err, datastore.ErrNotFound) {
		return err
	}
	for _, kind := range []*datastore.Kind{datastore.BGPConfigurations, datastore.FelixConfigurations} {
		if err := gone(datastore.DeleteObject(ctx, s, kind, "node."+node)); err != nil {
			return err
		}
	}
	return nil
}

// gone forgives that somebody else was faster.
func gone(err error) error {
	if errors.Is(err, datastore.ErrNotFound) {
		return nil
	}
	return err
}

// releaseEndpoint frees the addresses of a workload endpoint.
func releaseEndpoint(ctx context.Context, s *datastore.Store, doc map[string]any) error {
	networks, _ := lookup(doc, "spec.ipNetworks").([]any)
	for _, network := range networks {
		text, _ := network.(string)
		prefix, err := netip.ParsePrefix(text)
		if err != nil || !prefix.IsSingleIP() {
			continue // nothing that IPAM gave out
		}
		err = ipam.New(s, "", nil).ReleaseAddress(ctx, ipam.Release{Addr: prefix.Addr()})
		if err != nil && !errors.Is(err, ipam.ErrNotAssigned) {
			return err
		}
	}
	return nil
}
