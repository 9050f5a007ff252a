package ipam

import (
	"bufio"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"margay/datastore"
)

// etcdCounters reads what the server itself counts: ranges it looked up, and bytes it sent to clients.
func etcdCounters(t *testing.T) (ranges, sent float64) {
	t.Helper()
	resp, err := http.Get(endpoint + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	seen := 0
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		name, value, ok := strings.Cut(lines.Text(), " ")
		if !ok {
			continue
		}
		switch name {
		case "etcd_mvcc_range_total", "etcd_network_client_grpc_sent_bytes_total":
			n, err := strconv.ParseFloat(value, 64)
			if err != nil {
				t.Fatal(err)
			}
			if seen++; name == "etcd_mvcc_range_total" {
				ranges = n
			} else {
				sent = n
			}
		}
	}
	if seen != 2 {
		t.Fatalf("%d of 2 counters found in etcd's metrics", seen)
	}
	return ranges, sent
}

// fill claims blocks for nodes as if they had done it themselves; each holds one address.
func fill(t *testing.T, s *datastore.Store, p *datastore.IPPool, nodes, blocks int) {
	t.Helper()
	prefix, err := p.Prefix()
	if err != nil {
		t.Fatal(err)
	}
	w := newWalk(prefix, p.Spec.BlockSize, "filling")
	var ops []datastore.Op
	for i := range blocks {
		cidr, ok := w.next()
		if !ok {
			t.Fatalf("%s has no room for %d blocks", prefix, blocks)
		}
		node, h := fmt.Sprintf("full%d", i%nodes), fmt.Sprintf("net.full%d", i)
		b := newBlock(cidr, "host:"+node, uint64(time.Now().UnixNano()))
		b.assign(attribute{handle: h, hasHandle: true, secondary: map[string]string{"node": node}})
		value, err := b.encode()
		if err != nil {
			t.Fatal(err)
		}
		ops = append(ops, datastore.OpCreate(blockKey(cidr), value),
			datastore.OpCreate(affinityKey(node, cidr), []byte(`{"state":"confirmed","deleted":false}`)),
			datastore.OpCreate(handleKey(h), fmt.Appendf(nil, `{"block":{%q:1},"deleted":false}`, cidr)))
		if len(ops) > 90 || i == blocks-1 {
			if _, err := s.Txn(t.Context(), ops...); err != nil {
				t.Fatal(err)
			}
			ops = nil
		}
	}
}

// cost is what one claim costs at etcd, in the mean, and how long it takes, in the middle.
type cost struct {
	ranges, sent float64
	p50          time.Duration
}

// measureClaims has nodes that are new claim their first block, each in a store as full as the one before found it.
func measureClaims(t *testing.T, s *datastore.Store, claims int) cost {
	t.Helper()
	var c cost
	var took []time.Duration
	for i := range claims {
		node := fmt.Sprintf("new%d", i)
		a := New(s, node, nil)
		r0, s0 := etcdCounters(t)
		start := time.Now()
		got, err := a.Assign(t.Context(), Request{Handle: "net." + node})
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(start))
		r1, s1 := etcdCounters(t)
		c.ranges, c.sent = c.ranges+(r1-r0)/float64(claims), c.sent+(s1-s0)/float64(claims)
		if _, err := s.Txn(t.Context(), datastore.OpDelete(blockKey(got.Block), 0), datastore.OpDelete(affinityKey(node, got.Block), 0),
			datastore.OpDelete(handleKey("net."+node), 0)); err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(took)
	c.p50 = took[len(took)/2]
	return c
}

// A claim costs as much with 5,000 nodes' blocks in the store as with 5, in an empty pool and in one that is 95 % full.
func TestClaimDoesNotGrowWithTheCluster(t *testing.T) {
	const claims = 40
	for _, tt := range []struct {
		name, few, many         string // CIDRs of pools of /26 blocks
		fewBlocks, manyBlocks   int
		mostRanges, mostSentKiB float64 // per claim, whatever the cluster
	}{
		{"sparse", "10.16.0.0/12", "10.16.0.0/12", 5, 5000, 40, 2},
		{"95 % full", "10.16.0.0/19", "10.16.0.0/13", 122, 7782, 160, 4},
	} {
		var few, many cost
		for _, size := range []struct {
			cidr          string
			nodes, blocks int
			into          *cost
		}{{tt.few, 5, tt.fewBlocks, &few}, {tt.many, 5000, tt.manyBlocks, &many}} {
			p := sized(size.cidr, 26)
			s := openStore(t, p)
			fill(t, s, p, size.nodes, size.blocks)
			*size.into = measureClaims(t, s, claims)
			t.Logf("%s: %d nodes, %d blocks: %.0f ranges, %.1f KiB sent, p50 %s per claim", tt.name, size.nodes, size.blocks,
				size.into.ranges, size.into.sent/1024, size.into.p50.Round(10*time.Microsecond))
		}
		t.Logf("%s: many/few: ranges %.2f, bytes %.2f, p50 %.2f", tt.name, many.ranges/few.ranges, many.sent/few.sent,
			float64(many.p50)/float64(few.p50))
		if many.ranges > 2*few.ranges || many.sent > 2*few.sent || many.ranges > tt.mostRanges || many.sent > tt.mostSentKiB*1024 {
			t.Errorf("%s: with 5 nodes %+v, with 5,000 %+v", tt.name, few, many)
		}
	}
}
