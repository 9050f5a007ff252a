package cluster

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// containers are those of the DaemonSet in deploy/, by name.
func containers(t *testing.T) map[string]corev1.Container {
	t.Helper()
	text, err := os.ReadFile("../../deploy/margay.yaml")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]corev1.Container{}
	for doc := range bytes.SplitSeq(text, []byte("\n---\n")) {
		var set appsv1.DaemonSet
		if err := yaml.Unmarshal(doc, &set); err != nil {
			t.Fatal(err)
		}
		for _, c := range set.Spec.Template.Spec.Containers {
			found[c.Name] = c
		}
	}
	return found
}

// safeBuffer may be written and read at once.
type safeBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// confined is a daemon that runs as a container's process would: with /proc/sys read-only and few capabilities.
type confined struct {
	cmd    *exec.Cmd
	output *safeBuffer
	gone   chan struct{}
}

// confine starts a daemon of the lab again, with the command line and the environment that it had, the command of the
// DaemonSet's container around it, and the capabilities that the container gets, less one of them where without is set.
func confine(t *testing.T, n labNode, c corev1.Container, binary string, was process, without corev1.Capability) *confined {
	t.Helper()
	var caps []string
	for _, add := range c.SecurityContext.Capabilities.Add {
		if add != without {
			caps = append(caps, "+"+strings.ToLower(string(add)))
		}
	}
	if binary == "vrouter" && os.Getenv("MARGAY_TEST_IO") == "xdp" {
		caps = append(caps, "+ipc_lock") // as docs/ports.md asks for who chooses it
	}
	command := append([]string(nil), c.Command...)
	if len(command) == 3 { // a script, whose last word is the binary
		command[2] = strings.TrimSuffix(command[2], binary) + strings.Join(append([]string{filepath.Join(bin, binary)}, was.args...), " ")
	} else {
		command = append([]string{filepath.Join(bin, binary)}, was.args...)
	}
	// ip netns exec would mount /sys anew and hide the namespaces' mounts; the daemons are started by the lab with nsenter's
	// means, and so are these.
	argv := append([]string{"--net=/run/netns/" + n.Netns, "unshare", "--mount", "sh", "-euc",
		`mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys; exec setpriv --inh-caps=-all --bounding-set=-all,` + strings.Join(caps, ",") + ` "$@"`,
		"confined"}, command...)
	p := &confined{cmd: exec.Command("nsenter", argv...), output: &safeBuffer{}, gone: make(chan struct{})}
	p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = was.env, p.output, p.output
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // killed, or ended with the error that the test reads off its output
		close(p.gone)
	}()
	t.Cleanup(p.stop)
	return p
}

func (p *confined) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGKILL) // it may have ended
	<-p.gone
}

// process is what a running daemon was started with.
type process struct{ args, env []string }

func processOf(t *testing.T, pid int) process {
	t.Helper()
	read := func(name string) []string {
		raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSuffix(string(raw), "\x00"), "\x00")
	}
	return process{read("cmdline")[1:], read("environ")}
}

// TestManifestsCapabilities: with what deploy/margay.yaml gives them, and no more, the daemons do their work; without any
// one of the capabilities they need, they say which.
func TestManifestsCapabilities(t *testing.T) {
	n1, n2, specs := node(t, 1), node(t, 2), containers(t)
	vrouter, agent := processOf(t, n2.PIDs["vrouter"]), processOf(t, n2.PIDs["agent"])
	kill(t, n2.PIDs["agent"])
	kill(t, n2.PIDs["vrouter"])
	defer func() {
		mustCtl(t, "lab", "restart", "--name", labName, n2.Name, "vrouter")
		mustCtl(t, "lab", "restart", "--name", labName, n2.Name, "agent")
		settled(t, node(t, 2))
	}()
	without := func(c corev1.Container, binary string, was process, missing corev1.Capability, want string) {
		p := confine(t, n2, c, binary, was, missing)
		select {
		case <-p.gone:
		case <-time.After(patience):
			t.Errorf("%s without %s runs on:\n%s", binary, missing, p.output)
		}
		p.stop()
		if !strings.Contains(p.output.String(), want) {
			t.Errorf("%s without %s: expected %q in\n%s", binary, missing, want, p.output)
		}
	}
	without(specs["vrouter"], "vrouter", vrouter, "NET_ADMIN", "NET_ADMIN")
	without(specs["vrouter"], "vrouter", vrouter, "NET_RAW", "NET_RAW")
	v := confine(t, n2, specs["vrouter"], "vrouter", vrouter, "")
	defer v.stop()
	without(specs["agent"], "margay-agent", agent, "SYS_ADMIN", "mount: ")
	without(specs["agent"], "margay-agent", agent, "NET_ADMIN", "operation not permitted")
	without(specs["agent"], "margay-agent", agent, "NET_BIND_SERVICE", "permission denied")
	a := confine(t, n2, specs["agent"], "margay-agent", agent, "")
	defer a.stop()
	defer func() {
		if t.Failed() {
			t.Logf("the daemons said:\n%s\n%s", v.output, a.output)
		}
	}()
	settled(t, n2)
	if !reached(n1.Pods[0].Netns, ip(t, n2.Pods[0].Address)) || !reached(n2.Pods[1].Netns, ip(t, n1.Pods[1].Address)) {
		t.Error("no packets pass")
	}
	// A pod that comes while they run: its interface's sysctls are written through the read-only mount's other side.
	mustCtl(t, "lab", "add-pod", "--name", labName, n2.Name)
	pods := node(t, 2).Pods
	last := pods[len(pods)-1]
	if !reached(n1.Pods[0].Netns, ip(t, last.Address)) {
		t.Errorf("the new pod %s is not reached", last.Name)
	}
	mustCtl(t, "lab", "del-pod", "--name", labName, last.Name)
}
