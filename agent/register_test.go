package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"

	"margay/datastore"
	"margay/datastore/embedded"
	"margay/ipam"
)

// testStore is an empty datastore of the test's own.
func testStore(t *testing.T) *datastore.Store {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan string, 1), make(chan error, 1)
	dir := t.TempDir()
	go func() {
		ended <- embedded.Serve(ctx, embedded.Config{Dir: dir, ClientURLs: []string{"http://127.0.0.1:0"}, NoSync: true,
			Ready: func(urls []string) { ready <- urls[0] }})
	}()
	t.Cleanup(func() { cancel(); <-ended })
	var url string
	select {
	case url = <-ready:
	case err := <-ended:
		ended <- err
		t.Fatal(err)
	}
	s, err := datastore.Open(ctx, datastore.Config{Endpoints: []string{url}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// The pool of the tunnel's address goes and one of the same addresses comes: the address is not the tunnel's until IPAM has
// given it again.
func TestTunnelAddressOfAPoolThatCameBack(t *testing.T) {
	s, ctx := testStore(t), t.Context()
	log := slog.New(slog.DiscardHandler)
	a := &Agent{store: s, cfg: Config{Node: "n1"}, log: log, alloc: ipam.New(s, "n1", log)}
	if err := datastore.CreateResource(ctx, s, datastore.NewNode("n1")); err != nil {
		t.Fatal(err)
	}
	create := func(name, cidr string) Pool {
		p := datastore.NewIPPool(name)
		p.Spec.CIDR, p.Spec.IPIPMode = cidr, "Always"
		if err := datastore.CreateResource(ctx, s, p); err != nil {
			t.Fatal(err)
		}
		return Pool{Name: name, CIDR: netip.MustParsePrefix(cidr), BlockSize: 26, IPIPMode: "Always"}
	}
	first := create("first", "10.244.0.0/24")
	if err := a.ensureTunnel(ctx, Inputs{Pools: []Pool{first}}); err != nil {
		t.Fatal(err)
	}
	other := Pool{Name: "other", CIDR: netip.MustParsePrefix("10.9.0.0/24"), BlockSize: 26, IPIPMode: "Always"}
	if err := datastore.DeleteResource[datastore.IPPool](ctx, s, "first"); err != nil {
		t.Fatal(err)
	}
	if err := a.ensureTunnel(ctx, Inputs{Pools: []Pool{other}}); err == nil || a.tunnel.IsValid() {
		t.Errorf("without a pool: %v, %s", err, a.tunnel)
	}
	again := create("again", "10.244.0.0/24")
	if err := a.ensureTunnel(ctx, Inputs{Pools: []Pool{again}}); err != nil {
		t.Fatal(err)
	}
	if h, err := ipam.Lookup(ctx, s, a.tunnel); err != nil || h.Handle != tunnelHandle("n1") {
		t.Errorf("%s: %+v, %v", a.tunnel, h, err)
	}
}

// A tunnel address that is released while its agent runs is got back; one that somebody else has got meanwhile is replaced.
func TestTunnelAddressThatWasReleased(t *testing.T) {
	s, ctx := testStore(t), t.Context()
	log := slog.New(slog.DiscardHandler)
	a := &Agent{store: s, cfg: Config{Node: "n1"}, log: log, alloc: ipam.New(s, "n1", log), kick: make(chan struct{}, 1)}
	if err := datastore.CreateResource(ctx, s, datastore.NewNode("n1")); err != nil {
		t.Fatal(err)
	}
	p := datastore.NewIPPool("p")
	p.Spec.CIDR, p.Spec.IPIPMode = "10.244.0.0/24", "Always"
	if err := datastore.CreateResource(ctx, s, p); err != nil {
		t.Fatal(err)
	}
	in := Inputs{Pools: []Pool{{Name: "p", CIDR: netip.MustParsePrefix("10.244.0.0/24"), BlockSize: 26, IPIPMode: "Always"}}}
	ensure := func() {
		t.Helper()
		if err := a.confirmTunnel(ctx); err != nil {
			t.Fatal(err)
		}
		if err := a.ensureTunnel(ctx, in); err != nil {
			t.Fatal(err)
		}
		if h, err := ipam.Lookup(ctx, s, a.tunnel); err != nil || h.Handle != tunnelHandle("n1") {
			t.Fatalf("%s: %+v, %v", a.tunnel, h, err)
		}
		if recorded, ok := recordedTunnel(ctx, s, "n1"); !ok || recorded != a.tunnel {
			t.Fatalf("the Node says %s, expected %s", recorded, a.tunnel)
		}
	}
	ensure()
	first := a.tunnel
	ensure()
	if a.tunnel != first || len(a.kick) != 0 {
		t.Fatalf("%s: an address that is there was touched; it is %s", first, a.tunnel)
	}
	another := ipam.New(s, "", nil)
	if err := another.ReleaseAddress(ctx, ipam.Release{Addr: first}); err != nil {
		t.Fatal(err)
	}
	ensure()
	if a.tunnel != first || len(a.kick) != 1 {
		t.Errorf("the address was %s and is %s", first, a.tunnel)
	}
	if err := another.ReleaseAddress(ctx, ipam.Release{Addr: first}); err != nil {
		t.Fatal(err)
	}
	if _, err := ipam.New(s, "n1", log).Assign(ctx, ipam.Request{Handle: "pod", IPv4: ipam.Ask{IP: first}}); err != nil {
		t.Fatal(err)
	}
	ensure()
	if a.tunnel == first {
		t.Errorf("%s is a pod's and the tunnel's", first)
	}
}

// A Node that is deleted while its agent runs comes back, with the tunnel's address; one that is there stays as it is.
func TestRegisterAgain(t *testing.T) {
	s, ctx := testStore(t), t.Context()
	a := &Agent{store: s, cfg: Config{Node: "n1"}, log: slog.New(slog.DiscardHandler), tunnel: netip.MustParseAddr("10.244.0.1"),
		underlay: Underlay{Prefix: netip.MustParsePrefix("192.0.2.1/24")}}
	for range 2 {
		if err := a.registerAgain(ctx); err != nil {
			t.Fatal(err)
		}
		n, err := datastore.GetResource[datastore.Node](ctx, s, "n1")
		if err != nil || n.Spec.BGP == nil || n.Spec.BGP.IPv4Address != "192.0.2.1/24" || n.Spec.BGP.IPv4IPIPTunnelAddr != "10.244.0.1" {
			t.Fatalf("%+v, %v", n, err)
		}
		if err := a.registerAgain(ctx); err != nil {
			t.Fatal(err)
		}
		if again, err := datastore.GetResource[datastore.Node](ctx, s, "n1"); err != nil || again.Metadata.ResourceVersion != n.Metadata.ResourceVersion {
			t.Errorf("written though nothing was missing: %+v, %v", again, err)
		}
		if err := datastore.DeleteResource[datastore.Node](ctx, s, "n1"); err != nil {
			t.Fatal(err)
		}
	}
}
