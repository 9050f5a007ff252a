package datastore

import (
	"os"
	"testing"
	"time"

	"margay/datastore/embedded/embeddedtest"
)

// endpoint is the server that all tests of this package share.
var endpoint string

func TestMain(m *testing.M) { os.Exit(embeddedtest.Main(m, &endpoint)) }

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
	case <-time.After(60 * time.Second):
		t.Fatal("no event")
		return Event{}
	}
}
