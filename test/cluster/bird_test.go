package cluster

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestBirdLearnsBlocks: a BIRD 2 router on the underlay peers with node1, learns its block, and a pod answers from
// behind it.
func TestBirdLearnsBlocks(t *testing.T) {
	n := node(t, 1)
	self := ip(t, n.Address)
	four := self.As4()
	four[3] = 200
	router := netip.AddrFrom4(four)
	ns, dir := labName+"-bird", t.TempDir()
	newNetns(t, ns)
	// A port of the lab's underlay bridge, and a network of its own behind the router.
	for _, argv := range [][]string{
		{"ip", "-n", ns, "link", "add", "eth0", "type", "veth", "peer", "name", "bird0", "netns", labName + "-underlay"},
		{"ip", "-n", labName + "-underlay", "link", "set", "bird0", "master", "br0", "up"},
		{"ip", "-n", ns, "addr", "add", router.String() + "/24", "dev", "eth0"},
		{"ip", "-n", ns, "addr", "add", "192.0.2.1/32", "dev", "lo"},
		{"ip", "-n", ns, "link", "set", "lo", "up"},
		{"ip", "-n", ns, "link", "set", "eth0", "up"},
	} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
		}
	}
	conf := fmt.Sprintf(`router id %s;
protocol device {}
protocol direct { ipv4; interface "lo"; }
protocol static { ipv4; route 0.0.0.0/0 blackhole; }
protocol kernel { ipv4 { export where source = RTS_BGP; }; }
protocol bgp margay { local %s as 64999; neighbor %s as 64512; ipv4 { import all; export all; }; }
`, router, router, self)
	file := filepath.Join(dir, "bird.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	bird := exec.Command("ip", "netns", "exec", ns, "bird", "-f", "-c", file, "-s", filepath.Join(dir, "bird.ctl"), "-P", filepath.Join(dir, "bird.pid"))
	bird.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin")
	if err := bird.Start(); err != nil {
		t.Fatalf("bird: %v", err)
	}
	t.Cleanup(func() { _ = bird.Process.Kill(); _ = bird.Wait() })
	store(t, fmt.Sprintf("apiVersion: projectcalico.org/v3\nkind: BGPPeer\nmetadata: {name: bird}\nspec: {node: %s, peerIP: %s, asNumber: 64999}\n", n.Name, router),
		"apply", "-f", "-")
	deletePeer := sync.OnceFunc(func() { store(t, "", "delete", "bgppeer", "bird") })
	t.Cleanup(deletePeer)
	ownDefault := strings.TrimSpace(in(t, n.Netns, "ip", "route", "show", "default"))
	pod := ip(t, n.Pods[0].Address)
	took := until(t, "BIRD to have a kernel route to the pod", func() bool {
		out, err := tryIn(ns, "ip", "route", "get", pod.String())
		return err == nil && strings.Contains(out, "via "+self.String())
	})
	t.Logf("BIRD had the block after %s", took.Round(time.Millisecond))
	until(t, "node1's kernel route to what is behind BIRD", func() bool {
		out, err := tryIn(n.Netns, "ip", "route", "get", "192.0.2.1")
		return err == nil && strings.Contains(out, "via "+router.String())
	})
	if out, err := tryIn(ns, "ping", "-n", "-c", "3", "-W", "2", "-I", "192.0.2.1", pod.String()); err != nil {
		t.Errorf("a pod does not answer from behind BIRD: %v\n%s", err, out)
	}
	// The node's own default route is not BGP's to replace, nor to take along.
	if out := in(t, n.Netns, "ip", "route", "show", "default"); !strings.Contains(out, ownDefault+" \n") || strings.Count(out, "default") != 2 {
		t.Errorf("beside the node's own default route expected the learned one behind it:\n%s", out)
	}
	deletePeer()
	until(t, "what BIRD had announced to be gone", func() bool {
		return !strings.Contains(in(t, n.Netns, "ip", "route"), router.String())
	})
	if out := strings.TrimSpace(in(t, n.Netns, "ip", "route", "show", "default")); out != ownDefault {
		t.Errorf("the node's default route was %q and is %q", ownDefault, out)
	}
	if out := in(t, ns, "ip", "route"); strings.Contains(out, "10.244.0.0/16") {
		t.Errorf("BIRD learned more than blocks:\n%s", out)
	}
}
