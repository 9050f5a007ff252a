package bgp

import (
	"strings"
	"testing"
)

// Why a session is not up must be in the status, at either end.
func TestReasons(t *testing.T) {
	t.Parallel()
	n := network(t, 3)
	a, b := n[0].startSpeaker(t, childConfig{}), n[1].startSpeaker(t, childConfig{})
	a.setPeers(Peer{Addr: n[1].addr, AS: 65001}, Peer{Addr: n[2].addr, AS: 64512})
	a.await("closed by a peer that does not know us", func(r response) bool {
		return strings.Contains(r.Peers[0].LastError, "closed the connection before its OPEN")
	})
	b.setPeers(Peer{Addr: n[0].addr, AS: 64512, Passive: true})
	a.await("reasons at the active end", func(r response) bool {
		return strings.Contains(r.Peers[0].LastError, "bad peer as") && strings.Contains(r.Peers[1].LastError, "refused")
	})
	b.await("reason at the passive end", func(r response) bool {
		return r.Peers[0].LastError == "no session: invalid-msg in OpenConfirm"
	})
}

// MD5: only the same password on both ends makes a session, and changing or removing it takes effect.
func TestPassword(t *testing.T) {
	t.Parallel()
	n := network(t, 2)
	a, b := n[0].startSpeaker(t, childConfig{}), n[1].startSpeaker(t, childConfig{})
	set := func(pa, pb string) {
		t.Helper()
		a.setPeers(Peer{Addr: n[1].addr, AS: 64512, Password: pa})
		b.setPeers(Peer{Addr: n[0].addr, AS: 64512, Password: pb, Passive: true})
	}
	up := func() {
		t.Helper()
		a.await("session", func(r response) bool { return r.Peers[0].State == "Established" })
	}
	set("secret", "secret")
	up()
	set("secret", "other")
	a.await("no session", func(r response) bool {
		return r.Peers[0].State != "Established" && strings.Contains(r.Peers[0].LastError, "timeout")
	})
	set("", "")
	up()
	// A key left on the listener would refuse a peer that comes back without one.
	set("secret", "secret")
	up()
	a.setPeers()
	b.setPeers()
	set("", "")
	up()
}
