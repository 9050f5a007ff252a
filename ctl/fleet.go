package ctl

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"margay/agent/api"
	"margay/datastore"
	"margay/internal/version"
	"margay/ipam/audit"
)

// localTimeout bounds the question to the agent beside margayctl which node this is.
const localTimeout = 2 * time.Second

// fleet is the cluster as commands that ask many nodes need it: who the nodes are, how to ask their agents, whose an
// address is. It is read once.
type fleet struct {
	members   map[string]netip.Addr // the Node resources, with their addresses; invalid where one has none
	addresses map[netip.Addr]string // members by their addresses
	blocks    blockIndex
	directory *directory
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
	f := &fleet{members: map[string]netip.Addr{}, addresses: map[netip.Addr]string{}}
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
	if f.directory, err = newDirectory(ctx, cmd, s); err != nil {
		return nil, err
	}
	if f.report, err = audit.Look(ctx, s, version.String()); err != nil {
		return nil, err
	}
	f.blocks = indexBlocks(f.report.Blocks)
	// One that does not answer is asked as those of other nodes are.
	local, cancel := context.WithTimeout(ctx, localTimeout)
	defer cancel()
	if st, err := api.Get(local, agentSocket()); err == nil {
		f.local = st.Node
	}
	return f, nil
}

// names returns the nodes of the cluster, sorted: those that have a Node. Where an agent without one has said that it answers, its
// node was deleted; if it lives it makes its Node anew.
func (f *fleet) names() []string { return slices.Sorted(maps.Keys(f.members)) }

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
	var pods []string
	for _, a := range f.report.Sorted() {
		if a.Pod != "" {
			pods = append(pods, a.Namespace+"/"+a.Pod)
		}
	}
	nodes := f.names()
	switch {
	case len(nodes) == 0:
		return "there is no node"
	case len(pods) == 0:
		return "there is " + few(nodes)
	}
	return "there is " + few(nodes) + ", and of pods " + few(pods)
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

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
