package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"margay/datastore"
	"margay/ipam/audit"
)

var both = Ask{Want: Required}

// clean fails the test unless the checker finds nothing wrong.
func clean(t *testing.T, s *datastore.Store) {
	t.Helper()
	r, err := audit.Look(t.Context(), s, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Integrity() {
		t.Errorf("the checker: %s", p)
	}
}

// A pod of both families: two addresses, one handle, and what etcd holds.
func TestDualStack(t *testing.T) {
	s, ctx := openStore(t, pool("four", "10.244.0.0/26"), pool("six", "fd00:10:244::/64")), t.Context()
	a := New(s, "n1", nil)
	got, err := a.AssignAll(ctx, Request{Handle: "net.a", IPv4: both, IPv6: both})
	if err != nil || len(got) != 2 || got[0].Addr != addr("10.244.0.0") || !prefix("fd00:10:244::/64").Contains(got[1].Addr) || got[1].Block.Bits() != 122 {
		t.Fatalf("%+v, %v", got, err)
	}
	six := got[1]
	if six.Block.Contains(six.Addr) == false || six.Addr != six.Block.Addr() || six.Pool != "six" {
		t.Errorf("%+v", six)
	}
	key := strings.Replace(six.Block.String(), "/", "-", 1)
	if v := value(t, s, "/calico/ipam/v2/host/n1/ipv6/block/"+key); v != `{"state":"confirmed","deleted":false}` {
		t.Errorf("affinity: %s", v)
	}
	if v := value(t, s, "/calico/ipam/v2/assignment/ipv6/block/"+key); !strings.HasPrefix(v, fmt.Sprintf(`{"cidr":%q,"affinity":"host:n1","allocations":[0,null,`, six.Block)) {
		t.Errorf("block: %s", v)
	}
	if v := value(t, s, "/calico/ipam/v2/handle/net.a"); v != fmt.Sprintf(`{"block":{"10.244.0.0/26":1,%q:1},"deleted":false}`, six.Block) {
		t.Errorf("handle: %s", v)
	}
	if held, err := a.HandleAddresses(ctx, "net.a"); err != nil || len(held) != 2 || held[1] != six.Addr {
		t.Errorf("held: %v, %v", held, err)
	}
	if h, err := Lookup(ctx, s, six.Addr); err != nil || h.Handle != "net.a" || h.Block != six.Block {
		t.Errorf("lookup: %+v, %v", h, err)
	}
	clean(t, s)
	// One of the two goes alone; then the handle with the rest.
	if err := a.ReleaseAddress(ctx, Release{Addr: six.Addr}); err != nil {
		t.Error(err)
	}
	if freed, err := a.ReleaseHandle(ctx, "net.a"); err != nil || len(freed) != 1 || freed[0] != got[0].Addr {
		t.Errorf("released: %v, %v", freed, err)
	}
	clean(t, s)
}

// When one family has no address, the other's is not given either, and nothing of the handle is left.
func TestHalfADualStackAssignmentIsNone(t *testing.T) {
	s, ctx := openStore(t, pool("four", "10.244.0.0/26"), pool("six", "fd00::/127", func(s *datastore.IPPoolSpec) { s.BlockSize = 127 })), t.Context()
	a := New(s, "n1", nil)
	for i := range 2 {
		if _, err := a.AssignAll(ctx, Request{Handle: fmt.Sprint("net.", i), IPv4: both, IPv6: both}); err != nil {
			t.Fatal(err)
		}
	}
	for _, req := range []Request{
		{Handle: "net.x", IPv4: both, IPv6: both},
		{Handle: "net.x", IPv4: both, IPv6: Ask{IP: addr("fd00::1")}},
		{Handle: "net.x", IPv4: Ask{IP: addr("10.244.0.9")}, IPv6: Ask{Want: Required, Pools: []string{"nowhere"}}},
	} {
		if got, err := a.AssignAll(ctx, req); !errors.Is(err, ErrNoAddress) && !errors.Is(err, ErrAddressInUse) {
			t.Errorf("%+v: %v, %v", req, got, err)
		}
		use, err := Usage(ctx, s)
		if err != nil || use[0].InUse != 2 || use[1].InUse != 2 {
			t.Errorf("in use after a refusal: %+v, %v", use, err)
		}
		if held, err := a.HandleAddresses(ctx, "net.x"); err != nil || len(held) != 0 {
			t.Errorf("the refused handle holds %v, %v", held, err)
		}
	}
	clean(t, s)
}

// What is wanted if there is a pool is given where there is one, and missing where there is none.
func TestWantedIfThereIsAPool(t *testing.T) {
	s, ctx := openStore(t, pool("four", "10.244.0.0/26")), t.Context()
	a := New(s, "n1", nil)
	ask := Request{Handle: "net.a", IPv4: both, IPv6: Ask{Want: IfPool}}
	if got, err := a.AssignAll(ctx, ask); err != nil || len(got) != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	if err := datastore.CreateResource(ctx, s, pool("six", "fd00::/120")); err != nil {
		t.Fatal(err)
	}
	ask.Handle = "net.b"
	if got, err := a.AssignAll(ctx, ask); err != nil || len(got) != 2 {
		t.Fatalf("with a pool, which the allocator had not seen: %+v, %v", got, err)
	}
	six := Request{Handle: "net.c", IPv4: Ask{Want: IfPool, Pools: []string{"six"}}, IPv6: Ask{Want: IfPool}}
	if got, err := a.AssignAll(ctx, six); err != nil || len(got) != 1 || !got[0].Addr.Is6() {
		t.Errorf("IPv6 alone: %+v, %v", got, err)
	}
	clean(t, s)
}

// A block that an older pool of another block size left is not claimed over, in either family.
func TestOldBlocksOfAnotherSize(t *testing.T) {
	for _, tt := range []struct{ pool, inside, over string }{
		{"10.244.0.0/25", "10.244.0.32/28", "10.244.0.64/26"},
		{"fd00:0:0:7::40/121", "fd00:0:0:7::48/125", "fd00:0:0:7::/120"},
	} {
		size := prefix(tt.pool).Bits() + 1
		s, ctx := openStore(t, pool("p", prefix(tt.pool).Masked().String(), func(s *datastore.IPPoolSpec) { s.BlockSize = size })), t.Context()
		for _, old := range []string{tt.inside} {
			raw, err := newBlock(prefix(old), "host:old", 1).encode()
			if err != nil {
				t.Fatal(err)
			}
			put(t, s, blockKey(prefix(old)), string(raw))
			put(t, s, affinityKey("old", prefix(old)), `{"state":"confirmed","deleted":false}`)
		}
		ask := Request{IPv4: Ask{Want: IfPool}, IPv6: Ask{Want: IfPool}}
		for i := range 3 {
			a := New(s, fmt.Sprint("n", i), nil)
			ask.Handle = fmt.Sprint("net.", i)
			got, err := a.Assign(ctx, ask)
			if err != nil && i == 0 {
				t.Fatal(err)
			}
			if err == nil && prefix(tt.inside).Contains(got.Addr) && got.Block != prefix(tt.inside) || got.Block.IsValid() && got.Block != prefix(tt.inside) && got.Block.Overlaps(prefix(tt.inside)) {
				t.Errorf("%s: %+v lies over %s", tt.pool, got, tt.inside)
			}
		}
		clean(t, s)
	}
}

func TestSelectors(t *testing.T) {
	s, ctx := openStore(t,
		pool("a-rack1", "10.1.0.0/24", func(s *datastore.IPPoolSpec) { s.NodeSelector = "rack == '1'" }),
		pool("b-rack2", "10.2.0.0/24", func(s *datastore.IPPoolSpec) { s.NodeSelector = "rack in {'2', '3'} && !has(old)" }),
		pool("c-team", "10.3.0.0/24", func(s *datastore.IPPoolSpec) { s.NamespaceSelector = namespaceLabel + " == 'team'" }),
		pool("d-labels", "10.4.0.0/24", func(s *datastore.IPPoolSpec) { s.NamespaceSelector = "tier == 'gold'" }),
	), t.Context()
	for name, labels := range map[string]map[string]string{"n1": {"rack": "1"}, "n2": {"rack": "2"}, "n3": {"rack": "3", "old": ""}} {
		n := datastore.NewNode(name)
		n.Metadata.Labels = labels
		if err := datastore.CreateResource(ctx, s, n); err != nil {
			t.Fatal(err)
		}
	}
	for i, tt := range []struct {
		node string
		req  Request
		want string
	}{
		{"n1", Request{}, "a-rack1"},
		{"n2", Request{}, "b-rack2"},
		{"n3", Request{}, `pool b-rack2: spec.nodeSelector "rack in {'2', '3'} && !has(old)" does not select node n3; pool c-team: spec.namespaceSelector`},
		{"n3", Request{}, `pool d-labels: spec.namespaceSelector "tier == 'gold'": label tier of namespaces is not known here`},
		{"n3", Request{Namespace: "team"}, "c-team"},
		{"n3", Request{Use: datastore.UseTunnel}, "c-team"},
		{"n3", Request{IPv4: Ask{Pools: []string{"a-rack1"}}}, "a-rack1"}, // who names a pool gets it
		{"n3", Request{IPv4: Ask{Pools: []string{"d-labels"}}}, "d-labels"},
		{"unknown", Request{Namespace: "team"}, "c-team"},
	} {
		tt.req.Handle = fmt.Sprint("net.", i)
		got, err := New(s, tt.node, nil).Assign(ctx, tt.req)
		if err != nil && !strings.Contains(err.Error(), tt.want) || err == nil && got.Pool != tt.want {
			t.Errorf("%d: %+v, %v, expected %q", i, got, err, tt.want)
		}
	}
	// A label that changes counts from the next assignment on, though the allocator remembers.
	a := New(s, "n1", nil)
	for i, tt := range []struct{ rack, want string }{{"1", "a-rack1"}, {"2", "b-rack2"}, {"1", "a-rack1"}} {
		if err := datastore.ModifyResource(ctx, s, "n1", func(n *datastore.Node) error {
			n.Metadata.Labels = map[string]string{"rack": tt.rack}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for j := range 2 {
			if got, err := a.Assign(ctx, Request{Handle: fmt.Sprintf("again.%d-%d", i, j)}); err != nil || got.Pool != tt.want {
				t.Errorf("rack %s: %+v, %v", tt.rack, got, err)
			}
		}
	}
	clean(t, s)
}

// The walk visits each block of a pool once, in both families, and at the ends of a range.
func TestWalkBothFamilies(t *testing.T) {
	for _, tt := range []struct {
		pool string
		bits int
	}{{"10.0.0.0/8", 20}, {"255.255.255.0/24", 28}, {"10.0.0.0/26", 26}, {"fd00::/112", 122}, {"fdff:ffff:ffff:ffff:ffff:ffff:ffff:0/112", 122}, {"fd00:0:0:0:ffff:ffff:ffff:fff0/124", 126}} {
		p := prefix(tt.pool)
		w, seen := newWalk(p, tt.bits, "n1"), map[netip.Prefix]bool{}
		for cidr, ok := w.next(); ok; cidr, ok = w.next() {
			if seen[cidr] || !p.Contains(cidr.Addr()) || cidr != cidr.Masked() || cidr.Bits() != tt.bits {
				t.Fatalf("%s: %s", tt.pool, cidr)
			}
			seen[cidr] = true
		}
		if len(seen) != 1<<(tt.bits-p.Bits()) {
			t.Errorf("%s: %d blocks", tt.pool, len(seen))
		}
	}
	// In a pool without end it goes on, inside the pool.
	w := newWalk(prefix("fd00::/8"), 122, "n1")
	seen := map[netip.Prefix]bool{}
	for range 1000 {
		cidr, ok := w.next()
		if !ok || seen[cidr] || !prefix("fd00::/8").Contains(cidr.Addr()) {
			t.Fatal(cidr, ok)
		}
		seen[cidr] = true
	}
}
