package addr

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"time"

	"margay/datastore"
	"margay/ipam"
)

// boot gives a node an allocator that knows nothing, by a clock that is off.
func (s *sim) boot(n *simNode) {
	alloc := ipam.New(s.stores[rand.IntN(len(s.stores))], n.name, slog.New(s))
	n.skew.Store(int64(time.Duration(rand.IntN(600)-300) * time.Second))
	alloc.UseClock(func() time.Time { return time.Now().Add(time.Duration(n.skew.Load())) })
	n.mu.Lock()
	n.alloc = alloc
	n.mu.Unlock()
}

func (n *simNode) allocator() *ipam.Allocator {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.alloc
}

// take removes one of the node's pods from the model: from now on nobody vouches for it.
func (s *sim) take(n *simNode) (string, []netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for h, addrs := range n.pods {
		delete(n.pods, h)
		s.mu.Lock()
		for _, a := range addrs {
			delete(s.holder, a)
		}
		s.mu.Unlock()
		return h, addrs
	}
	return "", nil
}

// uncertain says that an operation may have happened or not.
func uncertain(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, datastore.ErrUnreachable)
}

func contended(err error) bool {
	return errors.Is(err, datastore.ErrConflict) || errors.Is(err, datastore.ErrExists) || errors.Is(err, datastore.ErrNotFound)
}

func (s *sim) settle(what, handle string, err error) {
	switch {
	case uncertain(err):
		if errors.Is(err, datastore.ErrUnreachable) {
			s.away.Add(1)
		}
		s.forget(handle)
	case errors.Is(err, ipam.ErrNoAddress), errors.Is(err, ipam.ErrAddressInUse), contended(err):
		s.refused.Add(1)
	default:
		s.problem("%s %s: %v", what, handle, err)
	}
}

// forget notes that nobody knows what a handle holds.
func (s *sim) forget(handle string) {
	s.mu.Lock()
	s.unknown[handle] = true
	s.mu.Unlock()
}

// step is one operation of one worker.
func (s *sim) step(ctx context.Context, n *simNode) {
	n.alive.RLock()
	defer n.alive.RUnlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	switch rand.IntN(20) {
	case 0, 1, 2, 3: // killed in the middle
		s.kills.Add(1)
		stop := time.AfterFunc(time.Duration(rand.IntN(8000))*time.Microsecond, cancel)
		defer stop.Stop()
		defer s.boot(n)
	case 4: // the clock jumps
		n.skew.Store(int64(time.Duration(rand.IntN(7200)-3600) * time.Second))
	}
	s.ops.Add(1)
	alloc := n.allocator()
	// A node that is draining only gives back, so that its blocks run empty and others take them over.
	if rand.IntN(100) < 60 && !n.draining.Load() {
		s.add(ctx, n, alloc)
		return
	}
	handle, addrs := s.take(n)
	if handle == "" {
		n.draining.Store(false)
		return
	}
	if rand.IntN(100) == 0 {
		n.draining.Store(true)
	}
	if rand.IntN(2) == 0 { // another node's agent may release as well
		alloc = s.nodes[rand.IntN(len(s.nodes))].allocator()
	}
	if err := s.release(ctx, alloc, handle, addrs); err != nil {
		s.settle("release of", handle, err)
		s.forget(handle)
	}
}

func (s *sim) release(ctx context.Context, alloc *ipam.Allocator, handle string, addrs []netip.Addr) error {
	if rand.IntN(3) > 0 {
		freed, err := alloc.ReleaseHandle(ctx, handle)
		if err == nil && !sameAddrs(freed, addrs) {
			s.problem("release of %s, which holds %v: %v", handle, addrs, freed)
		}
		return err
	}
	for _, addr := range addrs {
		h, err := ipam.Lookup(ctx, s.stores[0], addr)
		if err != nil {
			return err
		}
		if err := alloc.ReleaseAddress(ctx, ipam.Release{Addr: addr, Handle: handle, Sequence: &h.Sequence}); err != nil {
			return err
		}
	}
	return nil
}

func sameAddrs(a, b []netip.Addr) bool {
	if len(a) != len(b) {
		return false
	}
	has := map[netip.Addr]bool{}
	for _, addr := range a {
		has[addr] = true
	}
	for _, addr := range b {
		if !has[addr] {
			return false
		}
	}
	return true
}

func (s *sim) add(ctx context.Context, n *simNode, alloc *ipam.Allocator) {
	req := ipam.Request{Handle: fmt.Sprintf("net.%d", s.handles.Add(1)), Attrs: map[string]string{"pod": "x"}}
	req.IPv4.Want = ipam.Required
	switch k := rand.IntN(10); {
	case k == 0 && s.Fixed.IsValid():
		base := s.Fixed.Addr().As4()
		req.IPv4.IP = netip.AddrFrom4([4]byte{base[0], base[1], byte(rand.IntN(16)), byte(rand.IntN(256))})
	case k < 4:
		req.IPv6.Want = ipam.IfPool
	}
	got, err := alloc.AssignAll(ctx, req)
	if err != nil {
		s.settle("assign", req.Handle, err)
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range got {
		if other := s.holder[a.Addr]; other != "" {
			s.res.Duplicates++
			s.res.Problems = append(s.res.Problems, fmt.Sprintf("%s was given to %s while %s has it", a.Addr, req.Handle, other))
		}
		s.holder[a.Addr] = req.Handle
		n.pods[req.Handle] = append(n.pods[req.Handle], a.Addr)
	}
}

// die takes a node away for good; another cleans up after it.
func (s *sim) die(ctx context.Context, n, other *simNode) {
	n.alive.Lock()
	defer n.alive.Unlock()
	s.deaths.Add(1)
	for {
		h, _ := s.take(n)
		if h == "" {
			break
		}
		s.forget(h) // until somebody looks
	}
	if _, err := other.allocator().ReleaseNode(ctx, n.name); err != nil && !uncertain(err) && !contended(err) {
		s.problem("node %s: %v", n.name, err)
	}
	s.boot(n)
}
