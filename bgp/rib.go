package bgp

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
)

// Path is a route learned from a peer, with the attributes a decision may rest on.
type Path struct {
	NextHop     netip.Addr
	Peer        netip.Addr // who sent it
	AS          uint32     // that peer's
	ASPath      []uint32   // nearest first; empty for a route of our own AS
	LocalPref   uint32     // 0 when the peer sent none
	MED         uint32     // 0 when the peer sent none
	Communities []uint32   // RFC 1997
	Since       time.Time  // when this became the best path
	Stale       bool       // kept while its peer restarts (RFC 4724), not confirmed since
	// Equal are the paths from other peers that are as good, up to the tie-breaks of the decision process (RFC 4271,
	// 9.1.2.2, before step e): flows may be spread over all of them. Sorted by next hop and peer, as this path is sorted
	// before them.
	Equal []Path
}

// All returns p and its equals.
func (p Path) All() []Path { return append([]Path{p}, p.Equal...) }

// SetAnnounced makes prefixes the set that this speaker originates, with Config.Listen as next hop: new ones are
// announced to every peer, the others withdrawn. Nothing changes when one is invalid; the error names it.
func (s *Speaker) SetAnnounced(ctx context.Context, prefixes []netip.Prefix) error {
	want := make(map[netip.Prefix]struct{}, len(prefixes))
	for _, p := range prefixes {
		switch {
		case !p.IsValid() || p != p.Masked():
			return fmt.Errorf("announced prefix %v: expected one without host bits", p)
		case p.Addr().Is4() != s.cfg.Listen.Is4():
			return fmt.Errorf("announced prefix %v: expected one of the same family as %s", p, s.cfg.Listen)
		}
		want[p] = struct{}{}
	}
	s.ops.Lock()
	defer s.ops.Unlock()
	if s.stopped {
		return ErrStopped
	}
	var add, del []*apiutil.Path
	for p := range want {
		if _, ok := s.announced[p]; !ok {
			add = append(add, s.ownPath(p))
		}
	}
	for p := range s.announced {
		if _, ok := want[p]; !ok {
			del = append(del, s.ownPath(p))
		}
	}
	// Announce before withdrawing, so that a change from one prefix to a covering one leaves no hole.
	if len(add) > 0 {
		if _, err := s.srv.AddPath(apiutil.AddPathRequest{Paths: add}); err != nil {
			return fmt.Errorf("bgp announce: %w", err)
		}
	}
	if len(del) > 0 {
		if err := s.srv.DeletePath(apiutil.DeletePathRequest{Paths: del}); err != nil {
			return fmt.Errorf("bgp withdraw: %w", err)
		}
	}
	first := s.announced == nil
	s.announced = want
	if first {
		return s.syncPeers(ctx)
	}
	return nil
}

// ownPath returns the path that announces p, a masked prefix of Listen's family.
func (s *Speaker) ownPath(p netip.Prefix) *apiutil.Path {
	// Neither constructor fails for a valid prefix and address, which the callers checked.
	nlri, _ := bgp.NewIPAddrPrefix(p)
	nextHop, _ := bgp.NewPathAttributeNextHop(s.cfg.Listen)
	return &apiutil.Path{
		Family: s.family,
		Nlri:   nlri,
		Attrs:  []bgp.PathAttributeInterface{bgp.NewPathAttributeOrigin(bgp.BGP_ORIGIN_ATTR_TYPE_IGP), nextHop},
		Age:    time.Now().Unix(),
	}
}

// onBestPath takes a change of best paths from the watch: each is one path that now is, or no longer is, among the best
// for its prefix.
func (s *Speaker) onBestPath(paths []*apiutil.Path, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	touched := false
	for _, p := range paths {
		prefix, path, ok := pathFrom(p)
		if !ok {
			continue
		}
		path.Since = at
		now, had := s.best[prefix]
		switch {
		case !p.Withdrawal && p.PeerAddress.IsValid():
			s.best[prefix] = now.with(path, had)
		case !had:
			continue
		case p.Withdrawal:
			if now, had = now.without(p.PeerAddress); had {
				s.best[prefix] = now
			} else {
				delete(s.best, prefix)
			}
		default:
			// Now announced by ourselves, which is the same as gone to who wants to know what the others have.
			delete(s.best, prefix)
		}
		s.changed[prefix] = struct{}{}
		touched = true
	}
	if touched {
		select {
		case s.updates <- struct{}{}:
		default:
		}
	}
}

// with returns p and its equals with one more, which replaces what its peer had sent before. had is false where there is
// no p yet.
func (p Path) with(one Path, had bool) Path {
	if !had || p.Peer == one.Peer && len(p.Equal) == 0 {
		return one
	}
	return joined(append(slices.DeleteFunc(p.All(), func(o Path) bool { return o.Peer == one.Peer }), one))
}

// without returns p and its equals without what peer has sent; false when nothing is left.
func (p Path) without(peer netip.Addr) (Path, bool) {
	rest := slices.DeleteFunc(p.All(), func(o Path) bool { return o.Peer == peer })
	if len(rest) == 0 {
		return Path{}, false
	}
	return joined(rest), true
}

// joined makes one path of several, which it may change.
func joined(all []Path) Path {
	for i := range all {
		all[i].Equal = nil
	}
	slices.SortFunc(all, func(a, b Path) int { return cmp.Or(a.NextHop.Compare(b.NextHop), a.Peer.Compare(b.Peer)) })
	all[0].Equal = slices.Clone(all[1:])
	return all[0]
}

// pathFrom converts what a peer sent; ok is false for anything but a unicast prefix with a next hop.
func pathFrom(p *apiutil.Path) (prefix netip.Prefix, path Path, ok bool) {
	if p == nil {
		return prefix, path, false
	}
	nlri, isPrefix := p.Nlri.(*bgp.IPAddrPrefix)
	if !isPrefix || !nlri.Prefix.IsValid() {
		return prefix, path, false
	}
	path = Path{Peer: p.PeerAddress, AS: p.PeerASN}
	for _, a := range p.Attrs {
		switch a := a.(type) {
		case *bgp.PathAttributeNextHop:
			path.NextHop = a.Value
		case *bgp.PathAttributeMpReachNLRI:
			path.NextHop = a.Nexthop
		case *bgp.PathAttributeAsPath:
			for _, seg := range a.Value {
				path.ASPath = append(path.ASPath, seg.GetAS()...)
			}
		case *bgp.PathAttributeLocalPref:
			path.LocalPref = a.Value
		case *bgp.PathAttributeMultiExitDisc:
			path.MED = a.Value
		case *bgp.PathAttributeCommunities:
			path.Communities = slices.Clone(a.Value)
		}
	}
	return nlri.Prefix.Masked(), path, p.Withdrawal || path.NextHop.IsValid()
}

// Updates returns a channel of capacity one that is signalled after Changes has something new.
func (s *Speaker) Updates() <-chan struct{} { return s.updates }

// Changes returns what changed since its last call: for each prefix the paths to use now, several where they are equally
// good, or none when it was withdrawn. However often a prefix changed, it is there once, with its latest state. The maps and slices are
// the caller's.
func (s *Speaker) Changes() map[netip.Prefix][]Path {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[netip.Prefix][]Path, len(s.changed))
	for prefix := range s.changed {
		if path, ok := s.best[prefix]; ok {
			out[prefix] = s.withStaleness(path).All()
		} else {
			out[prefix] = nil
		}
	}
	clear(s.changed)
	return out
}

// Best returns the best path of every prefix that a peer announces, with its equals, our own announcements excluded. The
// map is the caller's.
func (s *Speaker) Best() map[netip.Prefix]Path {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := maps.Clone(s.best)
	for prefix, path := range out {
		out[prefix] = s.withStaleness(path)
	}
	return out
}

// withStaleness sets p.Stale. A path that came back unchanged from a restarted peer cannot be told from one that did
// not yet, as GoBGP reports only changes: it counts as stale until the peer's End-of-RIB. Called with mu held.
func (s *Speaker) withStaleness(p Path) Path {
	if from := s.peers[p.Peer]; from != nil {
		p.Stale = from.restarting && p.Since.Before(from.lostAt)
	}
	if len(p.Equal) > 0 {
		p.Equal = slices.Clone(p.Equal)
		for i, o := range p.Equal {
			p.Equal[i] = s.withStaleness(o)
		}
	}
	return p
}
