package port_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
	"margay/vrouter"
	"margay/vrouter/port"
)

// directNode is a namespace with a router of the attachment direct. Its pods have namespaces of their own.
type directNode struct {
	*node
	index  int
	io     string
	queues int
	direct *port.Direct
	stop   func()
}

// newDirectNodes returns two nodes, wired and configured, without pods.
func newDirectNodes(t *testing.T, way string) (*directNode, *directNode) {
	t.Helper()
	sa, sb := newSpace(t), newSpace(t)
	wire(t, sa, sb, 1)
	io, many, _ := strings.Cut(way, ", ")
	queues := 1
	if many != "" {
		queues = directQueues
	}
	nodes := []*directNode{{node: &node{space: sa}, index: 1, io: io, queues: queues}, {node: &node{space: sb}, index: 2, io: io, queues: queues}}
	for _, n := range nodes {
		n.address = nodeAddress(n.index)
		n.do(t, func() error {
			return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
		})
		n.start(t)
		n.do(t, func() error { return addRoute("vr0", podBlock(3-n.index).String(), "") })
	}
	return nodes[0], nodes[1]
}

// start opens the ports, on a router without a state, and configures it.
func (n *directNode) start(t *testing.T) {
	t.Helper()
	n.router = vrouter.New()
	var ports *port.Ports
	n.do(t, func() (err error) {
		ports, err = port.OpenPorts(port.Options{Attach: port.AttachDirect, IO: n.io, Name: "vr0", Queues: n.queues}, func() error { return nil })
		if err != nil {
			return err
		}
		n.device, n.underlay, n.direct = ports.Device, ports.Underlay, ports.Direct
		return os.WriteFile("/proc/sys/net/ipv4/conf/vr0/rp_filter", []byte("0"), 0)
	})
	n.router.OnConfig(ports.Configure)
	workers := ports.Workers(n.router)
	if len(workers) != n.queues {
		t.Fatalf("%d workers", len(workers))
	}
	var threads []func() error
	for _, w := range workers {
		threads = append(threads, w.Run)
	}
	n.stop = n.run(t, ports, threads...)
	n.configure(t, n.index)
}

// directQueues is the number of queues of a way that has several.
const directQueues = 3

// onEachIO runs a test for each way to read pods' interfaces, with one queue and with several.
func onEachIO(t *testing.T, f func(*testing.T, string)) {
	for _, way := range []string{port.IOPacket, port.IOXDP, port.IOPacket + ", queues", port.IOXDP + ", queues", port.IOTC, port.IOTC + ", queues"} {
		t.Run(way, func(t *testing.T) { f(t, way) })
	}
}

var calicoMAC = net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}

// addPod makes a pod's namespace as the CNI server does, and tells the router of it. number is the last octet of its
// address.
func (n *directNode) addPod(t *testing.T, number byte) *node {
	t.Helper()
	p := &node{space: newSpace(t), pod: netip.AddrFrom4([4]byte{10, 244, byte(n.index), number})}
	name := fmt.Sprintf("cali%d", number)
	n.do(t, func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: 1480, HardwareAddr: calicoMAC},
			PeerName: "eth0", PeerMTU: 1480, PeerNamespace: netlink.NsFd(p.handle)}); err != nil {
			return err
		}
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		return addRoute(name, p.pod.String()+"/32", "")
	})
	p.do(t, func() error {
		if err := addAddress("eth0", p.pod.String()+"/32"); err != nil {
			return err
		}
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		gateway := net.IPv4(169, 254, 1, 1)
		return errors.Join(
			netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: gateway, HardwareAddr: calicoMAC}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: gateway, Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway}))
	})
	n.tell(t, p)
	return p
}

// tell tells the router of pods.
func (n *directNode) tell(t *testing.T, pods ...*node) {
	t.Helper()
	for _, p := range pods {
		name := fmt.Sprintf("cali%d", p.pod.As4()[3])
		if err := n.router.Update(vrouter.Update{AddPods: []vrouter.Pod{{Address: p.pod, Interface: name}}}); err != nil {
			t.Fatal(err)
		}
	}
}

// reads waits until the vRouter reads so many of so many pods.
func (n *directNode) reads(t *testing.T, have, of int) {
	t.Helper()
	want := fmt.Sprintf("%d of %d pods %s", have, of, map[string]string{port.IOPacket: "read by AF_PACKET", port.IOXDP: "read by AF_XDP", port.IOTC: "by tc"}[n.io])
	eventually(t, want, func() bool { return strings.Contains(n.direct.String(), want) })
	if text := n.direct.String(); strings.Contains(text, "because") {
		t.Fatal(text)
	}
}

// noDrops fails the test for each packet that a router has dropped, but for a full queue: that is how TCP learns its rate, and
// the kernel's behind a veth holds 1,000 packets (netdev_max_backlog), fewer than a window of single segments.
func noDrops(t *testing.T, routers ...*vrouter.Router) {
	t.Helper()
	for _, r := range routers {
		for _, c := range r.Counters() {
			if strings.HasPrefix(c.Name, "drop_") && c.Name != "drop_"+vrouter.ReasonSendQueueFull.String() && c.Packets != 0 {
				t.Errorf("%v: %s: %d packets", r.Status().Config.NodeAddress, c.Name, c.Packets)
			}
		}
	}
}

// TestDirect sends UDP of all sizes and bulk TCP among pods of one node and of two.
func TestDirect(t *testing.T) { onEachIO(t, direct) }

func direct(t *testing.T, way string) {
	a, b := newDirectNodes(t, way)
	p, q, r := a.addPod(t, 1), a.addPod(t, 2), b.addPod(t, 1)
	a.reads(t, 2, 2)
	b.reads(t, 1, 1)
	for _, to := range []*node{q, r} {
		conn := p.dialUDP(t, to.echo(t))
		eventually(t, "first answer", func() bool { return answered(conn, 1) })
		// Up to 1452 they are ours; the others are fragments, which are the kernel's.
		for _, size := range []int{1, 18, 1451, 1452, 1453, 4000, 20000, 65000} {
			if !answers(conn, size) {
				t.Errorf("%v: no answer to a datagram of %d bytes", to.pod, size)
			}
		}
		bulk(t, p, to)
		bulk(t, to, p)
	}
	noDrops(t, a.router, b.router)
	if named := a.queueNames(t); !named["pods_receive"] {
		t.Errorf("queues %v", named)
	}
	for name, n := range map[string]*directNode{"forwarded_encap": a, "forwarded_decap": b, "forwarded_local": a} {
		if got := n.counter(name); got < 100 {
			t.Errorf("%v: %s: %d packets: expected more", n.address, name, got)
		}
	}
}

// TestDirectMerged is TestDirect's bulk for packets that arrive one by one, and merged by GRO.
func TestDirectMerged(t *testing.T) {
	for _, way := range []string{port.IOPacket, port.IOTC} { // with AF_XDP the kernel merges nothing
		t.Run(way, func(t *testing.T) { directMerged(t, way) })
	}
}

func directMerged(t *testing.T, way string) {
	a, b := newDirectNodes(t, way)
	p, r := a.addPod(t, 1), b.addPod(t, 1)
	a.reads(t, 1, 1)
	b.reads(t, 1, 1)
	for _, n := range []*directNode{a, b} {
		n.do(t, func() error { return errors.Join(ethtool(ethtoolSetTSO, 0), ethtool(ethtoolSetGSO, 0)) })
	}
	bulk(t, p, r)
	for _, n := range []*directNode{a, b} {
		sysfs := t.TempDir()
		n.do(t, func() error { return errors.Join(ethtool(ethtoolSetGRO, 1), holdGRO(sysfs)) })
	}
	bulk(t, p, r)
	bulk(t, r, p)
	noDrops(t, a.router, b.router)
}

// TestDirectHost: what is not between pods is the kernel's: pod and host reach each other, and no packet of theirs passes
// the vRouter.
func TestDirectHost(t *testing.T) { onEachIO(t, directHost) }

func directHost(t *testing.T, way string) {
	a, _ := newDirectNodes(t, way)
	p := a.addPod(t, 1)
	a.reads(t, 1, 1)
	host := &node{space: a.space, pod: netip.MustParseAddr("10.244.1.60")}
	host.do(t, func() error { return addAddress("vr0", host.pod.String()+"/32") })
	for _, c := range []struct{ from, to *node }{{p, host}, {host, p}} {
		conn := c.from.dialUDP(t, c.to.echo(t))
		eventually(t, "answer", func() bool { return answered(conn, 100) })
		bulk(t, c.from, c.to)
	}
	for _, path := range []string{"encap", "decap", "local", "host"} {
		if got := a.counter("forwarded_" + path); got != 0 {
			t.Errorf("forwarded_%s: %d", path, got)
		}
	}
}

// TestDirectSpoofed: what a pod sends from another address is dropped under its name, and nobody answers it.
func TestDirectSpoofed(t *testing.T) { onEachIO(t, directSpoofed) }

func directSpoofed(t *testing.T, way string) {
	a, b := newDirectNodes(t, way)
	p, q, r := a.addPod(t, 1), a.addPod(t, 2), b.addPod(t, 1)
	a.reads(t, 2, 2)
	b.reads(t, 1, 1)
	thief := &node{space: p.space, pod: netip.MustParseAddr("10.244.1.9")}
	thief.do(t, func() error { return addAddress("lo", thief.pod.String()+"/32") })
	for i, to := range []*node{q, r} {
		conn := thief.dialUDP(t, to.echo(t))
		for range 3 {
			if answered(conn, 10) {
				t.Fatal("an answer to a stolen address")
			}
		}
		want := uint64(3 * (i + 1))
		eventually(t, "drops are counted", func() bool { return a.counter("drop_spoofed") >= want })
		if got := a.counter("drop_spoofed"); got != want {
			t.Errorf("drop_spoofed: %d, expected %d", got, want)
		}
	}
}

// TestDirectComesAndGoes: pods and the vRouter itself come and go under traffic. Without the vRouter pods of one node
// reach each other through the kernel, and those of others not at all.
func TestDirectComesAndGoes(t *testing.T) { onEachIO(t, directComesAndGoes) }

func directComesAndGoes(t *testing.T, way string) {
	a, b := newDirectNodes(t, way)
	p, q, r := a.addPod(t, 1), a.addPod(t, 2), b.addPod(t, 1)
	a.reads(t, 2, 2)
	b.reads(t, 1, 1)
	near, far := p.dialUDP(t, q.echo(t)), p.dialUDP(t, r.echo(t))
	eventually(t, "first answers", func() bool { return answered(near, 1) && answered(far, 1) })

	a.stop()
	eventually(t, "an answer through the kernel", func() bool { return answered(near, 1) })
	if answered(far, 1) {
		t.Error("an answer from the other node, without a vRouter")
	}
	a.start(t)
	a.tell(t, p, q)
	a.reads(t, 2, 2)
	eventually(t, "answers after a restart", func() bool { return answered(near, 1) && answered(far, 1) })
	bulk(t, p, r)

	// A pod is deleted: its interface goes, and then the control plane says so.
	a.do(t, func() error { return deleteLink("cali2") })
	a.reads(t, 1, 2)
	if err := a.router.Update(vrouter.Update{DelPods: []netip.Addr{q.pod}}); err != nil {
		t.Fatal(err)
	}
	a.reads(t, 1, 1)
	if answered(near, 1) {
		t.Error("an answer from a pod that is gone")
	}
	// Another gets its address and its interface's name.
	again := a.addPod(t, 2)
	a.reads(t, 2, 2)
	conn := p.dialUDP(t, again.echo(t))
	eventually(t, "an answer from the new pod", func() bool { return answered(conn, 1) })
	// The device that the kernel sends by is deleted: the port makes it anew and goes on.
	a.do(t, func() error { return deleteLink("vr0") })
	eventually(t, "vr0 is back", func() bool {
		return slices.ContainsFunc(a.links(t), func(l netlink.Link) bool { return l.Attrs().Name == "vr0" })
	})
	eventually(t, "an answer after that", func() bool { return answered(far, 1) })
}

func (s *space) links(t *testing.T) (links []netlink.Link) {
	t.Helper()
	s.do(t, func() (err error) {
		links, err = dump.Links(dump.Here)
		return err
	})
	return links
}

// TestDirectService: connections to an address that the kernel rewrites (as kube-proxy does) work, on one node and
// between two, although the vRouter could deliver their answers itself; also after its restart, which forgets what it
// has seen.
func TestDirectService(t *testing.T) { onEachIO(t, directService) }

func directService(t *testing.T, way string) {
	a, b := newDirectNodes(t, way)
	p, q, r := a.addPod(t, 1), a.addPod(t, 2), b.addPod(t, 1)
	a.reads(t, 2, 2)
	b.reads(t, 1, 1)
	near, far := q.echo(t), r.echo(t)
	a.do(t, func() error {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(fmt.Sprintf(`table ip services { chain prerouting { type nat hook prerouting priority dstnat;
			ip daddr 10.96.0.1 udp dport 53 dnat to %s
			ip daddr 10.96.0.2 udp dport 53 dnat to %s
			ip daddr 10.96.0.1 tcp dport 80 dnat to %s:8080
			ip daddr 10.96.0.2 tcp dport 80 dnat to %s:8080
			}
		}`, near, far, q.pod, r.pod))
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	})
	var conns []*net.UDPConn
	for _, service := range []string{"10.96.0.1", "10.96.0.2"} {
		conn := p.dialUDP(t, &net.UDPAddr{IP: net.ParseIP(service), Port: 53})
		eventually(t, "an answer from "+service, func() bool { return answered(conn, 10) })
		conns = append(conns, conn)
	}
	streams := []*stream{p.openStream(t, "10.96.0.1:80", q), p.openStream(t, "10.96.0.2:80", r)}
	for i, c := range streams {
		if err := c.echoed(); err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
	}
	a.stop()
	a.start(t)
	a.tell(t, p, q)
	a.reads(t, 2, 2)
	for i, c := range streams {
		// The server speaks first: what was rewritten before the restart is the kernel's all the same.
		if err := c.spoken(); err != nil {
			t.Errorf("stream %d after a restart: %v", i, err)
		}
		eventually(t, "an answer after a restart", func() bool { return answered(conns[i], 10) })
	}
	// Beside the services the pods still talk directly.
	before := a.counter("forwarded_local")
	conn := p.dialUDP(t, near)
	eventually(t, "a direct answer", func() bool { return answered(conn, 10) })
	eventually(t, "the vRouter counts both ways", func() bool { return a.counter("forwarded_local") >= before+2 })
}

// stream is a connection to a service, and its far end.
type stream struct {
	*net.TCPConn
	server net.Conn
}

// openStream opens a connection to service, which leads to port 8080 of server, where everything is echoed.
func (n *node) openStream(t *testing.T, service string, server *node) *stream {
	t.Helper()
	var listener net.Listener
	server.do(t, func() (err error) {
		listener, err = net.Listen("tcp4", server.pod.String()+":8080")
		return err
	})
	defer listener.Close()
	var conn net.Conn
	n.do(t, func() (err error) {
		conn, err = net.DialTimeout("tcp4", service, 60*time.Second)
		return err
	})
	far, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = conn.Close(), far.Close() })
	go func() { _, _ = io.Copy(far, far) }()
	return &stream{conn.(*net.TCPConn), far}
}

// echoed sends a mebibyte and waits for as much to come back.
func (s *stream) echoed() error {
	if err := s.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		return err
	}
	const total = 1 << 20
	sent := make(chan error, 1)
	go func() {
		_, err := s.Write(make([]byte, total))
		sent <- err
	}()
	if n, err := io.CopyN(io.Discard, s, total); err != nil {
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	return <-sent
}

// spoken waits for what the server says unasked.
func (s *stream) spoken() error {
	if err := s.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		return err
	}
	if _, err := s.server.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(s, make([]byte, 1))
	return err
}
