package addr

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"margay/ipam"
	"margay/ipam/audit"
)

// collectors is how many nodes' garbage collectors clean up after the simulation; what they leave is released by handle.
const collectors = 50

// verify compares model and store, lets garbage be collected and looks again, releases everything and looks once more.
func (s *sim) verify(ctx context.Context) error {
	r, err := s.look(ctx)
	if err != nil {
		return err
	}
	s.res.Blocks, s.res.Held = len(r.Blocks), len(r.Allocations)
	for addr, handle := range s.holder {
		if list := r.Allocations[addr.String()]; len(list) != 1 || list[0].Handle != handle {
			s.res.Lost++
			s.problem("%s was given to %s, and is lost: %v", addr, handle, list)
		}
	}
	doubtful := map[string]bool{} // nodes with addresses of killed operations
	for _, a := range r.Sorted() {
		if s.holder[netip.MustParseAddr(a.IP)] == a.Handle {
			continue
		}
		if !s.unknown[a.Handle] {
			s.res.Leaks++
			s.problem("%s is held by %s, which nobody asked for or which was released", a.IP, a.Handle)
		}
		doubtful[a.Node] = true
	}
	if err := s.collect(ctx, doubtful); err != nil {
		return err
	}
	if r, err = s.look(ctx); err != nil {
		return err
	}
	for addr, handle := range s.holder {
		if list := r.Allocations[addr.String()]; len(list) != 1 || list[0].Handle != handle {
			s.res.Lost++
			s.problem("%s of %s fell to the garbage collector", addr, handle)
		}
	}
	all := r.Sorted()
	var next atomic.Int64
	var workers sync.WaitGroup
	for range s.Workers {
		workers.Go(func() {
			for i := next.Add(1) - 1; int(i) < len(all); i = next.Add(1) - 1 {
				if _, err := s.nodes[int(i)%len(s.nodes)].allocator().ReleaseHandle(ctx, all[i].Handle); err != nil {
					s.problem("release of %s: %v", all[i].Handle, err)
				}
			}
		})
	}
	workers.Wait()
	if r, err = s.look(ctx); err != nil {
		return err
	}
	if left := len(r.Allocations) + r.Handles; left != 0 {
		s.res.Leaks += left
		s.problem("%d addresses and %d handles are left of %d", len(r.Allocations), r.Handles, len(all))
	}
	return nil
}

func (s *sim) look(ctx context.Context) (*audit.Report, error) {
	r, err := audit.Look(ctx, s.stores[0], "")
	if err != nil {
		return nil, err
	}
	for _, p := range r.Integrity() {
		switch p.Kind {
		case audit.DuplicateAddress:
			s.res.Duplicates++
		case audit.LeakedHandle, audit.MissingHandle, audit.HandleMismatch, audit.AddressWithoutHandle:
			s.res.Leaks++
		}
		s.problem("the checker: %s", p)
	}
	return r, nil
}

// collect has the garbage collectors of some doubtful nodes look twice, by what the model says is in use there.
func (s *sim) collect(ctx context.Context, doubtful map[string]bool) error {
	const grace = time.Millisecond
	n := 0
	for _, node := range s.nodes {
		if !doubtful[node.name] || n == collectors {
			continue
		}
		n++
		owned := ipam.Owned{Handles: map[string]bool{}}
		for h := range node.pods {
			owned.Handles[h] = true
		}
		c := ipam.NewCollector(node.allocator(), grace, func(context.Context) (ipam.Owned, error) { return owned, nil })
		// What one look gives back may leave a block empty, which is the next one's.
		left := 1
		for range 10 {
			got, err := c.Look(ctx)
			if err != nil {
				return err
			}
			s.res.Collected += len(got.Addresses)
			if left = got.Suspects; left == 0 {
				break
			}
			time.Sleep(2 * grace)
		}
		if left != 0 {
			s.problem("%d things of node %s are nobody's and were not given back", left, node.name)
		}
	}
	return nil
}
