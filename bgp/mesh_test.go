package bgp

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

func TestMesh(t *testing.T) {
	t.Parallel()
	n := network(t, 3)
	blocks := []string{"10.244.1.0/26", "10.244.2.0/26", "10.244.3.0/26"}
	var c [3]*child
	for i := range n {
		c[i] = n[i].startSpeaker(t, childConfig{})
		c[i].announce(blocks[i])
	}
	start := time.Now()
	for i := range n {
		var peers []Peer
		for j := range n {
			if j != i {
				peers = append(peers, n[j].peer(n[i]))
			}
		}
		c[i].setPeers(peers...)
	}
	for i := range n {
		want := map[string]*node{}
		for j := range n {
			if j != i {
				want[blocks[j]] = n[j]
			}
		}
		c[i].awaitRoutes(want)
		c[i].await("synced", func(r response) bool { return r.Synced })
	}
	t.Logf("first convergence of three nodes: %v", time.Since(start))

	st := c[0].state()
	if len(st.Peers) != 2 {
		t.Fatalf("peers: %+v", st.Peers)
	}
	for i, p := range st.Peers {
		if p.Addr != n[i+1].addr || p.AS != 64512 || p.Kind != "node-to-node mesh" || p.State != "Established" || p.Received != 1 ||
			p.Advertised != 1 || !p.EndOfRIB || p.Restarting || p.LastError != "" || time.Since(p.Since) > time.Minute {
			t.Errorf("peer: %+v", p)
		}
	}
	ch := c[0].do(request{Op: "changes"}).Changes
	if got := ch[netip.MustParsePrefix(blocks[1])]; len(got) != 1 || got[0].NextHop != n[1].addr || got[0].LocalPref != 100 || len(got[0].ASPath) != 0 {
		t.Errorf("changes: %+v", ch)
	}

	// A change of what is announced, and of who is a peer.
	c[1].announce("10.244.2.64/26")
	took := c[0].awaitRoutes(map[string]*node{"10.244.2.64/26": n[1], blocks[2]: n[2]})
	t.Logf("a changed announcement: %v", took)
	ch = c[0].do(request{Op: "changes"}).Changes
	if gone, ok := ch[netip.MustParsePrefix(blocks[1])]; !ok || len(gone) != 0 {
		t.Errorf("changes after a withdraw: %+v", ch)
	}
	c[0].setPeers(n[2].peer(n[0]))
	c[0].awaitRoutes(map[string]*node{blocks[2]: n[2]})
	c[1].awaitRoutes(map[string]*node{blocks[2]: n[2]})
}

// Both ends connect: one of the two connections must survive, and no session may flap for it.
func TestBothActive(t *testing.T) {
	t.Parallel()
	n := network(t, 2)
	a, b := n[0].startSpeaker(t, childConfig{}), n[1].startSpeaker(t, childConfig{})
	a.announce("10.244.1.0/26")
	b.announce("10.244.2.0/26")
	a.setPeers(Peer{Addr: n[1].addr, AS: 64512})
	b.setPeers(Peer{Addr: n[0].addr, AS: 64512})
	a.awaitRoutes(map[string]*node{"10.244.2.0/26": n[1]})
	b.awaitRoutes(map[string]*node{"10.244.1.0/26": n[0]})
}

// pair starts two speakers that know each other's block.
func pair(t *testing.T, n []*node, cfg childConfig) (a, b *child) {
	t.Helper()
	a, b = n[0].startSpeaker(t, cfg), n[1].startSpeaker(t, cfg)
	a.announce("10.244.1.0/26")
	b.announce("10.244.2.0/26")
	a.setPeers(n[1].peer(n[0]))
	b.setPeers(n[0].peer(n[1]))
	a.awaitRoutes(map[string]*node{"10.244.2.0/26": n[1]})
	b.awaitRoutes(map[string]*node{"10.244.1.0/26": n[0]})
	return a, b
}

func TestCleanStopFlushes(t *testing.T) {
	t.Parallel()
	for _, first := range []int{0, 1} { // the passive and the active end
		n := network(t, 2)
		a, b := pair(t, n, childConfig{})
		stays, goes, home, other := a, b, n[1], n[0]
		block, otherBlock := "10.244.2.0/26", "10.244.1.0/26"
		if first == 0 {
			stays, goes, home, other = b, a, n[0], n[1]
			block, otherBlock = otherBlock, block
		}
		start := time.Now()
		goes.stop()
		stays.awaitRoutes(nil)
		t.Logf("clean stop: gone after %v", time.Since(start))

		again := home.startSpeaker(t, childConfig{})
		start = time.Now()
		again.announce(block)
		again.setPeers(other.peer(home))
		stays.awaitRoutes(map[string]*node{block: home})
		again.awaitRoutes(map[string]*node{otherBlock: other})
		t.Logf("started again: back after %v", time.Since(start))
	}
}

func TestKilledAndRestarted(t *testing.T) {
	t.Parallel()
	for _, victim := range []int{0, 1} { // the passive and the active end
		n := network(t, 3) // the third peer is configured and never there
		a, b := pair(t, n, childConfig{})
		stays, dies, home, other := a, b, n[1], n[0]
		block, otherBlock := "10.244.2.0/26", "10.244.1.0/26"
		if victim == 0 {
			stays, dies, home, other = b, a, n[0], n[1]
			block, otherBlock = otherBlock, block
		}
		prefix := netip.MustParsePrefix(block)
		dies.kill()
		stays.await("restarting and stale", func(r response) bool {
			return len(r.Best) == 1 && r.Best[prefix].Stale && r.Peers[0].Restarting && r.Peers[0].State != "Established"
		})

		again := home.startSpeaker(t, childConfig{Restarting: true, Deferral: 9 * time.Second})
		start := time.Now()
		again.setPeers(other.peer(home), n[2].peer(home))
		// Nothing may start before the announcements are there.
		if st := again.state(); len(st.Peers) != 0 || st.Synced {
			t.Fatalf("sessions before SetAnnounced: %+v", st)
		}
		again.announce(block)
		again.awaitRoutes(map[string]*node{otherBlock: other})
		t.Logf("killed and restarted: its table back after %v", time.Since(start))
		stays.await("fresh again", func(r response) bool {
			return !r.Best[prefix].Stale && r.Peers[0].State == "Established" && r.Peers[0].EndOfRIB && !r.Peers[0].Restarting
		})
		t.Logf("killed and restarted: its routes confirmed after %v", time.Since(start))
		again.await("synced without the missing peer", func(r response) bool { return r.Synced })
		t.Logf("killed and restarted: synced without the missing peer after %v", time.Since(start))
		if st := stays.state(); len(st.Withdrawn) != 0 || len(st.Best) != 1 {
			t.Errorf("routes lost on the way: withdrawn %v, best %v", st.Withdrawn, st.Best)
		}
		// And it works on: a new announcement, and one given up.
		again.announce("10.244.9.0/26")
		stays.awaitRoutes(map[string]*node{"10.244.9.0/26": home})
	}
}

// What the restarted speaker no longer announces goes with its End-of-RIB, and nothing else does.
func TestRestartDropsWhatIsNotConfirmed(t *testing.T) {
	t.Parallel()
	n := network(t, 2)
	a, b := pair(t, n, childConfig{})
	b.announce("10.244.2.0/26", "10.244.2.64/26")
	a.awaitRoutes(map[string]*node{"10.244.2.0/26": n[1], "10.244.2.64/26": n[1]})
	b.kill()
	again := n[1].startSpeaker(t, childConfig{Restarting: true})
	again.announce("10.244.2.64/26")
	again.setPeers(n[0].peer(n[1]))
	a.awaitRoutes(map[string]*node{"10.244.2.64/26": n[1]})
	if got := a.state().Withdrawn; !slices.Equal(got, []netip.Prefix{netip.MustParsePrefix("10.244.2.0/26")}) {
		t.Errorf("withdrawn: %v", got)
	}
	again.await("synced", func(r response) bool { return r.Synced })
}

// Two that restart together must not wait for each other: neither has an End-of-RIB to give before it has one.
func TestBothRestart(t *testing.T) {
	t.Parallel()
	n := network(t, 2)
	a, b := pair(t, n, childConfig{})
	a.kill()
	b.kill()
	start := time.Now()
	a, b = pair(t, n, childConfig{Restarting: true})
	for _, c := range []*child{a, b} {
		c.await("synced", func(r response) bool { return r.Synced && r.Peers[0].EndOfRIB })
	}
	t.Logf("both restarted: synced after %v", time.Since(start))
}

func TestRestartTimeOver(t *testing.T) {
	t.Parallel()
	n := network(t, 2)
	a, b := pair(t, n, childConfig{RestartTime: 3 * time.Second})
	start := time.Now()
	b.kill()
	a.await("restarting", func(r response) bool { return r.Peers[0].Restarting && len(r.Best) == 1 })
	a.awaitRoutes(nil)
	took := time.Since(start)
	t.Logf("restart time of 3s over: gone after %v", took)
	if st := a.state(); st.Peers[0].Restarting || took < 3*time.Second {
		t.Errorf("after %v: %+v", took, st.Peers)
	}
}

// A node without power sends nothing any more, not even the end of its connections.
func TestHoldTimeOver(t *testing.T) {
	t.Parallel()
	n := network(t, 2)
	a, b := pair(t, n, childConfig{HoldTime: 3 * time.Second, Keepalive: time.Second})
	ip(t, "-n", n[1].ns, "link", "set", "eth0", "down")
	b.kill()
	took := a.awaitRoutes(nil)
	t.Logf("hold time of 3s over: gone after %v", took)
	a.await("the reason", func(r response) bool { return !r.Peers[0].Restarting && r.Peers[0].LastError != "" })
}

// One prefix that two peers announce equally well is told with both next hops; the one that remains is told alone.
func TestEqualPaths(t *testing.T) {
	t.Parallel()
	n := network(t, 3)
	const shared = "192.0.2.0/24"
	var c [3]*child
	for i := range n {
		c[i] = n[i].startSpeaker(t, childConfig{})
	}
	c[0].announce("10.244.1.0/26")
	c[1].announce(shared)
	c[2].announce(shared, "10.244.3.0/26")
	c[0].setPeers(n[1].peer(n[0]), n[2].peer(n[0]))
	c[1].setPeers(n[0].peer(n[1]))
	c[2].setPeers(n[0].peer(n[2]))
	hops := func(r response) (all []netip.Addr) {
		p, ok := r.Best[netip.MustParsePrefix(shared)]
		if !ok {
			return nil
		}
		for _, p := range p.All() {
			all = append(all, p.NextHop)
		}
		return all
	}
	both := []netip.Addr{n[1].addr, n[2].addr}
	c[0].await("both paths", func(r response) bool { return slices.Equal(hops(r), both) })
	if ch := c[0].do(request{Op: "changes"}).Changes[netip.MustParsePrefix(shared)]; len(ch) != 2 {
		t.Errorf("changes: %+v", ch)
	}
	c[1].announce("10.244.2.0/26")
	c[0].await("one path", func(r response) bool { return slices.Equal(hops(r), both[1:]) })
	c[1].announce(shared)
	c[0].await("both again", func(r response) bool { return slices.Equal(hops(r), both) })
	// What this node announces itself is nobody's route to it; and then it is the others' again.
	c[0].announce(shared)
	c[0].await("our own", func(r response) bool { return len(hops(r)) == 0 })
	c[0].announce("10.244.1.0/26")
	c[0].await("the others' again", func(r response) bool { return slices.Equal(hops(r), both) })
	c[2].stop()
	c[0].await("one after a stop", func(r response) bool { return slices.Equal(hops(r), both[:1]) })
}
