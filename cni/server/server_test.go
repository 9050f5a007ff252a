package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"margay/cni"
	"margay/internal/dump"
)

func parseResult(t *testing.T, out []byte) *current.Result {
	t.Helper()
	r := &current.Result{}
	if err := json.Unmarshal(out, r); err != nil {
		t.Fatalf("result %q: %v", out, err)
	}
	return r
}

func (n *node) add(p *pod) (addr netip.Addr, host string, raw []byte) {
	n.t.Helper()
	raw = n.must("ADD", p, n.conf(""))
	r := parseResult(n.t, raw)
	if len(r.IPs) != 1 || len(r.Interfaces) != 2 || *r.IPs[0].Interface != 1 || r.Interfaces[1].Name != "eth0" || r.Interfaces[1].Sandbox != p.path() {
		n.t.Fatalf("result %s", raw)
	}
	addr, _ = netip.AddrFromSlice(r.IPs[0].Address.IP.To4())
	return addr, r.Interfaces[0].Name, raw
}

func calis(t *testing.T) (names []string) {
	t.Helper()
	links, err := dump.Links(dump.Here)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "cali") {
			names = append(names, l.Attrs().Name)
		}
	}
	return names
}

// How long a datagram is waited for: one that must come, and one that must not.
const (
	patience = 60 * time.Second
	moment   = 3 * time.Second
)

// exchange sends a datagram from one pod to another and reports whether it arrived within limit, and from where.
func exchange(t *testing.T, from, to *pod, source, target netip.Addr, limit time.Duration) (seen string, ok bool) {
	t.Helper()
	var rx, tx *net.UDPConn
	listen := func(conn **net.UDPConn, a netip.Addr, port int) func() error {
		return func() (err error) {
			*conn, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, uint16(port))))
			return err
		}
	}
	if to == nil {
		if err := listen(&rx, target, 7000)(); err != nil {
			t.Fatal(err)
		}
	} else {
		to.do(t, listen(&rx, target, 7000))
	}
	defer rx.Close()
	from.do(t, listen(&tx, source, 0))
	defer tx.Close()
	if _, err := tx.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(target, 7000)); err != nil {
		t.Fatal(err)
	}
	rx.SetReadDeadline(time.Now().Add(limit))
	_, peer, err := rx.ReadFromUDPAddrPort(make([]byte, 10))
	return peer.Addr().Unmap().String(), err == nil
}

func TestAddCheckDel(t *testing.T) {
	n := newNode(t)
	n.start()
	a, b := newPod(t, 0), newPod(t, 1)
	addrA, hostA, result := n.add(a)
	addrB, _, _ := n.add(b)
	if want := (&cni.Request{ContainerID: a.id, IfName: "eth0", Pod: cni.PodArgs{Namespace: "default", Name: a.name}}).HostName(); hostA != want {
		t.Errorf("host side %s, want %s", hostA, want)
	}
	if seen, ok := exchange(t, a, b, addrA, addrB, patience); !ok || seen != addrA.String() {
		t.Errorf("pod to pod: %v from %s", ok, seen)
	}
	a.do(t, func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		l, err := h.LinkByName("eth0")
		if err != nil || l.Attrs().MTU != 1440 {
			return fmt.Errorf("eth0: %+v, %w", l, err)
		}
		return nil
	})
	routes, err := dump.RoutesLike(dump.Here, netlink.FAMILY_V4, &netlink.Route{Protocol: RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
	if err != nil || len(routes) != 2 {
		t.Errorf("host routes %v, %v", routes, err)
	}
	check := n.conf(`,"prevResult":` + string(result))
	n.must("CHECK", a, check)

	// What breaks, CHECK names.
	a.do(t, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.RouteDel(podRoutes(l.Attrs().Index, gateway)[1])
	})
	if _, err := n.plugin("CHECK", a, check); err == nil || err.Code != cni.CodeCheck || !strings.Contains(err.Details, "route") {
		t.Errorf("CHECK after the default route went: %v", err)
	}
	if _, err := n.plugin("CHECK", a, n.conf("")); err == nil || err.Code != types.ErrInvalidNetworkConfig {
		t.Errorf("CHECK without prevResult: %v", err)
	}

	n.must("DEL", a, n.conf(""))
	n.must("DEL", a, n.conf(""))
	n.must("DEL", newPod(t, 7), n.conf("")) // never added
	b.ns.Close()                            // namespace gone: the pair goes with it
	n.must("DEL", b, n.conf(""))
	if n.ipam.count() != 0 || len(calis(t)) != 0 || len(n.server.fw.pods) != 0 || len(n.server.Attachments()) != 0 {
		t.Errorf("left: %v %v %v", n.ipam.held, calis(t), n.server.fw.pods)
	}
	if n.added != 2 || n.remove != 2 {
		t.Errorf("OnPod: %d added, %d removed", n.added, n.remove)
	}
}

func TestSecondAddIsRefused(t *testing.T) {
	n := newNode(t)
	n.start()
	a, b := newPod(t, 0), newPod(t, 1)
	addr, host, result := n.add(a)
	elsewhere := &pod{id: a.id, name: a.name, ns: b.ns}
	for _, p := range []*pod{a, elsewhere} {
		_, err := n.plugin("ADD", p, n.conf(""))
		if err == nil || err.Code != cni.CodeExists || !strings.Contains(err.Msg, a.id) || !strings.Contains(err.Msg, "eth0") {
			t.Fatalf("second ADD: %v", err)
		}
	}
	n.must("CHECK", a, n.conf(`,"prevResult":`+string(result)))
	if got, _ := n.ipam.Addresses(t.Context(), "k8s-pod-network."+a.id); len(got) != 1 || got[0] != addr || len(calis(t)) != 1 {
		t.Errorf("attachment touched: %v %v", got, calis(t))
	}

	// The same pod's next container takes the host side over; the late DEL of the first does not harm it.
	next := &pod{id: b.id, name: a.name, ns: b.ns}
	addr2, host2, result2 := n.add(next)
	if host2 != host || addr2 == addr {
		t.Errorf("next container: %s %s", host2, addr2)
	}
	n.must("DEL", a, n.conf(""))
	n.must("CHECK", next, n.conf(`,"prevResult":`+string(result2)))
	n.must("DEL", next, n.conf(""))
	if n.ipam.count() != 0 {
		t.Errorf("leaked: %v", n.ipam.held)
	}
}

func TestAddFailureLeavesNothing(t *testing.T) {
	n := newNode(t)
	n.start()
	p := newPod(t, 0)
	// The pod's table of routes is in the way at the very last step.
	p.do(t, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: podRoutes(0, gateway)[1].Dst, Scope: netlink.SCOPE_LINK})
	})
	_, err := n.plugin("ADD", p, n.conf(""))
	if err == nil || err.Code != cni.CodePlumbing {
		t.Fatalf("ADD: %v", err)
	}
	if n.ipam.count() != 0 || len(calis(t)) != 0 || len(n.server.fw.pods) != 0 {
		t.Errorf("left: %v %v %v", n.ipam.held, calis(t), n.server.fw.pods)
	}
	n.ipam.setFail(errors.New("pool default-ipv4-ippool is full"))
	if _, err := n.plugin("ADD", newPod(t, 1), n.conf("")); err == nil || err.Code != cni.CodeIPAM || !strings.Contains(err.Msg, "default-ipv4-ippool") {
		t.Errorf("ADD without an address: %v", err)
	}
}

func TestDelWhileAgentOrDatastoreIsAway(t *testing.T) {
	n := newNode(t)
	n.start()
	a, b := newPod(t, 0), newPod(t, 1)
	n.add(a)
	n.add(b)
	n.ipam.setFail(errors.New("etcd down"))
	n.must("DEL", b, n.conf(""))
	if len(calis(t)) != 1 {
		t.Errorf("interfaces: %v", calis(t))
	}
	n.stop()
	n.must("DEL", a, n.conf(""))
	if _, err := n.plugin("ADD", b, n.conf("")); err == nil || err.Code != types.ErrTryAgainLater {
		t.Errorf("ADD without agent: %v", err)
	}
	if _, err := n.plugin("STATUS", nil, n.conf("")); err == nil || err.Code != types.ErrPluginNotAvailable {
		t.Errorf("STATUS without agent: %v", err)
	}
	n.ipam.setFail(nil)
	if n.ipam.count() != 2 {
		t.Fatalf("held: %v", n.ipam.held)
	}
	n.start()
	await(t, "queue drained", func() bool {
		l, err := cni.Queue{Dir: n.queueDir()}.List()
		return err == nil && len(l) == 0
	})
	if n.ipam.count() != 0 || len(calis(t)) != 0 {
		t.Errorf("left: %v %v", n.ipam.held, calis(t))
	}
	// A DEL that waits must not take the address of the same container's next ADD.
	n.stop()
	n.must("DEL", a, n.conf(""))
	n.start()
	n.add(a)
	if n.ipam.count() != 1 {
		t.Error("address of the new ADD was released")
	}
}

func TestRestartKeepsPods(t *testing.T) {
	n := newNode(t)
	n.start()
	if err := n.server.SetPools([]netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}); err != nil {
		t.Fatal(err)
	}
	a, b := newPod(t, 0), newPod(t, 1)
	addrA, hostA, result := n.add(a)
	addrB, _, _ := n.add(b)
	n.stop()
	// Something removed a route while nobody looked.
	l, err := netlink.LinkByName(hostA)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: hostNet(addrA), Scope: netlink.SCOPE_LINK}); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.must("CHECK", a, n.conf(`,"prevResult":`+string(result)))
	if _, ok := exchange(t, b, a, addrB, addrA, patience); !ok {
		t.Error("pods do not talk after the restart")
	}
	if elements, err := n.server.fw.conn.GetSetElements(n.server.fw.families[0].nat); err != nil || len(elements) < 2 {
		t.Errorf("pools were forgotten: %v, %v", elements, err)
	}
	if err := n.server.Reconcile(t.Context()); err != nil {
		t.Error("second Reconcile:", err)
	}
	f := n.server.fw
	f.conn.DelTable(f.table)
	if err := f.conn.Flush(); err != nil {
		t.Fatal(err)
	}
	if repaired, err := f.ensure(); !repaired || err != nil {
		t.Errorf("table not restored: %v, %v", repaired, err)
	}
	n.must("DEL", b, n.conf(""))
	if len(n.server.Attachments()) != 1 {
		t.Errorf("attachments %v", n.server.Attachments())
	}
}

func TestManyAtOnce(t *testing.T) {
	n := newNode(t)
	n.start()
	pods := make([]*pod, 100)
	for i := range pods {
		pods[i] = newPod(t, i)
	}
	each := func(verb string) time.Duration {
		start := time.Now()
		var wg sync.WaitGroup
		for _, p := range pods {
			wg.Go(func() {
				if _, err := n.plugin(verb, p, n.conf("")); err != nil {
					t.Errorf("%s %s: %v", verb, p.name, err)
				}
			})
		}
		wg.Wait()
		return time.Since(start)
	}
	t.Logf("100 ADDs at once: %v", each("ADD"))
	seen := map[netip.Addr]bool{}
	for _, a := range n.server.Attachments() {
		seen[a.Address] = true
	}
	if len(seen) != len(pods) || len(calis(t)) != len(pods) {
		t.Errorf("%d addresses, %d interfaces, want %d", len(seen), len(calis(t)), len(pods))
	}
	t.Logf("100 DELs at once: %v", each("DEL"))
	if n.ipam.count() != 0 || len(calis(t)) != 0 {
		t.Errorf("left: %d addresses, %d interfaces", n.ipam.count(), len(calis(t)))
	}
	p := pods[0]
	var best time.Duration
	for range 10 {
		start := time.Now()
		n.add(p)
		if d := time.Since(start); best == 0 || d < best {
			best = d
		}
		n.must("DEL", p, n.conf(""))
	}
	t.Logf("fastest ADD, plugin's start included: %v", best)
}

func TestBadNetns(t *testing.T) {
	n := newNode(t)
	n.start()
	p := newPod(t, 0)
	for _, path := range []string{"/proc/self/ns/net", "/nonexistent", "/dev/null"} {
		_, err := n.plugin("ADD", nil, n.conf(""), "CNI_CONTAINERID="+p.id, "CNI_NETNS="+path)
		if err == nil || err.Code != types.ErrInvalidNetNS {
			t.Errorf("%s: %v", path, err)
		}
	}
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	own := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), home.Fd())
	if _, err := n.plugin("ADD", nil, n.conf(""), "CNI_CONTAINERID="+p.id, "CNI_NETNS="+own); err == nil || err.Code != types.ErrInvalidNetNS {
		t.Errorf("node's own: %v", err)
	}
	if n.ipam.count() != 0 {
		t.Errorf("leaked: %v", n.ipam.held)
	}
}

func TestGCAndStatus(t *testing.T) {
	n := newNode(t)
	var notReady error
	n.ready = func() error { return notReady }
	n.start()
	a, b := newPod(t, 0), newPod(t, 1)
	n.add(a)
	n.add(b)
	n.must("GC", nil, n.conf(fmt.Sprintf(`,"cni.dev/valid-attachments":[{"containerID":%q,"ifname":"eth0"}]`, a.id)))
	if got := n.server.Attachments(); len(got) != 1 || got[0].ContainerID != a.id || n.ipam.count() != 1 {
		t.Errorf("after GC: %v", got)
	}
	if _, err := n.plugin("GC", nil, n.conf("")); err == nil || err.Code != types.ErrInvalidNetworkConfig {
		t.Errorf("GC without a list: %v", err)
	}
	n.must("GC", nil, n.conf(`,"cni.dev/valid-attachments":[]`))
	if n.ipam.count() != 0 {
		t.Errorf("after GC of all: %v", n.ipam.held)
	}
	n.must("STATUS", nil, n.conf(""))
	notReady = errors.New("etcd at http://x: not reachable")
	if _, err := n.plugin("STATUS", nil, n.conf("")); err == nil || err.Code != types.ErrPluginNotAvailable || !strings.Contains(err.Msg, "etcd") {
		t.Errorf("STATUS: %v", err)
	}
	if _, err := n.plugin("ADD", a, n.conf("")); err == nil || err.Code != types.ErrTryAgainLater {
		t.Errorf("ADD: %v", err)
	}
}

func TestBadInput(t *testing.T) {
	n := newNode(t)
	n.start()
	p := newPod(t, 0)
	for _, tc := range []struct {
		conf string
		code uint
	}{
		{"{", types.ErrDecodingFailure},
		{`{"cniVersion":"1.0.0"}`, types.ErrInvalidNetworkConfig},
		{`{"cniVersion":"9.0.0","name":"x"}`, types.ErrIncompatibleCNIVersion},
		{n.conf(`,"mtu":1`), types.ErrInvalidNetworkConfig},
	} {
		if _, err := n.plugin("ADD", p, tc.conf); err == nil || err.Code != tc.code {
			t.Errorf("%s: %v, want code %d", tc.conf, err, tc.code)
		}
	}
	for _, raw := range []string{"", "{", `{"protocol":1,"verb":"ADD","network":"n","containerID":"../x","ifName":"eth0"}`,
		`{"protocol":1,"verb":"ADD","network":"n","containerID":"x","ifName":"eth0"}`} {
		c, err := net.Dial("unix", n.socket())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, raw)
		c.(*net.UnixConn).CloseWrite()
		var resp cni.Response
		if err := json.NewDecoder(c).Decode(&resp); err != nil || resp.Error == nil {
			t.Errorf("%q: %+v, %v", raw, resp, err)
		}
		c.Close()
	}
	if s, err := New(Config{Node: "x", IPAM: n.ipam, Socket: n.socket()}); err != nil {
		t.Error(err)
	} else if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another margay-agent") {
		t.Errorf("second server: %v", err)
	}
}

// Every version of the specification gets its own shape of result, through the library that runtimes use.
func TestLibcni(t *testing.T) {
	n := newNode(t)
	n.start()
	for i, v := range cni.SpecVersions {
		conf := fmt.Sprintf(`{"cniVersion":%q,"name":"k8s-pod-network","plugins":[{"type":"margay","socket":%q,"queueDir":%q}]}`, v, n.socket(), n.queueDir())
		list, err := libcni.NetworkConfFromBytes([]byte(conf))
		if err != nil {
			t.Fatal(err)
		}
		p := newPod(t, i)
		rt := &libcni.RuntimeConf{ContainerID: p.id, NetNS: p.path(), IfName: "eth0"}
		lib := libcni.NewCNIConfigWithCacheDir([]string{pluginDir}, t.TempDir(), nil)
		r, err := lib.AddNetworkList(t.Context(), list, rt)
		if err != nil || r.Version() != v {
			t.Fatalf("%s: ADD: %v, %v", v, r, err)
		}
		if v != "0.3.1" { // CHECK came with 0.4.0
			if err := lib.CheckNetworkList(t.Context(), list, rt); err != nil {
				t.Errorf("%s: CHECK: %v", v, err)
			}
		}
		if err := lib.DelNetworkList(t.Context(), list, rt); err != nil {
			t.Errorf("%s: DEL: %v", v, err)
		}
	}
	if n.ipam.count() != 0 {
		t.Errorf("leaked: %v", n.ipam.held)
	}
}

// An address that the datastore calls free, and a pod here has all the same, is not taken from that pod.
func TestAddressOfALivingPod(t *testing.T) {
	n := newNode(t)
	n.start()
	a, b := newPod(t, 0), newPod(t, 1)
	addr, host, _ := n.add(a)
	n.ipam.mu.Lock()
	clear(n.ipam.held) // somebody has released what is not theirs
	n.ipam.mu.Unlock()
	if _, err := n.plugin("ADD", b, n.conf("")); err == nil || err.Code != types.ErrTryAgainLater {
		t.Errorf("ADD: %v", err)
	}
	if got := n.ipam.count(); got != 0 {
		t.Errorf("%d addresses held by whoever got none", got)
	}
	routes, err := netlink.RouteGet(addr.AsSlice())
	if err != nil || len(routes) != 1 {
		t.Fatal(routes, err)
	}
	if link, err := netlink.LinkByIndex(routes[0].LinkIndex); err != nil || link.Attrs().Name != host {
		t.Errorf("the address leads to %v, %v, expected %s", link, err, host)
	}
	n.must("DEL", a, n.conf(""))
	if got, _, _ := n.add(b); got != addr {
		t.Errorf("then: %s, expected %s", got, addr)
	}
}
