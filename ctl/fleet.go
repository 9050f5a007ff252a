package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"margay/agent/api"
	"margay/datastore"
	"margay/internal/version"
	"margay/ipam/audit"
)

// agentTimeout bounds one question to one agent: a node that is dead must not hold up the others for long.
const agentTimeout = 6 * time.Second

// fleet is the cluster as commands that ask many nodes need it: who the nodes are, how to ask their agents, whose an
// address is. It is read once.
type fleet struct {
	members   map[string]netip.Addr // the Node resources, with their addresses; invalid where one has none
	addresses map[netip.Addr]string // members by their addresses
	blocks    blockIndex
	endpoints map[string]api.Endpoint
	token     string
	report    *audit.Report
	pools     []*datastore.IPPool
	noEcho    bool   // traces do not have the nodes ping each other
	local     string // the node on which margayctl runs; empty: none
}

// openFleet reads the datastore.
func openFleet(ctx context.Context, cmd *cobra.Command) (*fleet, error) {
	s, err := openStore(ctx, cmd)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	f := &fleet{members: map[string]netip.Addr{}, addresses: map[netip.Addr]string{}, endpoints: map[string]api.Endpoint{}}
	nodes, _, err := datastore.ListResources[datastore.Node](ctx, s)
	if err != nil {
		return nil, err
	}
	for _, n := range nodes {
		p, err := n.IPv4()
		if err != nil {
			p = netip.Prefix{}
		}
		f.members[n.Metadata.Name] = p.Addr()
		if p.IsValid() {
			f.addresses[p.Addr()] = n.Metadata.Name
		}
	}
	if f.pools, _, err = datastore.ListResources[datastore.IPPool](ctx, s); err != nil {
		return nil, err
	}
	kvs, _, err := s.List(ctx, api.DiagNodes)
	if err != nil {
		return nil, err
	}
	for _, kv := range kvs {
		var e api.Endpoint
		if json.Unmarshal(kv.Value, &e) == nil {
			f.endpoints[strings.TrimPrefix(kv.Key, api.DiagNodes)] = e
		}
	}
	token, err := s.Get(ctx, api.DiagToken)
	if err != nil && !errors.Is(err, datastore.ErrNotFound) {
		return nil, err
	}
	f.token = strings.TrimSpace(string(token.Value))
	if f.report, err = audit.Look(ctx, s, version.String()); err != nil {
		return nil, err
	}
	f.blocks = indexBlocks(f.report.Blocks)
	if st, err := api.Get(ctx, agentSocket()); err == nil {
		f.local = st.Node
	}
	return f, nil
}

// names returns the nodes of the cluster, sorted: those that have a Node. Where an agent without one has said that it answers, its
// node was deleted; if it lives it makes its Node anew.
func (f *fleet) names() []string { return slices.Sorted(maps.Keys(f.members)) }

// client returns a client for a node's agent.
func (f *fleet) client(node string) (*api.Client, error) {
	if node == f.local && node != "" {
		return api.NewUnixClient(agentSocket()), nil
	}
	e, ok := f.endpoints[node]
	if !ok || f.token == "" {
		return nil, fmt.Errorf("margay-agent of %s %w: it has never said where (it listens on --diag-port)", node, api.ErrUnreachable)
	}
	return api.NewClient(node, e, f.token), nil
}

// currentClient is client for an agent that may have been restarted since the fleet was read.
func currentClient(ctx context.Context, cmd *cobra.Command, node string) (*api.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	s, err := openStore(ctx, cmd)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	kv, err := s.Get(ctx, api.DiagNodes+node)
	if err != nil {
		return nil, fmt.Errorf("margay-agent of %s %w: %w", node, api.ErrUnreachable, err)
	}
	var e api.Endpoint
	if err := json.Unmarshal(kv.Value, &e); err != nil {
		return nil, fmt.Errorf("%s: %w", kv.Key, datastore.JSONError(err))
	}
	token, err := s.Get(ctx, api.DiagToken)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", api.DiagToken, err)
	}
	return api.NewClient(node, e, strings.TrimSpace(string(token.Value))), nil
}

// nodeAt returns the name of the node that has an underlay address.
func (f *fleet) nodeAt(addr netip.Addr) (string, bool) {
	name, ok := f.addresses[addr]
	return name, ok
}

// blockIndex finds the block that an address lies in, of thousands.
type blockIndex struct {
	owners  map[netip.Prefix]string // the affinity, as stored
	lengths []int                   // of the prefixes, the longest first
}

func indexBlocks(all []audit.BlockInfo) blockIndex {
	x := blockIndex{owners: make(map[netip.Prefix]string, len(all))}
	for _, b := range all {
		cidr, err := netip.ParsePrefix(b.CIDR)
		if err != nil {
			continue // what cannot be read is `margayctl ipam check`'s to say
		}
		x.owners[cidr.Masked()] = b.Affinity
		if !slices.Contains(x.lengths, cidr.Bits()) {
			x.lengths = append(x.lengths, cidr.Bits())
		}
	}
	slices.Sort(x.lengths)
	slices.Reverse(x.lengths)
	return x
}

// of returns the smallest block that addr lies in, and its affinity; false where there is none.
func (x blockIndex) of(addr netip.Addr) (block netip.Prefix, affinity string, ok bool) {
	for _, n := range x.lengths {
		block, err := addr.Prefix(n)
		if err != nil {
			continue // longer than such an address
		}
		if affinity, ok := x.owners[block]; ok {
			return block, affinity, true
		}
	}
	return netip.Prefix{}, "", false
}

// place is what a user has named: a pod or a node.
type place struct {
	Name    string     `json:"name,omitempty"` // of the pod, or the node itself
	Address netip.Addr `json:"address"`        // unspecified for a node: the kernel chooses the source
	Node    string     `json:"node,omitempty"` // where it is; empty: outside the cluster, or unknown
	Entry   api.Entry  `json:"entry"`
	Block   string     `json:"block,omitempty"`
	Owner   string     `json:"blockOwner,omitempty"`
	Given   bool       `json:"assigned"` // IPAM has given the address out
}

func (p place) String() string {
	switch {
	case p.Address.IsUnspecified():
		return p.Name
	case p.Name != "":
		return fmt.Sprintf("%s (%s)", p.Name, p.Address)
	}
	return p.Address.String()
}

// find resolves an address, a node's name, or a pod's, with or without its namespace.
func (f *fleet) find(text string) (place, error) {
	if addr, err := netip.ParseAddr(text); err == nil {
		if !addr.Is4() {
			return place{}, fmt.Errorf("%s: expected an IPv4 address: this version's vRouter forwards no IPv6", text)
		}
		return f.at(addr), nil
	}
	if addr, ok := f.members[text]; ok {
		if !addr.IsValid() {
			return place{}, fmt.Errorf("node %s has no IPv4 address in the datastore", text)
		}
		return place{Name: text, Address: addr, Node: text, Entry: api.EntryHost}, nil
	}
	namespace, pod, found := strings.Cut(text, "/")
	if !found {
		namespace, pod = "", text
	}
	var matches []*audit.Allocation
	for _, a := range f.report.Sorted() {
		if a.Pod == pod && (namespace == "" || a.Namespace == namespace) && !a.CoolingDown {
			if addr, err := netip.ParseAddr(a.IP); err == nil && addr.Is4() {
				matches = append(matches, a)
			}
		}
	}
	switch len(matches) {
	case 1:
		return f.at(netip.MustParseAddr(matches[0].IP)), nil
	case 0:
		return place{}, fmt.Errorf("%q is no address, no node, and no pod that has an address: %s", text, f.known())
	}
	var names []string
	for _, m := range matches {
		names = append(names, fmt.Sprintf("%s/%s (%s)", m.Namespace, m.Pod, m.IP))
	}
	return place{}, fmt.Errorf("%q is several pods: %s: expected one by NAMESPACE/POD or address", text, strings.Join(names, ", "))
}

// known lists some of the names there are, for an error.
func (f *fleet) known() string {
	names := f.names()
	for _, a := range f.report.Sorted() {
		if a.Pod != "" && len(names) < 12 {
			names = append(names, a.Namespace+"/"+a.Pod)
		}
	}
	return "there is " + strings.Join(names, ", ")
}

// at says what is known of an address.
func (f *fleet) at(addr netip.Addr) place {
	p := place{Address: addr, Entry: api.EntryPod}
	if block, affinity, ok := f.blocks.of(addr); ok {
		p.Block, p.Owner = block.String(), strings.TrimPrefix(strings.TrimPrefix(affinity, "host:"), "virtual:")
		p.Node = p.Owner
	}
	if name, ok := f.nodeAt(addr); ok {
		p.Name, p.Node, p.Entry = name, name, api.EntryHost
		return p
	}
	for _, a := range f.report.Allocations[addr.String()] {
		if a.CoolingDown {
			continue
		}
		p.Given = true
		if a.Node != "" {
			p.Node = a.Node
		}
		switch {
		case a.Pod != "":
			p.Name = a.Pod
			if a.Namespace != "" && a.Namespace != "default" {
				p.Name = a.Namespace + "/" + a.Pod
			}
		case strings.HasSuffix(a.Attrs["type"], "TunnelAddress"):
			p.Name, p.Entry = a.Node, api.EntryHost
		}
	}
	return p
}

// podAt returns the name of the pod that has an address, "" when nobody knows.
func (f *fleet) podAt(addr netip.Addr) string {
	if !addr.IsValid() {
		return ""
	}
	p := f.at(addr)
	if p.Entry == api.EntryHost && p.Name != "" {
		return "node " + p.Name
	}
	return p.Name
}

// pool returns the pool that an address lies in.
func (f *fleet) pool(addr netip.Addr) *datastore.IPPool {
	var best *datastore.IPPool
	bits := -1
	for _, p := range f.pools {
		if cidr, err := p.Prefix(); err == nil && cidr.Contains(addr) && cidr.Bits() > bits {
			best, bits = p, cidr.Bits()
		}
	}
	return best
}

// atOnce is how many nodes are asked at the same time: as many handshakes as one processor makes in a fraction of agentTimeout.
const atOnce = 64

// eachNode runs f for all nodes named, atOnce at the same time.
func eachNode(nodes []string, f func(i int, node string)) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for i, n := range nodes {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			f(i, n)
		})
	}
	wg.Wait()
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
