package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"margay/bgp"
	"margay/vrouter/rpc"
)

// Pool is what routing needs of an IPPool.
type Pool struct {
	Name             string
	CIDR             netip.Prefix
	BlockSize        int    // prefix length of its blocks
	IPIPMode         string // Always, CrossSubnet or Never
	NATOutgoing      bool
	DisableBGPExport bool
	// Unsupported says what the pool asks for that this version does not do; such a pool is blackholed, because its
	// packets would otherwise leave in clear.
	Unsupported string
}

// Member is a node of the cluster as the datastore lists it.
type Member struct {
	Name    string
	Address netip.Addr
	Tunnel  netip.Addr // of its vr0; invalid where it has none
	AS      uint32     // 0: the cluster's
}

// Inputs is everything the desired state follows from.
type Inputs struct {
	Node     string
	Underlay Underlay
	Tunnel   netip.Addr // vr0's own address; invalid while there is none
	Pools    []Pool
	Members  []Member
	Blocks   []netip.Prefix // this node's confirmed blocks
	Pods     []netip.Addr   // addresses of this node's pods, borrowed ones among them
	PodLinks []rpc.Pod      // the same with their interfaces
	Paths    map[netip.Prefix]bgp.Path
	Blind    bool // something above may be missing because the datastore holds what cannot be read
}

// KernelRoute is a route the agent owns in the kernel's main table.
type KernelRoute struct {
	Prefix    netip.Prefix
	Blackhole bool
	Device    string       // empty for a blackhole
	Gateway   netip.Addr   // invalid: on the device itself
	Others    rpc.Gateways // of a route with several gateways: all but the first
	Source    netip.Addr   // invalid: the kernel's choice
	Metric    int
}

// Rejected is a learned route that the import rules refuse, and why.
type Rejected struct {
	Prefix netip.Prefix
	Peer   netip.Addr
	Why    string
}

// Desired is the state that the kernel, the vRouter and the BGP speaker are driven to.
type Desired struct {
	Nodes    []netip.Addr // who may tunnel to us
	Routes   map[netip.Prefix]rpc.NextHop
	Pods     []rpc.Pod // this node's
	Kernel   []KernelRoute
	Announce []netip.Prefix
	NAT, All []netip.Prefix // masqueraded sources; destinations that never are
	Encap    bool           // some pool needs IP-in-IP
	Rejected []Rejected
}

// blackholeMetric is far behind every route anybody installs: the blackhole only catches what has lost its route.
const blackholeMetric = 1 << 20

// nobodysMetric is that of the routes to vr0 for what no pod has: before the blackholes, and behind the routes of pods, which
// may be as long (a borrowed address, a block of one).
const nobodysMetric = blackholeMetric - 1

// learnedMetric is that of routes to the world outside the pools (BIRD's default for its kernel routes): behind what
// the operator has configured by hand, which comes without a metric.
const learnedMetric = 32

// widestBlock is the shortest prefix that a block can have (Calico: /20).
const widestBlock = 20

// tunnelDevice is the vRouter's device, to which the kernel routes the pools that need encapsulation.
const tunnelDevice = "vr0"

// tunnelGateway is the next hop of all routes to the tunnel device. Nobody has it, and nobody is asked for it; but a packet that
// comes out of the tunnel and goes back into it is no reason for an ICMP redirect then, which would tell its sender that the
// destination is on his link (RFC 1812, 5.2.7.2), and the kernel needs one neighbour for the tunnel and not one for each pod.
var tunnelGateway = netip.MustParseAddr(podGateway)

// ipipOverhead is the outer header's size, bytes (RFC 2003).
const ipipOverhead = 20

// Compute derives the desired state. It is pure: the same inputs give the same result.
func Compute(in Inputs) Desired {
	d := Desired{Routes: make(map[netip.Prefix]rpc.NextHop), Pods: in.PodLinks}
	members := make(map[netip.Addr]bool, len(in.Members))
	for _, m := range in.Members {
		if m.Name != in.Node && m.Address.IsValid() && m.Address != in.Underlay.Prefix.Addr() {
			members[m.Address] = true
			d.Nodes = append(d.Nodes, m.Address)
		}
	}
	d.pools(in)
	d.ownBlocks(in)
	d.borrowed(in)
	for prefix, path := range in.Paths {
		d.learned(in, members, prefix, path)
	}
	d.nested(in)
	slices.SortFunc(d.Nodes, netip.Addr.Compare)
	d.Kernel = unique(d.Kernel)
	slices.SortFunc(d.Rejected, func(a, b Rejected) int { return a.Prefix.Compare(b.Prefix) })
	return d
}

// unique sorts the routes and leaves one for each destination and metric, which is what one route is to the kernel.
// Two want the same place only where a pool is a single block: then the way to the node that has it is the right one.
func unique(routes []KernelRoute) []KernelRoute {
	slices.SortStableFunc(routes, func(a, b KernelRoute) int {
		gateway := func(r KernelRoute) int {
			if r.Gateway.IsValid() {
				return 0
			}
			return 1
		}
		return cmp.Or(a.Prefix.Compare(b.Prefix), cmp.Compare(a.Metric, b.Metric), cmp.Compare(gateway(a), gateway(b)))
	})
	return slices.CompactFunc(routes, func(a, b KernelRoute) bool { return a.Prefix == b.Prefix && a.Metric == b.Metric })
}

// pools routes each pool that needs encapsulation to vr0, and lays a blackhole under every pool, so that a packet to
// a pod never leaves in clear by the default route.
func (d *Desired) pools(in Inputs) {
	for _, p := range in.Pools {
		d.All = append(d.All, p.CIDR)
		if p.NATOutgoing {
			d.NAT = append(d.NAT, p.CIDR)
		}
		d.Kernel = append(d.Kernel, KernelRoute{Prefix: p.CIDR, Blackhole: true, Metric: blackholeMetric})
		if p.CIDR.Addr().Is4() && p.Unsupported == "" && encapsulates(p.IPIPMode) {
			d.Encap = true
			d.Kernel = append(d.Kernel, KernelRoute{Prefix: p.CIDR, Device: tunnelDevice, Source: in.Tunnel})
		}
	}
}

func encapsulates(mode string) bool { return mode == "Always" || mode == "CrossSubnet" }

// ownBlocks are announced, and accepted out of the tunnel.
func (d *Desired) ownBlocks(in Inputs) {
	for _, b := range in.Blocks {
		d.here(in, b)
		if p, ok := poolOf(in.Pools, b); !ok || !p.DisableBGPExport {
			d.Announce = append(d.Announce, b)
		}
	}
}

// here makes a prefix this node's. The kernel has a longer route for each pod in it; what is left goes to vr0, where the
// vRouter counts it as no_pod and tells its sender, or to an address that another node has borrowed. While nobody
// reads vr0 there is the blackhole.
func (d *Desired) here(in Inputs, prefix netip.Prefix) {
	d.Routes[prefix] = rpc.Local()
	d.Kernel = append(d.Kernel, KernelRoute{Prefix: prefix, Blackhole: true, Metric: blackholeMetric})
	if prefix.Addr().Is4() {
		d.Kernel = append(d.Kernel, KernelRoute{Prefix: prefix, Device: tunnelDevice, Source: in.Tunnel, Metric: nobodysMetric})
	}
}

// borrowed addresses, which lie in other nodes' blocks or in nobody's, are announced and accepted one by one: the longer
// prefix leads to this node.
func (d *Desired) borrowed(in Inputs) {
	for _, addr := range append(slices.Clone(in.Pods), in.Tunnel) {
		if !addr.Is4() || slices.ContainsFunc(in.Blocks, func(b netip.Prefix) bool { return b.Contains(addr) }) {
			continue
		}
		one := netip.PrefixFrom(addr, addr.BitLen())
		pool, ok := poolOf(in.Pools, one)
		if _, done := d.Routes[one]; done || !ok || pool.Unsupported != "" {
			continue
		}
		d.here(in, one)
		if !pool.DisableBGPExport {
			d.Announce = append(d.Announce, one)
		}
	}
}

// lent says whether a route inside this node's own block b leads to one address that another node of the cluster has
// borrowed; why not, if it does not. What this node's own pods have, nobody takes from them.
func lent(in Inputs, members map[netip.Addr]bool, b, prefix netip.Prefix, path bgp.Path) (why string) {
	switch {
	case !prefix.IsSingleIP() || prefix == b || !members[path.NextHop]:
		return fmt.Sprintf("inside this node's own block %s", b)
	case prefix.Addr() == in.Tunnel || slices.Contains(in.Pods, prefix.Addr()):
		return fmt.Sprintf("inside this node's own block %s, and the address is in use here", b)
	}
	return ""
}

// way is how a learned route leads to its next hop.
type way struct {
	kind    rpc.Kind // KindTunnel, or KindDirect
	outside bool     // of the pools: a route of the kernel's alone
}

// learned places one BGP route, over all of its equally good paths that are not refused and lead the same way.
func (d *Desired) learned(in Inputs, members map[netip.Addr]bool, prefix netip.Prefix, path bgp.Path) {
	var hops []netip.Addr
	var first way
	for _, p := range path.All() {
		w, why := d.judge(in, members, prefix, p)
		switch {
		case why != "":
			d.Rejected = append(d.Rejected, Rejected{Prefix: prefix, Peer: p.Peer, Why: why})
			continue
		case len(hops) == 0:
			first = w
		case w != first:
			continue
		}
		hops = append(hops, p.NextHop)
	}
	if len(hops) == 0 {
		return
	}
	if len(hops) > rpc.MaxGateways {
		hops = hops[:rpc.MaxGateways]
	}
	hop := rpc.Multipath(first.kind, hops...)
	switch {
	case first.outside:
		d.direct(in, prefix, hop, learnedMetric)
		return
	case first.kind == rpc.KindDirect:
		d.direct(in, prefix, hop, 0)
	}
	d.Routes[prefix] = hop
}

// judge says how one path leads to its next hop, or why it is refused.
func (d *Desired) judge(in Inputs, members map[netip.Addr]bool, prefix netip.Prefix, path bgp.Path) (w way, why string) {
	if why := martian(in, prefix); why != "" {
		return w, why
	}
	for _, b := range in.Blocks {
		if b.Overlaps(prefix) && prefix.Bits() >= b.Bits() {
			if why := lent(in, members, b, prefix, path); why != "" {
				return w, why
			}
		}
	}
	if _, here := d.Routes[prefix]; here {
		return w, "the address of a pod of this node"
	}
	if path.NextHop == in.Underlay.Prefix.Addr() {
		return w, "next hop is this node itself"
	}
	pool, inPool := poolOf(in.Pools, prefix)
	switch {
	case !inPool && members[path.Peer]:
		// Pods whose pool has been deleted must not begin to speak in clear.
		if !in.Blind && prefix.Bits() >= widestBlock && orphaned(in) {
			d.Kernel = append(d.Kernel, KernelRoute{Prefix: prefix, Blackhole: true, Metric: blackholeMetric})
		}
		return w, "sent by a node of the mesh, but inside no pool"
	case inPool && pool.Unsupported != "":
		return w, fmt.Sprintf("pool %s: %s", pool.Name, pool.Unsupported)
	case inPool && prefix.Bits() != pool.BlockSize && !ofMember(members, prefix, path):
		return w, fmt.Sprintf("inside pool %s, but neither a block (/%d) nor one of another size (/%d to /%d) or an address that a node of the mesh has",
			pool.Name, pool.BlockSize, widestBlock, prefix.Addr().BitLen())
	case !inPool:
		for _, p := range in.Pools {
			if prefix.Bits() > 0 && prefix.Overlaps(p.CIDR) {
				return w, fmt.Sprintf("covers pool %s", p.Name)
			}
		}
		w.outside, w.kind = true, rpc.KindDirect
		return w, ""
	case encapsulates(pool.IPIPMode) && !members[path.NextHop]:
		return w, fmt.Sprintf("next hop %s is no node of the cluster, and pool %s needs IP-in-IP", path.NextHop, pool.Name)
	case pool.IPIPMode == "Always", pool.IPIPMode == "CrossSubnet" && !in.Underlay.Prefix.Masked().Contains(path.NextHop):
		w.kind = rpc.KindTunnel
		return w, ""
	}
	w.kind = rpc.KindDirect
	return w, ""
}

// ofMember says whether a route inside a pool that is no block of the pool's size is a node's all the same: an address
// that it has borrowed, or a block from before the pool was deleted and made again with another block size. A node of
// the mesh is trusted with any block; with the old ones only towards nodes.
func ofMember(members map[netip.Addr]bool, prefix netip.Prefix, path bgp.Path) bool {
	return members[path.Peer] && (prefix.IsSingleIP() || prefix.Bits() >= widestBlock && members[path.NextHop])
}

// nested routes to vr0 what is tunnelled but lies inside a prefix that the kernel sends by the underlay: a borrowed
// address, or a block inside one of another size. The kernel's longest prefix must be the vRouter's.
func (d *Desired) nested(in Inputs) {
	direct := make(map[netip.Prefix]bool)
	for _, r := range d.Kernel {
		if r.Gateway.IsValid() && r.Metric == 0 {
			direct[r.Prefix] = true
		}
	}
	for prefix, hop := range d.Routes {
		if hop.Kind != rpc.KindTunnel {
			continue
		}
		for bits := prefix.Bits() - 1; bits >= widestBlock; bits-- {
			if direct[netip.PrefixFrom(prefix.Addr(), bits).Masked()] {
				d.Kernel = append(d.Kernel, KernelRoute{Prefix: prefix, Device: tunnelDevice, Source: in.Tunnel})
				break
			}
		}
	}
}

func (d *Desired) direct(in Inputs, prefix netip.Prefix, via rpc.NextHop, metric int) {
	d.Kernel = append(d.Kernel, KernelRoute{Prefix: prefix, Device: in.Underlay.Interface, Gateway: via.Gateway, Others: via.Others, Metric: metric})
}

// orphaned tells whether a block of this node lies in no pool.
func orphaned(in Inputs) bool {
	return slices.ContainsFunc(in.Blocks, func(b netip.Prefix) bool {
		_, ok := poolOf(in.Pools, b)
		return !ok
	})
}

// martian refuses what no peer may tell us: prefixes of special use (RFC 6890) and routes that would draw the
// underlay itself away.
func martian(in Inputs, p netip.Prefix) string {
	a := p.Addr()
	switch {
	case !a.Is4():
		return "not IPv4"
	case p != p.Masked():
		return "has host bits set"
	case p.Bits() > 0 && (a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.As4()[0] == 0 || a.As4()[0] >= 240):
		return "a special-use prefix (RFC 6890)"
	case p.Bits() >= in.Underlay.Prefix.Bits() && in.Underlay.Prefix.Masked().Contains(a):
		return "inside the underlay's subnet"
	}
	return ""
}

func poolOf(pools []Pool, p netip.Prefix) (Pool, bool) {
	for _, pool := range pools {
		if pool.CIDR.Bits() <= p.Bits() && pool.CIDR.Contains(p.Addr()) {
			return pool, true
		}
	}
	return Pool{}, false
}

// PodMTU is what pods and vr0 get, bytes: room for the outer header where some pool needs one.
func PodMTU(underlay int, encap bool) int {
	if encap {
		return underlay - ipipOverhead
	}
	return underlay
}

// MeshPeers returns this node's sessions of the full mesh. Of each pair the lower address, compared as text, is
// passive: Calico's rule, so that a mixed cluster agrees.
func MeshPeers(in Inputs, as uint32) []bgp.Peer {
	self := in.Underlay.Prefix.Addr()
	var peers []bgp.Peer
	for _, m := range in.Members {
		if m.Name == in.Node || !m.Address.IsValid() || m.Address == self {
			continue
		}
		peers = append(peers, bgp.Peer{Addr: m.Address, AS: cmp.Or(m.AS, as), Kind: "node-to-node mesh",
			Passive: self.String() < m.Address.String(), Local: self})
	}
	return peers
}
