package bgp

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// local starts a speaker on a loopback address of its own, in this process. One at a time: no test that uses it may
// run beside another.
func local(t *testing.T, addr string, change func(*Config)) *Speaker {
	t.Helper()
	c := Config{AS: 64512, Listen: netip.MustParseAddr(addr), Port: 17900}
	if change != nil {
		change(&c)
	}
	s, err := Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestStartRefuses(t *testing.T) {
	good := Config{AS: 64512, Listen: netip.MustParseAddr("127.7.0.1"), Port: 17901}
	for want, change := range map[string]func(*Config){
		"as: expected":                  func(c *Config) { c.AS = 0 },
		"listen: expected":              func(c *Config) { c.Listen = netip.Addr{} },
		"router id: expected":           func(c *Config) { c.Listen = netip.MustParseAddr("::1") },
		"port: expected":                func(c *Config) { c.Port = 65536 },
		"restart time: expected":        func(c *Config) { c.RestartTime = 2 * time.Hour },
		"hold time: expected":           func(c *Config) { c.HoldTime = 2 * time.Second },
		"keepalive: expected":           func(c *Config) { c.HoldTime, c.Keepalive = 30*time.Second, 30*time.Second },
		"connect retry: expected":       func(c *Config) { c.ConnectRetry = -2 * time.Second },
		"deferral: expected":            func(c *Config) { c.Deferral = -2 * time.Second },
		"is no socket":                  func(c *Config) { c.APISocket = t.TempDir() },
		"bgp listen on 192.0.2.1:17901": func(c *Config) { c.Listen = netip.MustParseAddr("192.0.2.1") },
	} {
		c := good
		change(&c)
		s, err := Start(t.Context(), c)
		if err == nil {
			_ = s.Stop(t.Context())
			t.Errorf("%s: started", want)
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("expected %q in %q", want, err)
		}
	}
}

func TestDefaults(t *testing.T) {
	c := Config{AS: 1, Listen: netip.MustParseAddr("10.0.0.1"), HoldTime: 8500 * time.Millisecond}
	if err := c.normalize(); err != nil {
		t.Fatal(err)
	}
	if c.HoldTime != 9*time.Second || c.Keepalive != 2*time.Second || c.RestartTime != DefaultRestartTime || c.Port != 179 ||
		c.RouterID != c.Listen || c.Deferral != DefaultDeferral {
		t.Errorf("%+v", c)
	}
}

func TestSetRefuses(t *testing.T) {
	s := local(t, "127.7.0.2", nil)
	ok := Peer{Addr: netip.MustParseAddr("127.7.0.3"), AS: 64512}
	with := func(change func(*Peer)) Peer { p := ok; change(&p); return p }
	for want, peers := range map[string][]Peer{
		"peer 127.7.0.2: address: expected another": {ok, with(func(p *Peer) { p.Addr = s.cfg.Listen })},
		"got it twice":              {ok, ok},
		"as: expected":              {with(func(p *Peer) { p.AS = 0 })},
		"peer fd00::1: address":     {with(func(p *Peer) { p.Addr = netip.MustParseAddr("fd00::1") })},
		"peer invalid IP: address":  {with(func(p *Peer) { p.Addr = netip.Addr{} })},
		"password: expected at":     {with(func(p *Peer) { p.Password = strings.Repeat("x", 81) })},
		"local address: expected o": {with(func(p *Peer) { p.Local = netip.MustParseAddr("fd00::1") })},
	} {
		if err := s.SetPeers(t.Context(), peers); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("expected %q in %v", want, err)
		}
	}
	for _, p := range []netip.Prefix{{}, netip.MustParsePrefix("10.0.0.1/24"), netip.MustParsePrefix("fd00::/64")} {
		if err := s.SetAnnounced(t.Context(), []netip.Prefix{netip.MustParsePrefix("10.1.0.0/26"), p}); err == nil {
			t.Errorf("announced %v", p)
		}
	}
	if len(s.Peers()) != 0 || len(s.announced) != 0 {
		t.Error("a refused set left something behind")
	}
}

func TestSyncedAlone(t *testing.T) {
	s := local(t, "127.7.0.4", nil)
	select {
	case <-s.Synced():
		t.Fatal("synced before SetPeers")
	default:
	}
	if err := s.SetPeers(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Synced():
	case <-time.After(patience):
		t.Error("not synced without peers")
	}
}

func TestStopped(t *testing.T) {
	s := local(t, "127.7.0.5", nil)
	if err := s.SetPeers(t.Context(), []Peer{{Addr: netip.MustParseAddr("127.7.0.6"), AS: 64512}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.SetPeers(t.Context(), nil); !errors.Is(err, ErrStopped) {
		t.Error(err)
	}
	if err := s.SetAnnounced(t.Context(), nil); !errors.Is(err, ErrStopped) {
		t.Error(err)
	}
	if p := s.Peers(); len(p) != 0 {
		t.Errorf("peers of a stopped speaker: %+v", p)
	}
}

func TestAPISocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "gobgp.sock")
	left, err := net.Listen("unix", path) // of a previous life
	if err != nil {
		t.Fatal(err)
	}
	left.(*net.UnixListener).SetUnlinkOnClose(false)
	left.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Fatal(err)
	}
	local(t, "127.7.0.7", func(c *Config) { c.APISocket = path })
	eventually(t, func() error {
		conn, err := net.Dial("unix", path)
		if err == nil {
			conn.Close()
		}
		return err
	})
}

func eventually(t *testing.T, ok func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %v", patience, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
