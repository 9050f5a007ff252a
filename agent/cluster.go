package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"margay/bgp"
	"margay/datastore"
	"margay/ipam"
)

// blockState is an affinity's value (datastore layout of Calico: /calico/ipam/v2/host/<node>/ipv4/block/<block>).
type blockState struct {
	block     netip.Prefix
	confirmed bool
}

// cluster mirrors what the agent needs of the datastore.
type cluster struct {
	node string
	log  *slog.Logger

	pools      *view[Pool]
	members    *view[Member]
	bgpPeers   *view[*datastore.BGPPeer]
	configs    *view[*datastore.BGPConfiguration]
	affinities *view[blockState]

	warned sync.Map // complaints made once
}

func newCluster(s *datastore.Store, node string, log *slog.Logger) *cluster {
	c := &cluster{node: node, log: log}
	c.pools = newView(s, log, datastore.IPPools.Prefix(), decodePool)
	c.members = newView(s, log, datastore.Nodes.Prefix(), decodeMember)
	c.bgpPeers = newView(s, log, datastore.BGPPeers.Prefix(), decodeValid[datastore.BGPPeer])
	c.configs = newView(s, log, datastore.BGPConfigurations.Prefix(), decodeValid[datastore.BGPConfiguration])
	c.affinities = newView(s, log, ipam.AffinityPrefix(node), decodeAffinity)
	return c
}

func newView[T any](s *datastore.Store, log *slog.Logger, prefix string, decode func(datastore.KV) (T, error)) *view[T] {
	return &view[T]{store: s, prefix: prefix, decode: decode, log: log}
}

// start returns when everything has been listed once.
func (c *cluster) start(ctx context.Context, changed func()) error {
	for _, start := range []func(context.Context, func()) error{
		c.pools.start, c.members.start, c.bgpPeers.start, c.configs.start, c.affinities.start,
	} {
		if err := start(ctx, changed); err != nil {
			return err
		}
	}
	return nil
}

// decodeValid decodes a resource and refuses one that its own rules refuse, whoever wrote it.
func decodeValid[T any, P datastore.Pointer[T]](kv datastore.KV) (P, error) {
	obj, err := datastore.Decode[T, P](kv)
	if err != nil {
		return nil, err
	}
	obj.Default()
	return obj, obj.Validate()
}

func decodePool(kv datastore.KV) (Pool, error) {
	p, err := decodeValid[datastore.IPPool](kv)
	if err != nil {
		return Pool{}, err
	}
	cidr, err := p.Prefix()
	pool := Pool{Name: p.Metadata.Name, CIDR: cidr, BlockSize: p.Spec.BlockSize, IPIPMode: p.Spec.IPIPMode,
		NATOutgoing: p.Spec.NATOutgoing, DisableBGPExport: p.Spec.DisableBGPExport}
	if p.Spec.VXLANMode != datastore.Never {
		pool.Unsupported = fmt.Sprintf("spec.vxlanMode %s: expected Never, this version does not do VXLAN", p.Spec.VXLANMode)
	}
	return pool, err
}

func decodeMember(kv datastore.KV) (Member, error) {
	n, err := decodeValid[datastore.Node](kv)
	if err != nil {
		return Member{}, err
	}
	m := Member{Name: n.Metadata.Name}
	if n.Spec.BGP == nil || n.Spec.BGP.IPv4Address == "" {
		return m, nil // registered, but without an address it takes no part
	}
	p, err := n.IPv4()
	m.Address = p.Addr()
	m.Tunnel, _ = netip.ParseAddr(n.Spec.BGP.IPv4IPIPTunnelAddr) // only traces ask it
	if n.Spec.BGP.ASNumber != nil {
		m.AS = uint32(*n.Spec.BGP.ASNumber)
	}
	return m, err
}

func decodeAffinity(kv datastore.KV) (blockState, error) {
	name := kv.Key[strings.LastIndexByte(kv.Key, '/')+1:]
	i := strings.LastIndexByte(name, '-')
	if i < 0 {
		return blockState{}, fmt.Errorf("block name %q: expected ADDRESS-LENGTH", name)
	}
	block, err := netip.ParsePrefix(name[:i] + "/" + name[i+1:])
	if err != nil || block != block.Masked() {
		return blockState{}, fmt.Errorf("block name %q: expected ADDRESS-LENGTH", name)
	}
	var v struct {
		State   string `json:"state"`
		Deleted bool   `json:"deleted"`
	}
	if err := json.Unmarshal(kv.Value, &v); err != nil {
		return blockState{}, fmt.Errorf("affinity of block %s: %w", block, err)
	}
	return blockState{block: block, confirmed: v.State == "confirmed" && !v.Deleted}, nil
}

// blind says which value that routing depends on cannot be read; nil when all can.
func (c *cluster) blind() error {
	return cmp.Or(c.pools.blind(), c.members.blind(), c.affinities.blind())
}

// inputs returns the cluster's part of what the desired state follows from.
func (c *cluster) inputs() Inputs {
	in := Inputs{Pools: c.pools.all(), Members: c.members.all(), Blocks: c.blocks()}
	// Most specific first: poolOf takes the first that contains.
	slices.SortFunc(in.Pools, bySpecificity)
	return in
}

func bySpecificity(a, b Pool) int { return cmp.Or(b.CIDR.Bits()-a.CIDR.Bits(), a.CIDR.Compare(b.CIDR)) }

// blocks returns this node's confirmed blocks: a pending affinity counts as absent, for routing too.
func (c *cluster) blocks() []netip.Prefix {
	var out []netip.Prefix
	for _, b := range c.affinities.all() {
		if b.confirmed {
			out = append(out, b.block)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

// config returns the BGPConfiguration in force: the node's own, or the default one, or nil.
func (c *cluster) config() *datastore.BGPConfiguration {
	var def *datastore.BGPConfiguration
	for _, b := range c.configs.all() {
		switch b.Metadata.Name {
		case "node." + c.node:
			return b
		case "default":
			def = b
		}
	}
	return def
}

// asNumber returns this node's AS number: its own, the configured one, or Calico's default.
func (c *cluster) asNumber() uint32 {
	for _, m := range c.members.all() {
		if m.Name == c.node && m.AS != 0 {
			return m.AS
		}
	}
	return c.clusterAS()
}

func (c *cluster) clusterAS() uint32 {
	if b := c.config(); b != nil && b.Spec.ASNumber != nil {
		return uint32(*b.Spec.ASNumber)
	}
	return uint32(datastore.DefaultASNumber)
}

// peers returns the sessions this node is to hold: the mesh, where it is on, and the BGPPeers that are for it.
func (c *cluster) peers(in Inputs) []bgp.Peer {
	var out []bgp.Peer
	if b := c.config(); b == nil || b.Spec.NodeToNodeMeshEnabled == nil || *b.Spec.NodeToNodeMeshEnabled {
		out = MeshPeers(in, c.clusterAS())
	}
	for _, p := range c.bgpPeers.all() {
		peer, why := c.configured(p, in.Underlay.Prefix.Addr())
		if why != "" {
			c.warnOnce("BGPPeer not used", p.Metadata.Name, why)
			continue
		}
		i := slices.IndexFunc(out, func(o bgp.Peer) bool { return o.Addr == peer.Addr })
		switch {
		case !peer.Addr.IsValid() || peer.Addr == peer.Local:
		case i >= 0:
			out[i] = peer // said explicitly, that wins over the mesh
		default:
			out = append(out, peer)
		}
	}
	slices.SortFunc(out, func(a, b bgp.Peer) int { return a.Addr.Compare(b.Addr) })
	return out
}

// configured turns a BGPPeer into a session; the zero Peer where it is for other nodes, and why where it asks for
// something this version does not do.
func (c *cluster) configured(p *datastore.BGPPeer, self netip.Addr) (peer bgp.Peer, why string) {
	s := p.Spec
	peer = bgp.Peer{Local: self, AS: uint32(s.ASNumber), Kind: "global"}
	switch {
	case s.Node != "" && s.Node != c.node:
		return bgp.Peer{}, ""
	case s.Node != "":
		peer.Kind = "node specific"
	}
	switch {
	case s.NodeSelector != "" && s.NodeSelector != "all()":
		return bgp.Peer{}, "spec.nodeSelector: only all() is understood"
	case s.PeerSelector != "":
		return bgp.Peer{}, "spec.peerSelector is not understood: name the peer by spec.peerIP"
	case s.Password != nil:
		return bgp.Peer{}, "spec.password: secrets are not read by this version"
	case s.ASNumber == 0:
		return bgp.Peer{}, "spec.asNumber: expected the peer's AS number"
	}
	at, err := p.Peer()
	if err != nil {
		return bgp.Peer{}, err.Error()
	}
	if at.Port() != 0 && at.Port() != bgp.DefaultPort {
		return bgp.Peer{}, fmt.Sprintf("spec.peerIP: only port %d is understood", bgp.DefaultPort)
	}
	peer.Addr = at.Addr()
	return peer, ""
}

func (c *cluster) warnOnce(what, name, why string) {
	if _, said := c.warned.LoadOrStore(what+name+why, true); !said {
		c.log.Warn(what, "name", name, "why", why)
	}
}
