package ipam

import (
	"fmt"
	"slices"
	"strings"

	"margay/datastore"
)

// choosePools picks the pools that a request may be served from, in the order of their names; the error says for each
// pool why it is not one.
func choosePools(pools []*datastore.IPPool, req Request) ([]*datastore.IPPool, error) {
	for _, want := range req.Pools {
		if !slices.ContainsFunc(pools, func(p *datastore.IPPool) bool { return named(p, want) }) {
			return nil, fmt.Errorf("%w: pool %s: there is no such pool", ErrNoAddress, want)
		}
	}
	var (
		out []*datastore.IPPool
		why []string
	)
	for _, p := range pools {
		if reason := unfit(p, req); reason != "" {
			why = append(why, fmt.Sprintf("pool %s: %s", p.Metadata.Name, reason))
			continue
		}
		out = append(out, p)
	}
	if len(out) > 0 {
		return out, nil
	}
	if len(why) == 0 {
		return nil, fmt.Errorf("%w: there is no IP pool: create one", ErrNoAddress)
	}
	return nil, fmt.Errorf("%w: %s", ErrNoAddress, strings.Join(why, "; "))
}

func named(p *datastore.IPPool, want string) bool {
	return want == p.Metadata.Name || want == p.Spec.CIDR
}

// unfit says why a pool cannot serve a request; empty if it can.
func unfit(p *datastore.IPPool, req Request) string {
	wanted := slices.ContainsFunc(req.Pools, func(want string) bool { return named(p, want) })
	prefix, err := p.Prefix()
	switch {
	case err != nil:
		return err.Error()
	case prefix.Addr().Is6():
		return "it is IPv6"
	case len(req.Pools) > 0 && !wanted:
		return "it was not asked for"
	case p.Spec.Disabled:
		return "it is disabled"
	case !slices.Contains(p.Spec.AllowedUses, req.Use):
		return fmt.Sprintf("spec.allowedUses does not have %s", req.Use)
	case p.Spec.AssignmentMode == datastore.Manual && !wanted && !req.IP.IsValid():
		return "spec.assignmentMode is Manual, and it was not asked for"
	case p.Spec.VXLANMode != "" && p.Spec.VXLANMode != datastore.Never:
		return fmt.Sprintf("spec.vxlanMode %s: expected Never, VXLAN is not supported", p.Spec.VXLANMode)
	case strings.ReplaceAll(p.Spec.NodeSelector, " ", "") != "all()":
		return fmt.Sprintf("spec.nodeSelector %q: expected all(), no other selector is supported", p.Spec.NodeSelector)
	}
	if err := p.Validate(); err != nil {
		return err.Error()
	}
	return ""
}
