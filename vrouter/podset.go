package vrouter

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
)

// podSet is the pods that the control plane has told of. The router's lock guards it.
type podSet struct {
	pods  map[netip.Addr]*knownPod
	apply func([]Pod)
}

type knownPod struct {
	name  string // the interface
	stale bool
}

// check returns an error for what change would not take.
func (s *podSet) check(add []Pod, del []netip.Addr) error {
	for i, p := range add {
		if err := p.Validate(); err != nil {
			return fmt.Errorf("add_pods[%d]: %w", i, err)
		}
	}
	for i, a := range del {
		if !a.IsValid() {
			return fmt.Errorf("del_pods[%d]: expected an address", i)
		}
	}
	return nil
}

// change takes pods away, adds others, and confirms those that are there. It reports whether anything but that changed.
func (s *podSet) change(add []Pod, del []netip.Addr) bool {
	changed := false
	for _, a := range del {
		if _, ok := s.pods[a]; ok {
			delete(s.pods, a)
			changed = true
		}
	}
	for _, p := range add {
		if had, ok := s.pods[p.Address]; ok && had.name == p.Interface {
			had.stale = false
			continue
		}
		s.pods[p.Address] = &knownPod{name: p.Interface}
		changed = true
	}
	if changed && s.apply != nil {
		s.apply(s.all())
	}
	return changed
}

func (s *podSet) markStale() {
	for _, p := range s.pods {
		p.stale = true
	}
}

func (s *podSet) stale() (n int) {
	for _, p := range s.pods {
		if p.stale {
			n++
		}
	}
	return n
}

// sweep takes away what is stale, and returns how many that were.
func (s *podSet) sweep() int {
	var gone []netip.Addr
	for a, p := range s.pods {
		if p.stale {
			gone = append(gone, a)
		}
	}
	s.change(nil, gone)
	return len(gone)
}

// all returns the pods sorted by address.
func (s *podSet) all() []Pod {
	pods := make([]Pod, 0, len(s.pods))
	for _, a := range slices.SortedFunc(maps.Keys(s.pods), netip.Addr.Compare) {
		pods = append(pods, Pod{a, s.pods[a].name})
	}
	return pods
}

// OnPods names the function that is told of all pods whenever they change. It must not call the router, nor block.
func (r *Router) OnPods(apply func([]Pod)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pods.apply = apply
}

// OnRoutes names the function that is told of the changes of the routes, in their order. It must not call the router, nor
// block.
func (r *Router) OnRoutes(apply func(set []Route, del []netip.Prefix)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.routesTo = apply
}

// tellRoutes tells who asked to be told.
func (r *Router) tellRoutes(set []Route, del []netip.Prefix) {
	if r.routesTo != nil && len(set)+len(del) > 0 {
		r.routesTo(set, del)
	}
}
