package bgp

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// bird is a BIRD 2 in a node's namespace.
type bird struct {
	t    *testing.T
	dir  string
	ns   string
	ctl  string
	proc *exec.Cmd
}

// startBird starts Debian's BIRD on n as AS as, announcing 192.0.2.0/24, with us at peer, AS 64512.
func startBird(t *testing.T, n, peer *node, as int) *bird {
	t.Helper()
	dir := t.TempDir()
	b := &bird{t: t, dir: dir, ns: n.ns, ctl: filepath.Join(dir, "bird.ctl")}
	conf := fmt.Sprintf(`router id %[1]s;
protocol device {}
protocol static behind { ipv4; route 192.0.2.0/24 blackhole; }
protocol bgp node {
	local %[1]s as %[2]d;
	neighbor %[3]s as 64512;
	connect delay time 1; connect retry time 2; error wait time 1, 2;
	graceful restart on;
	ipv4 { import all; export where source = RTS_STATIC; next hop self; };
}
`, n.addr, as, peer.addr)
	if err := os.WriteFile(filepath.Join(dir, "bird.conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("/usr/sbin/bird", "-p", "-c", filepath.Join(dir, "bird.conf")).CombinedOutput(); err != nil {
		t.Fatalf("bird -p: %v: %s", err, out)
	}
	b.start()
	t.Cleanup(b.kill)
	return b
}

// start runs BIRD; with -R it recovers as RFC 4724's restarting speaker.
func (b *bird) start(args ...string) {
	b.t.Helper()
	os.Remove(b.ctl)
	b.proc = exec.Command("ip", append([]string{"netns", "exec", b.ns, "/usr/sbin/bird", "-f", "-c", filepath.Join(b.dir, "bird.conf"), "-s", b.ctl,
		"-P", filepath.Join(b.dir, "bird.pid")}, args...)...)
	if err := b.proc.Start(); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bird) kill() {
	_ = b.proc.Process.Kill()
	_ = b.proc.Wait()
}

// ask runs a birdc command; while BIRD starts the answer is empty.
func (b *bird) ask(args ...string) string {
	out, err := exec.Command("/usr/sbin/birdc", append([]string{"-s", b.ctl}, args...)...).CombinedOutput()
	if err != nil {
		return ""
	}
	return string(out)
}

func (b *bird) await(what string, ok func(routes string) bool) time.Duration {
	b.t.Helper()
	start := time.Now()
	for {
		out := b.ask("show", "route", "all")
		if out != "" && ok(out) {
			return time.Since(start)
		}
		if time.Since(start) > patience {
			b.t.Fatalf("bird: not within %v: %s\n%s\n%s", patience, what, out, b.ask("show", "protocols", "all", "node"))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// watch samples whether BIRD has the prefix, until stop is called, which returns how often it was missing.
func (b *bird) watch(prefix string) (stop func() (missing, samples int)) {
	quit, done := make(chan struct{}), make(chan struct{})
	var missing, samples int
	go func() {
		defer close(done)
		for {
			select {
			case <-quit:
				return
			case <-time.After(20 * time.Millisecond):
			}
			if out := b.ask("show", "route"); out != "" {
				samples++
				if !strings.Contains(out, prefix) {
					missing++
				}
			}
		}
	}()
	return func() (int, int) {
		close(quit)
		<-done
		return missing, samples
	}
}

func TestBird(t *testing.T) {
	t.Parallel()
	for _, as := range []int{64512, 65002} {
		t.Run(fmt.Sprint(as), func(t *testing.T) {
			t.Parallel()
			testBird(t, as)
		})
	}
}

func testBird(t *testing.T, as int) {
	const ours, theirs = "10.244.1.0/26", "192.0.2.0/24"
	n := network(t, 3)
	b := startBird(t, n[2], n[0], as)
	router := Peer{Addr: n[2].addr, AS: uint32(as), Kind: "global"}
	us, mate := pair(t, n, childConfig{})
	start := time.Now()
	us.setPeers(n[1].peer(n[0]), router)
	has := func(r string) bool {
		return strings.Contains(r, ours) && strings.Contains(r, "BGP.next_hop: "+n[0].addr.String())
	}
	b.await("our block by us", has)
	us.awaitRoutes(map[string]*node{theirs: n[2], "10.244.2.0/26": n[1]})
	t.Logf("converged with BIRD as AS %d after %v", as, time.Since(start))

	path := us.state().Best[netip.MustParsePrefix(theirs)]
	want := []uint32(nil)
	if as != 64512 {
		want = []uint32{uint32(as)}
	}
	if !slices.Equal(path.ASPath, want) || path.AS != uint32(as) {
		t.Errorf("path from BIRD: %+v", path)
	}
	// A node is no transit, in neither direction.
	if r := b.ask("show", "route"); strings.Contains(r, "10.244.2.0/26") {
		t.Errorf("BIRD learned the other node's block from us:\n%s", r)
	}
	if st := mate.state(); len(st.Best) != 1 {
		t.Errorf("the other node learned BIRD's route from us: %v", st.Best)
	}

	// BIRD is strict about the forwarding bit: it must see it.
	watched := b.watch(ours)
	us.kill()
	us = n[0].startSpeaker(t, childConfig{Restarting: true})
	start = time.Now()
	us.announce(ours)
	us.setPeers(n[1].peer(n[0]), router)
	us.await("synced", func(r response) bool { return r.Synced && len(r.Best) == 2 })
	t.Logf("killed and restarted beside BIRD: synced after %v", time.Since(start))
	b.await("our block by us", has)
	if missing, samples := watched(); missing > 0 || samples == 0 {
		t.Errorf("killed and restarted: BIRD lost our route in %d of %d samples", missing, samples)
	}

	// The other way round: BIRD dies and recovers, and we keep its route.
	b.kill()
	us.await("BIRD's route stale", func(r response) bool { return r.Best[netip.MustParsePrefix(theirs)].Stale })
	b.start("-R")
	us.await("BIRD's route fresh", func(r response) bool {
		p, ok := r.Best[netip.MustParsePrefix(theirs)]
		return ok && !p.Stale
	})
	if w := us.state().Withdrawn; len(w) > 0 {
		t.Errorf("BIRD restarted: withdrawn %v", w)
	}
	b.await("our block by us", has)

	// A clean stop on either side is none of that.
	us.stop()
	took := b.await("our block gone", func(r string) bool { return !strings.Contains(r, ours) })
	t.Logf("clean stop: gone from BIRD after %v", took)
	us = n[0].startSpeaker(t, childConfig{})
	start = time.Now()
	us.announce(ours)
	us.setPeers(router)
	b.await("our block back", has)
	t.Logf("started again: back at BIRD after %v", time.Since(start))
	us.awaitRoutes(map[string]*node{theirs: n[2]})
	b.ask("down")
	us.awaitRoutes(nil)
}
