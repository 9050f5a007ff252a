package vrouter

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"margay/vrouter/fib"
	"margay/vrouter/packet"
)

const (
	// MinPathMTU is the least that a router on the way may tell us, in bytes of the outer packet. One that says less, or
	// a forger, would have us cut everything to pieces; it is the kernel's net.ipv4.route.min_pmtu.
	MinPathMTU = 552
	// PathMTULife is how long it is believed, until the larger one is tried again: RFC 1191, section 6.3.
	PathMTULife = 10 * time.Minute

	outerLen = packet.IPv4MinLen
)

// PathMTU is what has been learned about the way to another node.
type PathMTU struct {
	Gateway netip.Addr
	MTU     int // of the outer packet, in bytes
	Learned time.Time
	Expires time.Time
}

// pathMTU is PathMTU as the ladder reads it.
type pathMTU struct {
	gateway uint32
	mtu     int // of the inner packet
	learned time.Time
}

// mtuTo returns the length in bytes of the longest packet that can be sent into the tunnel to gateway.
func (s *state) mtuTo(gateway uint32) int {
	i, found := s.path(gateway)
	if !found {
		return s.config.MTU
	}
	return min(s.config.MTU, s.paths[i].mtu)
}

func (s *state) path(gateway uint32) (int, bool) {
	return slices.BinarySearchFunc(s.paths, gateway, func(p pathMTU, g uint32) int {
		switch {
		case p.gateway < g:
			return -1
		case p.gateway > g:
			return 1
		}
		return 0
	})
}

// narrow finds the shortest length that may need a look at the paths.
func (s *state) narrow() {
	s.narrowest = s.config.MTU
	for _, p := range s.paths {
		s.narrowest = min(s.narrowest, p.mtu)
	}
}

// clamp lowers the segment size that a TCP SYN on its way to hop announces.
func (v *view) clamp(p *Packet, inner packet.IPv4, hop fib.Hop) {
	const headers = packet.IPv4MinLen + 20
	packet.ClampMSS(inner, uint16(max(v.state.mtuTo(hop.Gateway())-headers, 1)), p.Offload.NeedsChecksum)
}

// LearnPathMTU takes note of an ICMP "fragmentation needed" about a packet in a tunnel of this node (RFC 2003, 5.1, "soft
// state"; RFC 1191, 6). b is the message with its IPv4 header. It reports whether that narrows a way; what is not about
// a packet to a node of the cluster, or says nothing new, does not, nor what a pod says: none is a router on the way, and
// one forged message would narrow all pods' way to that node. What it quotes has to be a packet that we have sent, see
// outerKey; of those who quote another one about a node only the first few in a minute are told apart, and then nobody is
// believed about it. The senders inside learn of it with their next packet that is too long.
func (r *Router) LearnPathMTU(b []byte, now time.Time) (PathMTU, bool) {
	m, ok := packet.ParseFragNeeded(b)
	if !ok {
		return PathMTU{}, false
	}
	quoted := packet.IPv4(m.Quoted)
	if m.MTU == 0 {
		m.MTU = packet.Plateau(quoted.TotalLen())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.state.Load()
	if !old.configured || quoted.Protocol() != packet.ProtocolIPIP || quoted.SrcU32() != old.address ||
		!quoted.DF() || !old.isNode(quoted.Dst()) || m.MTU >= quoted.TotalLen() || r.fromPods(packet.IPv4(b).Src()) {
		return PathMTU{}, false
	}
	learned := pathMTU{gateway: quoted.DstU32(), mtu: max(m.MTU, MinPathMTU) - outerLen, learned: now}
	if learned.mtu >= old.mtuTo(learned.gateway) || !r.forgers.sent(&old.key, quoted, now) {
		return PathMTU{}, false
	}
	next := *old
	next.paths = slices.Clone(old.paths)
	if i, found := next.path(learned.gateway); found {
		next.paths[i] = learned
	} else {
		next.paths = slices.Insert(next.paths, i, learned)
	}
	next.narrow()
	r.store(&next)
	return learned.public(), true
}

// fromPods reports whether an address is in the pods' network: there is a route for it, the default route excepted.
func (r *Router) fromPods(a netip.Addr) bool {
	route, found := r.table.Match(a)
	return found && route.Prefix.Bits() > 0 && route.NextHop.Kind != KindDrop
}

// ExpirePathMTU forgets what was learned too long ago, and reports whether it has forgotten anything.
func (r *Router) ExpirePathMTU(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := *r.state.Load()
	kept := slices.DeleteFunc(slices.Clone(next.paths), func(p pathMTU) bool { return !now.Before(p.learned.Add(PathMTULife)) })
	if len(kept) == len(next.paths) {
		return false
	}
	next.paths = kept
	next.narrow()
	r.store(&next)
	return true
}

// PathMTUs returns what has been learned, sorted by gateway.
func (r *Router) PathMTUs() []PathMTU {
	paths := r.state.Load().paths
	all := make([]PathMTU, len(paths))
	for i, p := range paths {
		all[i] = p.public()
	}
	return all
}

func (p pathMTU) public() PathMTU {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], p.gateway)
	return PathMTU{Gateway: netip.AddrFrom4(b), MTU: p.mtu + outerLen, Learned: p.learned, Expires: p.learned.Add(PathMTULife)}
}
