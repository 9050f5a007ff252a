package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// cniTimeout bounds one call of the plugin; kubelet's patience is of the same order.
const cniTimeout = 30 * time.Second

// cniParallel is how many plugin calls run at the same time.
const cniParallel = 8

// newContainerID makes an id of the form that container runtimes use.
func newContainerID() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

// cniConfig is the network configuration that the runtime writes to the plugin's standard input.
func (l *Lab) cniConfig(n *node) ([]byte, error) {
	return json.Marshal(map[string]string{
		"cniVersion": "1.0.0",
		"name":       "k8s-pod-network",
		"type":       "margay",
		"socket":     filepath.Join(l.runDir(n.Name), "cni.sock"),
		"queueDir":   filepath.Join(l.varDir(n.Name), "cni", "deleted"),
	})
}

// callCNI executes the plugin in the node's namespace as a container runtime does, and returns its standard output.
func (l *Lab) callCNI(ctx context.Context, s *state, n *node, p *pod, verb string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, cniTimeout)
	defer cancel()
	conf, err := l.cniConfig(n)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(s.BinDir, "margay-cni"))
	cmd.Env = append(cleanEnv(),
		"CNI_COMMAND="+verb,
		"CNI_CONTAINERID="+p.ContainerID,
		"CNI_NETNS="+netnsPath(p.Name),
		"CNI_IFNAME=eth0",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME="+p.Name+";K8S_POD_INFRA_CONTAINER_ID="+p.ContainerID,
		"CNI_PATH="+s.BinDir,
	)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(conf), &stdout, &stderr
	if err := startIn(netnsPath(n.Name), cmd); err != nil {
		return nil, fmt.Errorf("CNI %s of %s: %w", verb, p.Name, err)
	}
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("CNI %s of %s: %w", verb, p.Name, cniError(err, stdout.Bytes(), stderr.String()))
	}
	return stdout.Bytes(), nil
}

// cniError turns a failed call into what the plugin said about it.
func cniError(err error, stdout []byte, stderr string) error {
	var said struct {
		Code    int    `json:"code"`
		Msg     string `json:"msg"`
		Details string `json:"details"`
	}
	if json.Unmarshal(stdout, &said) == nil && said.Msg != "" {
		if said.Details != "" {
			said.Msg += ": " + said.Details
		}
		return fmt.Errorf("%s (code %d)", said.Msg, said.Code)
	}
	if stderr = strings.TrimSpace(stderr); stderr != "" {
		return fmt.Errorf("%w: %s", err, stderr)
	}
	return err
}

// attach makes the pod's namespace and adds it to the network. On failure nothing of it is left.
func (l *Lab) attach(ctx context.Context, s *state, n *node, p *pod) (addr netip.Addr, took time.Duration, err error) {
	if err := createNetNS(p.Name); err != nil {
		return netip.Addr{}, 0, err
	}
	added := false
	defer func() {
		if err == nil {
			return
		}
		if added { // it may have got halfway: a runtime, too, follows a failed ADD by a DEL
			_, delErr := l.callCNI(context.WithoutCancel(ctx), s, n, p, "DEL")
			err = errors.Join(err, delErr)
		}
		err = errors.Join(err, deleteNetNS(p.Name))
	}()
	h, err := linksIn(netnsPath(p.Name))
	if err != nil {
		return netip.Addr{}, 0, err
	}
	defer h.Close()
	if err := raise(h, "lo", netip.Prefix{}); err != nil { // the runtime's part, by CNI's loopback plugin
		return netip.Addr{}, 0, err
	}
	added = true
	begin := time.Now()
	out, err := l.callCNI(ctx, s, n, p, "ADD")
	took = time.Since(begin)
	if err != nil {
		return netip.Addr{}, took, err
	}
	addr, err = resultAddress(out)
	if err != nil {
		return netip.Addr{}, took, fmt.Errorf("CNI ADD of %s: %w", p.Name, err)
	}
	return addr, took, nil
}

// resultAddress reads the pod's IPv4 address out of a CNI result of version 1.0.0.
func resultAddress(out []byte) (netip.Addr, error) {
	var result struct {
		IPs []struct {
			Address string `json:"address"`
		} `json:"ips"`
	}
	if err := json.Unmarshal(out, &result); err != nil {
		return netip.Addr{}, fmt.Errorf("result is not JSON: %w", err)
	}
	for _, ip := range result.IPs {
		prefix, err := netip.ParsePrefix(ip.Address)
		if err != nil {
			return netip.Addr{}, fmt.Errorf("ips.address %q: expected ADDRESS/LENGTH", ip.Address)
		}
		if prefix.Addr().Is4() {
			return prefix.Addr(), nil
		}
	}
	return netip.Addr{}, errors.New("result has no IPv4 address")
}
