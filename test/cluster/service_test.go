package cluster

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// service is the address of a service whose backend is a pod, in the words in which kube-proxy tells the kernel.
type service struct {
	node             labNode
	address, backend netip.Addr
	port, backPort   uint16
}

// rules are those of kube-proxy's iptables mode: from pods and from the node itself to the backend, and with the node's own
// address where the sender is none of the cluster's pods.
func (s service) rules() [][]string {
	to := fmt.Sprintf("%s:%d", s.backend, s.backPort)
	match := []string{"-p", "tcp", "-d", s.address.String(), "--dport", fmt.Sprint(s.port), "-j", "DNAT", "--to-destination", to}
	return [][]string{
		append([]string{"PREROUTING"}, match...),
		append([]string{"OUTPUT"}, match...),
		{"POSTROUTING", "-p", "tcp", "-d", s.backend.String(), "--dport", fmt.Sprint(s.backPort), "!", "-s", "10.244.0.0/16",
			"-m", "conntrack", "--ctstate", "DNAT", "-j", "MASQUERADE"},
	}
}

func (s service) program(t *testing.T) {
	t.Helper()
	for _, r := range s.rules() {
		in(t, s.node.Netns, append([]string{"iptables", "-w", "-t", "nat", "-A"}, r...)...)
		t.Cleanup(func() { in(t, s.node.Netns, append([]string{"iptables", "-w", "-t", "nat", "-D"}, r...)...) })
	}
}

// TestServices: what kube-proxy has the kernel rewrite passes both ways, from pods, from the node, and from outside through
// the node, whether the backend is on that node or on another.
func TestServices(t *testing.T) {
	n1, n2, n3 := node(t, 1), node(t, 2), node(t, 3)
	cluster := netip.MustParseAddr("10.96.0.10")
	port := uint16(20000)
	for _, backend := range []struct {
		name string
		pod  labPod
	}{{"a backend on the same node", n1.Pods[1]}, {"a backend on another node", n2.Pods[0]}} {
		for _, from := range []struct {
			name, netns string
			address     netip.Addr
		}{
			{"from a pod", n1.Pods[0].Netns, cluster},
			{"from the node", n1.Netns, cluster},
			{"from another node to this one's port", n3.Netns, ip(t, n1.Address)},
		} {
			t.Run(strings.Join([]string{backend.name, from.name}, ", "), func(t *testing.T) {
				l, err := listen(backend.pod.Netns, ip(t, backend.pod.Address))
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				port++
				listening := netip.MustParseAddrPort(l.Addr().String())
				service{n1, from.address, listening.Addr(), port, listening.Port()}.program(t)
				if err := echoed(l, from.netns, netip.AddrPortFrom(from.address, port)); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
