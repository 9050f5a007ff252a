package lab

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// programs makes a directory of shell scripts in the daemons' place.
func programs(t *testing.T, scripts map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"vrouter", "margay-agent", "margay-cni"} {
		body := "#!/bin/sh\n" + scripts[name] + "\n"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFailedUpSaysWhyAndLeavesOnlyLogs(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	h := testHost(t)
	o := Options{Name: testName(), Nodes: 2, Pods: 1,
		BinDir: programs(t, map[string]string{"margay-agent": "echo the reason >&2; exit 1"})}
	_, err := h.Up(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "etcd: margay-agent ended (exit status 1): the reason") {
		t.Fatalf("got %v", err)
	}
	assertGone(t, &Lab{host: h, name: o.Name})
	logs, globErr := filepath.Glob(filepath.Join(os.TempDir(), "margay-lab-"+o.Name+"-*", "logs", "etcd.log"))
	if globErr != nil || len(logs) != 1 || !strings.Contains(err.Error(), logs[0]) {
		t.Errorf("logs %v are not what the error names: %v", logs, err)
	}
}

func TestFailedUpIsKeptOnDemand(t *testing.T) {
	h := testHost(t)
	o := Options{Name: testName(), Nodes: 1, KeepOnFailure: true,
		BinDir: programs(t, map[string]string{"margay-agent": "exit 1"})}
	_, err := h.Up(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "kept") {
		t.Fatalf("got %v", err)
	}
	l, err := h.Open(o.Name)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := l.Status(); err != nil || !strings.HasPrefix(st.State, "degraded") {
		t.Errorf("%+v, %v", st, err)
	}
	if err := h.Down(o.Name, nil); err != nil {
		t.Error(err)
	}
	assertGone(t, l)
}

func TestInterruptedUpLeavesNothing(t *testing.T) {
	h := testHost(t)
	o := Options{Name: testName(), Nodes: 2, BinDir: programs(t, map[string]string{"margay-agent": "exec sleep 600"})}
	l := &Lab{host: h, name: o.Name}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { // once etcd is on record, the process is there
		for ctx.Err() == nil {
			if s, err := l.load(); err == nil && s.Etcd.Alive() {
				cancel()
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	if _, err := h.Up(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	assertGone(t, l)
}

// A plugin that refuses is quoted, and its pod is not left half-made.
func TestRefusedPodLeavesNothing(t *testing.T) {
	l, s := wired(t, testHost(t), 1, 0)
	s.BinDir = programs(t, map[string]string{"margay-cni": `cat >/dev/null
[ "$CNI_COMMAND" = ADD ] || exit 0
echo '{"cniVersion":"1.0.0","code":102,"msg":"no address","details":"pool is full"}'; exit 1`})
	if err := l.record(s); err != nil {
		t.Fatal(err)
	}
	added, err := l.AddPods(t.Context(), "node1", 1)
	if len(added) > 0 || err == nil || !strings.Contains(err.Error(), "no address: pool is full (code 102)") {
		t.Errorf("%v, %v", added, err)
	}
	if s, err = l.load(); err != nil || len(s.Nodes[0].Pods) > 0 || s.Nodes[0].NextPod != 2 {
		t.Errorf("%+v, %v", s.Nodes[0], err)
	}
	if left, err := namespacesOf(l.name); err != nil || len(left) != 2 {
		t.Errorf("%v, %v", left, err)
	}
}

// The plugin is called as a runtime calls it: environment, configuration on standard input, the node's namespace.
func TestPodsAreAttachedAsARuntimeDoes(t *testing.T) {
	l, s := wired(t, testHost(t), 1, 0)
	out := filepath.Join(t.TempDir(), "call")
	s.BinDir = programs(t, map[string]string{"margay-cni": `{ env | grep ^CNI_ | sort; cat; echo; readlink /proc/self/ns/net; } >` + out + `.$CNI_COMMAND
echo '{"cniVersion":"1.0.0","ips":[{"address":"10.244.0.9/32"}]}'`})
	if err := l.record(s); err != nil {
		t.Fatal(err)
	}
	added, err := l.AddPods(t.Context(), "node1", 1)
	if err != nil || len(added) != 1 || added[0].Address.String() != "10.244.0.9" {
		t.Fatalf("%v, %v", added, err)
	}
	if err := l.RemovePods(t.Context(), "node1-pod1"); err != nil {
		t.Fatal(err)
	}
	var nodeNS string
	if err := within(netnsPath(s.Nodes[0].Name), func() (err error) { nodeNS, err = os.Readlink(ownNetNS); return err }); err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"ADD", "DEL"} {
		b, err := os.ReadFile(out + "." + verb)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"CNI_COMMAND=" + verb, "CNI_IFNAME=eth0", "CNI_NETNS=/run/netns/" + l.name + "-node1-pod1",
			"K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + l.name + "-node1-pod1", "CNI_PATH=" + s.BinDir, "CNI_CONTAINERID=",
			`"name":"k8s-pod-network"`, `"type":"margay"`, "/run/cni.sock", "/state/cni/deleted", nodeNS} {
			if !strings.Contains(string(b), want) {
				t.Errorf("%s lacks %s:\n%s", verb, want, b)
			}
		}
	}
	if s, err = l.load(); err != nil || len(s.Nodes[0].Pods) > 0 {
		t.Errorf("still on record: %+v, %v", s.Nodes[0].Pods, err)
	}
}
