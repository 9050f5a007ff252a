package ipam

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"margay/datastore"
)

// A claim that was interrupted after any of its steps is finished by the next assignment, and is no block until then.
func TestInterruptedClaim(t *testing.T) {
	const (
		block    = "10.244.0.0/26"
		pending  = `{"state":"pending","deleted":false}`
		affinity = "/calico/ipam/v2/host/n1/ipv4/block/10.244.0.0-26"
	)
	made := func(owner string) string {
		raw, err := newBlock(prefix(block), owner, 1).encode()
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	for _, tt := range []struct {
		name            string
		affinity, block string
		before          int  // confirmed blocks before
		ours            bool // whether the block is ours in the end
	}{
		{"affinity pending, no block", pending, "", 0, true},
		{"affinity pending, block made", pending, made("host:n1"), 0, true},
		{"affinity pending, block another's", pending, made("host:n2"), 0, false},
		{"affinity pending, block nobody's", pending, made(""), 0, false},
		{"affinity confirmed, block gone", `{"state":"confirmed","deleted":false,"type":"host"}`, "", 1, true},
		{"affinity confirmed, block another's", `{"state":"confirmed","deleted":false}`, made("host:n2"), 1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, ctx := openStore(t, pool("p", "10.244.0.0/24")), t.Context()
			put(t, s, affinity, tt.affinity)
			if tt.block != "" {
				put(t, s, blockKey(prefix(block)), tt.block)
			}
			a := New(s, "n1", nil)
			if blocks, err := a.ConfirmedBlocks(ctx); err != nil || len(blocks) != tt.before {
				t.Errorf("before: %v, %v", blocks, err)
			}
			got, err := a.Assign(ctx, Request{Handle: "x"})
			if err != nil || (got.Block == prefix(block)) != tt.ours {
				t.Fatalf("%+v, %v", got, err)
			}
			blocks, err := a.ConfirmedBlocks(ctx)
			if err != nil || !slices.Equal(blocks, []netip.Prefix{got.Block}) {
				t.Errorf("after: %v, %v, expected %v", blocks, err, got.Block)
			}
			if strings.Contains(tt.affinity, `"type"`) && !strings.Contains(value(t, s, affinity), `"type":"host"`) {
				t.Error("an unknown field of the affinity was lost")
			}
			kvs, _, err := s.Keys(ctx, AffinityPrefix("n1"))
			if err != nil || len(kvs) != 1 {
				t.Errorf("affinities: %v, %v", kvs, err)
			}
		})
	}
}

// One block that cannot be understood does not stop the node, and is not touched.
func TestMalformedBlock(t *testing.T) {
	s, ctx := openStore(t, pool("p", "10.244.0.0/24")), t.Context()
	put(t, s, "/calico/ipam/v2/host/n1/ipv4/block/10.244.0.0-26", `{"state":"confirmed","deleted":false}`)
	put(t, s, blockKey(prefix("10.244.0.0/26")), `{"cidr":"10.244.0.0/26","allocations":[7]}`)
	put(t, s, "/calico/ipam/v2/host/n1/ipv4/block/garbage", `{}`)
	a := New(s, "n1", nil)
	got, err := a.Assign(ctx, Request{Handle: "x"})
	if err != nil || got.Block == prefix("10.244.0.0/26") {
		t.Fatalf("%+v, %v", got, err)
	}
	if v := value(t, s, blockKey(prefix("10.244.0.0/26"))); v != `{"cidr":"10.244.0.0/26","allocations":[7]}` {
		t.Errorf("the block was changed: %s", v)
	}
	if blocks, err := a.ConfirmedBlocks(ctx); err != nil || len(blocks) != 2 {
		t.Errorf("blocks: %v, %v", blocks, err)
	}
	use, err := Usage(ctx, s)
	if len(use) != 1 || use[0].InUse != 1 || err == nil || !strings.Contains(err.Error(), "10.244.0.0-26") {
		t.Errorf("usage: %+v, %v", use, err)
	}
}

// What Calico wrote is worked on, and what is not understood in it stays.
func TestCalicosBlockInUse(t *testing.T) {
	s, ctx := openStore(t, pool("p", "10.244.0.0/16", func(s *datastore.IPPoolSpec) { s.BlockSize = 29 })), t.Context()
	put(t, s, "/calico/ipam/v2/host/n1/ipv4/block/10.244.40.128-29", `{"state":"confirmed","deleted":false}`)
	put(t, s, blockKey(prefix("10.244.40.128/29")), calicoBlock)
	put(t, s, handleKey("k8s-pod-network.abc"), `{"block":{"10.244.40.128/29":1},"deleted":false}`)
	put(t, s, configKey, `{"auto_allocate_blocks":true,"ipCooldownSeconds":1000000000}`) // so that releasedAt stays
	a := New(s, "n1", nil)
	got, err := a.Assign(ctx, Request{Handle: "x"})
	if err != nil || got.Addr != addr("10.244.40.132") {
		t.Fatalf("%+v, %v", got, err)
	}
	if released, err := a.ReleaseHandle(ctx, "k8s-pod-network.abc"); err != nil || !slices.Equal(released, []netip.Addr{addr("10.244.40.130")}) {
		t.Errorf("%v, %v", released, err)
	}
	v := value(t, s, blockKey(prefix("10.244.40.128/29")))
	for _, want := range []string{`"sequenceNumber":1795425093042315663`, `"releasedAt":"2026-11-23T09:11:33Z"`, `"affinityClaimTime"`, `"4":1795425093042315661`} {
		if !strings.Contains(v, want) {
			t.Errorf("%s is missing in %s", want, v)
		}
	}
}

// A handle with addresses in several blocks is released whole; a block that is nobody's and empty goes with it.
func TestHandleInSeveralBlocks(t *testing.T) {
	s, ctx := openStore(t, pool("p", "10.244.0.0/24")), t.Context()
	for _, b := range []struct{ cidr, affinity string }{{"10.244.0.0/26", "host:n1"}, {"10.244.0.64/26", ""}, {"10.244.0.128/26", "host:n2"}} {
		blk := newBlock(prefix(b.cidr), b.affinity, 5)
		blk.assign(attribute{handle: "h", hasHandle: true})
		raw, err := blk.encode()
		if err != nil {
			t.Fatal(err)
		}
		put(t, s, blockKey(blk.cidr), string(raw))
	}
	put(t, s, handleKey("h"), `{"block":{"10.244.0.0/26":1,"10.244.0.64/26":1,"10.244.0.128/26":1,"10.244.0.192/26":1},"deleted":false}`)
	a := New(s, "n1", nil)
	want := []netip.Addr{addr("10.244.0.0"), addr("10.244.0.64"), addr("10.244.0.128")}
	if held, err := a.HandleAddresses(ctx, "h"); err != nil || !slices.Equal(held, want) {
		t.Errorf("held %v, %v", held, err)
	}
	if released, err := a.ReleaseHandle(ctx, "h"); err != nil || !slices.Equal(released, want) {
		t.Errorf("released %v, %v", released, err)
	}
	if _, err := s.Get(ctx, blockKey(prefix("10.244.0.64/26"))); !errors.Is(err, datastore.ErrNotFound) {
		t.Errorf("the empty block without an owner: %v", err)
	}
	for _, key := range []string{handleKey("h")} {
		if _, err := s.Get(ctx, key); !errors.Is(err, datastore.ErrNotFound) {
			t.Errorf("%s: %v", key, err)
		}
	}
	// Without a pool the blocks are still reported.
	if err := datastore.DeleteResource[datastore.IPPool](ctx, s, "p"); err != nil {
		t.Fatal(err)
	}
	use, err := Usage(ctx, s)
	if err != nil || len(use) != 1 || use[0].Name != OrphanPool || use[0].Total != 128 || len(use[0].Blocks) != 2 {
		t.Errorf("usage: %+v, %v", use, err)
	}
}
