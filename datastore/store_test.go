package datastore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestCompareAndSwap(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	rev, err := s.Create(ctx, "/t/a", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, "/t/a", nil); !errors.Is(err, ErrExists) {
		t.Errorf("second create: %v", err)
	}
	rev2, err := s.Update(ctx, "/t/a", []byte("2"), rev)
	if err != nil || rev2 <= rev {
		t.Fatalf("update: %d after %d, %v", rev2, rev, err)
	}
	if _, err := s.Update(ctx, "/t/a", []byte("3"), rev); !errors.Is(err, ErrConflict) {
		t.Errorf("update of an old revision: %v", err)
	}
	for _, r := range []int64{0, -1} {
		if _, err := s.Update(ctx, "/t/b", []byte("3"), r); !errors.Is(err, ErrConflict) {
			t.Errorf("update at revision %d: %v", r, err)
		}
	}
	if _, err := s.Get(ctx, "/t/b"); !errors.Is(err, ErrNotFound) {
		t.Errorf("an update without a revision created the key: %v", err)
	}
	if _, err := s.Update(ctx, "/t/b", nil, rev); !errors.Is(err, ErrNotFound) {
		t.Errorf("update of nothing: %v", err)
	}
	if err := s.Delete(ctx, "/t/a", rev); !errors.Is(err, ErrConflict) {
		t.Errorf("delete of an old revision: %v", err)
	}
	kv, err := s.Get(ctx, "/t/a")
	if err != nil || string(kv.Value) != "2" || kv.Revision != rev2 {
		t.Errorf("get: %+v, %v", kv, err)
	}
	if err := s.Delete(ctx, "/t/a", rev2); err != nil {
		t.Error(err)
	}
	if err := s.Delete(ctx, "/t/a", 0); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete of nothing: %v", err)
	}
}

func TestTransactionIsAllOrNothing(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	rev, err := s.Txn(ctx, OpCreate("/t/a", []byte("1")), OpCreate("/t/b", []byte("1")))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		ops  []Op
		key  string
		want error
	}{
		{"create", []Op{OpUpdate("/t/a", []byte("2"), rev), OpCreate("/t/b", nil)}, "/t/b", ErrExists},
		{"update", []Op{OpCreate("/t/c", nil), OpUpdate("/t/b", nil, rev-1)}, "/t/b", ErrConflict},
		{"delete", []Op{OpCreate("/t/c", nil), OpDelete("/t/d", 0)}, "/t/d", ErrNotFound},
		{"check", []Op{OpCreate("/t/c", nil), OpCheck("/t/a", 0)}, "/t/a", ErrExists},
		{"unchanged", []Op{OpCreate("/t/c", nil), OpUnchanged("/t/", rev-1)}, "/t/", ErrConflict},
	} {
		_, err := s.Txn(ctx, tt.ops...)
		var txn *TxnError
		if !errors.Is(err, tt.want) || !errors.As(err, &txn) || txn.Key != tt.key {
			t.Errorf("%s: %v, expected %v on %s", tt.name, err, tt.want, tt.key)
		}
	}
	kvs, _, err := s.List(ctx, "/t/")
	if err != nil || len(kvs) != 2 || kvs[0].Revision != rev || kvs[1].Revision != rev {
		t.Errorf("a failed transaction left something: %v, %v", kvs, err)
	}
	if _, err := s.Txn(ctx, OpUnchanged("/t/", rev), OpCheck("/t/a", rev), OpCheck("/t/x", 0), OpDelete("/t/b", rev)); err != nil {
		t.Error(err)
	}
	if _, err := s.Txn(ctx); err == nil {
		t.Error("an empty transaction was accepted")
	}
}

func TestListPages(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	const n = 2*pageSize + 7
	for i := 0; i < n; i += 100 {
		var ops []Op
		for j := i; j < min(n, i+100); j++ {
			ops = append(ops, OpCreate(fmt.Sprintf("/t/%05d", j), []byte{byte(j)}))
		}
		if _, err := s.Txn(ctx, ops...); err != nil {
			t.Fatal(err)
		}
	}
	kvs, rev, err := s.List(ctx, "/t/")
	if err != nil || len(kvs) != n || rev == 0 {
		t.Fatalf("%d keys at %d, %v: expected %d", len(kvs), rev, err, n)
	}
	for i, kv := range kvs {
		if kv.Key != fmt.Sprintf("/t/%05d", i) || len(kv.Value) != 1 {
			t.Fatalf("place %d: %+v", i, kv)
		}
	}
	many, _, err := s.ListMany(ctx, "/t/00001", "/t/0000", "/t/none/", "/t/")
	if err != nil || len(many[0]) != 1 || len(many[1]) != 0 || len(many[2]) != 0 || len(many[3]) != n {
		t.Errorf("list many: %d lists, %v", len(many), err)
	}
}

func TestWatch(t *testing.T) {
	s := openStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	first, err := s.Create(ctx, "/t/a", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	events := s.Watch(ctx, "/t/", first)
	rev, err := s.Update(ctx, "/t/a", []byte("2"), first)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(ctx, "/t/a", rev); err != nil {
		t.Fatal(err)
	}
	if ev := next(t, events); ev.Type != Put || string(ev.KV.Value) != "2" || ev.KV.Revision != rev || ev.Prev == nil || string(ev.Prev.Value) != "1" {
		t.Errorf("put: %+v", ev)
	}
	if ev := next(t, events); ev.Type != Delete || ev.KV.Key != "/t/a" || ev.Prev == nil || string(ev.Prev.Value) != "2" {
		t.Errorf("delete: %+v", ev)
	}
	cancel()
	for range events { // closed: ends
	}
}

// A watch whose history was compacted away, and one from a future that this store never had, each say Resync once and
// then go on.
func TestWatchResync(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	rev, err := s.Create(ctx, "/t/a", nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if rev, err = s.Update(ctx, "/t/a", nil, rev); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.client.Compact(ctx, rev); err != nil {
		t.Fatal(err)
	}
	for name, from := range map[string]int64{"compacted": 1, "future": rev + 1000} {
		events := s.Watch(ctx, "/t/", from)
		if ev := next(t, events); ev.Type != Resync || ev.KV.Revision < rev {
			t.Errorf("%s: %+v, expected a resync", name, ev)
		}
		if rev, err = s.Update(ctx, "/t/a", []byte(name), rev); err != nil {
			t.Fatal(err)
		}
		if ev := next(t, events); ev.Type != Put || string(ev.KV.Value) != name {
			t.Errorf("%s: %+v, expected a put", name, ev)
		}
	}
}

func TestOpenFailsClearlyAndInTime(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and never says a word
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, tt := range []struct {
		endpoint, want string
	}{
		{"http://127.0.0.1:1", "etcd at http://127.0.0.1:1: not reachable: dial tcp 127.0.0.1:1: connect: connection refused"},
		{"http://" + silent.Addr().String(), "not reachable"},
		{strings.Replace(endpoint, "http:", "https:", 1), "not reachable: tls handshake: "},
	} {
		start := time.Now()
		_, err := Open(t.Context(), Config{Endpoints: []string{tt.endpoint}, DialTimeout: time.Second})
		if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, expected %q", tt.endpoint, err, tt.want)
		}
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("%s: took %s", tt.endpoint, took)
		}
	}
	for _, cfg := range []Config{
		{},
		{Endpoints: []string{"127.0.0.1:2379"}},
		{Endpoints: []string{"http://127.0.0.1"}},
		{Endpoints: []string{"https://127.0.0.1:1"}, Cert: "x"},
		{Endpoints: []string{"https://127.0.0.1:1"}, CACert: "/does/not/exist"},
		{Endpoints: []string{"https://127.0.0.1:1"}, CACert: os.DevNull},
	} {
		if _, err := Open(t.Context(), cfg); err == nil || errors.Is(err, ErrUnreachable) {
			t.Errorf("%+v: %v, expected a configuration error", cfg, err)
		}
	}
	// One endpoint that works is enough.
	s, err := Open(t.Context(), Config{Endpoints: []string{"http://127.0.0.1:1", endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
}

func TestConfigFromEnvironmentAndFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "calicoctl.cfg")
	content := "apiVersion: projectcalico.org/v3\nkind: CalicoAPIConfig\nspec:\n  datastoreType: etcdv3\n" +
		"  etcdEndpoints: http://f1:1, http://f2:1\n  etcdCACertFile: /f/ca\n  etcdUsername: fu\n"
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{}
	getenv := func(name string) string { return env[name] }
	cfg, err := configFrom(getenv, file)
	if err != nil || strings.Join(cfg.Endpoints, " ") != "http://f1:1 http://f2:1" || cfg.CACert != "/f/ca" || cfg.Username != "fu" {
		t.Errorf("file only: %+v, %v", cfg, err)
	}
	env["ETCD_ENDPOINTS"], env["ETCD_KEY_FILE"], env["DATASTORE_TYPE"] = "http://e:1", "/e/key", "etcdv3"
	cfg, err = configFrom(getenv, file)
	if err != nil || strings.Join(cfg.Endpoints, " ") != "http://e:1" || cfg.CACert != "/f/ca" || cfg.Key != "/e/key" {
		t.Errorf("environment over file: %+v, %v", cfg, err)
	}
	if cfg, err := configFrom(getenv, "/does/not/exist"); err != nil || cfg.CACert != "" {
		t.Errorf("no file: %+v, %v", cfg, err)
	}
	env["DATASTORE_TYPE"] = "kubernetes"
	if _, err := configFrom(getenv, file); err == nil || !strings.Contains(err.Error(), "DATASTORE_TYPE") {
		t.Errorf("kubernetes: %v", err)
	}
	if err := os.WriteFile(file, []byte(":\n\t{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := configFrom(func(string) string { return "" }, file); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("broken file: %v", err)
	}
}
