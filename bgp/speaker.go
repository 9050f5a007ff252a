package bgp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	api "github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"
)

// Defaults of a Config's zero fields.
const (
	DefaultPort         = 179
	DefaultRestartTime  = 120 * time.Second
	DefaultHoldTime     = 90 * time.Second
	DefaultKeepalive    = 30 * time.Second
	DefaultConnectRetry = 2 * time.Second
	// DefaultDeferral leaves a peer that saw us die time to come back: GoBGP idles for 5 s after a broken session and
	// needs up to 2 s more to connect.
	DefaultDeferral = 20 * time.Second
)

// advertiseDeferral bounds how long a restarted speaker holds back its own announcements for the sake of peers whose
// End-of-RIB is outstanding (RFC 4724 section 4.1). It can be short because nothing learned is ever passed on.
const advertiseDeferral = 2 * time.Second

// maxRestartTime is what the 12 bits of the graceful restart capability hold (RFC 4724 section 3).
const maxRestartTime = 4095 * time.Second

// ErrStopped is returned by calls on a Speaker after Stop.
var ErrStopped = errors.New("bgp speaker is stopped")

// Config is what a Speaker is told once, at its start. Durations are rounded up to whole seconds, which is what BGP
// timers are made of; zero means the default.
type Config struct {
	AS       uint32     // our AS number; required
	RouterID netip.Addr // BGP identifier, an IPv4 address; Listen's when that is IPv4
	Listen   netip.Addr // where sessions are accepted, and the next hop of what is announced; required
	Port     int        // TCP port listened on and connected to; DefaultPort

	// Restarting says that the forwarding state of a previous life is still in place: the restart and forwarding bits
	// are set (RFC 4724), and no session starts before SetAnnounced.
	Restarting bool

	RestartTime  time.Duration // how long peers keep our routes after we died; at most 4095 s
	HoldTime     time.Duration // at least 3 s (RFC 4271 section 4.2)
	Keepalive    time.Duration // less than HoldTime; a third of HoldTime when that is set alone
	ConnectRetry time.Duration // between attempts to connect; at least 2 s
	Deferral     time.Duration // after which Synced no longer waits for missing peers

	Log       *slog.Logger // nothing is logged when nil
	APISocket string       // optional unix socket on which GoBGP serves its gRPC API, for the gobgp command
}

// Speaker is a running BGP speaker. Its methods may be called from any goroutine.
type Speaker struct {
	cfg    Config
	family bgp.Family
	srv    *server.BgpServer
	log    *slog.Logger
	cancel context.CancelFunc // ends the watch

	// ops serialises everything that configures GoBGP; it is taken before mu and never while mu is held.
	ops       sync.Mutex
	desired   map[netip.Addr]Peer       // guarded by ops: what SetPeers asked for last; nil before the first call
	announced map[netip.Prefix]struct{} // guarded by ops: in GoBGP's table; nil before the first SetAnnounced
	stopped   bool                      // guarded by ops

	mu       sync.Mutex
	peers    map[netip.Addr]*peer // configured in GoBGP
	best     map[netip.Prefix]Path
	changed  map[netip.Prefix]struct{} // since the last Changes
	waiting  bool                      // sessions were started and Synced is still open
	deferral *time.Timer

	updates chan struct{}
	synced  chan struct{}
}

// normalize fills in the defaults and refuses what cannot work; errors name the field.
func (c *Config) normalize() error {
	seconds := func(d *time.Duration, def time.Duration) {
		if *d == 0 {
			*d = def
		}
		*d = (*d + time.Second - 1).Truncate(time.Second)
	}
	if c.Keepalive == 0 && c.HoldTime != 0 {
		c.Keepalive = max(c.HoldTime/3, time.Second).Truncate(time.Second)
	}
	seconds(&c.RestartTime, DefaultRestartTime)
	seconds(&c.HoldTime, DefaultHoldTime)
	seconds(&c.Keepalive, DefaultKeepalive)
	seconds(&c.ConnectRetry, DefaultConnectRetry)
	if c.Deferral == 0 {
		c.Deferral = DefaultDeferral
	}
	if c.Port == 0 {
		c.Port = DefaultPort
	}
	if !c.RouterID.IsValid() && c.Listen.Is4() {
		c.RouterID = c.Listen
	}
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	switch {
	case c.AS == 0:
		return errors.New("as: expected a number from 1 to 4294967295, got 0")
	case !c.Listen.IsValid() || c.Listen.IsUnspecified() || c.Listen.Zone() != "" || c.Listen.Is4In6():
		return fmt.Errorf("listen: expected one of this node's addresses, got %v", c.Listen)
	case !c.RouterID.Is4() || c.RouterID.IsUnspecified():
		return fmt.Errorf("router id: expected an IPv4 address, got %v", c.RouterID)
	case c.Port < 0 || c.Port > 65535:
		return fmt.Errorf("port: expected 1 to 65535, got %d", c.Port)
	case c.RestartTime < 0 || c.RestartTime > maxRestartTime:
		return fmt.Errorf("restart time: expected at most %v, got %v", maxRestartTime, c.RestartTime)
	case c.HoldTime < 3*time.Second || c.HoldTime > 65535*time.Second:
		return fmt.Errorf("hold time: expected 3s to 65535s, got %v", c.HoldTime)
	case c.Keepalive < time.Second || c.Keepalive >= c.HoldTime:
		return fmt.Errorf("keepalive: expected at least 1s and less than the hold time of %v, got %v", c.HoldTime, c.Keepalive)
	case c.ConnectRetry < 0:
		return fmt.Errorf("connect retry: expected a positive duration, got %v", c.ConnectRetry)
	case c.Deferral < 0:
		return fmt.Errorf("deferral: expected a positive duration, got %v", c.Deferral)
	}
	return nil
}

// Start opens the listener and returns a Speaker without peers and announcements; ctx bounds the start only. The error
// names the field of cfg, or the address that cannot be listened on. A second Speaker beside a running one is not
// supported.
func Start(ctx context.Context, cfg Config) (*Speaker, error) {
	if err := cfg.normalize(); err != nil {
		return nil, fmt.Errorf("bgp configuration: %w", err)
	}
	s := &Speaker{
		cfg:     cfg,
		family:  bgp.RF_IPv4_UC,
		log:     cfg.Log,
		peers:   make(map[netip.Addr]*peer),
		best:    make(map[netip.Prefix]Path),
		changed: make(map[netip.Prefix]struct{}),
		updates: make(chan struct{}, 1),
		synced:  make(chan struct{}),
	}
	if cfg.Listen.Is6() {
		s.family = bgp.RF_IPv6_UC
	}
	opts := []server.ServerOption{server.LoggerOption(slog.New(&logHandler{next: cfg.Log.Handler(), fault: s.fault}), nil)}
	if cfg.APISocket != "" {
		if err := removeSocket(cfg.APISocket); err != nil {
			return nil, fmt.Errorf("bgp api socket: %w", err)
		}
		opts = append(opts, server.GrpcListenAddress("unix://"+cfg.APISocket))
	}
	s.srv = server.NewBgpServer(opts...)
	go s.srv.Serve()
	if err := s.start(ctx); err != nil {
		if s.cancel != nil {
			s.cancel()
		}
		s.srv.Stop()
		return nil, err
	}
	return s, nil
}

// start configures the fresh GoBGP server: listener, export policy, watch.
func (s *Speaker) start(ctx context.Context) error {
	at := net.JoinHostPort(s.cfg.Listen.String(), fmt.Sprint(s.cfg.Port))
	err := s.srv.StartBgp(ctx, &api.StartBgpRequest{Global: &api.Global{
		Asn:             s.cfg.AS,
		RouterId:        s.cfg.RouterID.String(),
		ListenPort:      int32(s.cfg.Port),
		ListenAddresses: []string{s.cfg.Listen.String()},
		// Paths as good as the best are told too (ECMP).
		UseMultiplePaths: true,
	}})
	if err != nil {
		return fmt.Errorf("bgp listen on %s: %w", at, err)
	}
	if err := s.exportOwnOnly(ctx); err != nil {
		return fmt.Errorf("bgp export policy: %w", err)
	}
	watch, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	// One watcher for everything, so that an End-of-RIB is seen after the routes before it.
	err = s.srv.WatchEvent(watch, server.WatchEventMessageCallbacks{
		OnBestPath:   s.onBestPath,
		OnPathEor:    s.onEndOfRIB,
		OnPeerUpdate: s.onPeer,
	}, server.WatchBestPath(true), server.WatchEor(true), server.WatchPeer())
	if err != nil {
		return fmt.Errorf("bgp watch: %w", err)
	}
	return nil
}

// exportOwnOnly lets nothing out but what this speaker originates: a node is no transit.
func (s *Speaker) exportOwnOnly(ctx context.Context) error {
	own := &api.Policy{Name: "own-only", Statements: []*api.Statement{{
		Name:       "originated-here",
		Conditions: &api.Conditions{RouteType: api.Conditions_ROUTE_TYPE_LOCAL},
		Actions:    &api.Actions{RouteAction: api.RouteAction_ROUTE_ACTION_ACCEPT},
	}}}
	if err := s.srv.AddPolicy(ctx, &api.AddPolicyRequest{Policy: own}); err != nil {
		return err
	}
	return s.srv.AddPolicyAssignment(ctx, &api.AddPolicyAssignmentRequest{Assignment: &api.PolicyAssignment{
		Name:          "global",
		Direction:     api.PolicyDirection_POLICY_DIRECTION_EXPORT,
		Policies:      []*api.Policy{{Name: own.Name}},
		DefaultAction: api.RouteAction_ROUTE_ACTION_REJECT,
	}})
}

// Stop ends every session with a Cease, so that the peers drop our routes at once although graceful restart was
// negotiated, and returns when the notifications are sent and the listener is closed, or with ctx's error. A second
// call returns nil.
func (s *Speaker) Stop(ctx context.Context) error {
	s.ops.Lock()
	if s.stopped {
		s.ops.Unlock()
		return nil
	}
	s.ops.Unlock()
	s.withdrawAll(ctx)
	s.ops.Lock()
	s.stopped = true
	s.ops.Unlock()

	s.mu.Lock()
	if s.deferral != nil {
		s.deferral.Stop()
	}
	s.mu.Unlock()

	done := make(chan struct{})
	go func() {
		defer close(done)
		s.srv.Stop()
		s.cancel()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("bgp stop: %w", ctx.Err())
	}
}

// withdrawTimeout bounds the wait for the last UPDATE of a clean stop.
const withdrawTimeout = 500 * time.Millisecond

// withdrawAll takes our routes back before the sessions end, and waits until the peers that are up have been sent that. A
// Cease alone can get lost: a socket closed while data of the peer's lies unread resets the connection, and a peer that
// looks at the reset first takes it for a crash, and keeps our routes for the restart time.
func (s *Speaker) withdrawAll(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, withdrawTimeout)
	defer cancel()
	before := s.updatesSent()
	s.ops.Lock()
	none := len(s.announced) == 0
	s.ops.Unlock()
	if none || s.SetAnnounced(ctx, nil) != nil {
		return // what cannot be withdrawn goes with the sessions
	}
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		waiting := false
		for addr, sent := range s.updatesSent() {
			if then, up := before[addr]; up && sent == then {
				waiting = true
			}
		}
		if !waiting {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// updatesSent returns the number of UPDATE messages sent to each peer that is up.
func (s *Speaker) updatesSent() map[string]uint64 {
	sent := make(map[string]uint64)
	// The error is that of a server that has stopped; nobody is up then.
	_ = s.srv.ListPeer(context.Background(), &api.ListPeerRequest{}, func(p *api.Peer) {
		if p.GetState().GetSessionState() == api.PeerState_SESSION_STATE_ESTABLISHED {
			sent[p.GetState().GetNeighborAddress()] = p.GetState().GetMessages().GetSent().GetUpdate()
		}
	})
	return sent
}

// removeSocket takes away the socket file that a previous life left behind; anything else under that name stays.
func removeSocket(path string) error {
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case fi.Mode()&os.ModeSocket == 0:
		return fmt.Errorf("%s exists and is no socket", path)
	}
	return os.Remove(path)
}
