package server

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"margay/cni"
)

// reaches says whether a datagram gets from one pod (nil: the node) to another over IPv6 within limit, under that source
// address.
func reaches(t *testing.T, from, to *pod, source, target netip.Addr, limit time.Duration) bool {
	t.Helper()
	var rx, tx *net.UDPConn
	listen := func(conn **net.UDPConn, a netip.Addr, port uint16) func() error {
		return func() (err error) {
			*conn, err = net.ListenUDP("udp6", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, port)))
			return err
		}
	}
	to.do(t, listen(&rx, target, 7006))
	defer rx.Close()
	if from == nil {
		if err := listen(&tx, source, 0)(); err != nil {
			t.Fatal(err)
		}
	} else {
		from.do(t, listen(&tx, source, 0))
	}
	defer tx.Close()
	if _, err := tx.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(target, 7006)); err != nil {
		t.Fatal(err)
	}
	rx.SetReadDeadline(time.Now().Add(limit))
	_, peer, err := rx.ReadFromUDPAddrPort(make([]byte, 10))
	return err == nil && (!source.IsValid() || source.IsUnspecified() || peer.Addr() == source)
}

// Pods of both families and of IPv6 alone: what they have, whom they reach, what keeps them from spoofing, and that
// nothing of them is left.
func TestIPv6Pods(t *testing.T) {
	n := newNode(t)
	n.start()
	both, six := newPod(t, 0), newPod(t, 1)
	mac := `,"runtimeConfig":{"mac":"02:00:00:00:00:77"}`
	raw := n.must("ADD", both, n.conf(`,"ipam":{"assign_ipv6":"true"}`+mac))
	r := parseResult(t, raw)
	if len(r.IPs) != 2 || len(r.Routes) != 2 || r.IPs[1].Address.String() != "fd00:244::1/128" || r.Routes[1].GW.String() != "fe80::ecee:eeff:feee:eeee" ||
		r.Routes[1].Dst.String() != "::/0" || r.Interfaces[1].Mac != "02:00:00:00:00:77" {
		t.Fatalf("result %s", raw)
	}
	raw6 := n.must("ADD", six, n.conf(`,"ipam":{"assign_ipv4":"false","assign_ipv6":"true"}`))
	if r := parseResult(t, raw6); len(r.IPs) != 1 || r.IPs[0].Address.String() != "fd00:244::2/128" {
		t.Fatalf("result %s", raw6)
	}
	first, second := netip.MustParseAddr("fd00:244::1"), netip.MustParseAddr("fd00:244::2")
	if !reaches(t, both, six, first, second, patience) || !reaches(t, six, both, second, first, patience) {
		t.Error("the pods do not reach each other over IPv6")
	}
	if !reaches(t, nil, six, netip.IPv6Unspecified(), second, patience) {
		t.Error("the node does not reach its pod over IPv6")
	}
	spoofed := netip.MustParseAddr("fd00:244::99")
	both.do(t, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(l, &netlink.Addr{IPNet: hostNet(spoofed), Flags: nodad(spoofed)})
	})
	if reaches(t, both, six, spoofed, second, moment) {
		t.Error("a packet under another's address got through")
	}
	check := n.conf(`,"prevResult":` + string(raw))
	n.must("CHECK", both, check)
	n.must("CHECK", six, n.conf(`,"prevResult":`+string(raw6)))

	// A restarted agent finds both, and knows them by both addresses.
	n.stop()
	n.start()
	list := n.server.Attachments()
	if len(list) != 2 {
		t.Errorf("after a restart: %+v", list)
	}
	for _, a := range list {
		if a.Address6 != first && a.Address6 != second || a.Address.IsValid() != (a.Address6 == first) {
			t.Errorf("after a restart: %+v", a)
		}
	}
	n.must("CHECK", both, check)
	both.do(t, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.RouteDel(podRoutes(l.Attrs().Index, gateway6)[1])
	})
	if _, err := n.plugin("CHECK", both, check); err == nil || err.Code != cni.CodeCheck || !strings.Contains(err.Details, "::/0") {
		t.Errorf("CHECK without the IPv6 default route: %v", err)
	}
	n.must("DEL", both, n.conf(""))
	n.must("DEL", six, n.conf(""))
	if n.ipam.count() != 0 || len(calis(t)) != 0 || len(n.server.fw.pods) != 0 {
		t.Errorf("left: %v %v %v", n.ipam.held, calis(t), n.server.fw.pods)
	}
}

// A node that has its own default route from router advertisements keeps it when it becomes a router itself.
func TestForwardingKeepsRouterAdvertisements(t *testing.T) {
	link := netlink.NewVeth(netlink.LinkAttrs{Name: "mgt-ra"})
	link.PeerName = "mgt-ra-peer"
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(link)
	for name, value := range map[string]string{"all/forwarding": "0", "mgt-ra/accept_ra": "1"} {
		if err := SetSysctl("ipv6/conf/"+name, value); err != nil {
			t.Fatal(err)
		}
	}
	if err := forwardOnNode6(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"all/forwarding": "1", "mgt-ra/accept_ra": "2"} {
		if got, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + name); err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("%s: %s, %v, expected %s", name, got, err, want)
		}
	}
}

// Annotations arrive through the real plugin, and a bad one is told.
func TestAnnotations(t *testing.T) {
	n := newNode(t)
	n.start()
	annotated := func(key, value string) string {
		raw, err := json.Marshal(map[string]map[string]string{"io.kubernetes.cri.pod-annotations": {"cni.projectcalico.org/" + key: value}})
		if err != nil {
			t.Fatal(err)
		}
		return n.conf(fmt.Sprintf(`,"runtimeConfig":%s`, raw))
	}
	p := newPod(t, 0)
	r := parseResult(t, n.must("ADD", p, annotated("ipAddrs", `["10.244.0.77"]`)))
	if len(r.IPs) != 1 || r.IPs[0].Address.String() != "10.244.0.77/32" {
		t.Errorf("ipAddrs: %+v", r.IPs)
	}
	if _, err := n.plugin("ADD", newPod(t, 1), annotated("ipAddrs", "10.244.0.77")); err == nil || err.Code != types.ErrInvalidNetworkConfig {
		t.Errorf("a bad annotation: %v", err)
	}
	n.must("DEL", p, annotated("ipAddrs", "x")) // must not keep the pod from going
}

// TestDiscoveryIsCountedApart: what a pod without IPv6 sends of it by itself is no spoofing, and is not counted with what somebody
// may look for.
func TestDiscoveryIsCountedApart(t *testing.T) {
	n := newNode(t)
	n.start()
	n.add(newPod(t, 0))
	for limit := time.Now().Add(patience); n.counter(fwDiscovery) == 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("the pod's kernel has not asked for routers, neighbours or groups")
		}
	}
	if got := n.counter(fwIPv6); got != 0 {
		t.Errorf("%d of it are counted as other IPv6", got)
	}
}
