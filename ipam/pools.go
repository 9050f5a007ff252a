package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"margay/datastore"
	"margay/datastore/selector"
)

// poolView is a pool, with what follows from it for this node.
type poolView struct {
	*datastore.IPPool
	prefix    netip.Prefix
	unusable  string // why nothing can be assigned from it; empty if something can
	selective bool   // whether it serves this node depends on the node's labels
	elsewhere string // why it does not serve this node; empty if it does
	namespace *selector.Selector
}

func (p *poolView) name() string { return p.Metadata.Name }

func (p *poolView) family() int { return familyOf(p.prefix) }

// decodePool reads a stored pool; nil if it cannot be read.
func (a *Allocator) decodePool(kv datastore.KV, labels map[string]string) *poolView {
	pool, err := datastore.Decode[datastore.IPPool](kv)
	if err != nil {
		a.log.Warn("pool ignored", "err", err)
		return nil
	}
	pool.Default()
	p := &poolView{IPPool: pool}
	if p.prefix, err = pool.Prefix(); err == nil {
		err = pool.Validate()
	}
	switch vxlan := pool.Spec.VXLANMode; {
	case err != nil:
		p.unusable = err.Error()
	case vxlan != datastore.Never:
		p.unusable = fmt.Sprintf("spec.vxlanMode %s: expected Never, VXLAN is not supported", vxlan)
	}
	if p.unusable != "" {
		return p
	}
	sel, err := selector.Parse(pool.Spec.NodeSelector)
	if err == nil {
		p.namespace, err = selector.Parse(pool.Spec.NamespaceSelector)
	}
	if err != nil {
		p.unusable = err.Error() // Validate has found it before
		return p
	}
	p.selective = len(sel.Labels()) > 0
	if !sel.Matches(labels) {
		p.elsewhere = fmt.Sprintf("spec.nodeSelector %q does not select node %s", pool.Spec.NodeSelector, a.node)
	}
	return p
}

// choosePools picks the pools that a request may be served from, in the order of their names; the error says for each
// pool why it is not one.
func (v *view) choosePools(req Request, ask familyAsk) ([]*poolView, error) {
	for _, want := range ask.Pools {
		if !slices.ContainsFunc(v.pools, func(p *poolView) bool { return p.called(want) }) {
			return nil, fmt.Errorf("%w: pool %s: there is no such pool", ErrNoAddress, want)
		}
	}
	var (
		out []*poolView
		why []string
	)
	for _, p := range v.pools {
		if reason := p.unfit(req, ask); reason != "" {
			why = append(why, fmt.Sprintf("pool %s: %s", p.name(), reason))
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

// called says whether a pool is meant by a name or CIDR.
func (p *poolView) called(want string) bool {
	if want == p.name() {
		return true
	}
	cidr, err := netip.ParsePrefix(want)
	return err == nil && cidr.Masked() == p.prefix
}

// unfit says why a pool cannot serve a request; empty if it can. Who asks for a pool by name, or for an address of it,
// gets it whatever nodes and namespaces it selects, as with Calico.
func (p *poolView) unfit(req Request, ask familyAsk) string {
	wanted := slices.ContainsFunc(ask.Pools, p.called)
	switch {
	case !p.prefix.IsValid():
		return p.unusable
	case p.family() != ask.family:
		return fmt.Sprintf("it is IPv%d", p.family())
	case len(ask.Pools) > 0 && !wanted:
		return "it was not asked for"
	case p.Spec.Disabled:
		return "it is disabled"
	case !slices.Contains(p.Spec.AllowedUses, req.Use):
		return fmt.Sprintf("spec.allowedUses does not have %s", req.Use)
	case p.unusable != "" || wanted || ask.IP.IsValid():
		return p.unusable
	case p.Spec.AssignmentMode == datastore.Manual:
		return "spec.assignmentMode is Manual, and it was not asked for"
	case p.elsewhere != "":
		return p.elsewhere
	case req.Use == datastore.UseWorkload:
		return p.unfitNamespace(req.Namespace)
	}
	return ""
}

// namespaceLabel is the label that Kubernetes itself gives each namespace: its name.
const namespaceLabel = "kubernetes.io/metadata.name"

// unfitNamespace says why a pool cannot serve a pod of a namespace, of whose labels only the name is known here.
func (p *poolView) unfitNamespace(namespace string) string {
	labels := map[string]string{}
	if namespace != "" {
		labels[namespaceLabel] = namespace
	}
	text := p.Spec.NamespaceSelector
	if i := slices.IndexFunc(p.namespace.Labels(), func(l string) bool { return l != namespaceLabel }); i >= 0 {
		return fmt.Sprintf("spec.namespaceSelector %q: label %s of namespaces is not known here, only %s is", text, p.namespace.Labels()[i], namespaceLabel)
	}
	if !p.namespace.Matches(labels) {
		return fmt.Sprintf("spec.namespaceSelector %q does not select namespace %q", text, namespace)
	}
	return ""
}
