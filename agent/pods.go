package agent

import (
	"maps"
	"net/netip"
	"slices"
	"sync"

	"margay/vrouter/rpc"
)

// pods are the addresses attached to this node, as the CNI server tells of them.
type pods struct {
	mu    sync.Mutex
	addrs map[netip.Addr]string // with the host's side of their interfaces
}

func (p *pods) set(added bool, addr netip.Addr, link string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !added {
		delete(p.addrs, addr)
		return
	}
	if p.addrs == nil {
		p.addrs = map[netip.Addr]string{}
	}
	p.addrs[addr] = link
}

func (p *pods) all() []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.SortedFunc(maps.Keys(p.addrs), netip.Addr.Compare)
}

// link returns the host's side of the interface of the pod that has an address; "" when none has.
func (p *pods) link(addr netip.Addr) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.addrs[addr]
}

// links returns the pods with their interfaces, sorted by address.
func (p *pods) links() []rpc.Pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	links := make([]rpc.Pod, 0, len(p.addrs))
	for _, addr := range slices.SortedFunc(maps.Keys(p.addrs), netip.Addr.Compare) {
		links = append(links, rpc.Pod{Address: addr, Interface: p.addrs[addr]})
	}
	return links
}

// podChanged notes a pod that came or went: the vRouter is told of its interface; one that has borrowed its address changes
// routes, and so does the last one of a pool that was deleted.
func (a *Agent) podChanged(added bool, addr netip.Addr, link string) {
	a.pods.set(added, addr, link)
	a.wake()
}
