package addr

import (
	"net/netip"
	"testing"
	"time"

	"margay/datastore"
)

func simulate(t *testing.T, c Simulation) SimResult {
	t.Helper()
	r, err := c.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d nodes, %d operations, %d kills, %d met an etcd that was away, %d refused, %d borrowed, %d blocks taken over, %d nodes died, %d etcd restarts; at the end %d addresses in %d blocks, %d collected; %s",
		r.Nodes, r.Ops, r.Kills, r.Away, r.Refused, r.Borrowed, r.TakenOver, r.Deaths, r.Restarts, r.Held, r.Blocks, r.Collected, r.Took.Round(100*time.Millisecond))
	for _, p := range r.Problems {
		t.Error(p)
	}
	if r.Duplicates+r.Leaks+r.Lost != 0 {
		t.Errorf("%d duplicates, %d leaks, %d lost", r.Duplicates, r.Leaks, r.Lost)
	}
	return r
}

// simLimit ends a simulation that hangs; it ends by its number of operations long before.
const simLimit = 5 * time.Minute

// Room for 40 blocks, some of them tiny, for 40 nodes, and a reservation: claims race, blocks run out, addresses are
// borrowed and blocks taken over.
func TestCrowdedCluster(t *testing.T) {
	r := simulate(t, Simulation{Nodes: 40, Workers: 80, Ops: 2000, Time: simLimit, Cuts: 16, Fixed: netip.MustParsePrefix("10.240.0.0/20"),
		Reserved: []string{"10.240.0.0/29", "10.240.8.9/32"},
		Pools: []*datastore.IPPool{newPool("a", "10.240.0.0/24", 28), newPool("b", "10.240.8.0/26", 29),
			newPool("c", "10.240.9.0/27", 31), newPool("six", "fd00::/121", 125)}})
	for what, n := range map[string]int64{"kills": r.Kills, "operations that met an etcd that was away": r.Away, "borrowed": r.Borrowed,
		"blocks taken over": r.TakenOver, "nodes died": r.Deaths, "restarts of etcd": r.Restarts, "collected": int64(r.Collected)} {
		if n == 0 {
			t.Errorf("%s: none, so the simulation did not show what it is for", what)
		}
	}
}

// The cluster sizes that are wanted, for a few operations; `margay-bench ipam sim` runs them at length.
func TestLargeClusters(t *testing.T) {
	for _, nodes := range []int{1000, 5000} {
		r := simulate(t, Simulation{Nodes: nodes, Workers: 32, Ops: int64(nodes) + 1500, Time: simLimit, Cuts: 6})
		if r.Blocks < nodes || r.Restarts == 0 {
			t.Errorf("%d nodes had %d blocks, %d restarts", nodes, r.Blocks, r.Restarts)
		}
	}
}
