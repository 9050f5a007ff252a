package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"margay/datastore"
	"margay/internal/dump"
)

var testSeq = func() func() int {
	var mu sync.Mutex
	n := 0
	return func() int { mu.Lock(); defer mu.Unlock(); n++; return n }
}()

// testName is a lab name that no other test run uses.
func testName() string { return fmt.Sprintf("mgt-%d-%d", os.Getpid(), testSeq()) }

// testHost is a machine of its own: a directory, and a namespace in place of the root one.
func testHost(t *testing.T) Host {
	t.Helper()
	name := testName() + "-host"
	if err := createNetNS(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := deleteNetNS(name); err != nil {
			t.Error(err)
		}
	})
	return Host{Dir: filepath.Join(t.TempDir(), "lab"), NetNS: netnsPath(name)}
}

// wired makes a lab's network and pods' namespaces, without any daemon.
func wired(t *testing.T, h Host, nodes, pods int) (*Lab, *state) {
	t.Helper()
	o := Options{Name: testName(), Nodes: nodes, Pods: pods, BinDir: "/bin"}
	o.fill()
	pool := datastore.NewIPPool(PoolName)
	pool.Spec.CIDR = "10.244.0.0/16"
	l, s, err := h.reserve(o, pool)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Down(l.name, nil); err != nil && !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
		assertGone(t, l)
	})
	if _, err := l.buildNetwork(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	for _, n := range s.Nodes {
		for _, p := range n.Pods {
			if err := createNetNS(p.Name); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.Phase, s.Owner = phaseUp, Process{}
	if err := l.record(s); err != nil {
		t.Fatal(err)
	}
	return l, s
}

func assertGone(t *testing.T, l *Lab) {
	t.Helper()
	if left, err := namespacesOf(l.name); err != nil || len(left) > 0 {
		t.Errorf("namespaces left: %v, %v", left, err)
	}
	if _, err := os.Stat(l.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", l.Dir(), err)
	}
	h, err := linksIn(l.host.netns())
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if _, err := h.LinkByName(hostLink(l.name)); !errors.As(err, &netlink.LinkNotFoundError{}) {
		t.Errorf("the host's veth is left: %v", err)
	}
}

// fakeDaemon puts a process on a node's record, running inside its namespace.
func fakeDaemon(t *testing.T, l *Lab, s *state) Process {
	t.Helper()
	c, err := daemon{netns: netnsPath(s.Nodes[0].Name), argv: []string{"/bin/sleep", "600"}, log: l.Dir() + "/logs/x"}.start()
	if err != nil {
		t.Fatal(err)
	}
	s.Nodes[0].Agent = c.Process
	if err := l.record(s); err != nil {
		t.Fatal(err)
	}
	return c.Process
}

func TestUnderlayConnectsHostEtcdAndNodes(t *testing.T) {
	h := testHost(t)
	_, s := wired(t, h, 3, 1)
	hostName := filepath.Base(h.NetNS)
	all := []endpoint{
		{underlayName(s.Name), at(s.Subnet, etcdOctet)},
		{hostName, at(s.Subnet, hostOctet)},
	}
	for _, n := range s.Nodes {
		all = append(all, endpoint{n.Name, n.Address})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if lost, err := reachAll(ctx, all); err != nil || len(lost) > 0 {
		t.Errorf("%v %s", err, describe(lost))
	}
}

func TestReachNamesThePairsThatAreCut(t *testing.T) {
	_, s := wired(t, testHost(t), 3, 0)
	var all []endpoint
	for _, n := range s.Nodes {
		all = append(all, endpoint{n.Name, n.Address})
	}
	// A new interface may take the kernel a second to be carried: only what has worked can be cut.
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if lost, err := reachAll(ctx, all); err != nil || len(lost) > 0 {
		t.Fatalf("before the cut: %v%s", err, describe(lost))
	}
	if err := unplugNode(s.Nodes[2]); err != nil {
		t.Fatal(err)
	}
	// On a busy machine the answer of one that is not cut may be late, too: then it gets longer.
	for patience := 600 * time.Millisecond; ; patience *= 4 {
		ctx, cancel = context.WithTimeout(t.Context(), patience)
		lost, err := reachAll(ctx, all)
		cancel()
		if err == nil && len(lost) == 4 {
			break
		}
		if err != nil || len(lost) < 4 || patience > 30*time.Second {
			t.Fatalf("%v, %d lost:%s", err, len(lost), describe(lost))
		}
	}
	if err := raiseNode(s, s.Nodes[2]); err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if lost, err := reachAll(ctx, all); err != nil || len(lost) > 0 {
		t.Errorf("after it came back: %v%s", err, describe(lost))
	}
}

func TestManyNodesAreIntroduced(t *testing.T) {
	_, s := wired(t, testHost(t), manyNodes+1, 0)
	h, err := linksIn(netnsPath(s.Nodes[0].Name))
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	neighs, err := dump.Neighbours(h, 0, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	permanent := 0
	for _, n := range neighs {
		if n.State == netlink.NUD_PERMANENT {
			permanent++
		}
	}
	if permanent != manyNodes {
		t.Errorf("%d permanent neighbours, want %d", permanent, manyNodes)
	}
}

func TestDownKillsWhatIsOnRecordAndWhatIsNot(t *testing.T) {
	l, s := wired(t, testHost(t), 2, 1)
	recorded := fakeDaemon(t, l, s)
	stray, err := daemon{netns: netnsPath(s.Nodes[1].Pods[0].Name), argv: []string{"/bin/sleep", "600"}, log: l.Dir() + "/logs/y"}.start()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.host.Down(l.name, nil); err != nil {
		t.Fatal(err)
	}
	if recorded.Alive() || stray.Alive() {
		t.Error("a process outlived its lab")
	}
	assertGone(t, l)
	if err := l.host.Down(l.name, nil); !errors.Is(err, ErrNotFound) {
		t.Errorf("a second down: %v", err)
	}
}

func TestDownAfterACrash(t *testing.T) {
	for name, wreck := range map[string]func(t *testing.T, l *Lab){
		"truncated": func(t *testing.T, l *Lab) { wreckFile(t, os.Truncate(l.stateFile(), 17)) },
		"empty":     func(t *testing.T, l *Lab) { wreckFile(t, os.Truncate(l.stateFile(), 0)) },
		"no file":   func(t *testing.T, l *Lab) { wreckFile(t, os.Remove(l.stateFile())) },
		"no dir":    func(t *testing.T, l *Lab) { wreckFile(t, os.RemoveAll(l.Dir())) },
		"no namespaces": func(t *testing.T, l *Lab) {
			names, err := namespacesOf(l.name)
			wreckFile(t, errors.Join(err, unplugHost(l.name)))
			for _, n := range names {
				wreckFile(t, deleteNetNS(n))
			}
		},
		"a namespace half made": func(t *testing.T, l *Lab) {
			wreckFile(t, os.WriteFile(netnsPath(nodeName(l.name, 9)), nil, 0o444))
		},
		"no underlay": func(t *testing.T, l *Lab) {
			wreckFile(t, errors.Join(unplugHost(l.name), deleteNetNS(underlayName(l.name))))
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, s := wired(t, testHost(t), 1, 1)
			p := fakeDaemon(t, l, s)
			wreck(t, l)
			if err := l.host.Down(l.name, nil); err != nil {
				t.Fatal(err)
			}
			if p.Alive() {
				t.Error("the daemon outlived its lab")
			}
			assertGone(t, l)
		})
	}
}

func wreckFile(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestNameInUse(t *testing.T) {
	l, s := wired(t, testHost(t), 1, 0)
	if err := l.checkFree(); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Errorf("got %v", err)
	}
	s.Phase, s.Owner = phaseStarting, self()
	if err := l.record(s); err != nil {
		t.Fatal(err)
	}
	if err := l.checkFree(); err == nil || !strings.Contains(err.Error(), "being brought up") {
		t.Errorf("got %v", err)
	}
	s.Owner = Process{PID: os.Getpid(), Started: 1} // died meanwhile
	if err := l.record(s); err != nil {
		t.Fatal(err)
	}
	if _, err := l.ready(); err == nil || !strings.Contains(err.Error(), "never finished") {
		t.Errorf("got %v", err)
	}
}

func TestDownLeavesALabThatIsComingUp(t *testing.T) {
	l, s := wired(t, testHost(t), 1, 0)
	s.Phase, s.Owner = phaseStarting, sleeper(t)
	if err := l.record(s); err != nil {
		t.Fatal(err)
	}
	if err := l.host.Down(l.name, nil); err == nil || !strings.Contains(err.Error(), "being brought up") {
		t.Fatalf("got %v", err)
	}
	if err := s.Owner.stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if err := l.host.Down(l.name, nil); err != nil {
		t.Errorf("with the owner dead: %v", err)
	}
}

func TestLabsAtOnceGetUnderlaysOfTheirOwn(t *testing.T) {
	h := testHost(t)
	pool := datastore.NewIPPool(PoolName)
	pool.Spec.CIDR = "198.18.0.0/22"
	const labs = 8
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		seen = map[netip.Prefix]string{}
	)
	for range labs {
		name := testName()
		wg.Go(func() {
			_, s, err := h.reserve(Options{Name: name, Nodes: 1, BinDir: "/bin"}, pool)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
				return
			}
			if other, taken := seen[s.Subnet]; taken || s.Subnet.Overlaps(netip.MustParsePrefix(pool.Spec.CIDR)) {
				t.Errorf("%s and %q got %s", name, other, s.Subnet)
			}
			seen[s.Subnet] = name
		})
	}
	wg.Wait()
	names, err := h.Names()
	if err != nil || len(names) != labs {
		t.Errorf("%v, %v", names, err)
	}
	for _, name := range names { // their owner is this very process, which may
		if err := h.Down(name, nil); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(h.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", h.Dir, err)
	}
}

func TestSubnetsOfTheHostAreLeftAlone(t *testing.T) {
	h := testHost(t)
	l, s := wired(t, h, 1, 0)
	elsewhere := Host{Dir: filepath.Join(t.TempDir(), "other"), NetNS: h.NetNS}
	pool := datastore.NewIPPool(PoolName)
	pool.Spec.CIDR = "10.0.0.0/8"
	got, err := elsewhere.freeSubnet(pool)
	if err != nil || got == s.Subnet {
		t.Errorf("%v, %v: lab %s has %s already", got, err, l.name, s.Subnet)
	}
}

func TestCurrentFindsTheNode(t *testing.T) {
	h := testHost(t)
	l, s := wired(t, h, 2, 1)
	n := s.Nodes[1]
	for ns, want := range map[string]string{n.Name: n.Name, n.Pods[0].Name: n.Name, underlayName(l.name): ""} {
		err := within(netnsPath(ns), func() error {
			here, ok := h.current()
			if !ok || here.Lab != l.name || here.Node != want || len(here.Endpoints) != 1 || here.Endpoints[0] != s.endpoint() {
				return fmt.Errorf("in %s: %+v, %v", ns, here, ok)
			}
			if want != "" && here.RunDir != l.runDir(want) {
				return fmt.Errorf("in %s: run dir %s", ns, here.RunDir)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	if here, ok := h.current(); ok {
		t.Errorf("outside: %+v", here)
	}
}

func TestStatusSeesDeadProcesses(t *testing.T) {
	l, s := wired(t, testHost(t), 1, 1)
	p := fakeDaemon(t, l, s)
	st, err := l.Status()
	if err != nil || st.Nodes[0].PIDs.Agent != p.PID || st.Nodes[0].State != "vrouter dead" {
		t.Errorf("%+v, %v", st, err)
	}
	if err := p.stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if st, err = l.Status(); err != nil || st.Nodes[0].PIDs.Agent != 0 || !strings.HasPrefix(st.State, "degraded") {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestStartRunsInsideTheNamespace(t *testing.T) {
	l, s := wired(t, testHost(t), 1, 1)
	var out strings.Builder
	cmd := exec.Command("ip", "-br", "link", "show", "eth0")
	cmd.Stdout = &out
	if err := l.Start("node1", cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "eth0") {
		t.Errorf("%v: %q", err, out.String())
	}
	if err := l.Start("node7", exec.Command("true")); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown node: %v", err)
	}
	entered := exec.Command("ip", "netns", "exec", s.Nodes[0].Pods[0].Name, "true")
	if b, err := entered.CombinedOutput(); err != nil {
		t.Errorf("ip netns exec: %v %s", err, b)
	}
}
