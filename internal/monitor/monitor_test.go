package monitor

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

func serve(t *testing.T, c Config) *Server {
	t.Helper()
	s, err := Listen(c, NewRegistry("vrouter"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		s.Serve(ctx)
		close(done)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return s
}

// get asks the server whose address is addr.
func get(t *testing.T, addr net.Addr, path string) (int, string) {
	t.Helper()
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, addr.Network(), addr.String())
		}}}
	resp, err := client.Get("http://daemon" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestMetricsAndProfiles(t *testing.T) {
	dir := t.TempDir()
	s := serve(t, Config{Metrics: "127.0.0.1:0", Pprof: filepath.Join(dir, "pprof.sock")})
	code, text := get(t, s.on[0].Addr(), "/metrics")
	if code != http.StatusOK || !strings.Contains(text, `margay_build_info{component="vrouter"`) || !strings.Contains(text, "go_goroutines") || !strings.Contains(text, "process_cpu_seconds_total") {
		t.Errorf("%d\n%s", code, text)
	}
	if code, _ := get(t, s.on[0].Addr(), "/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("profiles are served where metrics are: %d", code)
	}
	if code, text := get(t, s.on[1].Addr(), "/debug/pprof/goroutine?debug=1"); code != http.StatusOK || !strings.Contains(text, "goroutine profile") {
		t.Errorf("%d\n%s", code, text)
	}
	if code, b := get(t, s.on[1].Addr(), "/debug/pprof/heap"); code != http.StatusOK || !bytes.HasPrefix([]byte(b), []byte{0x1f, 0x8b}) {
		t.Errorf("%d: no profile", code)
	}
	if info, err := os.Stat(filepath.Join(dir, "pprof.sock")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", info, err)
	}
}

func TestBuildInfoIsLinted(t *testing.T) {
	problems, err := testutil.GatherAndLint(NewRegistry("agent"), "margay_build_info")
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

func TestListenRefuses(t *testing.T) {
	dir := t.TempDir()
	file, used := filepath.Join(dir, "file"), filepath.Join(dir, "used.sock")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	serve(t, Config{Metrics: used})
	for _, c := range []struct {
		c    Config
		want []string
	}{
		{Config{Pprof: ":6060"}, []string{"--pprof", "loopback"}},
		{Config{Pprof: "0.0.0.0:6060"}, []string{"--pprof", "loopback"}},
		{Config{Pprof: "198.18.0.1:6060"}, []string{"--pprof", "loopback"}},
		{Config{Pprof: "localhost"}, []string{"--pprof", "loopback"}},
		{Config{Metrics: "9100"}, []string{"--metrics", "expected HOST:PORT"}},
		{Config{Metrics: file}, []string{"--metrics", "not a socket"}},
		{Config{Metrics: used}, []string{"--metrics", "another process"}},
		{Config{Metrics: "192.0.2.1:9100"}, []string{"--metrics", "192.0.2.1"}},
	} {
		s, err := Listen(c.c, NewRegistry("vrouter"), slog.New(slog.DiscardHandler))
		if err == nil {
			t.Errorf("%+v: accepted: %v", c.c, s.Close())
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%+v: %v: expected %q in it", c.c, err, w)
			}
		}
	}
	if _, err := os.Stat(file); err != nil {
		t.Error("the file is gone:", err)
	}
}

// A socket that a killed process has left is taken over, and one that was never served is closed with the rest.
func TestStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metrics.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	s := serve(t, Config{Metrics: path})
	if code, _ := get(t, s.on[0].Addr(), "/metrics"); code != http.StatusOK {
		t.Errorf("status %d", code)
	}
}
