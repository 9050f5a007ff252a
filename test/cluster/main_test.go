// Package cluster tests the whole: labs of network namespaces with the real daemons, on real traffic. It runs the
// binaries in bin/, which `make test` builds first, and needs root.
package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"margay/vrouter/rpc"
)

// labName is this run's shared lab; the process id keeps two runs on one machine apart.
var labName = fmt.Sprintf("mgt%d", os.Getpid())

// bin is where the binaries are: bin/ of the checkout, or MARGAY_BIN, for another build of them.
var bin = func() string {
	dir := os.Getenv("MARGAY_BIN")
	if dir == "" {
		dir = "../../bin"
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		panic(err)
	}
	return dir
}()

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	defer func() {
		if out, err := ctl("lab", "down", "--name", labName); err != nil {
			fmt.Fprintf(os.Stderr, "lab down: %v\n%s", err, out)
			code = 1
		}
		if left := leftovers(); left != "" {
			fmt.Fprintf(os.Stderr, "lab down left behind:\n%s\n", left)
			code = 1
		}
	}()
	sweep()
	began := time.Now()
	up := []string{"lab", "up", "--name", labName, "--nodes", "3", "--pods", "2"}
	// These put the whole suite on another attachment than the default, another way to read and write interfaces, on as many
	// queues, and on one thread or two for each.
	for _, choice := range [][2]string{{"--attach", "MARGAY_TEST_ATTACH"}, {"--io", "MARGAY_TEST_IO"},
		{"--queues", "MARGAY_TEST_QUEUES"}, {"--threads-per-queue", "MARGAY_TEST_THREADS"}} {
		if value := os.Getenv(choice[1]); value != "" {
			up = append(up, choice[0], value)
		}
	}
	if out, err := ctl(up...); err != nil {
		fmt.Fprintf(os.Stderr, "lab up: %v\n%s", err, out)
		return 1
	}
	fmt.Printf("lab up: 3 nodes, 6 pods in %.1fs\n", time.Since(began).Seconds())
	return m.Run()
}

// sweep removes what runs that were killed have left: labs and namespaces of processes that are no more.
func sweep() {
	owner := regexp.MustCompile(`/mgt([0-9]+)[^/]*$`)
	for _, pattern := range []string{"/run/margay/lab/mgt*", "/run/netns/mgt*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			panic(err) // the pattern is ours
		}
		for _, path := range found {
			m := owner.FindStringSubmatch(path)
			if m == nil {
				continue
			}
			if _, err := os.Stat("/proc/" + m[1]); err == nil {
				continue
			}
			if strings.HasPrefix(path, "/run/netns/") {
				_ = netns.DeleteNamed(filepath.Base(path)) // another run may sweep at the same time
			} else {
				_, _ = ctl("lab", "down", "--name", filepath.Base(path))
			}
		}
	}
}

// leftovers lists what of this run's labs is still there: namespaces, devices, directories, processes.
func leftovers() string {
	var left []string
	for _, pattern := range []string{"/run/netns/" + labName + "*", "/run/margay/lab/" + labName + "*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return err.Error()
		}
		left = append(left, found...)
	}
	cmdlines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err.Error()
	}
	for _, file := range cmdlines {
		if text, err := os.ReadFile(file); err == nil && bytes.Contains(text, []byte("/lab/"+labName)) {
			left = append(left, file+": "+string(bytes.ReplaceAll(text, []byte{0}, []byte{' '})))
		}
	}
	return strings.Join(left, "\n")
}

// ctl runs margayctl and returns both outputs together.
func ctl(args ...string) (string, error) {
	out, err := exec.Command(filepath.Join(bin, "margayctl"), args...).CombinedOutput()
	return string(out), err
}

func mustCtl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := ctl(args...)
	if err != nil {
		t.Fatalf("margayctl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// store runs margayctl against the lab's datastore.
func store(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	cmd := exec.Command(filepath.Join(bin, "margayctl"), args...)
	cmd.Env = append(os.Environ(), "DATASTORE_TYPE=etcdv3", "ETCD_ENDPOINTS="+strings.Join(status(t).Etcd, ","))
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("margayctl %s: %v\n%s%s", strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String()
}

// labStatus is `margayctl lab status -o json`.
type labStatus struct {
	Name  string
	Etcd  []string
	Nodes []labNode
}

type labNode struct {
	Name, Netns, Address string
	PIDs                 map[string]int
	Pods                 []labPod
}

type labPod struct{ Name, Netns, Address string }

func status(t *testing.T) labStatus {
	t.Helper()
	cmd := exec.Command(filepath.Join(bin, "margayctl"), "lab", "status", "--name", labName, "-o", "json")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("lab status: %v", err)
	}
	var st labStatus
	if err := json.Unmarshal(out, &st); err != nil {
		t.Fatalf("lab status: %v\n%s", err, out)
	}
	return st
}

// node returns the i-th node, from 1.
func node(t *testing.T, i int) labNode {
	t.Helper()
	st := status(t)
	if len(st.Nodes) < i {
		t.Fatalf("lab status lists %d nodes: %+v", len(st.Nodes), st)
	}
	return st.Nodes[i-1]
}

// ip is a status address, with or without a prefix length.
func ip(t *testing.T, s string) netip.Addr {
	t.Helper()
	a, err := netip.ParseAddr(strings.SplitN(s, "/", 2)[0])
	if err != nil {
		t.Fatalf("address %q: %v", s, err)
	}
	return a
}

// inNetns runs f on a thread of its own inside a named network namespace. Sockets that f makes stay in it.
func inNetns(t *testing.T, name string, f func() error) {
	t.Helper()
	if err := enter(name, f); err != nil {
		t.Fatalf("in %s: %v", name, err)
	}
}

func enter(name string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		// The thread stays locked, so it ends with the goroutine and no other ever runs in the wrong namespace.
		runtime.LockOSThread()
		h, err := netns.GetFromName(name)
		if err != nil {
			done <- err
			return
		}
		defer h.Close()
		if err := netns.Set(h); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// in runs a command inside a namespace.
func in(t *testing.T, name string, argv ...string) string {
	t.Helper()
	out, err := tryIn(name, argv...)
	if err != nil {
		t.Fatalf("in %s: %s: %v\n%s", name, strings.Join(argv, " "), err, out)
	}
	return out
}

func tryIn(name string, argv ...string) (string, error) {
	cmd := exec.Command("ip", append([]string{"netns", "exec", name}, argv...)...)
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// until waits for a condition and returns how long it took.
func until(t *testing.T, what string, cond func() bool) time.Duration {
	t.Helper()
	return within(t, patience, what, cond)
}

// within is until with a limit of its own, for what must not come by another and later way.
func within(t *testing.T, limit time.Duration, what string, cond func() bool) time.Duration {
	t.Helper()
	began := time.Now()
	for !cond() {
		if time.Since(began) > limit {
			t.Fatalf("%s: not within %s", what, limit)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return time.Since(began)
}

// patience bounds every wait for something that is to happen: only a failure takes that long, however busy the machine is.
const patience = 60 * time.Second

// pings tells whether one echo request is answered within a second: a look at this moment, for what is awaited and for what
// must not get through. That a pod is reached is for reached to say.
func pings(from string, to netip.Addr) bool {
	_, err := tryIn(from, "ping", "-n", "-c", "1", "-W", "1", to.String())
	return err == nil
}

// reached waits for an answer to a ping: a route that has just changed takes its time to get everywhere.
func reached(from string, to netip.Addr) bool {
	for limit := time.Now().Add(patience); !pings(from, to); {
		if time.Now().After(limit) {
			return false
		}
	}
	return true
}

// answers sends one echo request and waits long for its answer: for paths that nothing has changed.
func answers(from string, to netip.Addr) bool {
	_, err := tryIn(from, "ping", "-n", "-c", "1", "-W", "20", to.String())
	return err == nil
}

// pinging sends echo requests until it is told to stop, whether they are answered or not.
func pinging(from string, to netip.Addr) (stop func()) {
	enough, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-enough:
				return
			case <-time.After(50 * time.Millisecond):
				pings(from, to)
			}
		}
	}()
	return func() { close(enough); <-done }
}

// runDir is where a node's daemons have their sockets.
func runDir(n labNode) string {
	return filepath.Join("/run/margay/lab", labName, "nodes", n.Name, "run")
}

// askVRouter lets f ask a node's vRouter itself: a process started for each sample would measure the machine's load.
func askVRouter(t *testing.T, n labNode, f func(context.Context, *rpc.Client)) {
	t.Helper()
	c, err := rpc.Dial(filepath.Join(runDir(n), "vrouter.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	f(ctx, c)
}

// routes returns the vRouter's table of a node: prefix to gateway.
func routes(t *testing.T, n labNode) map[string]string {
	t.Helper()
	m := make(map[string]string)
	askVRouter(t, n, func(ctx context.Context, c *rpc.Client) {
		entries, _, err := c.Routes(ctx)
		if err != nil {
			t.Fatalf("routes of %s: %v", n.Name, err)
		}
		for _, r := range entries {
			m[r.Prefix.String()] = r.NextHop.Gateway.String()
		}
	})
	return m
}

// via tells whether a node's vRouter has any route by way of gateway.
func via(t *testing.T, n labNode, gateway string) bool {
	for _, gw := range routes(t, n) {
		if gw == gateway {
			return true
		}
	}
	return false
}

// counters returns the vRouter's counters of a node, packets by name.
func counters(t *testing.T, n labNode) map[string]uint64 {
	t.Helper()
	var v map[string]struct{ Packets uint64 }
	out := in(t, n.Netns, "margayctl", "node", "counters", "--all", "-o", "json")
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("node counters: %v\n%s", err, out)
	}
	m := make(map[string]uint64)
	for name, c := range v {
		m[name] = c.Packets
	}
	return m
}

// setMode changes the pool's ipipMode and waits until node 1 and 2 route each other's pods accordingly.
func setMode(t *testing.T, mode, device string) {
	t.Helper()
	store(t, "", "patch", "ippool", "default-ipv4-ippool", "-p", `{"spec":{"ipipMode":"`+mode+`"}}`)
	st := status(t)
	for i, n := range st.Nodes {
		for j, m := range st.Nodes {
			if i == j {
				continue
			}
			for _, p := range m.Pods {
				until(t, fmt.Sprintf("%s routes %s by %s", n.Name, p.Address, device), func() bool {
					out, err := tryIn(n.Netns, "ip", "route", "get", ip(t, p.Address).String())
					return err == nil && strings.Contains(out, "dev "+device)
				})
			}
		}
	}
}

// collect runs f for each item at once and reports every error.
func collect[T any](t *testing.T, items []T, f func(T) error) {
	t.Helper()
	var wg sync.WaitGroup
	for _, it := range items {
		wg.Go(func() {
			if err := f(it); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}
