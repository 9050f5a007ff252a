package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/cni"
	"margay/internal/dump"
)

// The tests play the node in a network namespace of their own: the whole test process moves into a fresh one and
// executes itself again there. Pods are namespaces that only an open file holds, so that nothing survives the process.
const inNodeEnv = "MARGAY_CNI_TEST_NODE"

var pluginDir string // holds the real plugin, under its type's name

func TestMain(m *testing.M) {
	if os.Getenv(inNodeEnv) == "" {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			fmt.Fprintln(os.Stderr, "these tests need root:", err)
			os.Exit(1)
		}
		err := syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), inNodeEnv+"=1"))
		fmt.Fprintln(os.Stderr, "execute self:", err)
		os.Exit(1)
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "mgt-cni-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "margay"), "margay/cmd/margay-cni")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build margay-cni: %v\n%s", err, out)
		return 1
	}
	pluginDir = dir
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lo:", err)
		return 1
	}
	return m.Run()
}

// fakeIPAM gives addresses of 10.244.0.0/24 and fd00:244::/120 in order and keeps them by handle.
type fakeIPAM struct {
	mu   sync.Mutex
	held map[string][]netip.Addr
	fail error // returned by every method when set
}

func newFakeIPAM() *fakeIPAM { return &fakeIPAM{held: map[string][]netip.Addr{}} }

func (f *fakeIPAM) Assign(_ context.Context, r AssignRequest) ([]netip.Addr, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return nil, f.fail
	}
	if _, ok := f.held[r.Handle]; ok {
		return nil, errors.New("handle in use")
	}
	used := map[netip.Addr]bool{}
	for _, list := range f.held {
		for _, a := range list {
			used[a] = true
		}
	}
	var out []netip.Addr
	for _, family := range []struct {
		cni.Family
		first string
	}{{r.IPv4, "10.244.0.1"}, {r.IPv6, "fd00:244::1"}} {
		if family.Assign != cni.AssignRequired { // no pool here for those who want an address only if there is one
			continue
		}
		a := netip.MustParseAddr(family.first)
		if family.IP.IsValid() {
			a = family.IP
		}
		for used[a] {
			a = a.Next()
		}
		out = append(out, a)
	}
	f.held[r.Handle] = out
	return out, nil
}

func (f *fakeIPAM) Release(_ context.Context, handle string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	delete(f.held, handle)
	return nil
}

func (f *fakeIPAM) Addresses(_ context.Context, handle string) ([]netip.Addr, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return nil, f.fail
	}
	return f.held[handle], nil
}

func (f *fakeIPAM) setFail(err error) {
	f.mu.Lock()
	f.fail = err
	f.mu.Unlock()
}

func (f *fakeIPAM) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.held)
}

// node is a server under test, with its directories.
type node struct {
	t             *testing.T
	dir           string
	ipam          *fakeIPAM
	server        *Server
	stop          func()
	ready         func() error
	mu            sync.Mutex
	added, remove int
}

func newNode(t *testing.T) *node {
	n := &node{t: t, dir: t.TempDir(), ipam: newFakeIPAM()}
	t.Cleanup(n.cleanUp)
	return n
}

func (n *node) socket() string   { return n.dir + "/run/cni.sock" }
func (n *node) queueDir() string { return n.dir + "/lib/cni/deleted" }

func (n *node) start() {
	n.t.Helper()
	s, err := New(Config{Node: "mgt-node", Socket: n.socket(), QueueDir: n.queueDir(), IPAM: n.ipam,
		MTU: func() int { return 1440 }, Ready: n.ready, Log: slog.New(slog.NewTextHandler(n.t.Output(), nil)),
		OnPod: func(added bool, _ netip.Addr, _ string) {
			n.mu.Lock()
			defer n.mu.Unlock()
			if added {
				n.added++
			} else {
				n.remove++
			}
		}})
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(n.t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	n.server = s
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Error("run:", err)
		}
	})
	n.t.Cleanup(n.stop)
	await(n.t, "socket", func() bool {
		select {
		case err := <-done:
			n.t.Fatal("run:", err)
		default:
		}
		_, err := os.Stat(n.socket())
		return err == nil
	})
}

// cleanUp leaves the node's namespace as it was for the next test.
func (n *node) cleanUp() {
	links, err := dump.Links(dump.Here)
	if err != nil {
		n.t.Error(err)
	}
	for _, l := range links {
		if l.Type() == "veth" {
			netlink.LinkDel(l)
		}
	}
	f, err := newFirewall()
	if err != nil {
		n.t.Fatal(err)
	}
	f.conn.AddTable(f.table)
	f.conn.DelTable(f.table)
	if err := f.conn.Flush(); err != nil {
		n.t.Error("remove table:", err)
	}
}

func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatal("never came:", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// pod is a container as its runtime sees it.
type pod struct {
	id, name string
	ns       *os.File
}

func newPod(t *testing.T, i int) *pod {
	t.Helper()
	type result struct {
		f   *os.File
		err error
	}
	c := make(chan result)
	go func() {
		runtime.LockOSThread() // and never back: the thread ends with the goroutine
		var r result
		if r.err = unix.Unshare(unix.CLONE_NEWNET); r.err == nil {
			r.f, r.err = os.Open("/proc/thread-self/ns/net")
		}
		c <- r
	}()
	r := <-c
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { r.f.Close() })
	return &pod{id: fmt.Sprintf("%064x", i+1), name: fmt.Sprintf("pod%d", i), ns: r.f}
}

func (p *pod) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.ns.Fd()) }

// do runs fn inside the pod.
func (p *pod) do(t *testing.T, fn func() error) {
	t.Helper()
	if err := inNetns(p.ns, fn); err != nil {
		t.Fatal(err)
	}
}

func (n *node) conf(extra string) string {
	return fmt.Sprintf(`{"cniVersion":"1.1.0","name":"k8s-pod-network","type":"margay","socket":%q,"queueDir":%q%s}`,
		n.socket(), n.queueDir(), extra)
}

// plugin executes the real binary as a runtime does. The error is what the plugin printed, as its exit status says.
func (n *node) plugin(verb string, p *pod, conf string, env ...string) (stdout []byte, cniErr *types.Error) {
	n.t.Helper()
	cmd := exec.Command(filepath.Join(pluginDir, "margay"))
	cmd.Env = append([]string{"CNI_COMMAND=" + verb, "CNI_PATH=" + pluginDir, "CNI_IFNAME=eth0"}, env...)
	if p != nil {
		cmd.Env = append(cmd.Env, "CNI_CONTAINERID="+p.id, "CNI_NETNS="+p.path(),
			"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME="+p.name)
	}
	cmd.Stdin = strings.NewReader(conf)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if err == nil {
		return out.Bytes(), nil
	}
	var exit *exec.ExitError
	e := &types.Error{}
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || json.Unmarshal(out.Bytes(), e) != nil || e.Msg == "" {
		n.t.Fatalf("%s: %v, stdout %q, stderr %q: expected an error as JSON", verb, err, out.String(), errOut.String())
	}
	return nil, e
}

func (n *node) must(verb string, p *pod, conf string, env ...string) []byte {
	n.t.Helper()
	out, err := n.plugin(verb, p, conf, env...)
	if err != nil {
		n.t.Fatalf("%s: %+v", verb, err)
	}
	return out
}
