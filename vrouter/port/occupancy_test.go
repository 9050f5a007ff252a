package port_test

import (
	"net/netip"
	"testing"

	"margay/vrouter"
)

// TestQueuesTold: `direct` tells of the pods' sockets, also while they come and go, and none is fuller than full.
func TestQueuesTold(t *testing.T) {
	onEachIO(t, func(t *testing.T, way string) {
		a, _ := newDirectNodes(t, way)
		pods := []*node{a.addPod(t, 1), a.addPod(t, 2)}
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				default:
				}
				for _, q := range a.router.Queues() {
					if q.Used > q.Size {
						t.Errorf("%s: %d of %d", q.Name, q.Used, q.Size)
					}
				}
			}
		}()
		defer func() {
			close(stop)
			<-stopped
		}()
		for range 5 {
			a.tell(t, pods...)
			a.reads(t, 2, 2)
			found := make(map[string]vrouter.Queue)
			for _, q := range a.router.Queues() {
				found[q.Name] = q
			}
			for _, name := range []string{"pods_receive", "pods_send", "underlay_receive", "underlay_send"} {
				if found[name].Size == 0 {
					t.Errorf("%s: %+v of %v", name, found[name], found)
				}
			}
			if err := a.router.Update(vrouter.Update{DelPods: []netip.Addr{pods[1].pod}}); err != nil {
				t.Fatal(err)
			}
			a.reads(t, 1, 1)
		}
	})
}
