package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"margay/agent/api"
	"margay/cni/server"
	"margay/datastore"
	"margay/ipam"
)

// registerNode makes this node's Node resource say its address, in a datastore that it initializes where it is new. Two nodes
// of one address would take each other's packets: that is an error to be mended by a person.
func registerNode(ctx context.Context, s *datastore.Store, name string, u Underlay) error {
	if err := datastore.Initialize(ctx, s); err != nil {
		return fmt.Errorf("initialize the datastore: %w", err)
	}
	nodes, _, err := datastore.ListResources[datastore.Node](ctx, s)
	if err != nil && len(nodes) == 0 {
		return fmt.Errorf("list the nodes: %w", err)
	}
	for _, n := range nodes {
		if p, err := n.IPv4(); err == nil && n.Metadata.Name != name && p.Addr() == u.Prefix.Addr() {
			return fmt.Errorf("address %s is already that of node %s in the datastore: give this node another address, choose one with --ip-autodetection-method, or delete that Node",
				p.Addr(), n.Metadata.Name)
		}
	}
	set := func(n *datastore.Node) error {
		if n.Spec.BGP == nil {
			n.Spec.BGP = &datastore.NodeBGP{}
		}
		n.Spec.BGP.IPv4Address = u.Prefix.String()
		return nil
	}
	fresh := datastore.NewNode(name)
	_ = set(fresh) // never fails
	if err := datastore.CreateResource(ctx, s, fresh); !errors.Is(err, datastore.ErrExists) {
		return err
	}
	return datastore.ModifyResource(ctx, s, name, set)
}

// registerPeriod is how often a running agent makes sure that its Node is there, at least: more often than garbage is collected.
const registerPeriod = time.Minute

// stayRegistered makes this node's Node anew, until ctx is done, when somebody has deleted it under a living node: without it
// the others would soon give its pods' addresses to their own. Neither does a living node lose its tunnel's address.
func (a *Agent) stayRegistered(ctx context.Context) {
	period := registerPeriod
	if a.cfg.IPAMGrace > 0 {
		period = min(period, max(a.cfg.IPAMGrace/3, time.Second))
	}
	tick := time.NewTicker(period)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := a.registerAgain(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("registering this node again", "err", err)
		}
		if err := a.confirmTunnel(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("confirming the tunnel address", "err", err)
		}
	}
}

func (a *Agent) registerAgain(ctx context.Context) error {
	there, err := a.store.Existing(ctx, datastore.Nodes.Key(a.cfg.Node))
	if err != nil || len(there) > 0 {
		return err
	}
	var underlay Underlay
	var tunnel netip.Addr
	var answers api.Endpoint
	a.locked(func() { underlay, tunnel, answers = a.underlay, a.tunnel, a.answers })
	a.log.Warn("this node's Node was deleted while its agent runs: it is made again; stop the agent first to remove the node for good")
	if err := registerNode(ctx, a.store, a.cfg.Node, underlay); err != nil {
		return err
	}
	if answers.Address.IsValid() { // who deletes a Node deletes that, too
		if err := a.publish(ctx, answers); err != nil {
			return err
		}
	}
	if !tunnel.IsValid() {
		return nil
	}
	return recordTunnel(ctx, a.store, a.cfg.Node, tunnel)
}

// recordTunnel writes the tunnel address where Calico's components look for it.
func recordTunnel(ctx context.Context, s *datastore.Store, node string, tunnel netip.Addr) error {
	return datastore.ModifyResource(ctx, s, node, func(n *datastore.Node) error {
		if n.Spec.BGP == nil {
			n.Spec.BGP = &datastore.NodeBGP{}
		}
		n.Spec.BGP.IPv4IPIPTunnelAddr = tunnel.String()
		return nil
	})
}

// recordedTunnel reads what recordTunnel has written.
func recordedTunnel(ctx context.Context, s *datastore.Store, node string) (netip.Addr, bool) {
	n, err := datastore.GetResource[datastore.Node](ctx, s, node)
	if err != nil || n.Spec.BGP == nil {
		return netip.Addr{}, false
	}
	addr, err := netip.ParseAddr(n.Spec.BGP.IPv4IPIPTunnelAddr)
	return addr, err == nil && addr.Is4()
}

// podIPAM is address management as the CNI server wants it.
type podIPAM struct {
	alloc *ipam.Allocator
	node  string
}

// Assign implements server.IPAM.
func (p podIPAM) Assign(ctx context.Context, r server.AssignRequest) ([]netip.Addr, error) {
	attrs := map[string]string{"node": p.node}
	if r.Namespace != "" || r.Pod != "" {
		attrs["namespace"], attrs["pod"] = r.Namespace, r.Pod
	}
	got, err := p.alloc.AssignAll(ctx, ipam.Request{Handle: r.Handle, Attrs: attrs, Use: datastore.UseWorkload, Namespace: r.Namespace,
		IPv4: ipam.Ask{Want: wants[r.IPv4.Assign], Pools: r.IPv4.Pools, IP: r.IPv4.IP},
		IPv6: ipam.Ask{Want: wants[r.IPv6.Assign], Pools: r.IPv6.Pools, IP: r.IPv6.IP}})
	var addrs []netip.Addr
	for _, a := range got {
		addrs = append(addrs, a.Addr)
	}
	if err == nil && len(addrs) == 0 {
		err = fmt.Errorf("%w: no pool serves this node", ipam.ErrNoAddress)
	}
	return addrs, err
}

// wants says the CNI protocol's words in IPAM's.
var wants = map[string]ipam.Want{server.AssignNone: ipam.No, server.AssignIfPool: ipam.IfPool, server.AssignRequired: ipam.Required}

// Release implements server.IPAM.
func (p podIPAM) Release(ctx context.Context, handle string) error {
	_, err := p.alloc.ReleaseHandle(ctx, handle)
	return err
}

// Addresses implements server.IPAM.
func (p podIPAM) Addresses(ctx context.Context, handle string) ([]netip.Addr, error) {
	return p.alloc.HandleAddresses(ctx, handle)
}
