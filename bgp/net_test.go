package bgp

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
)

// node is a network namespace with eth0 on a network that it shares with its test's other nodes.
type node struct {
	ns   string
	addr netip.Addr
}

var networks atomic.Int32

// network makes n namespaces on one bridge, which is in a namespace too; nothing of it is seen outside, and the test's
// end removes it.
func network(t *testing.T, n int) []*node {
	t.Helper()
	base := fmt.Sprintf("mgt-bgp-%d-%d", os.Getpid(), networks.Add(1))
	sw := base + "-sw"
	addNamespace(t, sw)
	ip(t, "-n", sw, "link", "add", "br0", "type", "bridge")
	ip(t, "-n", sw, "link", "set", "br0", "up")
	nodes := make([]*node, n)
	for i := range nodes {
		nd := &node{ns: fmt.Sprintf("%s-n%d", base, i+1), addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)})}
		addNamespace(t, nd.ns)
		port := fmt.Sprintf("p%d", i+1)
		ip(t, "-n", sw, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", nd.ns)
		ip(t, "-n", sw, "link", "set", port, "master", "br0", "up")
		ip(t, "-n", nd.ns, "addr", "add", nd.addr.String()+"/24", "dev", "eth0")
		ip(t, "-n", nd.ns, "link", "set", "eth0", "up")
		ip(t, "-n", nd.ns, "link", "set", "lo", "up")
		nodes[i] = nd
	}
	return nodes
}

func addNamespace(t *testing.T, name string) {
	t.Helper()
	ip(t, "netns", "add", name)
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
			t.Errorf("ip netns del %s: %v: %s", name, err, out)
		}
	})
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// peer returns n as an internal peer of the others; of a pair the lower one waits.
func (n *node) peer(of *node) Peer {
	return Peer{Addr: n.addr, AS: 64512, Kind: "node-to-node mesh", Passive: of.addr.Less(n.addr)}
}
