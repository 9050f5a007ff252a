package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"margay/datastore"
)

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// The life of an address, and what etcd holds in each stage of it.
func TestLifeOfAnAddress(t *testing.T) {
	s, ctx := openStore(t, pool("p", "10.244.0.0/26")), t.Context()
	a := New(s, "n1", nil)
	got, err := a.Assign(ctx, Request{Handle: "k8s-pod-network.abc", Attrs: map[string]string{"namespace": "default", "pod": "web-0"}})
	if err != nil || got != (Assignment{Addr: addr("10.244.0.0"), Block: prefix("10.244.0.0/26"), Pool: "p"}) {
		t.Fatalf("%+v, %v", got, err)
	}
	if v := value(t, s, "/calico/ipam/v2/host/n1/ipv4/block/10.244.0.0-26"); v != `{"state":"confirmed","deleted":false}` {
		t.Errorf("affinity: %s", v)
	}
	if v := value(t, s, "/calico/ipam/v2/handle/k8s-pod-network.abc"); v != `{"block":{"10.244.0.0/26":1},"deleted":false}` {
		t.Errorf("handle: %s", v)
	}
	stored := value(t, s, "/calico/ipam/v2/assignment/ipv4/block/10.244.0.0-26")
	for _, want := range []string{`{"cidr":"10.244.0.0/26","affinity":"host:n1","allocations":[0,null,`, `"unallocated":[1,2,3,`, `"attributes":[{"handle_id":"k8s-pod-network.abc",` +
		`"secondary":{"namespace":"default","node":"n1","pod":"web-0","timestamp":"20`, ` +0000 UTC"}}]`, `"deleted":false}`} {
		if !strings.Contains(stored, want) {
			t.Errorf("block: %s is missing in %s", want, stored)
		}
	}
	if _, err := a.Assign(ctx, Request{Handle: "k8s-pod-network.abc"}); !errors.Is(err, ErrHandleInUse) {
		t.Errorf("second assignment of the handle: %v", err)
	}
	tunnel, err := a.Assign(ctx, Request{Handle: "ipip-tunnel-addr-n1", Use: datastore.UseTunnel, Attrs: map[string]string{"type": "ipipTunnelAddress"}})
	if err != nil || tunnel.Addr != addr("10.244.0.1") {
		t.Fatalf("%+v, %v", tunnel, err)
	}
	if v := value(t, s, blockKey(got.Block)); !strings.Contains(v, `"secondary":{"node":"n1","type":"ipipTunnelAddress"}`) {
		t.Errorf("tunnel attribute: %s", v)
	}
	if held, err := a.HandleAddresses(ctx, "k8s-pod-network.abc"); err != nil || !slices.Equal(held, []netip.Addr{got.Addr}) {
		t.Errorf("held: %v, %v", held, err)
	}
	if blocks, err := a.ConfirmedBlocks(ctx); err != nil || !slices.Equal(blocks, []netip.Prefix{got.Block}) {
		t.Errorf("blocks: %v, %v", blocks, err)
	}
	use, err := Usage(ctx, s)
	if err != nil || len(use) != 1 || use[0].Total != 64 || use[0].InUse != 2 || use[0].Free != 62 || len(use[0].Blocks) != 1 ||
		use[0].Blocks[0] != (BlockUsage{CIDR: got.Block, Total: 64, InUse: 2, Affinity: "n1"}) {
		t.Errorf("usage: %+v, %v", use, err)
	}
	// Any node's allocator may release: the agent of this node may be gone for good.
	released, err := New(s, "n2", nil).ReleaseHandle(ctx, "k8s-pod-network.abc")
	if err != nil || !slices.Equal(released, []netip.Addr{got.Addr}) {
		t.Errorf("released: %v, %v", released, err)
	}
	if _, err := s.Get(ctx, "/calico/ipam/v2/handle/k8s-pod-network.abc"); !errors.Is(err, datastore.ErrNotFound) {
		t.Errorf("the handle is still there: %v", err)
	}
	if released, err := a.ReleaseHandle(ctx, "k8s-pod-network.abc"); err != nil || len(released) != 0 {
		t.Errorf("second release: %v, %v", released, err)
	}
	if held, err := a.HandleAddresses(ctx, "k8s-pod-network.abc"); err != nil || len(held) != 0 {
		t.Errorf("held after release: %v, %v", held, err)
	}
	// What was released last is given out last; a's memory of the block was out of date, and that did no harm.
	next, err := a.Assign(ctx, Request{Handle: "k8s-pod-network.def"})
	if err != nil || next.Addr != addr("10.244.0.2") {
		t.Errorf("next: %+v, %v", next, err)
	}
}

// Many pods at once on several nodes: no address twice, none lost, and all come back.
func TestManyAtOnce(t *testing.T) {
	s, ctx := openStore(t, pool("p", "10.244.0.0/23", func(s *datastore.IPPoolSpec) { s.BlockSize = 28 })), t.Context()
	const nodes, pods = 3, 100
	var (
		mu    sync.Mutex
		owner = map[netip.Addr]string{}
		wg    sync.WaitGroup
	)
	allocators := make([]*Allocator, nodes)
	for n := range nodes {
		allocators[n] = New(s, fmt.Sprintf("n%d", n), nil)
		for p := range pods {
			wg.Go(func() {
				h := fmt.Sprintf("net.%d-%d", n, p)
				got, err := allocators[n].Assign(ctx, Request{Handle: h})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				if other := owner[got.Addr]; other != "" {
					t.Errorf("%s was given to %s and to %s", got.Addr, other, h)
				}
				owner[got.Addr] = h
			})
		}
	}
	wg.Wait()
	use, err := Usage(ctx, s)
	if err != nil || use[0].InUse != nodes*pods || len(owner) != nodes*pods {
		t.Fatalf("%v in use, %d given out, expected %d: %v", use[0].InUse, len(owner), nodes*pods, err)
	}
	// 100 addresses in blocks of 16: seven per node, no more.
	if len(use[0].Blocks) != nodes*7 {
		t.Errorf("%d blocks, expected %d", len(use[0].Blocks), nodes*7)
	}
	for a, h := range owner {
		wg.Go(func() {
			// Half of them by another node than the one that assigned.
			if got, err := allocators[int(a.As4()[3])%nodes].ReleaseHandle(ctx, h); err != nil || !slices.Equal(got, []netip.Addr{a}) {
				t.Errorf("release of %s: %v, %v", h, got, err)
			}
		})
	}
	wg.Wait()
	if use, err = Usage(ctx, s); err != nil || use[0].InUse != 0 {
		t.Errorf("%v in use after all were released, %v", use[0].InUse, err)
	}
	if kvs, _, err := s.Keys(ctx, HandlePrefix); err != nil || len(kvs) != 0 {
		t.Errorf("%d handles are left, %v", len(kvs), err)
	}
}

// Two allocators of one node, as when an old agent has not died yet, do no harm to each other.
func TestTwoAllocatorsOfOneNode(t *testing.T) {
	s, ctx := openStore(t, pool("p", "10.244.0.0/24")), t.Context()
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		seen = map[netip.Addr]bool{}
	)
	for i := range 2 {
		a := New(s, "n1", nil)
		for j := range 20 {
			wg.Go(func() {
				got, err := a.Assign(ctx, Request{Handle: fmt.Sprintf("net.%d-%d", i, j)})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				if seen[got.Addr] {
					t.Errorf("%s twice", got.Addr)
				}
				seen[got.Addr] = true
			})
		}
	}
	wg.Wait()
	if blocks, err := New(s, "n1", nil).ConfirmedBlocks(ctx); err != nil || len(blocks) != 1 {
		t.Errorf("blocks %v, %v: one would have done", blocks, err)
	}
	// One handle wanted twice at the same time gets one address.
	var won, refused int
	for i := range 2 {
		a := New(s, fmt.Sprintf("m%d", i), nil)
		wg.Go(func() {
			_, err := a.Assign(ctx, Request{Handle: "net.same"})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				won++
			case errors.Is(err, ErrHandleInUse):
				refused++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won != 1 || refused != 1 {
		t.Errorf("one handle: %d won, %d refused", won, refused)
	}
}

func TestPoolFull(t *testing.T) {
	s, ctx := openStore(t, pool("small", "10.244.0.0/31", func(s *datastore.IPPoolSpec) { s.BlockSize = 32 })), t.Context()
	n1, n2 := New(s, "n1", nil), New(s, "n2", nil)
	for i, a := range []*Allocator{n1, n2} {
		if _, err := a.Assign(ctx, Request{Handle: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	_, err := n1.Assign(ctx, Request{Handle: "x"})
	if !errors.Is(err, ErrNoAddress) || !strings.Contains(err.Error(), "pool small: all 2 blocks of 10.244.0.0/31 are taken") {
		t.Errorf("full pool: %v", err)
	}
	if _, err := s.Get(ctx, handleKey("x")); !errors.Is(err, datastore.ErrNotFound) {
		t.Errorf("a refused assignment left its handle: %v", err)
	}
	// Somebody else releases an address of ours: we find it.
	if _, err := n2.ReleaseHandle(ctx, "0"); err != nil {
		t.Fatal(err)
	}
	if _, err := n1.Assign(ctx, Request{Handle: "x"}); err != nil {
		t.Errorf("after a release by another node: %v", err)
	}
	// A second pool is used once the first is full.
	if err := datastore.CreateResource(ctx, s, pool("spare", "10.245.0.0/24")); err != nil {
		t.Fatal(err)
	}
	if got, err := n1.Assign(ctx, Request{Handle: "y"}); err != nil || got.Pool != "spare" {
		t.Errorf("spare pool: %+v, %v", got, err)
	}
}

func TestWhichPoolsServe(t *testing.T) {
	s, ctx := openStore(t,
		pool("a-disabled", "10.1.0.0/24", func(s *datastore.IPPoolSpec) { s.Disabled = true }),
		pool("b-tunnels", "10.2.0.0/24", func(s *datastore.IPPoolSpec) { s.AllowedUses = []string{datastore.UseTunnel} }),
		pool("c-selector", "10.3.0.0/24", func(s *datastore.IPPoolSpec) { s.NodeSelector = "rack == 'a'" }),
		pool("d-manual", "10.4.0.0/24", func(s *datastore.IPPoolSpec) { s.AssignmentMode = datastore.Manual }),
		pool("e-six", "fd00::/64"),
		pool("f-good", "10.6.0.0/24"),
	), t.Context()
	put(t, s, datastore.IPPools.Key("g-broken"), "{")
	a := New(s, "n1", nil)
	for i, tt := range []struct {
		req  Request
		want string // the pool, or part of the error
	}{
		{Request{}, "f-good"},
		{Request{Use: datastore.UseTunnel, IPv4: Ask{Pools: []string{"b-tunnels", "c-selector"}}}, "b-tunnels"},
		{Request{IPv4: Ask{Pools: []string{"d-manual"}}}, "d-manual"},
		{Request{IPv4: Ask{Pools: []string{"10.4.0.0/24"}}}, "d-manual"},
		{Request{IPv4: Ask{IP: addr("10.4.0.9")}}, "d-manual"},
		{Request{IPv4: Ask{IP: addr("10.6.0.200")}}, "f-good"},
		{Request{IPv4: Ask{Pools: []string{"a-disabled"}}}, "pool a-disabled: it is disabled"},
		{Request{IPv4: Ask{Pools: []string{"b-tunnels"}}}, "pool b-tunnels: spec.allowedUses does not have Workload"},
		{Request{IPv4: Ask{Pools: []string{"c-selector"}}}, "c-selector"},
		{Request{IPv4: Ask{Pools: []string{"e-six"}}}, "pool e-six: it is IPv6"},
		{Request{IPv4: Ask{Pools: []string{"nowhere"}}}, "pool nowhere: there is no such pool"},
		{Request{IPv4: Ask{IP: addr("10.4.0.9")}}, "address 10.4.0.9: address not available: it is held already"},
		{Request{IPv4: Ask{IP: addr("10.1.0.1")}}, "address 10.1.0.1: address not available: it is in no pool"},
		{Request{IPv4: Ask{IP: addr("fd00::1")}}, "expected IPv4"},
		{Request{IPv6: Ask{Want: Required}}, "e-six"},
		{Request{IPv6: Ask{IP: addr("fd00::9")}}, "e-six"},
		{Request{IPv6: Ask{IP: addr("10.6.0.1")}}, "expected IPv6"},
		{Request{IPv4: Ask{IP: addr("::ffff:10.6.0.1")}}, "expected IPv4"},
		{Request{IPv6: Ask{IP: addr("fd00::1%eth0")}}, "without a zone"},
		{Request{IPv6: Ask{Want: Required, Pools: []string{"f-good"}}}, "pool f-good: it is IPv4"},
		{Request{Handle: "a/b"}, "expected neither '/'"},
	} {
		if tt.req.Handle == "" {
			tt.req.Handle = fmt.Sprint("h", i)
		}
		got, err := a.Assign(ctx, tt.req)
		switch {
		case err != nil && !strings.Contains(err.Error(), tt.want):
			t.Errorf("%+v: %v, expected %q", tt.req, err, tt.want)
		case err == nil && got.Pool != tt.want:
			t.Errorf("%+v: %+v, expected %q", tt.req, got, tt.want)
		case err == nil && (tt.req.IPv4.IP.IsValid() || tt.req.IPv6.IP.IsValid()) && got.Addr != tt.req.IPv4.IP && got.Addr != tt.req.IPv6.IP:
			t.Errorf("%+v: %+v", tt.req, got)
		}
	}
	put(t, s, configKey, `{"strict_affinity":true,"auto_allocate_blocks":true}`)
	if _, err := New(s, "n2", nil).Assign(ctx, Request{Handle: "other", IPv4: Ask{IP: addr("10.4.0.10")}}); !errors.Is(err, ErrAddressInUse) {
		t.Errorf("an address in another node's block: %v", err)
	}
	if kvs, _, err := s.Keys(ctx, AffinityPrefix("n2")); err != nil || len(kvs) != 0 {
		t.Errorf("a refused claim left an affinity: %v, %v", kvs, err)
	}
}

func TestLockedAndLimited(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	a := New(s, "n1", nil)
	if _, err := a.Assign(ctx, Request{Handle: "x"}); !errors.Is(err, ErrNoAddress) || !strings.Contains(err.Error(), "there is no IP pool") {
		t.Errorf("no pool: %v", err)
	}
	if err := datastore.CreateResource(ctx, s, pool("p", "10.244.0.0/16", func(s *datastore.IPPoolSpec) { s.BlockSize = 32 })); err != nil {
		t.Fatal(err)
	}
	info, locked := datastore.NewClusterInformation("default"), false
	info.Spec.DatastoreReady = &locked
	if err := datastore.CreateResource(ctx, s, info); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Assign(ctx, Request{Handle: "x"}); !errors.Is(err, ErrLocked) {
		t.Errorf("locked: %v", err)
	}
	locked = true
	if err := datastore.UpdateResource(ctx, s, info); err != nil {
		t.Fatal(err)
	}
	put(t, s, configKey, `{"strict_affinity":true,"auto_allocate_blocks":true,"maxBlocksPerHost":1}`)
	if _, err := a.Assign(ctx, Request{Handle: "x"}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Assign(ctx, Request{Handle: "y"}); err == nil || !strings.Contains(err.Error(), "maxBlocksPerHost allows (1)") {
		t.Errorf("limit: %v", err)
	}
	put(t, s, configKey, `{"strict_affinity":true,"auto_allocate_blocks":false}`)
	if _, err := a.Assign(ctx, Request{Handle: "y"}); err == nil || !strings.Contains(err.Error(), "auto_allocate_blocks is off") {
		t.Errorf("no auto allocation: %v", err)
	}
	put(t, s, configKey, `[`)
	if _, err := a.Assign(ctx, Request{Handle: "y"}); err == nil || !strings.Contains(err.Error(), configKey) {
		t.Errorf("malformed configuration: %v", err)
	}
}
