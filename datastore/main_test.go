package datastore

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"margay/datastore/embedded"
)

// endpoint is the server that all tests of this package share.
var endpoint string

func TestMain(m *testing.M) {
	os.Exit(withServer(m.Run))
}

func withServer(run func() int) int {
	dir, err := os.MkdirTemp("", "margay-datastore")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan string, 1), make(chan error, 1)
	go func() {
		ended <- embedded.Serve(ctx, embedded.Config{Dir: dir, ClientURLs: []string{"http://127.0.0.1:0"}, NoSync: true,
			Ready: func(urls []string) { ready <- urls[0] }})
	}()
	select {
	case endpoint = <-ready:
	case err := <-ended:
		fmt.Fprintln(os.Stderr, err)
		cancel()
		return 1
	}
	code := run()
	cancel()
	<-ended
	return code
}

// openStore gives a store with nothing under /calico/ and /t/.
func openStore(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	for _, prefix := range []string{"/calico/", "/t/"} {
		kvs, _, err := s.Keys(t.Context(), prefix)
		if err != nil {
			t.Fatal(err)
		}
		for _, kv := range kvs {
			if err := s.Delete(t.Context(), kv.Key, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	return s
}

// next waits for an event.
func next(t *testing.T, events <-chan Event) Event {
	t.Helper()
	select {
	case ev := <-events:
		return ev
	case <-time.After(20 * time.Second):
		t.Fatal("no event")
		return Event{}
	}
}
