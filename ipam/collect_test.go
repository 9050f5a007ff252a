package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"margay/datastore"
)

// collectorOf makes a collector with a clock to be moved, and what its node's pods use.
func collectorOf(a *Allocator) (c *Collector, owned *Owned, pass func(time.Duration)) {
	owned = &Owned{Handles: map[string]bool{}, Addrs: map[netip.Addr]bool{}}
	c = NewCollector(a, DefaultGrace, func(context.Context) (Owned, error) { return *owned, nil })
	clock := time.Now()
	c.now = func() time.Time { return clock }
	a.now = func() time.Time { return clock }
	return c, owned, func(d time.Duration) { clock = clock.Add(d) }
}

func (c *Collector) mustLook(t *testing.T) Collected {
	t.Helper()
	got, err := c.Look(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// What a pod, a tunnel, a hand or a stranger holds stays; what nobody holds goes, and not before its time.
func TestCollectAddresses(t *testing.T) {
	s, ctx := openStore(t, pool("p", "10.244.0.0/26", func(s *datastore.IPPoolSpec) { s.BlockSize = 28 }), pool("six", "fd00::/64")), t.Context()
	for _, name := range []string{"n1", "n2"} {
		if err := datastore.CreateResource(ctx, s, datastore.NewNode(name)); err != nil {
			t.Fatal(err)
		}
	}
	a, other := New(s, "n1", nil), New(s, "n2", nil)
	c, owned, pass := collectorOf(a)
	pod := mustAssign(t, a, Request{Handle: "net.pod", IPv4: both, IPv6: both})
	route := mustAssign(t, a, Request{Handle: "net.route"})
	tunnel := mustAssign(t, a, Request{Handle: "ipip-tunnel-addr-n1", Use: datastore.UseTunnel, Attrs: map[string]string{"type": "ipipTunnelAddress"}})
	service := mustAssign(t, a, Request{Handle: "lb-x", Attrs: map[string]string{"type": "loadBalancer"}})
	strangers := mustAssign(t, other, Request{Handle: "net.stranger"})
	leaked, err := a.AssignAll(ctx, Request{Handle: "net.leaked", IPv4: both, IPv6: both})
	if err != nil {
		t.Fatal(err)
	}
	borrowed := mustAssign(t, a, Request{Handle: "net.borrowed", IPv4: Ask{IP: strangers.Block.Addr().Next().Next()}})
	lent := mustAssign(t, other, Request{Handle: "net.lent", IPv4: Ask{IP: pod.Block.Addr().Next().Next().Next().Next().Next().Next().Next()}})
	back := mustAssign(t, a, Request{Handle: "net.back"})
	owned.Handles["net.pod"], owned.Handles["ipip-tunnel-addr-n1"], owned.Addrs[route.Addr] = true, true, true

	if got := c.mustLook(t); len(got.Addresses) != 0 || got.Suspects != 4 {
		t.Fatalf("first look: %+v", got)
	}
	pass(DefaultGrace / 2)
	if got := c.mustLook(t); len(got.Addresses) != 0 || got.Suspects != 4 {
		t.Fatalf("within the grace period: %+v", got)
	}
	// One of the suspects is released and given to another pod meanwhile; another turns out to be in use.
	if _, err := a.ReleaseHandle(ctx, "net.back"); err != nil {
		t.Fatal(err)
	}
	if again := mustAssign(t, a, Request{Handle: "net.again", IPv4: Ask{IP: back.Addr}}); again.Addr != back.Addr {
		t.Fatal(again)
	}
	pass(DefaultGrace/2 + time.Second)
	got := c.mustLook(t)
	want := []netip.Addr{leaked[0].Addr, leaked[1].Addr, borrowed.Addr}
	slices.SortFunc(got.Addresses, netip.Addr.Compare)
	slices.SortFunc(want, netip.Addr.Compare)
	if !slices.Equal(got.Addresses, want) || got.Suspects != 1 {
		t.Fatalf("second look: %+v, expected %v", got, want)
	}
	for _, addr := range []netip.Addr{pod.Addr, route.Addr, tunnel.Addr, service.Addr, strangers.Addr, lent.Addr, back.Addr} {
		if _, err := Lookup(ctx, s, addr); err != nil {
			t.Errorf("%s is gone: %v", addr, err)
		}
	}
	for _, addr := range want {
		if _, err := Lookup(ctx, s, addr); !errors.Is(err, ErrNotAssigned) {
			t.Errorf("%s is still there: %v", addr, err)
		}
	}
	clean(t, s)
	// Who cannot say what is used gives nothing back.
	pass(2 * DefaultGrace)
	c.owned = func(context.Context) (Owned, error) { return Owned{}, errors.New("no idea") }
	if _, err := c.Look(ctx); err == nil {
		t.Error("a look without knowledge")
	}
	if _, err := Lookup(ctx, s, back.Addr); err != nil {
		t.Errorf("%s is gone: %v", back.Addr, err)
	}
}

// While the datastore is locked nothing is given back, and the grace period begins anew.
func TestCollectRespectsTheLock(t *testing.T) {
	s, ctx := openStore(t, pool("p", "10.244.0.0/26")), t.Context()
	a := New(s, "n1", nil)
	c, _, pass := collectorOf(a)
	leaked := mustAssign(t, a, Request{Handle: "net.leaked"})
	c.mustLook(t)
	info, ready := datastore.NewClusterInformation("default"), false
	info.Spec.DatastoreReady = &ready
	if err := datastore.CreateResource(ctx, s, info); err != nil {
		t.Fatal(err)
	}
	pass(2 * DefaultGrace)
	if got := c.mustLook(t); len(got.Addresses)+got.Suspects != 0 {
		t.Errorf("locked: %+v", got)
	}
	ready = true
	if err := datastore.UpdateResource(ctx, s, info); err != nil {
		t.Fatal(err)
	}
	if got := c.mustLook(t); len(got.Addresses) != 0 || got.Suspects != 1 {
		t.Errorf("unlocked: %+v", got)
	}
	pass(DefaultGrace)
	if got := c.mustLook(t); !slices.Equal(got.Addresses, []netip.Addr{leaked.Addr}) {
		t.Errorf("after the grace period: %+v", got)
	}
}

// Blocks: an empty one goes when another of the pool is there, or the pool does not serve the node any more; what is left
// of a claim goes; the last one stays.
func TestCollectBlocks(t *testing.T) {
	s, ctx := openStore(t, pool("a", "10.1.0.0/24", func(s *datastore.IPPoolSpec) { s.BlockSize = 30 }), pool("b", "10.2.0.0/24")), t.Context()
	a := New(s, "n1", nil)
	c, owned, pass := collectorOf(a)
	var first Assignment
	for i := range 8 { // two blocks of a, full
		got := mustAssign(t, a, Request{Handle: fmt.Sprint("net.", i), IPv4: Ask{Pools: []string{"a"}}})
		owned.Handles[fmt.Sprint("net.", i)] = true
		if i == 0 {
			first = got
		}
	}
	b := mustAssign(t, a, Request{Handle: "net.b", IPv4: Ask{Pools: []string{"b"}}})
	if _, err := a.ReleaseHandle(ctx, "net.b"); err != nil {
		t.Fatal(err)
	}
	put(t, s, affinityKey("n1", prefix("10.1.0.252/30")), `{"state":"pending","deleted":false}`) // died in a claim
	stranger := mustAssign(t, New(s, "n2", nil), Request{Handle: "net.x", IPv4: Ask{Pools: []string{"a"}}})
	put(t, s, affinityKey("n1", stranger.Block), `{"state":"pending","deleted":false}`) // lost a claim and died
	if err := datastore.CreateResource(ctx, s, datastore.NewNode("n2")); err != nil {
		t.Fatal(err)
	}
	twice := func() Collected {
		c.mustLook(t)
		pass(DefaultGrace)
		return c.mustLook(t)
	}
	if got := twice(); !slices.Equal(got.Blocks, sorted(prefix("10.1.0.252/30"), stranger.Block)) || len(got.Addresses) != 0 {
		t.Errorf("left of claims: %+v", got)
	}
	for i := range 8 { // all but one address of the first block go
		if i == 0 {
			continue
		}
		if _, err := a.ReleaseHandle(ctx, fmt.Sprint("net.", i)); err != nil {
			t.Fatal(err)
		}
	}
	if got := twice(); len(got.Blocks) != 1 || got.Blocks[0].Contains(first.Addr) || got.Blocks[0].Bits() != 30 {
		t.Errorf("an empty block beside one with room: %+v", got)
	}
	if err := datastore.ModifyResource(ctx, s, "b", func(p *datastore.IPPool) error { p.Spec.NodeSelector = "never == ''"; return nil }); err != nil {
		t.Fatal(err)
	}
	if got := twice(); !slices.Equal(got.Blocks, []netip.Prefix{b.Block}) {
		t.Errorf("the block of a pool that does not select the node: %+v", got)
	}
	if got := twice(); len(got.Blocks)+got.Suspects != 0 {
		t.Errorf("in order: %+v", got)
	}
	if blocks, err := a.ConfirmedBlocks(ctx); err != nil || !slices.Equal(blocks, []netip.Prefix{first.Block}) {
		t.Errorf("left: %v, %v", blocks, err)
	}
	clean(t, s)
	if _, err := a.Assign(ctx, Request{Handle: "net.new", IPv4: Ask{Pools: []string{"a"}}}); err != nil {
		t.Error(err)
	}
}

func sorted(p ...netip.Prefix) []netip.Prefix {
	slices.SortFunc(p, netip.Prefix.Compare)
	return p
}

// What a node has left that was deleted goes: its blocks, its pods' addresses in others' blocks, and handles that hold
// nothing; what a WorkloadEndpoint vouches for stays.
func TestCollectGoneNodes(t *testing.T) {
	s, ctx := openStore(t, pool("p", "10.244.0.0/24", func(s *datastore.IPPoolSpec) { s.BlockSize = 28 })), t.Context()
	for _, name := range []string{"n1", "alive"} {
		if err := datastore.CreateResource(ctx, s, datastore.NewNode(name)); err != nil {
			t.Fatal(err)
		}
	}
	own := mustAssign(t, New(s, "n1", nil), Request{Handle: "net.own"})
	alive := mustAssign(t, New(s, "alive", nil), Request{Handle: "net.alive"})
	gone := mustAssign(t, New(s, "gone", nil), Request{Handle: "net.gone"})
	lent := mustAssign(t, New(s, "gone", nil), Request{Handle: "net.lent", IPv4: Ask{IP: own.Block.Addr().Next().Next()}})
	calico := mustAssign(t, New(s, "calico", nil), Request{Handle: "net.calico"})
	put(t, s, endpointPrefix+"default/calico-k8s-web-eth0", `{"spec":{"node":"calico","ipNetworks":["`+calico.Addr.String()+`/32"]}}`)
	put(t, s, affinityKey("half", prefix("10.244.0.240/28")), `{"state":"pending","deleted":false}`)
	put(t, s, handleKey("net.empty"), `{"block":{},"deleted":false}`)
	a := New(s, "n1", nil)
	c, owned, pass := collectorOf(a)
	owned.Handles["net.own"] = true
	if got := c.mustLook(t); got.Suspects != 3 {
		t.Fatalf("first look: %+v", got)
	}
	pass(DefaultGrace)
	got := c.mustLook(t)
	if !slices.Equal(got.Nodes, []string{"gone", "half"}) || len(got.Addresses) != 2 || !slices.Contains(got.Addresses, gone.Addr) ||
		!slices.Contains(got.Addresses, lent.Addr) || !slices.Equal(got.Handles, []string{"net.empty"}) {
		t.Errorf("second look: %+v", got)
	}
	for _, addr := range []netip.Addr{own.Addr, alive.Addr, calico.Addr} {
		if _, err := Lookup(ctx, s, addr); err != nil {
			t.Errorf("%s is gone: %v", addr, err)
		}
	}
	clean(t, s)
}

// A node that has come back between the look and the release keeps what it has.
func TestGoneNodeComesBack(t *testing.T) {
	s, ctx := openStore(t, pool("p", "10.244.0.0/24")), t.Context()
	pod := mustAssign(t, New(s, "n1", nil), Request{Handle: "net.pod"})
	if err := datastore.CreateResource(ctx, s, datastore.NewNode("n1")); err != nil {
		t.Fatal(err)
	}
	if freed, err := New(s, "n2", nil).releaseNode(ctx, "n1", true); !errors.Is(err, ErrReassigned) || len(freed) != 0 {
		t.Errorf("%v, %v", freed, err)
	}
	if _, err := Lookup(ctx, s, pod.Addr); err != nil {
		t.Error(err)
	}
	if err := datastore.DeleteResource[datastore.Node](ctx, s, "n1"); err != nil {
		t.Fatal(err)
	}
	if freed, err := New(s, "n2", nil).releaseNode(ctx, "n1", true); err != nil || !slices.Equal(freed, []netip.Addr{pod.Addr}) {
		t.Errorf("%v, %v", freed, err)
	}
	clean(t, s)
}

// In each period it is somebody's turn, and in the long run everybody's.
func TestTurn(t *testing.T) {
	names := []string{"a", "b", "c", "d", "e"}
	turns := map[string]int{}
	for period := range int64(1000) {
		turns[turn(names, period)]++
	}
	for _, name := range names {
		if n := turns[name]; n < 120 || n > 280 {
			t.Errorf("%s has %d turns of 1,000", name, n)
		}
	}
	if turn(nil, 1) != "" {
		t.Error("somebody of nobody")
	}
}
