package oracle

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"margay/test/space"
	"margay/vrouter"
	"margay/vrouter/port"
)

// narrowMTU is that of the link between the two routers between the two nodes, whose own links have 1500.
const narrowMTU = 1400

// host is a node whose pod is an address on its loopback device.
type host struct {
	*space.Space
	router *vrouter.Router
	pod    netip.Addr
}

// cable connects two namespaces by a veth pair.
func cable(t *testing.T, a, b *space.Space, atA, atB string, mtu int, addressA, addressB string) {
	t.Helper()
	a.Do(t, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: atA, MTU: mtu}, PeerName: atB, PeerNamespace: netlink.NsFd(b.Handle), PeerMTU: uint32(mtu)})
	})
	a.Do(t, func() error { return space.Address(atA, addressA) })
	b.Do(t, func() error { return space.Address(atB, addressB) })
}

func via(prefix, gateway string) error {
	p := netip.MustParsePrefix(prefix)
	return netlink.RouteReplace(&netlink.Route{Gw: net.ParseIP(gateway), Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}})
}

// newHost starts a vRouter in s, which has eth0 with the node's address already.
func newHost(t *testing.T, s *space.Space, driver port.Options, node, other, pod, otherPod string) *host {
	t.Helper()
	h := &host{Space: s, router: vrouter.New(), pod: addr(pod)}
	var ports *port.Ports
	var reply *port.Reply
	var icmp *port.ICMP
	s.Do(t, func() (err error) {
		if reply, err = port.OpenReply(); err != nil {
			return err
		}
		if icmp, err = port.OpenICMP(); err != nil {
			return err
		}
		if ports, err = port.OpenPorts(driver, func() error { return nil }); err != nil {
			return err
		}
		return space.Address("lo", pod+"/32")
	})
	s.Do(t, func() error {
		l, err := netlink.LinkByName("vr0")
		if err != nil {
			return err
		}
		return errors.Join(space.Sysctls(map[string]string{"ipv4/conf/vr0/rp_filter": "0"}), netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index,
			Src: net.ParseIP(pod), Dst: &net.IPNet{IP: net.ParseIP(otherPod).To4(), Mask: net.CIDRMask(32, 32)}}))
	})
	h.router.OnConfig(ports.Configure)
	workers := ports.Workers(h.router)
	workers[0].SetReply(reply)
	if err := h.router.Update(vrouter.Update{
		Config:   &vrouter.Config{NodeAddress: addr(node), Underlay: "eth0", MTU: 1480},
		AddNodes: []netip.Addr{addr(other)},
		Set: []vrouter.Route{
			{Prefix: netip.PrefixFrom(h.pod, 32), NextHop: vrouter.NextHop{Kind: vrouter.KindLocal}},
			{Prefix: netip.PrefixFrom(addr(otherPod), 32), NextHop: vrouter.NextHop{Kind: vrouter.KindTunnel, Gateway: addr(other)}},
		},
	}); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	run := func(f func() error) {
		go func() {
			runtime.LockOSThread() // never given back: the thread stays in the namespace
			if err := netns.Set(s.Handle); err != nil {
				done <- err
				return
			}
			done <- f()
		}()
	}
	for _, w := range workers {
		run(w.Run)
	}
	run(func() error {
		return icmp.Listen(time.Second, func(b []byte) { h.router.LearnPathMTU(b, time.Now()) }, func() {})
	})
	t.Cleanup(func() {
		ports.Stop()
		icmp.Stop()
		for range len(workers) + 1 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if err := errors.Join(ports.Close(), reply.Close(), icmp.Close()); err != nil {
			t.Error(err)
		}
	})
	return h
}

// TestPathMTU: a link on the way between two nodes is narrower than the nodes know. The vRouter learns of it by ICMP about
// its outer packets, and the senders inside learn of it by the vRouter (RFC 2003, 5.1); what has DF clear is split.
func TestPathMTU(t *testing.T) {
	for _, driver := range []port.Options{
		{Attach: port.AttachTUNPlain, IO: port.IOPacket, Name: "vr0", Queues: 1},
		{Attach: port.AttachTUN, IO: port.IOPacket, Name: "vr0", Queues: 1},
		{Attach: port.AttachVeth, IO: port.IOPacket, Name: "vr0", Queues: 1},
		{Attach: port.AttachVeth, IO: port.IOXDP, Name: "vr0", Queues: 1},
	} {
		t.Run(driver.Attach+","+driver.IO, func(t *testing.T) { pathMTU(t, driver) })
	}
}

func pathMTU(t *testing.T, driver port.Options) {
	sa, r1, r2, sb := space.New(t), space.New(t), space.New(t), space.New(t)
	for _, s := range []*space.Space{sa, r1, r2, sb} {
		s.Do(t, space.BeRouter)
	}
	cable(t, sa, r1, "eth0", "eth0", 1500, "198.18.0.1/24", "198.18.0.254/24")
	cable(t, r1, r2, "eth1", "eth1", narrowMTU, "198.18.9.1/24", "198.18.9.2/24")
	cable(t, sb, r2, "eth0", "eth0", 1500, "198.18.1.2/24", "198.18.1.254/24")
	sa.Do(t, func() error { return via("198.18.0.0/15", "198.18.0.254") })
	r1.Do(t, func() error { return via("198.18.1.0/24", "198.18.9.2") })
	r2.Do(t, func() error { return via("198.18.0.0/24", "198.18.9.1") })
	sb.Do(t, func() error { return via("198.18.0.0/15", "198.18.1.254") })
	a := newHost(t, sa, driver, "198.18.0.1", "198.18.1.2", "10.244.1.1", "10.244.2.1")
	b := newHost(t, sb, driver, "198.18.1.2", "198.18.0.1", "10.244.2.1", "10.244.1.1")
	server := b.echo(t)

	// TCP first: its connection finds the way's MTU by itself, while the vRouter learns.
	transfer(t, a, b)
	// The other node has met no limit: a's kernel has announced a smaller segment than it could have.
	b.learn(t, a.echo(t))
	transfer(t, b, a)
	for other, h := range map[string]*host{"198.18.1.2": a, "198.18.0.1": b} {
		if got := h.router.PathMTUs(); len(got) != 1 || got[0].Gateway != addr(other) || got[0].MTU != narrowMTU {
			t.Fatalf("the way to %s: learned %+v", other, got)
		}
	}

	// With DF: the sender inside is told the tunnel's share of the narrow link.
	const inner, headers = narrowMTU - 20, 28
	told := a.dial(t, server, unix.IP_PMTUDISC_PROBE) // DF, and the kernel's own knowledge of the way does not count
	for size := inner - headers - 16; size <= inner-headers+16; size++ {
		err := told.ask(size)
		if fits := size <= inner-headers; fits && err != nil || !fits && !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("%d bytes, DF: %v", size, err)
		}
	}
	knows := a.dial(t, server, unix.IP_PMTUDISC_DO)
	if err := knows.ask(inner - headers); err != nil {
		t.Errorf("as much as fits: %v", err)
	}
	if mtu, err := knows.option(unix.IP_MTU); err != nil || mtu != inner {
		t.Errorf("the kernel has been told an MTU of %d, %v: expected %d", mtu, err, inner)
	}

	// With DF clear, by single bytes about every boundary: the narrow link's, vr0's, and those of two fragments.
	split := a.dial(t, server, unix.IP_PMTUDISC_OMIT) // DF clear, cut only to vr0's MTU
	for _, about := range []int{inner - headers, 1480 - headers, 1480 - headers + 1456, 2*(inner-20) - 8} {
		for size := about - 16; size <= about+16; size++ {
			if err := split.ask(size); err != nil {
				t.Errorf("%d bytes, DF clear: %v", size, err)
			}
		}
	}
	pieces := uint64(0)
	for _, c := range a.router.Counters() {
		if c.Name == "split" {
			pieces = c.Packets
		}
	}
	if pieces < 30 {
		t.Errorf("the vRouter has split %d packets: expected more", pieces)
	}
}

// echo starts a UDP echo server on the node's pod.
func (h *host) echo(t *testing.T) *net.UDPAddr {
	t.Helper()
	var conn *net.UDPConn
	h.Do(t, func() (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: h.pod.AsSlice()})
		return err
	})
	t.Cleanup(func() { _ = conn.Close() })
	discovery(t, conn, unix.IP_PMTUDISC_OMIT) // the answers are split, not lost
	go func() {
		buffer := make([]byte, 65536)
		for {
			n, from, err := conn.ReadFromUDP(buffer)
			if err != nil {
				return
			}
			// What cannot be answered shows as a missing answer.
			_, _ = conn.WriteToUDP(buffer[:n], from)
		}
	}()
	return conn.LocalAddr().(*net.UDPAddr)
}

// learn sends what is too long for the way, until the vRouter knows.
func (h *host) learn(t *testing.T, to *net.UDPAddr) {
	t.Helper()
	conn := h.dial(t, to, unix.IP_PMTUDISC_PROBE)
	for deadline := time.Now().Add(60 * time.Second); len(h.router.PathMTUs()) == 0; time.Sleep(time.Millisecond) {
		// An error is what an earlier one has brought.
		_, _ = conn.Write(make([]byte, 1452))
		if time.Now().After(deadline) {
			t.Fatal("nothing learned within a minute")
		}
	}
}

// asker is a UDP socket of a pod.
type asker struct{ *net.UDPConn }

// dial returns a socket with a mode of path MTU discovery.
func (h *host) dial(t *testing.T, to *net.UDPAddr, mode int) asker {
	t.Helper()
	var conn *net.UDPConn
	h.Do(t, func() (err error) {
		conn, err = net.DialUDP("udp4", &net.UDPAddr{IP: h.pod.AsSlice()}, to)
		return err
	})
	t.Cleanup(func() { _ = conn.Close() })
	discovery(t, conn, mode)
	return asker{conn}
}

// discovery sets a socket's mode of path MTU discovery.
func discovery(t *testing.T, conn *net.UDPConn, mode int) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	set := func(fd uintptr) {
		err = errors.Join(unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, mode),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1))
	}
	if controlErr := raw.Control(set); controlErr != nil || err != nil {
		t.Fatal(controlErr, err)
	}
}

func (a asker) option(option int) (value int, err error) {
	raw, err := a.SyscallConn()
	if err != nil {
		return 0, err
	}
	controlErr := raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, option) })
	return value, errors.Join(controlErr, err)
}

// ask sends a datagram and waits for its echo, or for what an ICMP error says about it.
func (a asker) ask(size int) error {
	want := make([]byte, size)
	if _, err := rand.Read(want); err != nil {
		return err
	}
	if err := a.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return err
	}
	if _, err := a.Write(want); err != nil {
		return err
	}
	got := make([]byte, 65536)
	for {
		n, err := a.Read(got)
		if err != nil || bytes.Equal(got[:n], want) {
			return err
		}
	}
}

// transfer sends TCP and compares it.
func transfer(t *testing.T, from, to *host) {
	t.Helper()
	want := make([]byte, 2<<20)
	if _, err := rand.Read(want); err != nil {
		t.Fatal(err)
	}
	var listener *net.TCPListener
	to.Do(t, func() (err error) {
		listener, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: to.pod.AsSlice()})
		return err
	})
	defer listener.Close()
	var conn *net.TCPConn
	from.Do(t, func() (err error) {
		conn, err = net.DialTCP("tcp4", &net.TCPAddr{IP: from.pod.AsSlice()}, listener.Addr().(*net.TCPAddr))
		return err
	})
	deadline := time.Now().Add(60 * time.Second)
	in, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := errors.Join(in.SetDeadline(deadline), conn.SetDeadline(deadline)); err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(want)
		sent <- errors.Join(err, conn.Close())
	}()
	got, err := io.ReadAll(in)
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes came, not the %d that were sent", len(got), len(want))
	}
}
