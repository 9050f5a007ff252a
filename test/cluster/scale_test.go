package cluster

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

// attachment is one pod attached by executing the plugin as a runtime does.
type attachment struct {
	node      labNode
	id, netns string
	address   string
	took      time.Duration
}

// plugin executes margay-cni in a node's namespace.
func plugin(n labNode, verb, id, ns string) ([]byte, error) {
	conf := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"k8s-pod-network","type":"margay","socket":%q,"queueDir":%q}`,
		filepath.Join(runDir(n), "cni.sock"), filepath.Join(runDir(n), "../state/cni/deleted"))
	cmd := exec.Command(filepath.Join(bin, "margay-cni"))
	cmd.Env = []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + ns, "CNI_IFNAME=eth0", "CNI_PATH=" + bin,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=scale;K8S_POD_NAME=" + id}
	cmd.Stdin = strings.NewReader(conf)
	var out []byte
	err := enter(n.Netns, func() (err error) { out, err = cmd.Output(); return err })
	return out, err
}

// newNetns makes a namespace that a runtime would hand to the plugin.
func newNetns(t *testing.T, name string) string {
	t.Helper()
	if err := exec.Command("ip", "netns", "add", name).Run(); err != nil {
		t.Fatalf("ip netns add %s: %v", name, err)
	}
	t.Cleanup(func() { _ = netns.DeleteNamed(name) })
	return "/run/netns/" + name
}

func inUse(t *testing.T) (n int) {
	t.Helper()
	var pools []struct{ InUse int }
	out := store(t, "", "ipam", "show", "-o", "json")
	var raw []map[string]any
	if err := json.Unmarshal([]byte(out), &raw); err != nil {
		t.Fatalf("ipam show: %v\n%s", err, out)
	}
	if err := json.Unmarshal([]byte(out), &pools); err != nil {
		t.Fatal(err)
	}
	for _, p := range pools {
		n += p.InUse
	}
	return n
}

// TestTwoHundredPods attaches 200 pods on three nodes, at once on each, and takes them away again.
func TestTwoHundredPods(t *testing.T) {
	const total = 200
	before := inUse(t)
	st := status(t)
	work := make([][]*attachment, len(st.Nodes))
	for i := range total {
		n := i % len(st.Nodes)
		id := fmt.Sprintf("%s-scale-%d", labName, i)
		work[n] = append(work[n], &attachment{node: st.Nodes[n], id: id, netns: newNetns(t, id)})
	}
	began := time.Now()
	onEach(t, work, func(a *attachment) error {
		at := time.Now()
		out, err := plugin(a.node, "ADD", a.id, a.netns)
		a.took = time.Since(at)
		if err != nil {
			return fmt.Errorf("ADD %s: %w: %s", a.id, err, out)
		}
		var result struct{ IPs []struct{ Address string } }
		if err := json.Unmarshal(out, &result); err != nil || len(result.IPs) != 1 {
			return fmt.Errorf("ADD %s: %v: %s", a.id, err, out)
		}
		a.address = strings.TrimSuffix(result.IPs[0].Address, "/32")
		return nil
	})
	wall := time.Since(began)
	seen := map[string]string{}
	var times []time.Duration
	for _, p := range pods(t) {
		seen[ip(t, p.Address).String()] = p.Name
	}
	for _, list := range work {
		for _, a := range list {
			if other, twice := seen[a.address]; twice {
				t.Errorf("address %s given to %s and %s", a.address, other, a.id)
			}
			seen[a.address] = a.id
			times = append(times, a.took)
		}
	}
	slices.Sort(times)
	t.Logf("%d ADDs in %s, %d nodes at once: p50 %s, p95 %s a pod", total, wall.Round(time.Millisecond), len(work),
		times[total/2].Round(time.Millisecond), times[total*95/100].Round(time.Millisecond))
	if got := inUse(t); got != before+total {
		t.Errorf("%d addresses in use, expected %d", got, before+total)
	}
	if first, last := work[0][0], work[1][len(work[1])-1]; !reached(first.id, ip(t, last.address)) {
		t.Errorf("%s (%s) does not reach %s (%s)", first.id, first.address, last.id, last.address)
	}
	onEach(t, work, func(a *attachment) error {
		if out, err := plugin(a.node, "DEL", a.id, a.netns); err != nil {
			return fmt.Errorf("DEL %s: %w: %s", a.id, err, out)
		}
		return nil
	})
	if got := inUse(t); got != before {
		t.Errorf("%d addresses in use after the detachments, expected %d as before", got, before)
	}
}

// onEach runs f one after the other within each list, and the lists at once.
func onEach(t *testing.T, work [][]*attachment, f func(*attachment) error) {
	t.Helper()
	var wg sync.WaitGroup
	for _, list := range work {
		wg.Go(func() {
			for _, a := range list {
				if err := f(a); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// TestPluginEdges are the calls a runtime makes that are easy to get wrong.
func TestPluginEdges(t *testing.T) {
	n := node(t, 1)
	before := inUse(t)
	id := labName + "-edge"
	ns := newNetns(t, id)
	if out, err := plugin(n, "ADD", id, ns); err != nil {
		t.Fatalf("ADD: %v: %s", err, out)
	}
	out, err := plugin(n, "ADD", id, ns)
	if err == nil || !strings.Contains(string(out), id) {
		t.Errorf("a second ADD: expected an error that names the container, got %v: %s", err, out)
	}
	if got := inUse(t); got != before+1 {
		t.Errorf("a second ADD left %d addresses in use, expected %d", got, before+1)
	}
	if !reached(id, ip(t, node(t, 2).Pods[0].Address)) {
		t.Error("a second ADD broke the pod")
	}
	for range 2 { // a runtime may repeat a DEL
		if out, err := plugin(n, "DEL", id, ns); err != nil {
			t.Errorf("DEL: %v: %s", err, out)
		}
	}
	if out, err := plugin(n, "DEL", labName+"-never", ns); err != nil {
		t.Errorf("DEL of one never added: %v: %s", err, out)
	}
	if got := inUse(t); got != before {
		t.Errorf("%d addresses in use, expected %d", got, before)
	}
}

// TestDeleteWhileAgentIsDown: the DEL succeeds, and the address is released when the agent is back.
func TestDeleteWhileAgentIsDown(t *testing.T) {
	n := node(t, 3)
	before := inUse(t)
	id := labName + "-queued"
	ns := newNetns(t, id)
	if out, err := plugin(n, "ADD", id, ns); err != nil {
		t.Fatalf("ADD: %v: %s", err, out)
	}
	kill(t, n.PIDs["agent"])
	if out, err := plugin(n, "DEL", id, ns); err != nil {
		t.Errorf("DEL while the agent is down: %v: %s", err, out)
	}
	if got := inUse(t); got != before+1 {
		t.Errorf("%d addresses in use while the agent is down, expected %d", got, before+1)
	}
	mustCtl(t, "lab", "restart", "--name", labName, "node3", "agent")
	until(t, "the queued release", func() bool { return inUse(t) == before })
	settled(t, node(t, 3))
}

// TestEtcdDown: with the datastore away, packets flow and the tools say what is wrong.
func TestEtcdDown(t *testing.T) {
	cmd := exec.Command(filepath.Join(bin, "margayctl"), "ipam", "show")
	cmd.Env = append(os.Environ(), "ETCD_ENDPOINTS=http://127.0.0.1:1")
	out, err := cmd.CombinedOutput()
	if text := string(out); err == nil || strings.Count(text, "\n") != 1 || !strings.Contains(text, "not reachable") {
		t.Errorf("expected one line that says that etcd is not reachable and exit 1, got %v:\n%s", err, out)
	}
}
