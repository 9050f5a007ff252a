package oracle

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/test/node"
	"margay/test/space"
	"margay/vrouter"
	"margay/vrouter/port"
)

// TestRelay: what two of the kernel's routers between the nodes, and the node's own kernel, say about outer packets, the pod that
// has sent the inner ones is told (RFC 2003, 4).
func TestRelay(t *testing.T) {
	node.OnEach(t, node.Drivers, relay)
}

func relay(t *testing.T, driver port.Options) {
	s, r1, r2 := space.New(t), space.New(t), space.New(t)
	for _, s := range []*space.Space{s, r1, r2} {
		s.Do(t, space.BeRouter)
	}
	node.Cable(t, s, r1, "eth0", "eth0", 1500, "198.18.0.1/24", "198.18.0.254/24")
	node.Cable(t, r1, r2, "eth1", "eth1", 1500, "198.18.9.1/24", "198.18.9.2/24")
	s.Do(t, func() error {
		return errors.Join(via("198.18.0.0/15", "198.18.0.254"), space.Sysctls(map[string]string{"ipv4/neigh/eth0/retrans_time_ms": "100"}))
	})
	r1.Do(t, func() error {
		return errors.Join(space.Sysctls(map[string]string{"ipv4/conf/all/rp_filter": "0", "ipv4/conf/eth1/rp_filter": "0"}), via("198.18.3.0/24", "198.18.9.2"), refuse("198.18.1.1/32", unix.RTN_UNREACHABLE), refuse("198.18.1.2/32", unix.RTN_PROHIBIT))
	})
	r2.Do(t, func() error {
		return errors.Join(via("198.18.0.0/24", "198.18.9.1"), via("198.18.3.0/24", "198.18.9.1"))
	})

	pod := addr("10.244.1.1")
	cases := []struct {
		name     string
		node, to netip.Addr
		want     error
	}{
		{"a router's host unreachable", addr("198.18.1.1"), addr("10.244.2.1"), unix.EHOSTUNREACH},
		{"a router's prohibition", addr("198.18.1.2"), addr("10.244.2.2"), unix.EHOSTUNREACH},
		{"a router without a route", addr("198.18.2.1"), addr("10.244.2.3"), unix.ENETUNREACH},
		{"a loop between routers", addr("198.18.3.1"), addr("10.244.2.4"), unix.EHOSTUNREACH},
		{"a neighbour that is dead", addr("198.18.0.9"), addr("10.244.2.5"), unix.EHOSTUNREACH},
	}
	u := vrouter.Update{
		Config: &vrouter.Config{NodeAddress: addr("198.18.0.1"), Underlay: "eth0", MTU: podMTU},
		Set:    []vrouter.Route{{Prefix: netip.PrefixFrom(pod, 32), NextHop: vrouter.NextHop{Kind: vrouter.KindLocal}}},
	}
	for _, c := range cases {
		u.AddNodes = append(u.AddNodes, c.node)
		u.Set = append(u.Set, vrouter.Route{Prefix: netip.PrefixFrom(c.to, 32), NextHop: vrouter.NextHop{Kind: vrouter.KindTunnel, Gateway: c.node}})
	}
	h := &host{address: pod, Node: node.Start(t, s, node.Config{Driver: driver, Update: u, Options: vrouter.Options{ICMPRate: 1000},
		Routes: func() error { return space.Route("10.244.2.0/24", "vr0") }})}
	h.pod = h.AddPod(t, node.Pod{Address: pod, MTU: podMTU})
	for _, c := range cases {
		conn := h.dial(t, &net.UDPAddr{IP: c.to.AsSlice(), Port: 9}, unix.IP_PMTUDISC_PROBE)
		var err error
		for deadline := time.Now().Add(node.Patience); time.Now().Before(deadline); {
			if _, err = conn.Write(make([]byte, 100)); err == nil {
				if err := conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
					t.Fatal(err)
				}
				_, err = conn.Read(make([]byte, 1))
			}
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%s: the pod was told %v: expected %v", c.name, err, c.want)
		}
	}
	if c := h.Counters(); c["icmp_relayed"] < uint64(len(cases)) {
		t.Errorf("%v", c)
	}
	for _, s := range []*space.Space{r1, r2} {
		h.Watch(s)
	}
	h.Balance(t)
}

// refuse makes a route that ends in an ICMP error.
func refuse(prefix string, kind int) error {
	p := netip.MustParsePrefix(prefix)
	return netlink.RouteAdd(&netlink.Route{Type: kind, Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}})
}
