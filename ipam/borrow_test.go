package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"margay/datastore"
	"margay/ipam/audit"
)

// sized makes a pool of blocks of that size.
func sized(cidr string, bits int) *datastore.IPPool {
	return pool("p", cidr, func(s *datastore.IPPoolSpec) { s.BlockSize = bits })
}

// sound fails the test where the store contradicts itself.
func sound(t *testing.T, s *datastore.Store) *audit.Report {
	t.Helper()
	r, err := audit.Look(t.Context(), s, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Integrity() {
		t.Error(p)
	}
	return r
}

func mustAssign(t *testing.T, a *Allocator, req Request) Assignment {
	t.Helper()
	got, err := a.Assign(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// A node without a block of its own borrows, unless strict affinity forbids it.
func TestBorrow(t *testing.T) {
	s, ctx := openStore(t, sized("10.244.0.0/30", 30)), t.Context()
	n1, n2 := New(s, "n1", nil), New(s, "n2", nil)
	mustAssign(t, n1, Request{Handle: "a"})
	put(t, s, configKey, `{"strict_affinity":true,"auto_allocate_blocks":true}`)
	for _, req := range []Request{{Handle: "b"}, {Handle: "b", IPv4: Ask{IP: addr("10.244.0.3")}}} {
		if _, err := n2.Assign(ctx, req); err == nil || !strings.Contains(err.Error(), "strict affinity forbids to borrow") {
			t.Errorf("%+v: %v", req, err)
		}
	}
	put(t, s, configKey, `{"strict_affinity":false,"auto_allocate_blocks":true}`)
	got := mustAssign(t, n2, Request{Handle: "b"})
	fixed := mustAssign(t, n2, Request{Handle: "c", IPv4: Ask{IP: addr("10.244.0.3")}})
	if got.Block != prefix("10.244.0.0/30") || fixed.Addr != addr("10.244.0.3") {
		t.Errorf("%+v, %+v", got, fixed)
	}
	if blocks, err := n2.ConfirmedBlocks(ctx); err != nil || len(blocks) != 0 {
		t.Errorf("a borrower owns %v, %v", blocks, err)
	}
	// The lender goes on with what it has; nobody's address is given out twice.
	mustAssign(t, n1, Request{Handle: "d"})
	if _, err := n1.Assign(ctx, Request{Handle: "e"}); !errors.Is(err, ErrNoAddress) || !strings.Contains(err.Error(), "other nodes' blocks are full too") {
		t.Errorf("full: %v", err)
	}
	r := sound(t, s)
	if a := r.Allocations[got.Addr.String()][0]; !a.Borrowed || a.Node != "n2" {
		t.Errorf("%+v", a)
	}
	if released, err := n1.ReleaseHandle(ctx, "b"); err != nil || !slices.Equal(released, []netip.Addr{got.Addr}) {
		t.Errorf("%v, %v", released, err)
	}
	sound(t, s)
}

// Limits on claiming make a node borrow, or refuse where it may not.
func TestLimitsThenBorrow(t *testing.T) {
	s, ctx := openStore(t, sized("10.244.0.0/24", 30)), t.Context()
	put(t, s, configResource, `{"spec":{"strictAffinity":false,"maxBlocksPerHost":1}}`)
	mustAssign(t, New(s, "n1", nil), Request{Handle: "n1"})
	n2 := New(s, "n2", nil)
	for i := range 5 {
		mustAssign(t, n2, Request{Handle: fmt.Sprint("n2-", i)})
	}
	if blocks, err := n2.ConfirmedBlocks(ctx); err != nil || len(blocks) != 1 {
		t.Errorf("blocks %v, %v", blocks, err)
	}
	put(t, s, configKey, `{}`) // Calico leaves out what is false
	if got := mustAssign(t, New(s, "n3", nil), Request{Handle: "n3"}); got.Block == (netip.Prefix{}) {
		t.Errorf("%+v", got)
	}
	if blocks, err := New(s, "n3", nil).ConfirmedBlocks(ctx); err != nil || len(blocks) != 0 {
		t.Errorf("auto_allocate_blocks is off, and n3 has %v, %v", blocks, err)
	}
	sound(t, s)
}

// A block that is empty goes to a node in want, but only a minute after it was claimed.
func TestTakeOver(t *testing.T) {
	s, ctx := openStore(t, sized("10.244.0.0/30", 30)), t.Context()
	put(t, s, configKey, `{"strict_affinity":true,"auto_allocate_blocks":true}`)
	n1, n2 := New(s, "n1", nil), New(s, "n2", nil)
	mustAssign(t, n1, Request{Handle: "a"})
	clock := time.Now()
	n2.now = func() time.Time { return clock }
	for _, step := range []struct {
		name  string
		after time.Duration
		empty bool
		ok    bool
	}{
		{"in use", 2 * time.Minute, false, false},
		{"empty too briefly", 30 * time.Second, true, false},
		{"the clock jumped back", -time.Hour, true, false},
		{"empty", 2 * time.Minute, true, true},
	} {
		if step.empty {
			if _, err := n1.ReleaseHandle(ctx, "a"); err != nil {
				t.Fatal(err)
			}
		}
		clock = time.Now().Add(step.after)
		_, err := n2.Assign(ctx, Request{Handle: "b"})
		if (err == nil) != step.ok {
			t.Errorf("%s: %v", step.name, err)
		}
		sound(t, s)
	}
	// n1 remembers the block, and finds out that it has lost it.
	if _, err := n1.Assign(ctx, Request{Handle: "c"}); !errors.Is(err, ErrNoAddress) {
		t.Errorf("n1: %v", err)
	}
	if blocks, err := n1.ConfirmedBlocks(ctx); err != nil || len(blocks) != 0 {
		t.Errorf("n1: %v, %v", blocks, err)
	}
}

func TestReservations(t *testing.T) {
	s, ctx := openStore(t, sized("10.244.0.0/29", 30)), t.Context()
	put(t, s, reservationPrefix+"r", `{"spec":{"reservedCIDRs":["10.244.0.0/31","10.244.0.2","10.244.0.3/32","10.244.0.5","nonsense"]}}`)
	put(t, s, reservationPrefix+"broken", `[`)
	a := New(s, "n1", nil)
	var got []netip.Addr
	for i := range 3 {
		got = append(got, mustAssign(t, a, Request{Handle: fmt.Sprint(i)}).Addr)
	}
	if want := []netip.Addr{addr("10.244.0.4"), addr("10.244.0.6"), addr("10.244.0.7")}; !slices.Equal(got, want) {
		t.Errorf("%v, expected %v", got, want)
	}
	if _, err := a.Assign(ctx, Request{Handle: "x"}); !errors.Is(err, ErrNoAddress) {
		t.Errorf("only reserved ones are left: %v", err)
	}
	if blocks, err := a.ConfirmedBlocks(ctx); err != nil || len(blocks) != 1 {
		t.Errorf("a wholly reserved block was claimed: %v, %v", blocks, err)
	}
	// Whoever asks for it gets it.
	if got := mustAssign(t, a, Request{Handle: "x", IPv4: Ask{IP: addr("10.244.0.5")}}); got.Addr != addr("10.244.0.5") {
		t.Errorf("%+v", got)
	}
	sound(t, s)
}

func TestCooldown(t *testing.T) {
	s, ctx := openStore(t, sized("10.244.0.0/31", 31)), t.Context()
	put(t, s, configKey, `{"strict_affinity":true,"auto_allocate_blocks":true,"ipCooldownSeconds":60}`)
	a, clock := New(s, "n1", nil), time.Now()
	a.now = func() time.Time { return clock }
	first := mustAssign(t, a, Request{Handle: "a"})
	mustAssign(t, a, Request{Handle: "b"})
	if released, err := a.ReleaseHandle(ctx, "a"); err != nil || !slices.Equal(released, []netip.Addr{first.Addr}) {
		t.Fatalf("%v, %v", released, err)
	}
	if _, err := Lookup(ctx, s, first.Addr); !errors.Is(err, ErrNotAssigned) {
		t.Errorf("a released address has a holder: %v", err)
	}
	if err := a.ReleaseAddress(ctx, Release{Addr: first.Addr}); !errors.Is(err, ErrNotAssigned) {
		t.Errorf("released twice: %v", err)
	}
	clock = clock.Add(50 * time.Second)
	if _, err := a.Assign(ctx, Request{Handle: "c"}); !errors.Is(err, ErrNoAddress) {
		t.Errorf("given out while cooling down: %v", err)
	}
	if _, err := a.Assign(ctx, Request{Handle: "c", IPv4: Ask{IP: first.Addr}}); !errors.Is(err, ErrAddressInUse) {
		t.Errorf("given out by name while cooling down: %v", err)
	}
	sound(t, s)
	clock = clock.Add(15 * time.Second)
	if got := mustAssign(t, New(s, "n1", nil).at(clock), Request{Handle: "c"}); got.Addr != first.Addr {
		t.Errorf("%+v", got)
	}
	if r := sound(t, s); len(r.Allocations) != 2 {
		t.Errorf("%v", r.Allocations)
	}
}

// at sets an allocator's clock.
func (a *Allocator) at(t time.Time) *Allocator {
	a.now = func() time.Time { return t }
	return a
}

func TestReleaseAddress(t *testing.T) {
	s, ctx := openStore(t, sized("10.244.0.0/24", 26)), t.Context()
	a := New(s, "n1", nil)
	got := mustAssign(t, a, Request{Handle: "a"})
	h, err := Lookup(ctx, s, got.Addr)
	if err != nil || h.Handle != "a" || h.Block != got.Block || h.Attrs["node"] != "n1" {
		t.Fatalf("%+v, %v", h, err)
	}
	wrong := h.Sequence + 1
	for _, r := range []Release{{Addr: got.Addr, Sequence: &wrong}, {Addr: got.Addr, Handle: "b"}} {
		if err := a.ReleaseAddress(ctx, r); !errors.Is(err, ErrReassigned) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	for _, r := range []Release{{Addr: addr("10.244.0.250")}, {Addr: addr("192.0.2.1")}, {Addr: addr("fd00::1")}} {
		if err := a.ReleaseAddress(ctx, r); !errors.Is(err, ErrNotAssigned) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	if err := a.ReleaseAddress(ctx, Release{}); err == nil {
		t.Error("no address was accepted")
	}
	if err := New(s, "n2", nil).ReleaseAddress(ctx, Release{Addr: got.Addr, Handle: "a", Sequence: &h.Sequence}); err != nil {
		t.Error(err)
	}
	if r := sound(t, s); len(r.Allocations) != 0 || r.Handles != 0 {
		t.Errorf("%+v", r)
	}
	// One of several addresses of a handle; and one whose handle is gone.
	put(t, s, handleKey("two"), `{"block":{"10.244.1.0/30":2},"deleted":false,"new":1}`)
	b := newBlock(prefix("10.244.1.0/30"), "", 7)
	for range 2 {
		b.assign(attribute{handle: "two", hasHandle: true})
	}
	b.assign(attribute{handle: "gone", hasHandle: true})
	raw, err := b.encode()
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, blockKey(b.cidr), string(raw))
	for _, ip := range []string{"10.244.1.0", "10.244.1.2"} {
		if err := a.ReleaseAddress(ctx, Release{Addr: addr(ip)}); err != nil {
			t.Error(err)
		}
	}
	if v := value(t, s, handleKey("two")); v != `{"block":{"10.244.1.0/30":1},"deleted":false,"new":1}` {
		t.Errorf("handle: %s", v)
	}
	if err := a.ReleaseAddress(ctx, Release{Addr: addr("10.244.1.1")}); err != nil {
		t.Error(err)
	}
	for _, key := range []string{handleKey("two"), blockKey(b.cidr)} {
		if _, err := s.Get(ctx, key); !errors.Is(err, datastore.ErrNotFound) {
			t.Errorf("%s: %v", key, err)
		}
	}
}

// A node that is gone leaves nothing but what others borrowed of it.
func TestReleaseNode(t *testing.T) {
	s, ctx := openStore(t, sized("10.244.0.0/24", 25)), t.Context()
	n1, n2, n3 := New(s, "n1", nil), New(s, "n2", nil), New(s, "n3", nil)
	lent := mustAssign(t, n1, Request{Handle: "lender"})
	mustAssign(t, n2, Request{Handle: "other"})
	for i := range 70 {
		mustAssign(t, n1, Request{Handle: fmt.Sprint("pod", i)})
	}
	borrowed := mustAssign(t, n3, Request{Handle: "borrower", IPv4: Ask{IP: newBlock(lent.Block, "", 0).addr(100)}})
	mustAssign(t, n1, Request{Handle: "abroad", IPv4: Ask{IP: otherHalf(lent.Block)}})
	put(t, s, affinityKey("n1", prefix("10.244.9.0/25")), `{"state":"pending","deleted":false}`)
	released, err := n2.ReleaseNode(ctx, "n1")
	if err != nil || len(released) != 72 {
		t.Errorf("%d released, %v", len(released), err)
	}
	r := sound(t, s)
	if len(r.Allocations) != 2 || r.Allocations[borrowed.Addr.String()] == nil {
		t.Errorf("%v", r.Allocations)
	}
	if kvs, _, err := s.Keys(ctx, root+"host/n1/"); err != nil || len(kvs) != 0 {
		t.Errorf("%v, %v", kvs, err)
	}
	for _, bad := range []string{"", "a/b"} {
		if _, err := n2.ReleaseNode(ctx, bad); err == nil {
			t.Errorf("node %q was accepted", bad)
		}
	}
}

// otherHalf is an address in the pool's other block.
func otherHalf(block netip.Prefix) netip.Addr {
	if block.Contains(addr("10.244.0.5")) {
		return addr("10.244.0.250")
	}
	return addr("10.244.0.5")
}
