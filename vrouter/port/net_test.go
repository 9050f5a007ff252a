package port_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/fib"
	"margay/vrouter/port"
)

// space is a network namespace without a name: it is gone with the test process, whatever happens.
type space struct{ handle netns.NsHandle }

func newSpace(t *testing.T) *space {
	t.Helper()
	s := &space{}
	onThread(t, func() error {
		var err error
		if s.handle, err = netns.New(); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	t.Cleanup(func() {
		if err := s.handle.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// onThread runs f on a thread of its own, which is thrown away afterwards with whatever namespace it is in.
func onThread(t *testing.T, f func() error) {
	t.Helper()
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		result <- f()
	}()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
}

// do runs f in the namespace.
func (s *space) do(t *testing.T, f func() error) {
	t.Helper()
	onThread(t, func() error {
		if err := netns.Set(s.handle); err != nil {
			return err
		}
		return f()
	})
}

func addAddress(link, address string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(address)
	if err != nil {
		return err
	}
	return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
}

// deleteLink deletes an interface of the calling thread's namespace.
func deleteLink(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkDel(link)
}

func addRoute(link, prefix, source string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	p := netip.MustParsePrefix(prefix)
	return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Src: net.ParseIP(source),
		Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}})
}

// wire connects the namespaces by a veth pair of so many queues, eth0 on both sides.
func wire(t *testing.T, a, b *space, queues int) {
	t.Helper()
	a.do(t, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", MTU: 1500, NumTxQueues: queues, NumRxQueues: queues},
			PeerName: "eth0", PeerNamespace: netlink.NsFd(b.handle)})
	})
	a.do(t, func() error { return addAddress("eth0", "198.18.0.1/24") })
	b.do(t, func() error { return addAddress("eth0", "198.18.0.2/24") })
}

// driver is a pair of ports that a node can have.
type driver struct {
	name     string
	device   func(string) (port.Device, error)
	underlay func() (*port.Underlay, error)
	whole    bool // superpackets leave whole
	xdp      bool // single packets come and go by AF_XDP
}

// plain is the driver of tun-plain, whole that of tun, split the same where BPF is not allowed; and so on.
var (
	plain     = driver{name: "tun-plain", device: openPlain, underlay: port.OpenUnderlay}
	whole     = driver{name: "tun", device: openTUN, underlay: port.OpenOffloadUnderlay, whole: true}
	split     = driver{name: "tun without BPF", device: openTUN, underlay: port.OpenSplitUnderlay}
	tunXDP    = driver{name: "tun, AF_XDP", device: openTUN, underlay: openXDP, whole: true, xdp: true}
	tunSplit  = driver{name: "tun, AF_XDP without TCX", device: openTUN, underlay: port.OpenXDPSplitUnderlay, xdp: true}
	veth      = driver{name: "veth", device: openVeth, underlay: port.OpenOffloadUnderlay, whole: true}
	vethSplit = driver{name: "veth without BPF", device: openVeth, underlay: port.OpenSplitUnderlay}
	vethXDP   = driver{name: "veth, AF_XDP", device: openXDPVeth, underlay: openXDP, whole: true, xdp: true}

	drivers = []driver{plain, whole, split, tunXDP, tunSplit, veth, vethSplit, vethXDP}
)

// device makes no Device of a nil pointer.
func device[D port.Device](d D, err error) (port.Device, error) {
	if err != nil {
		return nil, err
	}
	return d, nil
}

func openPlain(name string) (port.Device, error) { return device(port.OpenTUN(name)) }
func openTUN(name string) (port.Device, error)   { return device(port.OpenOffloadTUN(name)) }
func openVeth(name string) (port.Device, error)  { return device(port.OpenVeth(name)) }
func openXDPVeth(name string) (port.Device, error) {
	return device(port.OpenXDPVeth(name, port.XDPOptions{}))
}
func openXDP() (*port.Underlay, error) { return port.OpenXDPUnderlay(port.XDPOptions{}) }

// onEach runs a test on every driver.
func onEach(t *testing.T, f func(*testing.T, driver)) {
	for _, d := range drivers {
		t.Run(d.name, func(t *testing.T) { f(t, d) })
	}
}

// node is a namespace with a router. Its one pod is an address on the loopback device.
type node struct {
	*space
	router   *vrouter.Router
	device   port.Device
	underlay *port.Underlay
	super    atomic.Int64 // superpackets that arrived
	address  netip.Addr
	pod      netip.Addr
	stop     func() // of a node with queues
}

// spy counts the superpackets that come out of a port.
type spy struct {
	vrouter.Port
	super *atomic.Int64
}

func (s spy) Recv(batch []*vrouter.Packet) (int, error) {
	n, err := s.Port.Recv(batch)
	for _, p := range batch[:n] {
		if p.Offload.Segmentation != vrouter.SegmentNone {
			s.super.Add(1)
		}
	}
	return n, err
}

// newNode makes the namespace's router, not yet configured. index is 1 or 2, the other node's is 3-index.
func newNode(t *testing.T, s *space, index int, d driver) *node {
	t.Helper()
	n := &node{space: s, router: vrouter.New(), address: nodeAddress(index), pod: podAddress(index)}
	s.do(t, func() (err error) {
		if n.underlay, err = d.underlay(); err != nil {
			return err
		}
		if n.device, err = d.device("vr0"); err != nil {
			return errors.Join(err, n.underlay.Close())
		}
		return addAddress("lo", n.pod.String()+"/32")
	})
	s.do(t, func() error { return addRoute("vr0", podBlock(3-index).String(), n.pod.String()) })
	ports := &port.Ports{Device: n.device, Underlay: n.underlay}
	n.router.OnConfig(ports.Configure)
	s.run(t, ports,
		n.router.NewWorker(vrouter.Encap, n.device, n.underlay).Run,
		n.router.NewWorker(vrouter.Decap, spy{n.underlay, &n.super}, n.device).Run)
	return n
}

// run runs what forwards on ports in the namespace, each on a thread of its own, until the test ends or stop is called.
func (s *space) run(t *testing.T, ports *port.Ports, threads ...func() error) (stop func()) {
	done := make(chan error)
	for _, thread := range threads {
		go func() {
			runtime.LockOSThread() // never given back: the thread stays in the namespace
			if err := netns.Set(s.handle); err != nil {
				done <- err
				return
			}
			done <- thread()
		}()
	}
	stop = sync.OnceFunc(func() {
		ports.Stop()
		var errs []error
		for range threads {
			errs = append(errs, <-done)
		}
		if err := errors.Join(append(errs, ports.Close())...); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func (n *node) configure(t *testing.T, index int) {
	t.Helper()
	other := 3 - index
	err := n.router.Update(vrouter.Update{
		Config:   &vrouter.Config{NodeAddress: n.address, Underlay: "eth0", MTU: 1480},
		AddNodes: []netip.Addr{nodeAddress(1), nodeAddress(2)},
		Set: []vrouter.Route{
			{Prefix: podBlock(index), NextHop: vrouter.NextHop{Kind: fib.KindLocal}},
			{Prefix: podBlock(other), NextHop: vrouter.NextHop{Kind: fib.KindTunnel, Gateway: nodeAddress(other)}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
}

func nodeAddress(index int) netip.Addr {
	return netip.AddrFrom4([4]byte{198, 18, 0, byte(index)})
}

func podAddress(index int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 244, byte(index), 1})
}

func podBlock(index int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(index), 0}), 26)
}

// newNodes returns two nodes, wired and configured.
func newNodes(t *testing.T, d driver) (*node, *node) {
	t.Helper()
	sa, sb := newSpace(t), newSpace(t)
	wire(t, sa, sb, 1)
	a, b := newNode(t, sa, 1, d), newNode(t, sb, 2, d)
	a.configure(t, 1)
	b.configure(t, 2)
	return a, b
}

func (n *node) counter(name string) uint64 {
	for _, c := range n.router.Counters() {
		if c.Name == name {
			return c.Packets
		}
	}
	return ^uint64(0)
}

// eventually fails the test when condition does not come true in a minute.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// echo starts a UDP echo server on the node's pod and returns its address.
func (n *node) echo(t *testing.T) *net.UDPAddr {
	t.Helper()
	var conn *net.UDPConn
	n.do(t, func() (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: n.pod.AsSlice()})
		return err
	})
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
	go func() {
		b := make([]byte, 65536)
		for {
			got, from, err := conn.ReadFromUDP(b)
			if err != nil {
				return
			}
			// What cannot be answered shows as a missing answer.
			_, _ = conn.WriteToUDP(b[:got], from)
		}
	}()
	return conn.LocalAddr().(*net.UDPAddr)
}

// dialUDP returns a socket of the node's pod.
func (n *node) dialUDP(t *testing.T, to *net.UDPAddr) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	n.do(t, func() (err error) {
		conn, err = net.DialUDP("udp4", &net.UDPAddr{IP: n.pod.AsSlice()}, to)
		return err
	})
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
	return conn
}

var datagrams atomic.Uint32

// answered reports whether one datagram of size bytes comes back within a quarter of a second: for what is awaited, and for
// what must not come. An answer to an earlier one, which comes late, does not count.
func answered(conn *net.UDPConn, size int) bool { return answeredIn(conn, size, 250*time.Millisecond) }

// answers is answered for what must come: on a busy machine a quarter of a second is no time.
func answers(conn *net.UDPConn, size int) bool { return answeredIn(conn, size, 60*time.Second) }

func answeredIn(conn *net.UDPConn, size int, patience time.Duration) bool {
	if conn.SetDeadline(time.Now().Add(patience)) != nil {
		return false
	}
	want := make([]byte, size)
	copy(want, []byte{byte(datagrams.Add(1))})
	if _, err := conn.Write(want); err != nil {
		time.Sleep(5 * time.Millisecond) // refused at once, as with an interface that is gone
		return false
	}
	got := make([]byte, 65536)
	for {
		n, err := conn.Read(got)
		if err != nil {
			return false
		}
		if bytes.Equal(got[:n], want) {
			return true
		}
	}
}

// Commands of the ethtool ioctl, linux/ethtool.h.
const (
	ethtoolSetTxChecksum = 0x17
	ethtoolGetTSO        = 0x1e
	ethtoolSetTSO        = 0x1f
	ethtoolSetGSO        = 0x24
	ethtoolSetGRO        = 0x2c
)

// ethtool sets one of eth0's features in the caller's namespace.
func ethtool(command, value uint32) error {
	_, err := ethtoolCall(command, value)
	return err
}

// ethtoolGet asks for one.
func ethtoolGet(command uint32) (uint32, error) { return ethtoolCall(command, 0) }

func ethtoolCall(command, value uint32) (uint32, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer os.NewFile(uintptr(fd), "ethtool").Close()
	data := [2]uint32{command, value}
	request := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&data)}
	copy(request.name[:], "eth0")
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return 0, fmt.Errorf("ethtool %#x: %w", command, errno)
	}
	return data[1], nil
}

// holdGRO lets eth0, in the caller's namespace, wait up to 200 µs for the next segment before it hands a merged packet
// over: without it whether anything is merged depends on how the machine is loaded. The calling thread, which the
// caller throws away, gets a mount namespace of its own for the sysfs of this network namespace.
func holdGRO(dir string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("sysfs", dir, "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mount sysfs: %w", err)
	}
	for name, value := range map[string]string{"gro_flush_timeout": "200000", "napi_defer_hard_irqs": "2"} {
		if err := os.WriteFile(dir+"/class/net/eth0/"+name, []byte(value), 0); err != nil {
			return err
		}
	}
	return nil
}
