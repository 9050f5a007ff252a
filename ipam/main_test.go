package ipam

import (
	"os"
	"slices"
	"testing"

	"margay/datastore"
	"margay/datastore/embedded/embeddedtest"
)

// endpoint is the server that all tests of this package share.
var endpoint string

func TestMain(m *testing.M) { os.Exit(embeddedtest.Main(m, &endpoint)) }

// openStore gives a store with nothing in it but the pools.
func openStore(t *testing.T, pools ...*datastore.IPPool) *datastore.Store {
	t.Helper()
	s, err := datastore.Open(t.Context(), datastore.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	kvs, _, err := s.Keys(t.Context(), "/calico/")
	if err != nil {
		t.Fatal(err)
	}
	for batch := range slices.Chunk(kvs, 100) {
		ops := make([]datastore.Op, len(batch))
		for i, kv := range batch {
			ops[i] = datastore.OpDelete(kv.Key, 0)
		}
		if _, err := s.Txn(t.Context(), ops...); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range pools {
		if err := datastore.CreateResource(t.Context(), s, p); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// pool makes a pool, changed as the test wants it.
func pool(name, cidr string, change ...func(*datastore.IPPoolSpec)) *datastore.IPPool {
	p := datastore.NewIPPool(name)
	p.Spec.CIDR = cidr
	for _, c := range change {
		c(&p.Spec)
	}
	return p
}

// value reads a key that must be there.
func value(t *testing.T, s *datastore.Store, key string) string {
	t.Helper()
	kv, err := s.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(kv.Value)
}

// put writes a key whether it is there or not.
func put(t *testing.T, s *datastore.Store, key, val string) {
	t.Helper()
	if kv, err := s.Get(t.Context(), key); err == nil {
		if _, err := s.Update(t.Context(), key, []byte(val), kv.Revision); err != nil {
			t.Fatal(err)
		}
	} else if _, err := s.Create(t.Context(), key, []byte(val)); err != nil {
		t.Fatal(err)
	}
}
