package agent

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
)

// pods are the addresses attached to this node, as the CNI server tells of them.
type pods struct {
	mu    sync.Mutex
	addrs map[netip.Addr]bool
}

func (p *pods) set(added bool, addr netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !added {
		delete(p.addrs, addr)
		return
	}
	if p.addrs == nil {
		p.addrs = map[netip.Addr]bool{}
	}
	p.addrs[addr] = true
}

func (p *pods) all() []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.SortedFunc(maps.Keys(p.addrs), netip.Addr.Compare)
}

// podChanged notes a pod that came or went.
func (a *Agent) podChanged(added bool, addr netip.Addr, _ string) {
	a.pods.set(added, addr)
	a.wake()
}
