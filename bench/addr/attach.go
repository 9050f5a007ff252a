package addr

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"margay/bench/stat"
	"margay/lab"
)

// pluginsVersion is the release of containernetworking/plugins that ADD is compared with.
const pluginsVersion = "v1.9.1"

// buildPeers builds ptp and host-local into dir, through the Go module proxy.
func buildPeers(ctx context.Context, dir string) error {
	for _, plugin := range []string{"main/ptp", "ipam/host-local"} {
		cmd := exec.CommandContext(ctx, "go", "install", "github.com/containernetworking/plugins/plugins/"+plugin+"@"+pluginsVersion)
		cmd.Dir = dir // outside the module: nothing of it is wanted there
		cmd.Env = append(os.Environ(), "GOBIN="+dir, "CGO_ENABLED=0", "GOFLAGS=")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w: %s", plugin, err, out)
		}
	}
	return nil
}

// plugin is one way to attach a pod: a binary and its configuration.
type plugin struct {
	binary string
	conf   []byte
	path   string // CNI_PATH
}

// call executes the plugin on a node, as a runtime does.
func (p plugin) call(l *lab.Lab, node, verb, id, netns string) error {
	cmd := exec.Command(p.binary)
	cmd.Env = []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + netns, "CNI_IFNAME=eth0", "CNI_PATH=" + p.path,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME=" + id, "PATH=" + os.Getenv("PATH")}
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(p.conf), &out, &out
	if err := l.Start(node, cmd); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", filepath.Base(p.binary), verb, err, strings.TrimSpace(out.String()))
	}
	return nil
}

// Attach measures CNI ADD, one after the other, beside upstream's ptp with host-local on the same node; they take turns.
// Each pod is taken away again before the next comes.
func Attach(ctx context.Context, rounds int, binDir string) (row Row, err error) {
	dir, err := os.MkdirTemp("", "margay-bench-cni-")
	if err != nil {
		return Row{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := buildPeers(ctx, dir); err != nil {
		return Row{}, err
	}
	name := labName("a")
	l, err := lab.Host{}.Up(ctx, lab.Options{Name: name, Nodes: 1, BinDir: binDir})
	if err != nil {
		return Row{}, err
	}
	defer func() { err = errors.Join(err, lab.Host{}.Down(name, nil)) }()
	st, err := l.Status()
	if err != nil {
		return Row{}, err
	}
	node := st.Nodes[0]
	ours, err := json.Marshal(map[string]string{"cniVersion": "1.0.0", "name": "k8s-pod-network", "type": "margay",
		"socket": filepath.Join(node.RunDir, "cni.sock"), "queueDir": filepath.Join(dir, "deleted")})
	if err != nil {
		return Row{}, err
	}
	theirs, err := json.Marshal(map[string]any{"cniVersion": "1.0.0", "name": "peer", "type": "ptp",
		"ipam": map[string]string{"type": "host-local", "subnet": "10.99.0.0/16", "dataDir": filepath.Join(dir, "leases")}})
	if err != nil {
		return Row{}, err
	}
	plugins := [2]plugin{{filepath.Join(binDir, "margay-cni"), ours, binDir}, {filepath.Join(dir, "ptp"), theirs, dir}}
	var took [2][]float64
	for i := range rounds + 2 {
		for j, p := range plugins {
			id := fmt.Sprintf("%s-pod%d", node.Name, 1000+2*i+j)
			if err := inNetns(ctx, id, func(path string) error {
				if err := timed(&took[j], func() error { return p.call(l, node.Name, "ADD", id, path) }); err != nil {
					return err
				}
				return p.call(l, node.Name, "DEL", id, path)
			}); err != nil {
				return Row{}, err
			}
		}
		if i == 1 {
			took = [2][]float64{} // the first ones do not count
		}
	}
	return Row{What: "CNI ADD, one after the other, p50", Unit: "ms", Ours: stat.Summarise(took[0]), Peer: stat.Summarise(took[1]),
		PeerIs: "ptp with host-local " + pluginsVersion, AtLeast: 1.5, Aim: 0.7}.judge(), nil
}

// labName is the name of a lab of this process: short, as namespaces are named after it.
func labName(suffix string) string { return fmt.Sprintf("%s%d%s", labPrefix, os.Getpid(), suffix) }

const labPrefix = "mgi"

// Sweep removes the labs that a killed run has left, with the namespaces of their names, and returns their names.
func Sweep() ([]string, error) {
	names, err := lab.Host{}.Names()
	if err != nil {
		return nil, err
	}
	var removed []string
	for _, name := range names {
		rest, ours := strings.CutPrefix(name, labPrefix)
		digits := strings.IndexFunc(rest+"x", func(r rune) bool { return r < '0' || r > '9' }) // the process id, then a suffix
		pid, err := strconv.Atoi(rest[:min(digits, len(rest))])
		if !ours || err != nil || syscall.Kill(pid, 0) == nil {
			continue
		}
		if err := (lab.Host{}).Down(name, nil); err != nil {
			return removed, err
		}
		removed = append(removed, name)
	}
	return removed, nil
}

// inNetns makes a network namespace, runs f with its path, and removes it. It is named like a pod of the lab, so that the
// lab's removal takes it along if the process dies.
func inNetns(ctx context.Context, name string, f func(path string) error) (err error) {
	if out, err := exec.CommandContext(ctx, "ip", "netns", "add", name).CombinedOutput(); err != nil {
		return fmt.Errorf("ip netns add %s: %w: %s", name, err, out)
	}
	defer func() {
		if out, derr := exec.Command("ip", "netns", "del", name).CombinedOutput(); derr != nil {
			err = errors.Join(err, fmt.Errorf("ip netns del %s: %w: %s", name, derr, out))
		}
	}()
	return f("/run/netns/" + name)
}
