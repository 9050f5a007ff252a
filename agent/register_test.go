package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"

	"margay/datastore"
	"margay/datastore/embedded"
)

// A Node that is deleted while its agent runs comes back, with the tunnel's address; one that is there stays as it is.
func TestRegisterAgain(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
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
	defer s.Close()
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
