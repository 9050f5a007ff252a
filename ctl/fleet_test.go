package ctl

import (
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"margay/agent/api"
	"margay/ipam/audit"
)

// bigFleet is a cluster of n nodes with a block each, in which every pod is known.
func bigFleet(n int) *fleet {
	f := &fleet{members: map[string]netip.Addr{}, addresses: map[netip.Addr]string{}, directory: &directory{endpoints: map[string]api.Endpoint{}},
		report: &audit.Report{Allocations: map[string][]*audit.Allocation{}}}
	for i := range n {
		name, at := fmt.Sprintf("node%d", i), netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
		f.members[name], f.addresses[at] = at, name
		block := netip.AddrFrom4([4]byte{10, byte(i >> 10), byte(i >> 2), byte(i << 6)})
		f.report.Blocks = append(f.report.Blocks, audit.BlockInfo{CIDR: block.String() + "/26", Affinity: "host:" + name})
		pod := block.Next().String()
		f.report.Allocations[pod] = []*audit.Allocation{{IP: pod, Pod: "pod-" + name, Namespace: "default", Node: name}}
	}
	f.blocks = indexBlocks(f.report.Blocks)
	return f
}

// TestManyNodes: with thousands of nodes an address is found without a walk over all of them.
func TestManyNodes(t *testing.T) {
	f := bigFleet(5000)
	if got := f.podAt(netip.MustParseAddr("10.4.225.193")); got != "pod-node4999" {
		t.Errorf("the last node's pod is %q", got)
	}
	if p := f.at(netip.MustParseAddr("10.0.1.77")); p.Block != "10.0.1.64/26" || p.Owner != "node5" || p.Node != "node5" || p.Given {
		t.Errorf("an address that no pod has: %+v", p)
	}
	if got := f.podAt(netip.MustParseAddr("198.18.0.7")); got != "node node7" {
		t.Errorf("a node's address is %q", got)
	}
	if p := f.at(netip.MustParseAddr("192.0.2.1")); p.Block != "" || p.Node != "" {
		t.Errorf("an address outside: %+v", p)
	}
	last := netip.MustParseAddr("10.4.225.193")
	if n := testing.AllocsPerRun(10, func() { f.podAt(last) }); n > 20 {
		t.Errorf("%v allocations for one address", n)
	}
}

// TestSmallestBlock: where blocks overlap, as after a pool was made again, the smaller one says whose an address is.
func TestSmallestBlock(t *testing.T) {
	x := indexBlocks([]audit.BlockInfo{{CIDR: "10.0.0.0/24", Affinity: "host:a"}, {CIDR: "10.0.0.64/26", Affinity: "host:b"},
		{CIDR: "nonsense"}, {CIDR: "fd00::/122", Affinity: "host:c"}})
	for addr, want := range map[string]string{"10.0.0.1": "host:a", "10.0.0.65": "host:b", "fd00::1": "host:c", "10.0.1.1": ""} {
		if _, got, ok := x.of(netip.MustParseAddr(addr)); got != want || ok != (want != "") {
			t.Errorf("%s: %q, %v: expected %q", addr, got, ok, want)
		}
	}
}

// TestDeletedNodesAreNotAsked: what an agent has left in the datastore is no node.
func TestDeletedNodesAreNotAsked(t *testing.T) {
	f := bigFleet(2)
	f.directory.endpoints["deleted"] = api.Endpoint{Address: netip.MustParseAddrPort("198.18.0.9:9179")}
	if got := f.names(); !slices.Equal(got, []string{"node0", "node1"}) {
		t.Errorf("nodes %v", got)
	}
}

func TestNodesAreAskedSomeAtATime(t *testing.T) {
	var now, most, all atomic.Int32
	eachNode(t.Context(), make([]string, 1000), func(int, string) {
		if n := now.Add(1); n > most.Load() {
			most.Store(n)
		}
		time.Sleep(10 * time.Microsecond)
		now.Add(-1)
		all.Add(1)
	})
	if all.Load() != 1000 || most.Load() > atOnce {
		t.Errorf("%d asked, %d at once", all.Load(), most.Load())
	}
}
