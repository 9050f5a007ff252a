package rpc

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"margay/vrouter"
	"margay/vrouter/packet"
	pb "margay/vrouter/rpc/vrouterpb"
)

// start serves router on socket and returns a function that stops the server and waits for it.
func start(t *testing.T, router *vrouter.Router, socket string) func() {
	t.Helper()
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- NewServer(router, "test", func() string { return "vr0, eth0" }, IOTC).Serve(ctx, l)
	}()
	stopped := false
	stop := func() {
		t.Helper()
		cancel()
		if !stopped {
			stopped = true
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(stop)
	return stop
}

func dial(t *testing.T, socket string) *Client {
	t.Helper()
	c, err := Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

var (
	config  = Config{NodeAddress: netip.MustParseAddr("198.18.0.1"), Underlay: "eth0", MTU: 1480}
	gateway = netip.MustParseAddr("198.18.0.2")
	routes  = []Route{
		{Prefix: netip.MustParsePrefix("10.244.1.0/26"), NextHop: Local()},
		{Prefix: netip.MustParsePrefix("10.244.2.0/26"), NextHop: Tunnel(gateway)},
		{Prefix: netip.MustParsePrefix("10.244.3.0/26"), NextHop: Multipath(KindDirect, gateway, netip.MustParseAddr("198.18.0.200"), netip.MustParseAddr("198.18.0.201"))},
		{Prefix: netip.MustParsePrefix("10.244.4.0/26"), NextHop: Blackhole()},
		{Prefix: netip.MustParsePrefix("fd00:1::/64"), NextHop: Tunnel(netip.MustParseAddr("fd00::2"))},
	}
)

func TestSynchronisation(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "run", "vrouter.sock")
	start(t, vrouter.New(), socket)
	c, ctx := dial(t, socket), within(t)

	before, err := c.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if before.Restored || before.Configured || before.APIVersion != APIVersion || before.Version != "test" || before.Instance == "" ||
		before.Port != "vr0, eth0" || before.IO != IOTC || time.Since(before.Started) > time.Minute {
		t.Errorf("first status %+v", before)
	}
	if err := c.Update(ctx, Update{Config: &config, AddNodes: []netip.Addr{config.NodeAddress, gateway}, Set: routes,
		AddPods: []Pod{{Address: gateway, Interface: "cali1"}, {Address: config.NodeAddress, Interface: "cali2"}}}); err != nil {
		t.Fatal(err)
	}
	if swept, err := c.End(ctx); err != nil || swept != 0 {
		t.Errorf("End: %d, %v", swept, err)
	}
	now, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !now.Restored || !now.Configured || now.Config != config || now.Routes != 5 || now.Nodes != 2 || now.Pods != 2 || now.Stale != 0 ||
		now.Instance != before.Instance || !now.Started.Equal(before.Started) {
		t.Errorf("status %+v", now)
	}

	if before, err = c.Begin(ctx); err != nil || !before.Restored || before.Stale != 0 {
		t.Errorf("second Begin: %+v, %v", before, err)
	}
	if err := c.Update(ctx, Update{AddNodes: []netip.Addr{config.NodeAddress}, DelNodes: []netip.Addr{gateway}, Set: routes[:3], Del: []netip.Prefix{routes[3].Prefix},
		AddPods: []Pod{{Address: gateway, Interface: "cali3"}}, DelPods: []netip.Addr{config.NodeAddress}}); err != nil {
		t.Fatal(err)
	}
	entries, nodes, err := c.Routes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := []RouteEntry{{Route: routes[0]}, {Route: routes[1]}, {Route: routes[2]}, {Route: routes[4], Stale: true}}
	if d := cmp.Diff(want, entries, cmp.Comparer(func(a, b RouteEntry) bool { return a == b })); d != "" {
		t.Error(d)
	}
	if len(nodes) != 1 || nodes[0] != config.NodeAddress {
		t.Errorf("nodes %v", nodes)
	}
	if swept, err := c.End(ctx); err != nil || swept != 1 {
		t.Errorf("End: %d, %v: expected one route swept", swept, err)
	}
	counters, err := c.Counters(ctx)
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]bool)
	for _, n := range counters {
		names[n.Name] = true
	}
	if !names["forwarded_encap"] || !names["drop_no_route"] {
		t.Errorf("counters %v", counters)
	}
}

func TestRefused(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "vrouter.sock")
	router := vrouter.New()
	start(t, router, socket)
	c, ctx := dial(t, socket), within(t)
	for name, u := range map[string]Update{
		"mtu":      {Config: &Config{NodeAddress: gateway, Underlay: "eth0", MTU: -1}, Set: routes},
		"gateway":  {Set: append(routes[:4:4], Route{Prefix: routes[1].Prefix, NextHop: Tunnel(netip.Addr{})})},
		"set[0]":   {Set: []Route{{NextHop: Local()}}},
		"kind":     {Set: []Route{{Prefix: routes[0].Prefix, NextHop: NextHop{Kind: 77}}}},
		"del[0]":   {Del: []netip.Prefix{{}}, Set: routes},
		"node \"i": {AddNodes: []netip.Addr{{}}, Set: routes},
		"pod":      {AddPods: []Pod{{Address: gateway}}, Set: routes},
		"del_pods": {DelPods: []netip.Addr{{}}, Set: routes},
	} {
		err := c.Update(ctx, u)
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), socket) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if s := router.Status(); s.Routes != 0 || s.Configured {
		t.Errorf("a trace of refused updates: %+v", s)
	}
	router.OnConfig(func(Config) error { return errors.New("no such device") })
	if err := c.Update(ctx, Update{Config: &config}); err == nil || errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "no such device") {
		t.Errorf("a port that cannot follow: %v", err)
	}
}

// TestMalformed sends what no client of ours does: addresses of odd lengths and the like.
func TestMalformed(t *testing.T) {
	s := NewServer(vrouter.New(), "test", func() string { return "" }, "")
	for name, req := range map[string]*pb.UpdateRequest{
		"config.node_address": {Config: &pb.Config{NodeAddress: []byte{1}}},
		"add_nodes[1]":        {AddNodes: [][]byte{{1, 2, 3, 4}, {1, 2, 3}}},
		"del_nodes[0]":        {DelNodes: [][]byte{make([]byte, 17)}},
		"del_pods[0]":         {DelPods: [][]byte{make([]byte, 3)}},
		"add_pods[0].address": {AddPods: []*pb.Pod{{Address: make([]byte, 5), Interface: "cali1"}}},
		"set[0].prefix":       {Set: []*pb.Route{nil}},
		"set[0].gateway":      {Set: []*pb.Route{{Prefix: &pb.Prefix{Address: make([]byte, 4)}, Kind: pb.Kind_KIND_DROP, Gateway: []byte{1}}}},
		"set[0].kind":         {Set: []*pb.Route{{Prefix: &pb.Prefix{Address: make([]byte, 4)}}}},
		"del[0]":              {Del: []*pb.Prefix{{Address: make([]byte, 4), Bits: 33}}},
	} {
		_, err := s.Update(t.Context(), req)
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Begin(t.Context(), &pb.BeginRequest{}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a caller without a version: %v", err)
	}
}

// TestRestart: a client made before the server, and kept while the server is away, works whenever there is one.
func TestRestart(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "vrouter.sock")
	c, ctx := dial(t, socket), within(t)
	if _, err := c.Status(ctx); !errors.Is(err, ErrUnavailable) {
		t.Errorf("without a server: %v", err)
	}
	instances := make(map[string]bool)
	for range 2 {
		stop := start(t, vrouter.New(), socket)
		for {
			s, err := c.Status(ctx)
			if err == nil {
				instances[s.Instance] = true
				break
			}
			if !errors.Is(err, ErrUnavailable) {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Millisecond)
		}
		stop()
		if _, err := os.Stat(socket); err == nil {
			t.Error("the socket file is left")
		}
	}
	if len(instances) != 2 {
		t.Errorf("instances %v: expected two", instances)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "vrouter.sock")

	// Left by a process that was killed.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(socket)
	if err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: expected mode 0600", info.Mode(), err)
	}
	if _, err := Listen(socket); !errors.Is(err, ErrInUse) {
		t.Errorf("a second one: %v", err)
	}
	// A file that has become another's is not removed.
	if err := os.Rename(socket, socket+".moved"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(socket); err != nil {
		t.Error(err)
	}
	if _, err := Listen(socket); err == nil {
		t.Error("a plain file was replaced")
	}
}

// TestListenAtOnce starts several at the same moment: one gets the socket, and keeps it.
func TestListenAtOnce(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "vrouter.sock")
	const starters = 8
	results := make(chan net.Listener, starters)
	for range starters {
		go func() {
			l, err := Listen(socket)
			if err != nil && !errors.Is(err, ErrInUse) {
				t.Error(err)
			}
			results <- l
		}()
	}
	var winners []net.Listener
	for range starters {
		if l := <-results; l != nil {
			winners = append(winners, l)
		}
	}
	if len(winners) != 1 {
		t.Fatalf("%d got the socket", len(winners))
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(conn.Close(), winners[0].Close()); err != nil {
		t.Error(err)
	}
}

// TestPathMTUs: what was learned is told, to the nanosecond.
func TestPathMTUs(t *testing.T) {
	router, socket := vrouter.New(), filepath.Join(t.TempDir(), "vrouter.sock")
	start(t, router, socket)
	c, ctx := dial(t, socket), within(t)
	if err := c.Update(ctx, Update{Config: &config, AddNodes: []netip.Addr{gateway}, Set: routes}); err != nil {
		t.Fatal(err)
	}
	inner := []byte{0x45, 0, 0x05, 0xc8, 0, 7, 0x40, 0, 64, 17, 0, 0, 10, 244, 1, 1, 10, 244, 2, 1}
	quoted := append([]byte{0x45, 0, 0x05, 0xdc, 0, 0, 0x40, 0, 64, 4, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2}, inner...)
	binary.BigEndian.PutUint16(quoted[4:], 7+router.OuterOffset(gateway))
	message := make([]byte, packet.MaxICMPError)
	message = message[:packet.PutICMPError(message, quoted, packet.ICMPError{Type: packet.ICMPUnreachable, Code: packet.CodeFragNeeded, Rest: 1400}, [4]byte{198, 18, 0, 9}, 1)]
	learned, ok := router.LearnPathMTU(message, time.Now().Round(0))
	if !ok || learned.Gateway != gateway || learned.MTU != 1400 {
		t.Fatalf("learned %+v, %v", learned, ok)
	}
	now, err := c.Status(ctx)
	if err != nil || len(now.PathMTUs) != 1 || now.PathMTUs[0] != learned {
		t.Errorf("path MTUs %+v, %v: expected %+v", now.PathMTUs, err, learned)
	}
}
