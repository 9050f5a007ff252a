package cluster

import (
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// reattach returns a vRouter's command line with another attachment, whichever it had, and AF_PACKET.
func reattach(args []string, attach string) []string {
	args = slices.Clone(args)
	for _, flag := range []string{"--attach", "--io"} {
		if i := slices.Index(args, flag); i >= 0 {
			args = slices.Delete(args, i, i+2)
		}
	}
	return append(args, "--attach", attach)
}

// kindOfTunnel is what `ip link` calls the kind of a node's vr0.
func kindOfTunnel(n labNode) string {
	for _, kind := range []string{"veth", "tun"} {
		if out, err := tryIn(n.Netns, "ip", "-o", "link", "show", "dev", "vr0", "type", kind); err == nil && strings.Contains(out, "vr0") {
			return kind
		}
	}
	return "none"
}

// TestAttachmentChanges: a node whose vRouter is started anew with another attachment, as by an upgrade to another default,
// goes on as it was, with the agent running all the while; and so back.
func TestAttachmentChanges(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	was, other := kindOfTunnel(n2), "veth"
	if was == "veth" {
		other = "tun"
	}
	works := func(kind string) {
		t.Helper()
		until(t, "vr0 to be a "+kind, func() bool { return kindOfTunnel(n2) == kind })
		settled(t, node(t, 2))
		for _, way := range []struct{ from, to string }{
			{n1.Pods[0].Netns, n2.Pods[0].Address}, {n2.Pods[0].Netns, n1.Pods[0].Address},
			{n2.Netns, n1.Pods[0].Address}, {n1.Netns, n2.Pods[0].Address},
		} {
			if !reached(way.from, ip(t, way.to)) {
				t.Errorf("by %s: %s is not reached from %s", kind, way.to, way.from)
			}
		}
		if !reached(n1.Pods[0].Netns, tunnelAddress(t, n2)) {
			t.Errorf("by %s: the node's tunnel address is not reached", kind)
		}
		if err := transfer(n1.Pods[0], n2.Pods[0], ip(t, n2.Pods[0].Address)); err != nil {
			t.Errorf("by %s: TCP: %v", kind, err)
		}
	}
	vrouter := processOf(t, n2.PIDs["vrouter"])
	kill(t, n2.PIDs["vrouter"])
	until(t, "nobody to answer on the vRouter's socket", func() bool {
		conn, err := net.Dial("unix", filepath.Join(runDir(n2), "vrouter.sock"))
		if err == nil {
			_ = conn.Close()
		}
		return err != nil
	})
	back := func() {
		mustCtl(t, "lab", "restart", "--name", labName, n2.Name, "vrouter")
		settled(t, node(t, 2))
	}
	var output safeBuffer
	cmd := exec.Command("nsenter", append([]string{"--net=/run/netns/" + n2.Netns, filepath.Join(bin, "vrouter")}, reattach(vrouter.args, other)...)...)
	cmd.Env, cmd.Stdout, cmd.Stderr = vrouter.env, &output, &output
	if err := cmd.Start(); err != nil {
		back()
		t.Fatal(err)
	}
	stop := func(sign syscall.Signal) {
		_ = cmd.Process.Signal(sign) // it may have ended
		_ = cmd.Wait()               // its output says what it had to say
	}
	defer func() {
		stop(syscall.SIGKILL)
		back()
		if t.Failed() {
			t.Logf("the vRouter said:\n%s", output.String())
		}
	}()
	works(other)
	stop(syscall.SIGTERM)
	back()
	works(was)
}
