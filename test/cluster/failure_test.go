package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"margay/vrouter/rpc"
)

// kill ends a process of the lab without notice and returns when it is gone.
func kill(t *testing.T, pid int) {
	t.Helper()
	if pid <= 0 {
		t.Fatalf("no such process: %d", pid)
	}
	p, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatalf("kill %d: %v", pid, err)
	}
	until(t, "the process to be gone", func() bool { return p.Signal(syscall.Signal(0)) != nil || zombie(pid) })
}

type nodeStatus struct {
	Ready         bool
	Reason        string
	TunnelAddress netip.Addr
	VRouter       struct {
		Stale    int
		Instance string
	}
	BGP []struct{ Address, State string }
}

func agentStatus(t *testing.T, n labNode) (st nodeStatus, err error) {
	t.Helper()
	out, err := tryIn(n.Netns, "margayctl", "node", "status", "-o", "json")
	if err != nil {
		return st, err
	}
	return st, json.Unmarshal([]byte(out), &st)
}

func tunnelAddress(t *testing.T, n labNode) netip.Addr {
	t.Helper()
	st, err := agentStatus(t, n)
	if err != nil {
		t.Fatal(err)
	}
	return st.TunnelAddress
}

// settled waits until an agent is ready and all its sessions are up.
func settled(t *testing.T, n labNode) {
	t.Helper()
	until(t, n.Name+" to settle", func() bool {
		st, err := agentStatus(t, n)
		if err != nil || !st.Ready || st.VRouter.Stale != 0 || st.VRouter.Instance != vrouterInstance(t, n) {
			return false // or the agent does not know yet that the vRouter is another one
		}
		for _, p := range st.BGP {
			if p.State != "Established" {
				return false
			}
		}
		return true
	})
}

// vrouterInstance names the vRouter's process; "" while none answers.
func vrouterInstance(t *testing.T, n labNode) string {
	t.Helper()
	var instance string
	askVRouter(t, n, func(ctx context.Context, c *rpc.Client) {
		if st, err := c.Status(ctx); err == nil {
			instance = st.Instance
		}
	})
	return instance
}

// agentAway is how long the killed agent stays away: a restarted pod with an image to pull.
const agentAway = 60 * time.Second

// TestAgentKilledLosesNothing: an agent killed with -9, away for a minute and back costs no packet, and no other node
// ever forgets the route.
func TestAgentKilledLosesNothing(t *testing.T) {
	n1, n2, n3 := node(t, 1), node(t, 2), node(t, 3)
	settled(t, n1)
	settled(t, n2)
	there := startStream(t, n1.Pods[0], n2.Pods[0], time.Millisecond)
	back := startStream(t, n2.Pods[0], n1.Pods[0], time.Millisecond)
	stopSampling := make(chan struct{})
	var sampler sync.WaitGroup
	samples := 0
	sampler.Go(func() {
		for {
			select {
			case <-stopSampling:
				return
			case <-time.After(50 * time.Millisecond):
			}
			samples++
			for _, n := range []labNode{n1, n3} {
				if !via(t, n, n2.Address) {
					t.Errorf("%s has lost its routes by %s", n.Name, n2.Address)
				}
			}
		}
	})
	kill(t, n2.PIDs["agent"])
	time.Sleep(agentAway) // the outage itself: nothing to await
	mustCtl(t, "lab", "restart", "--name", labName, "node2", "agent")
	settled(t, node(t, 2))
	settled(t, n1)
	close(stopSampling)
	sampler.Wait()
	for name, s := range map[string]*stream{"node1 to node2": there, "node2 to node1": back} {
		lost, total := s.finish(t)
		t.Logf("%s: %d datagrams, %d missing; %d samples of the others' tables", name, total, len(lost), samples)
		if len(lost) != 0 || total < 30_000 {
			t.Errorf("%s: %d of %d datagrams missing, the first at %v", name, len(lost), total, lost[:min(3, len(lost))])
		}
	}
}

// soon is within what the daemons promise, tries is how often a machine that is busy with other things may keep them from it.
const (
	soon  = 2 * time.Second
	tries = 3
)

// best repeats what is to take no longer than soon until it does. Other work delays it now and then, a defect each time.
func best(t *testing.T, what string, f func() time.Duration) {
	t.Helper()
	for try := 1; ; try++ {
		took := f()
		t.Logf("%s after %s", what, took.Round(time.Millisecond))
		if took <= soon {
			return
		}
		if try == tries {
			t.Fatalf("%s: in none of %d tries within %s", what, tries, soon)
		}
	}
}

// TestVRouterKilled: traffic is back within two seconds of the restart, and meanwhile nothing leaves in clear.
func TestVRouterKilled(t *testing.T) {
	best(t, "traffic is back after the restart began", func() time.Duration { return withoutVRouter(t) })
}

// withoutVRouter kills a node's vRouter and starts it again a second later, and returns how long after that packets flow.
func withoutVRouter(t *testing.T) (took time.Duration) {
	t.Helper()
	n1, n2 := node(t, 1), node(t, 2)
	a, b := n1.Pods[0], n2.Pods[0]
	tap := onWire(t, 1)
	s := startStream(t, a, b, 10*time.Millisecond)
	until(t, "the stream to flow", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.received) > 10 })
	before := in(t, a.Netns, "ip", "-4", "-o", "addr", "show", "dev", "eth0")
	kill(t, n1.PIDs["vrouter"])
	died := time.Now()
	until(t, "a second without the vRouter", func() bool { return time.Since(died) > time.Second })
	restarted := time.Now()
	mustCtl(t, "lab", "restart", "--name", labName, "node1", "vrouter")
	until(t, "the stream to flow again", func() bool {
		took = s.firstAfter(restarted).Sub(restarted)
		return took > 0
	})
	lost, _ := s.finish(t)
	if len(lost) == 0 {
		t.Error("nothing was lost while the vRouter was dead: the test killed nothing")
	}
	pool := netip.MustParsePrefix("10.244.0.0/16")
	for _, p := range tap.all() {
		if p.proto != 4 && (pool.Contains(p.src) || pool.Contains(p.dst)) {
			t.Fatalf("left the node in clear: %+v", p)
		}
		if p.outgoing && p.proto == 17 && p.src == ip(t, n1.Address) {
			t.Fatalf("left the node masqueraded: %+v", p)
		}
	}
	if now := in(t, a.Netns, "ip", "-4", "-o", "addr", "show", "dev", "eth0"); now != before {
		t.Errorf("the pod's interface changed:\n%s\n%s", before, now)
	}
	settled(t, n1)
	return took
}

// TestVRouterRestartsWithoutAgent: the snapshot forwards before any agent has said a word.
func TestVRouterRestartsWithoutAgent(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	kill(t, n1.PIDs["agent"])
	kill(t, n1.PIDs["vrouter"])
	mustCtl(t, "lab", "restart", "--name", labName, "node1", "vrouter")
	took := until(t, "traffic by the snapshot", func() bool { return pings(n1.Pods[0].Netns, ip(t, n2.Pods[0].Address)) })
	t.Logf("forwarding from the snapshot after %s", took.Round(time.Millisecond))
	mustCtl(t, "lab", "restart", "--name", labName, "node1", "agent")
	settled(t, node(t, 1))
}

// TestNodeStopsAndStarts: a clean stop is seen by all within two seconds, a start brings everything back.
func TestNodeStopsAndStarts(t *testing.T) {
	best(t, "the others have lost node3's routes after the stop began", func() time.Duration { return stopAndStart(t) })
}

// stopAndStart does so with node3 and returns how long after the stop began nobody routes to it any more.
func stopAndStart(t *testing.T) (took time.Duration) {
	t.Helper()
	before, others := node(t, 3), []labNode{node(t, 1), node(t, 2)}
	began := time.Now()
	stopped := make(chan error, 1)
	go func() { _, err := ctl("lab", "stop", "--name", labName, "node3"); stopped <- err }()
	for _, n := range others {
		until(t, n.Name+" to lose node3's routes", func() bool { return !via(t, n, before.Address) })
	}
	took = time.Since(began)
	if err := <-stopped; err != nil {
		t.Fatalf("lab stop: %v", err)
	}
	if pings(node(t, 1).Pods[0].Netns, ip(t, before.Pods[0].Address)) {
		t.Error("a pod of the stopped node still answers across nodes")
	}
	began = time.Now()
	mustCtl(t, "lab", "start", "--name", labName, "node3")
	until(t, "node3's pods to be reachable again", func() bool {
		return pings(node(t, 1).Pods[0].Netns, ip(t, before.Pods[0].Address)) && pings(before.Pods[1].Netns, ip(t, node(t, 2).Pods[0].Address))
	})
	t.Logf("node3 is back %s after its start began", time.Since(began).Round(time.Millisecond))
	after := node(t, 3)
	for i, p := range before.Pods {
		if after.Pods[i] != p {
			t.Errorf("pod changed over the restart: %+v, now %+v", p, after.Pods[i])
		}
	}
	settled(t, after)
	return took
}

// zombie tells that a process is dead and only waits to be reaped by whoever started it.
func zombie(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	for i := len(stat) - 1; i > 0; i-- {
		if stat[i] == ')' {
			// The leader is a zombie as soon as it is dead; sockets and files close with the last thread.
			threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
			return i+2 < len(stat) && stat[i+2] == 'Z' && (err != nil || len(threads) <= 1)
		}
	}
	return false
}
