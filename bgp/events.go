package bgp

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	api "github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
)

// renewInterval keeps a peer whose sessions break again and again from being renewed each time: in between GoBGP's own
// five idle seconds apply.
const renewInterval = 10 * time.Second

// stateNames are the states of RFC 4271 section 8.2.2, as people write them.
var stateNames = map[bgp.FSMState]string{
	bgp.BGP_FSM_IDLE:        "Idle",
	bgp.BGP_FSM_CONNECT:     "Connect",
	bgp.BGP_FSM_ACTIVE:      "Active",
	bgp.BGP_FSM_OPENSENT:    "OpenSent",
	bgp.BGP_FSM_OPENCONFIRM: "OpenConfirm",
	bgp.BGP_FSM_ESTABLISHED: "Established",
}

// The callbacks of the watch run one at a time, in the order in which GoBGP changed its tables for any one prefix or
// peer. They must be quick, and must not take ops: whoever holds ops may be waiting for GoBGP.

// onPeer follows a peer's state machine.
func (s *Speaker) onPeer(ev *apiutil.WatchEventMessage_PeerEvent, at time.Time) {
	if ev.Type != apiutil.PEER_EVENT_STATE {
		return
	}
	st := ev.Peer.State
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.peers[st.NeighborAddress]
	if p == nil {
		return
	}
	wasUp, before := p.established, p.state
	p.state = stateNames[st.SessionState]
	p.established = st.SessionState == bgp.BGP_FSM_ESTABLISHED
	switch {
	case p.established && !wasUp:
		s.sessionUp(p, st, at)
	case !p.established && wasUp:
		s.sessionDown(p, st, at)
	case st.DisconnectReason == api.PeerState_DISCONNECT_REASON_RESTART_TIMER_EXPIRED:
		p.restarting = false
		s.log.Warn("bgp peer did not come back in time, its routes are dropped", "peer", p.conf.Addr)
	case st.SessionState == bgp.BGP_FSM_IDLE && st.DisconnectMessage != "":
		// It ended before it was up. GoBGP calls a NOTIFICATION in OpenConfirm an invalid message.
		p.lastError = fmt.Sprintf("no session: %s in %s", st.DisconnectMessage, before)
	}
}

// sessionUp notes a session's beginning. Called with mu held.
func (s *Speaker) sessionUp(p *peer, st apiutil.PeerState, at time.Time) {
	p.since, p.lastError = at, ""
	p.complete = !sendsEndOfRIB(st.RemoteCap)
	p.restarting = p.restarting && !p.complete
	s.log.Info("bgp session up", "peer", p.conf.Addr, "as", p.conf.AS)
	go s.noteSent(p)
	s.checkSynced()
}

// sessionDown notes a session's end and decides what to do about it. Called with mu held.
func (s *Speaker) sessionDown(p *peer, st apiutil.PeerState, at time.Time) {
	p.since, p.complete = at, false
	reason := st.DisconnectMessage
	if reason != "" {
		p.lastError = reason
	}
	s.log.Warn("bgp session down", "peer", p.conf.Addr, "reason", reason)
	switch st.DisconnectReason {
	case api.PeerState_DISCONNECT_REASON_GRACEFUL_RESTART:
		p.restarting, p.lostAt = true, at
		go s.renewUnlessGraceful(p, p.sent)
	case api.PeerState_DISCONNECT_REASON_UNSPECIFIED, api.PeerState_DISCONNECT_REASON_DECONFIGURED,
		api.PeerState_DISCONNECT_REASON_ADMIN_DOWN:
		// Our own doing.
		p.restarting = false
	default:
		p.restarting = false
		if time.Since(p.renewed) >= renewInterval {
			p.renewed = time.Now()
			go s.renew(p)
		}
	}
}

// renewUnlessGraceful drops the routes of a session that ended because its hold time was over. GoBGP treats that as a
// graceful restart too (as RFC 8538 would have it, which was not negotiated); what tells it apart from a broken
// connection is the NOTIFICATION it sent, so more than before were sent.
func (s *Speaker) renewUnlessGraceful(p *peer, before uint64) {
	now, ok := s.notificationsSent(p.conf.Addr)
	if !ok || now <= before {
		return
	}
	s.mu.Lock()
	p.restarting = false
	p.lastError = "hold timer expired"
	s.mu.Unlock()
	s.renew(p)
}

// noteSent records how many NOTIFICATIONs a session began with.
func (s *Speaker) noteSent(p *peer) {
	n, ok := s.notificationsSent(p.conf.Addr)
	s.mu.Lock()
	defer s.mu.Unlock()
	if ok && p.established {
		p.sent = n
	}
}

func (s *Speaker) notificationsSent(a netip.Addr) (n uint64, ok bool) {
	err := s.srv.ListPeer(context.Background(), &api.ListPeerRequest{Address: a.String()}, func(p *api.Peer) {
		n, ok = p.GetState().GetMessages().GetSent().GetNotification(), true
	})
	return n, ok && err == nil
}

// onEndOfRIB notes that a peer has sent all its routes.
func (s *Speaker) onEndOfRIB(path *apiutil.Path, _ time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.peers[path.PeerAddress]
	if p == nil || path.Family != s.family || !p.established {
		return
	}
	p.complete, p.restarting = true, false
	s.checkSynced()
}

// fault remembers why a peer's session is not up. It is called from inside GoBGP's logger.
func (s *Speaker) fault(a netip.Addr, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.peers[a]; p != nil && !p.established {
		p.lastError = reason
	}
}

// sendsEndOfRIB says whether a peer with these capabilities will end its table with an End-of-RIB: whoever has the
// graceful restart capability does, with or without families in it (RFC 4724 section 3).
func sendsEndOfRIB(caps []bgp.ParameterCapabilityInterface) bool {
	for _, c := range caps {
		if c.Code() == bgp.BGP_CAP_GRACEFUL_RESTART {
			return true
		}
	}
	return false
}

// notificationText names a NOTIFICATION's code and subcode (RFC 4271 section 4.5, RFC 4486).
func notificationText(code, subcode int64) string {
	return bgp.NewNotificationErrorCode(uint8(code), uint8(subcode)).String()
}

// Synced returns a channel that is closed when every peer of the first SetPeers, and whoever was added since, has sent
// its End-of-RIB, or when Config.Deferral has passed since sessions were first started. A peer without graceful restart
// counts from the moment its session is up; no peers at all is synced at once. What the peers sent before is in
// Changes and Best by then.
func (s *Speaker) Synced() <-chan struct{} { return s.synced }

// isSynced says whether Synced is closed. Called with mu held.
func (s *Speaker) isSynced() bool {
	select {
	case <-s.synced:
		return true
	default:
		return false
	}
}

// beginSync starts the wait for the peers' tables, once.
func (s *Speaker) beginSync() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.deferral == nil {
		s.waiting = true
		s.deferral = time.AfterFunc(s.cfg.Deferral, s.deferralOver)
	}
	s.checkSynced()
}

// checkSynced closes Synced when nobody is missing any more. Called with mu held.
func (s *Speaker) checkSynced() {
	if !s.waiting {
		return
	}
	for _, p := range s.peers {
		if !p.established || !p.complete {
			return
		}
	}
	s.waiting = false
	s.deferral.Stop()
	close(s.synced)
}

func (s *Speaker) deferralOver() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.waiting {
		return
	}
	s.waiting = false
	for _, p := range s.peers {
		if !p.complete {
			s.log.Warn("bgp peer has not sent its table in time", "peer", p.conf.Addr, "state", p.state, "error", p.lastError)
		}
	}
	close(s.synced)
}
