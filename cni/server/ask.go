package server

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
)

// What follows asks the kernel what its rules would do with a packet; it is read out of the tables in force, not out of what
// the agent wants them to be.

// MaySend reports whether the anti-spoofing rules let a pod's interface send from an address.
func (s *Server) MaySend(iface string, addr netip.Addr) (bool, error) {
	s.fw.mu.Lock()
	defer s.fw.mu.Unlock()
	elements, err := s.fw.conn.GetSetElements(s.fw.setsOf(addr).pods)
	if err != nil {
		return false, fmt.Errorf("nftables: read set %s: %w", fwPodSet, err)
	}
	key := podKey{iface, addr}.bytes()
	return slices.ContainsFunc(elements, func(e nftables.SetElement) bool { return bytes.Equal(e.Key, key) }), nil
}

// Masquerades reports whether what src sends to dst, and leaves by another interface than a pod's or vr0, gets the node's own
// address as its source.
func (s *Server) Masquerades(src, dst netip.Addr) (bool, error) {
	s.fw.mu.Lock()
	defer s.fw.mu.Unlock()
	sets := s.fw.setsOf(src)
	from, err := s.fw.holds(sets.nat, src)
	if err != nil || !from {
		return false, err
	}
	inside, err := s.fw.holds(sets.all, dst)
	return !inside, err
}

// holds reports whether an interval set in the kernel has an address. mu is held.
func (f *firewall) holds(set *nftables.Set, a netip.Addr) (bool, error) {
	elements, err := f.conn.GetSetElements(set)
	if err != nil {
		return false, fmt.Errorf("nftables: read set %s: %w", set.Name, err)
	}
	slices.SortStableFunc(elements, func(x, y nftables.SetElement) int {
		if c := bytes.Compare(x.Key, y.Key); c != 0 || x.IntervalEnd == y.IntervalEnd {
			return c
		}
		if x.IntervalEnd {
			return -1 // one range may begin where another ends
		}
		return 1
	})
	inside := false
	for _, e := range elements {
		if bytes.Compare(e.Key, a.AsSlice()) > 0 {
			break
		}
		inside = !e.IntervalEnd
	}
	return inside, nil
}
