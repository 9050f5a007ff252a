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
)

// bird is a BIRD 2 router on the lab's underlay, of AS 64999, with a network of its own behind it.
type bird struct {
	ns   string
	addr netip.Addr
	kill func()
}

// startBird starts one with the host part octet of the underlay's addresses, behind which the network is, and peers it with
// node n. It announces a default route, too.
func startBird(t *testing.T, n labNode, name string, octet byte, network string) *bird {
	t.Helper()
	self := ip(t, n.Address)
	four := self.As4()
	four[3] = octet
	b := &bird{ns: labName + "-" + name, addr: netip.AddrFrom4(four)}
	dir := t.TempDir()
	newNetns(t, b.ns)
	// A port of the lab's underlay bridge, and a network of its own behind the router.
	for _, argv := range [][]string{
		{"ip", "-n", b.ns, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", labName + "-underlay"},
		{"ip", "-n", labName + "-underlay", "link", "set", name, "master", "br0", "up"},
		{"ip", "-n", b.ns, "addr", "add", b.addr.String() + "/24", "dev", "eth0"},
		{"ip", "-n", b.ns, "addr", "add", network, "dev", "lo"},
		{"ip", "-n", b.ns, "link", "set", "lo", "up"},
		{"ip", "-n", b.ns, "link", "set", "eth0", "up"},
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
`, b.addr, b.addr, self)
	file := filepath.Join(dir, "bird.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("ip", "netns", "exec", b.ns, "bird", "-f", "-c", file, "-s", filepath.Join(dir, "bird.ctl"), "-P", filepath.Join(dir, "bird.pid"))
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin")
	if err := cmd.Start(); err != nil {
		t.Fatalf("bird: %v", err)
	}
	b.kill = sync.OnceFunc(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	t.Cleanup(b.kill)
	store(t, fmt.Sprintf("apiVersion: projectcalico.org/v3\nkind: BGPPeer\nmetadata: {name: %s}\nspec: {node: %s, peerIP: %s, asNumber: 64999}\n", name, n.Name, b.addr),
		"apply", "-f", "-")
	return b
}

// TestBirdLearnsBlocks: a BIRD 2 router on the underlay peers with node1, learns its block, and a pod answers from
// behind it.
func TestBirdLearnsBlocks(t *testing.T) {
	n := node(t, 1)
	self := ip(t, n.Address)
	ownDefault := strings.TrimSpace(in(t, n.Netns, "ip", "route", "show", "default"))
	b := startBird(t, n, "bird", 200, "192.0.2.1/32")
	deletePeer := sync.OnceFunc(func() { store(t, "", "delete", "bgppeer", "bird") })
	t.Cleanup(deletePeer)
	pod := ip(t, n.Pods[0].Address)
	until(t, "BIRD to have a kernel route to the pod", func() bool {
		out, err := tryIn(b.ns, "ip", "route", "get", pod.String())
		return err == nil && strings.Contains(out, "via "+self.String())
	})
	until(t, "node1's kernel route to what is behind BIRD", func() bool {
		out, err := tryIn(n.Netns, "ip", "route", "get", "192.0.2.1")
		return err == nil && strings.Contains(out, "via "+b.addr.String())
	})
	if out, err := tryIn(b.ns, "ping", "-n", "-c", "3", "-W", "20", "-I", "192.0.2.1", pod.String()); err != nil {
		t.Errorf("a pod does not answer from behind BIRD: %v\n%s", err, out)
	}
	// The node's own default route is not BGP's to replace, nor to take along.
	until(t, "the learned default route beside the node's own", func() bool {
		return strings.Count(in(t, n.Netns, "ip", "route", "show", "default"), "default") == 2
	})
	if out := in(t, n.Netns, "ip", "route", "show", "default"); !strings.HasPrefix(out, ownDefault+" \n") {
		t.Errorf("beside the node's own default route expected the learned one behind it:\n%s", out)
	}
	deletePeer()
	until(t, "what BIRD had announced to be gone", func() bool {
		return !strings.Contains(in(t, n.Netns, "ip", "route"), b.addr.String())
	})
	if out := strings.TrimSpace(in(t, n.Netns, "ip", "route", "show", "default")); out != ownDefault {
		t.Errorf("the node's default route was %q and is %q", ownDefault, out)
	}
	if out := in(t, b.ns, "ip", "route"); strings.Contains(out, "10.244.0.0/16") {
		t.Errorf("BIRD learned more than blocks:\n%s", out)
	}
}

// TestTwoBirdsAnnounceOnePrefix: what two routers announce equally well is reached by both of them, and by the one that is
// left when the other dies.
func TestTwoBirdsAnnounceOnePrefix(t *testing.T) {
	n := node(t, 1)
	pod := n.Pods[0]
	birds := []*bird{startBird(t, n, "left", 201, "192.0.2.1/24"), startBird(t, n, "right", 202, "192.0.2.1/24")}
	deletePeers := sync.OnceFunc(func() { store(t, "", "delete", "bgppeer", "left", "right") })
	t.Cleanup(deletePeers)
	gateways := func() (found int) {
		out := in(t, n.Netns, "ip", "route", "show", "192.0.2.0/24")
		for _, b := range birds {
			found += strings.Count(out, "via "+b.addr.String()+" ")
		}
		return found
	}
	until(t, "node1's kernel route by way of both", func() bool { return gateways() == 2 })
	// The whole /24 is each one's own. Which one a flow goes to is for the kernel to choose by its addresses, so that of 64
	// targets neither has none; the answers come back whichever it is.
	const targets = 64
	target := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}) }
	everyTarget := func() {
		t.Helper()
		for i := range targets {
			if !reached(pod.Netns, target(i+1)) {
				t.Fatalf("%s is not reached", target(i+1))
			}
		}
	}
	until(t, "both routers to know the way to the pod", func() bool {
		for _, b := range birds {
			if out, err := tryIn(b.ns, "ip", "route", "get", ip(t, pod.Address).String()); err != nil || !strings.Contains(out, "via "+ip(t, n.Address).String()) {
				return false
			}
		}
		return true
	})
	var taps []*tap
	for _, b := range birds {
		taps = append(taps, tapOn(t, b.ns, "eth0"))
	}
	everyTarget()
	requests := 0
	for i, tap := range taps {
		tap.close()
		got := tap.count(func(s seen) bool { return s.proto == 1 && !s.outgoing && s.dst.As4()[0] == 192 })
		if got == 0 {
			t.Errorf("no packet of %d came to %s", targets, birds[i].ns)
		}
		requests += got
	}
	if requests < targets {
		t.Errorf("the routers saw %d of %d packets", requests, targets)
	}
	birds[0].kill()
	until(t, "the route by way of the one that is left", func() bool {
		return gateways() == 1 && strings.Contains(in(t, n.Netns, "ip", "route", "show", "192.0.2.0/24"), "via "+birds[1].addr.String()+" ")
	})
	everyTarget()
	deletePeers()
	until(t, "the route to be gone", func() bool { return gateways() == 0 })
}
