package embedded_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"margay/datastore"
	"margay/datastore/embedded"
)

// serve runs a server until the returned function is called; that waits until it is gone.
func serve(t *testing.T, cfg embedded.Config) (url string, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan string, 1), make(chan error, 1)
	cfg.Ready = func(urls []string) { ready <- urls[0] }
	go func() { ended <- embedded.Serve(ctx, cfg) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(stop)
	select {
	case url = <-ready:
	case err := <-ended:
		ended <- nil
		t.Fatalf("serve: %v", err)
	case <-time.After(60 * time.Second):
		t.Fatal("serve: not ready")
	}
	return url, stop
}

func TestDataSurvivesARestart(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	url, stop := serve(t, embedded.Config{Dir: dir, ClientURLs: []string{"http://127.0.0.1:0"}})
	s, err := datastore.Open(ctx, datastore.Config{Endpoints: []string{url}, DialTimeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, "/calico/x", []byte("1")); err != nil {
		t.Fatal(err)
	}
	watch, cancel := context.WithCancel(ctx)
	defer cancel()
	events := s.Watch(watch, "/calico/", 0)
	stop()
	if _, err := s.Get(ctx, "/calico/x"); !errors.Is(err, datastore.ErrUnreachable) {
		t.Errorf("get while the server is down: %v, expected ErrUnreachable", err)
	}
	// The same address again, and the same client: store and watch recover by themselves.
	serve(t, embedded.Config{Dir: dir, ClientURLs: []string{url}})
	kv, err := s.Get(ctx, "/calico/x")
	for limit := time.Now().Add(60 * time.Second); errors.Is(err, datastore.ErrUnreachable) && time.Now().Before(limit); {
		kv, err = s.Get(ctx, "/calico/x") // a busy machine may take longer than an operation has
	}
	if err != nil || string(kv.Value) != "1" {
		t.Fatalf("get after the restart: %q, %v", kv.Value, err)
	}
	// The watch may only have begun after the restart: keep writing until it says so.
	deadline := time.After(60 * time.Second)
	for rev := kv.Revision; ; {
		if rev, err = s.Update(ctx, "/calico/x", []byte("2"), rev); err != nil {
			t.Fatal(err)
		}
		select {
		case ev := <-events:
			if ev.Type != datastore.Put || string(ev.KV.Value) != "2" {
				t.Fatalf("event %+v, expected the put of 2", ev)
			}
		case <-time.After(50 * time.Millisecond):
			continue
		case <-deadline:
			t.Fatal("the watch did not recover")
		}
		break
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestBadConfigEndsInOneLine(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for _, tt := range []struct {
		name string
		cfg  embedded.Config
		want string
	}{
		{"no directory", embedded.Config{}, "data directory: expected a path"},
		{"no port", embedded.Config{Dir: t.TempDir(), ClientURLs: []string{"http://127.0.0.1"}}, "expected http://address:port"},
		{"scheme", embedded.Config{Dir: t.TempDir(), ClientURLs: []string{"ftp://127.0.0.1:1"}}, "expected http://address:port"},
		{"host name", embedded.Config{Dir: t.TempDir(), ClientURLs: []string{"http://localhost:1"}}, "expected an IP address"},
		{"port in use", embedded.Config{Dir: t.TempDir(), ClientURLs: []string{"http://" + busy.Addr().String()}}, "address already in use"},
		{"directory is a file", embedded.Config{Dir: "/dev/null", ClientURLs: []string{"http://127.0.0.1:0"}}, "not a directory"},
	} {
		err := embedded.Serve(context.Background(), tt.cfg)
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, expected one line with %q", tt.name, err, tt.want)
		}
	}
}

func TestLogReachesSlog(t *testing.T) {
	var out lockedBuffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
	_, stop := serve(t, embedded.Config{Dir: t.TempDir(), ClientURLs: []string{"http://127.0.0.1:0"}, Log: log, NoSync: true})
	stop()
	if !strings.Contains(out.String(), "level=DEBUG msg=\"etcd: ") {
		t.Error("etcd's routine messages did not arrive at debug level")
	}
	if strings.Contains(out.String(), "level=INFO") {
		t.Error("etcd's routine messages arrived at info level")
	}
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// Calls that are made while the server is away wait for it, within their deadline, and succeed when it comes back in time.
func TestCallsOutliveARestart(t *testing.T) {
	dir := t.TempDir()
	url, stop := serve(t, embedded.Config{Dir: dir, ClientURLs: []string{"http://127.0.0.1:0"}})
	s, err := datastore.Open(t.Context(), datastore.Config{Endpoints: []string{url}, DialTimeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	rev, err := s.Create(t.Context(), "/calico/x", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	stop()
	begun, results := make(chan struct{}, 3), make(chan error, 3)
	for _, call := range []func() error{
		func() error { _, err := s.Get(t.Context(), "/calico/x"); return err },
		func() error { _, _, err := s.List(t.Context(), "/calico/"); return err },
		func() error { _, err := s.Update(t.Context(), "/calico/x", []byte("2"), rev); return err },
	} {
		go func() {
			begun <- struct{}{}
			results <- call()
		}()
	}
	for range 3 {
		<-begun
	}
	serve(t, embedded.Config{Dir: dir, ClientURLs: []string{url}})
	for range 3 {
		if err := <-results; err != nil {
			t.Errorf("a call across the restart: %v", err)
		}
	}
	if kv, err := s.Get(t.Context(), "/calico/x"); err != nil || string(kv.Value) != "2" {
		t.Errorf("afterwards: %q, %v", kv.Value, err)
	}
}
