package port_test

import (
	"net"
	"sync"
	"testing"

	"margay/vrouter/port"
)

// TestDirectQueuesKeepOrder sends numbered flows among pods of one node and of two, whose vRouters have several workers: of no
// flow is a packet lost or overtaken by a later one, and no worker stays idle. With tc the kernel carries them, by the sender's
// processor: docs/direct.md.
func TestDirectQueuesKeepOrder(t *testing.T) {
	for io, window := range map[string]int{port.IOPacket: 8, port.IOXDP: 2} { // a veth's ring in front of AF_XDP holds 256
		t.Run(io, func(t *testing.T) {
			a, b := newDirectNodes(t, io+", queues")
			var here, there []*node
			for i := range byte(directQueues + 1) { // one worker has two pods
				here, there = append(here, a.addPod(t, i+1)), append(there, b.addPod(t, i+1))
			}
			a.reads(t, len(here), len(here))
			b.reads(t, len(there), len(there))
			var conns []*net.UDPConn
			var servers []*orderedEcho
			for i, p := range here {
				for _, to := range []*node{here[(i+1)%len(here)], there[i], there[(i+1)%len(there)]} {
					server := newOrderedEcho(t, to)
					servers = append(servers, server)
					// Until a neighbour is known packets go another way, on which a flow that begins then may be overtaken once.
					first := p.dialUDP(t, server.address())
					eventually(t, "first answer", func() bool { return answered(first, 1) })
					for range 4 {
						conns = append(conns, p.dialUDP(t, server.address()))
					}
				}
			}
			for _, way := range []struct{ from, to *directNode }{{a, b}, {b, a}} {
				eventually(t, "neighbours", func() bool {
					resolved, _ := way.from.underlay.Resolved(way.to.address)
					return resolved
				})
			}
			var wg sync.WaitGroup
			for _, conn := range conns {
				wg.Go(func() {
					if err := inOrder(conn, 20, window); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			for _, server := range servers {
				for _, err := range server.close() {
					t.Error(err)
				}
			}
			noDrops(t, a.router, b.router)
			for _, n := range []*directNode{a, b} {
				batches := n.router.Batches()
				if len(batches) != directQueues {
					t.Errorf("%d workers, expected %d", len(batches), directQueues)
				}
				for _, w := range batches {
					if w.Packets == 0 {
						t.Errorf("%v: worker %s had nothing to do", n.address, w.Worker)
					}
				}
			}
		})
	}
}
