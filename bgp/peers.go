package bgp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	api "github.com/osrg/gobgp/v4/api"
)

// maxPassword is what the kernel's TCP MD5 option takes (RFC 2385, TCP_MD5SIG_MAXKEYLEN).
const maxPassword = 80

// Peer is one neighbour to hold a session with.
type Peer struct {
	Addr     netip.Addr // of Listen's family; required
	AS       uint32     // required; another one than ours makes it external, at any distance
	Passive  bool       // wait for the peer to connect; of two active speakers one connection survives (RFC 4271 section 6.8)
	Password string     // TCP MD5 (RFC 2385), at most 80 bytes; none when empty
	Kind     string     // for people: "node-to-node mesh", "node specific", "global"
	Local    netip.Addr // our end of the session; Config.Listen when unset
}

// PeerStatus is what there is to know about one session.
type PeerStatus struct {
	Addr       netip.Addr `json:"address"`
	AS         uint32     `json:"as"`
	Kind       string     `json:"kind"`
	State      string     `json:"state"` // Idle, Connect, Active, OpenSent, OpenConfirm or Established (RFC 4271 section 8.2.2)
	Since      time.Time  `json:"since"` // when the session came up, or else when it was last lost or configured
	Received   int        `json:"received"`
	Advertised int        `json:"advertised"`
	EndOfRIB   bool       `json:"endOfRIB"`            // the peer has sent all it has (RFC 4724 section 2)
	Restarting bool       `json:"restarting"`          // its routes are kept although the session is lost or not yet complete again
	LastError  string     `json:"lastError,omitempty"` // why the session is not up, or why it last went down
}

// peer is the state of one configured neighbour; guarded by Speaker.mu.
type peer struct {
	conf        Peer
	state       string
	since       time.Time
	established bool
	complete    bool // End-of-RIB seen, or the peer has no graceful restart and will never send one
	restarting  bool
	lostAt      time.Time // of the session whose routes are kept
	lastError   string
	sent        uint64    // NOTIFICATIONs sent when the session came up
	renewed     time.Time // when renew last took this peer
}

// SetPeers makes peers the set of neighbours: sessions to others are ended with a Cease, and those whose parameters
// changed are started afresh. Nothing is changed when one of them is invalid; that error names the peer and the field.
// Where a session cannot be configured the rest of the set is, and the joined errors are returned.
func (s *Speaker) SetPeers(ctx context.Context, peers []Peer) error {
	want := make(map[netip.Addr]Peer, len(peers))
	for _, p := range peers {
		if !p.Local.IsValid() {
			p.Local = s.cfg.Listen
		}
		if err := s.checkPeer(p); err != nil {
			return err
		}
		if _, twice := want[p.Addr]; twice {
			return fmt.Errorf("peer %s: address: expected each once, got it twice", p.Addr)
		}
		want[p.Addr] = p
	}
	s.ops.Lock()
	defer s.ops.Unlock()
	if s.stopped {
		return ErrStopped
	}
	s.desired = want
	return s.syncPeers(ctx)
}

func (s *Speaker) checkPeer(p Peer) error {
	switch {
	case !p.Addr.IsValid() || p.Addr.IsUnspecified() || p.Addr.Is4() != s.cfg.Listen.Is4():
		return fmt.Errorf("peer %v: address: expected one of the same family as %s", p.Addr, s.cfg.Listen)
	case p.Addr == s.cfg.Listen:
		return fmt.Errorf("peer %s: address: expected another node's, got our own", p.Addr)
	case p.AS == 0:
		return fmt.Errorf("peer %s: as: expected a number from 1 to 4294967295, got 0", p.Addr)
	case len(p.Password) > maxPassword:
		return fmt.Errorf("peer %s: password: expected at most %d bytes, got %d", p.Addr, maxPassword, len(p.Password))
	case p.Local.Is4() != s.cfg.Listen.Is4():
		return fmt.Errorf("peer %s: local address: expected one of the same family as %s, got %s", p.Addr, s.cfg.Listen, p.Local)
	}
	return nil
}

// syncPeers brings GoBGP's neighbours to s.desired. A restarting speaker waits for its announcements first: the
// End-of-RIB of an empty table would make the peers drop the very routes they keep for us. Called with ops held.
func (s *Speaker) syncPeers(ctx context.Context) error {
	if s.desired == nil || s.cfg.Restarting && s.announced == nil {
		return nil
	}
	s.mu.Lock()
	have := make(map[netip.Addr]Peer, len(s.peers))
	for a, p := range s.peers {
		have[a] = p.conf
	}
	s.mu.Unlock()

	var errs []error
	for a, old := range have {
		if _, keep := s.desired[a]; !keep {
			errs = append(errs, s.removePeer(ctx, old))
		}
	}
	for a, p := range s.desired {
		old, known := have[a]
		switch {
		case !known:
			errs = append(errs, s.addPeer(ctx, p))
		case old != p:
			errs = append(errs, s.changePeer(ctx, old, p))
		}
	}
	s.beginSync()
	return errors.Join(errs...)
}

func (s *Speaker) addPeer(ctx context.Context, p Peer) error {
	s.mu.Lock()
	s.peers[p.Addr] = &peer{conf: p, state: "Idle", since: time.Now()}
	s.mu.Unlock()
	if err := s.srv.AddPeer(ctx, &api.AddPeerRequest{Peer: s.neighbor(p)}); err != nil {
		s.mu.Lock()
		delete(s.peers, p.Addr)
		s.mu.Unlock()
		return fmt.Errorf("add bgp peer %s: %w", p.Addr, err)
	}
	return nil
}

func (s *Speaker) removePeer(ctx context.Context, p Peer) error {
	if p.Password != "" {
		// Deleting a neighbour leaves its MD5 key on the listener, changing it to one without a password does not.
		p.Password = ""
		if _, err := s.srv.UpdatePeer(ctx, &api.UpdatePeerRequest{Peer: s.neighbor(p)}); err != nil {
			return fmt.Errorf("clear password of bgp peer %s: %w", p.Addr, err)
		}
	}
	if err := s.srv.DeletePeer(ctx, &api.DeletePeerRequest{Address: p.Addr.String()}); err != nil {
		return fmt.Errorf("delete bgp peer %s: %w", p.Addr, err)
	}
	s.mu.Lock()
	delete(s.peers, p.Addr)
	s.mu.Unlock()
	return nil
}

// changePeer restarts the session with new parameters; a new Kind alone is only noted.
func (s *Speaker) changePeer(ctx context.Context, old, p Peer) error {
	relabelled := old
	relabelled.Kind = p.Kind
	if relabelled != p {
		if _, err := s.srv.UpdatePeer(ctx, &api.UpdatePeerRequest{Peer: s.neighbor(p)}); err != nil {
			return fmt.Errorf("change bgp peer %s: %w", p.Addr, err)
		}
	}
	s.mu.Lock()
	s.peers[p.Addr].conf = p
	s.mu.Unlock()
	return nil
}

// renew replaces GoBGP's state machine for a peer whose session is lost by a fresh one, which drops what is left of the
// peer's routes and tries to connect at once instead of idling for five seconds. was guards against a peer that was
// removed or replaced meanwhile.
func (s *Speaker) renew(was *peer) {
	s.ops.Lock()
	defer s.ops.Unlock()
	if s.stopped {
		return
	}
	s.mu.Lock()
	conf := was.conf
	skip := s.peers[conf.Addr] != was || was.established
	s.mu.Unlock()
	if skip {
		return
	}
	ctx := context.Background()
	if err := s.srv.DeletePeer(ctx, &api.DeletePeerRequest{Address: conf.Addr.String()}); err != nil {
		s.log.Warn("bgp peer not renewed", "peer", conf.Addr, "error", err)
		return
	}
	if err := s.srv.AddPeer(ctx, &api.AddPeerRequest{Peer: s.neighbor(conf)}); err != nil {
		s.log.Error("bgp peer lost", "peer", conf.Addr, "error", err)
		s.mu.Lock()
		delete(s.peers, conf.Addr)
		s.mu.Unlock()
	}
}

// neighbor returns p in GoBGP's terms.
func (s *Speaker) neighbor(p Peer) *api.Peer {
	seconds := func(d time.Duration) uint64 { return uint64(d / time.Second) }
	family := &api.Family{Afi: api.Family_Afi(s.family.Afi()), Safi: api.Family_Safi(s.family.Safi())}
	s.mu.Lock()
	restarting := s.cfg.Restarting && !s.isSynced()
	s.mu.Unlock()
	n := &api.Peer{
		Conf: &api.PeerConf{
			NeighborAddress: p.Addr.String(),
			PeerAsn:         p.AS,
			LocalAsn:        s.cfg.AS,
			AuthPassword:    p.Password,
		},
		Transport: &api.Transport{
			LocalAddress: p.Local.String(),
			RemotePort:   uint32(s.cfg.Port),
			PassiveMode:  p.Passive,
		},
		Timers: &api.Timers{Config: &api.TimersConfig{
			ConnectRetry:           seconds(s.cfg.ConnectRetry),
			HoldTime:               seconds(s.cfg.HoldTime),
			KeepaliveInterval:      seconds(s.cfg.Keepalive),
			IdleHoldTimeAfterReset: 1,
		}},
		GracefulRestart: &api.GracefulRestart{
			Enabled:         true,
			RestartTime:     uint32(seconds(s.cfg.RestartTime)),
			DeferralTime:    uint32(seconds(advertiseDeferral)),
			LocalRestarting: restarting,
		},
		AfiSafis: []*api.AfiSafi{{
			Config:            &api.AfiSafiConfig{Family: family, Enabled: true},
			MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: true}},
		}},
	}
	if p.AS != s.cfg.AS {
		n.EbgpMultihop = &api.EbgpMultihop{Enabled: true, MultihopTtl: 255}
	}
	return n
}

// Peers returns the state of every configured peer, sorted by address; none after Stop.
func (s *Speaker) Peers() []PeerStatus {
	s.ops.Lock()
	stopped := s.stopped
	s.ops.Unlock()
	if stopped {
		return nil
	}
	received, advertised := make(map[netip.Addr]int), make(map[netip.Addr]int)
	// It fails only when the server is stopped meanwhile; the counts are then zero, as they should be.
	_ = s.srv.ListPeer(context.Background(), &api.ListPeerRequest{EnableAdvertised: true}, func(p *api.Peer) {
		addr, err := netip.ParseAddr(p.GetState().GetNeighborAddress())
		if err != nil {
			return
		}
		for _, f := range p.AfiSafis {
			received[addr] += int(f.GetState().GetReceived())
			advertised[addr] += int(f.GetState().GetAdvertised())
		}
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]PeerStatus, 0, len(s.peers))
	for a, p := range s.peers {
		list = append(list, PeerStatus{
			Addr: a, AS: p.conf.AS, Kind: p.conf.Kind, State: p.state, Since: p.since,
			Received: received[a], Advertised: advertised[a],
			EndOfRIB: p.established && p.complete, Restarting: p.restarting, LastError: p.lastError,
		})
	}
	slices.SortFunc(list, func(a, b PeerStatus) int { return a.Addr.Compare(b.Addr) })
	return list
}
