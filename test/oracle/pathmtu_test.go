package oracle

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/test/node"
	"margay/test/space"
	"margay/vrouter"
	"margay/vrouter/port"
)

// narrowMTU is that of the link between the two routers between the two nodes, whose own links have 1500.
const (
	narrowMTU = 1400
	innerMTU  = narrowMTU - 20 // what it leaves inside the tunnel
	podMTU    = 1480
)

func via(prefix, gateway string) error {
	p := netip.MustParsePrefix(prefix)
	return netlink.RouteReplace(&netlink.Route{Gw: net.ParseIP(gateway), Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}})
}

// host is a node with one pod.
type host struct {
	*node.Node
	pod     *space.Space
	address netip.Addr
}

// newHost starts a vRouter in s, which has eth0 with the node's address already.
func newHost(t *testing.T, s *space.Space, driver port.Options, self, other, pod, otherPod string) *host {
	t.Helper()
	h := &host{address: addr(pod)}
	h.Node = node.Start(t, s, node.Config{
		Driver: driver,
		Update: vrouter.Update{
			Config:   &vrouter.Config{NodeAddress: addr(self), Underlay: "eth0", MTU: podMTU},
			AddNodes: []netip.Addr{addr(other)},
			Set: []vrouter.Route{
				{Prefix: netip.PrefixFrom(h.address, 32), NextHop: vrouter.NextHop{Kind: vrouter.KindLocal}},
				{Prefix: netip.PrefixFrom(addr(otherPod), 32), NextHop: vrouter.NextHop{Kind: vrouter.KindTunnel, Gateway: addr(other)}},
			},
		},
		Options: vrouter.Options{ICMPRate: 1_000_000}, // the test asks for more errors in a second than pods should
		Routes:  func() error { return space.Route(otherPod+"/32", "vr0") },
	})
	h.pod = h.AddPod(t, node.Pod{Address: h.address, MTU: podMTU})
	return h
}

// TestPathMTU: a link on the way between two nodes is narrower than the nodes know. The vRouter learns of it by ICMP about
// its outer packets, and the senders inside learn of it by the vRouter (RFC 2003, 5.1); what has DF clear is split.
func TestPathMTU(t *testing.T) {
	node.OnEach(t, node.Drivers, pathMTU)
}

func pathMTU(t *testing.T, driver port.Options) {
	sa, r1, r2, sb := space.New(t), space.New(t), space.New(t), space.New(t)
	for _, s := range []*space.Space{sa, r1, r2, sb} {
		s.Do(t, space.BeRouter)
	}
	node.Cable(t, sa, r1, "eth0", "eth0", 1500, "198.18.0.1/24", "198.18.0.254/24")
	node.Cable(t, r1, r2, "eth1", "eth1", narrowMTU, "198.18.9.1/24", "198.18.9.2/24")
	node.Cable(t, sb, r2, "eth0", "eth0", 1500, "198.18.1.2/24", "198.18.1.254/24")
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
		if got := h.Router.PathMTUs(); len(got) != 1 || got[0].Gateway != addr(other) || got[0].MTU != narrowMTU {
			t.Fatalf("the way to %s: learned %+v", other, got)
		}
	}

	short := a.dial(t, server, unix.IP_PMTUDISC_DONT)
	for _, h := range []*host{a, b} {
		h.UntilCarried(t, func() {
			if err := short.ask(1); err != nil {
				t.Fatal(err)
			}
		})
	}

	// With DF: the sender inside is told the tunnel's share of the narrow link.
	const inner, headers = innerMTU, 28
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
	for _, about := range []int{inner - headers, podMTU - headers, podMTU - headers + 1456, 2*(inner-20) - 8} {
		for size := about - 16; size <= about+16; size++ {
			if err := split.ask(size); err != nil {
				t.Errorf("%d bytes, DF clear: %v", size, err)
			}
		}
	}
	pieces := a.Counters()["split"]
	if pieces < 30 {
		t.Errorf("the vRouter has split %d packets: expected more", pieces)
	}

	for _, pair := range [][2]*host{{a, b}, {b, a}} {
		segments(t, pair[0], pair[1])
	}
	if c := a.Counters(); c["split"] == pieces || c["drop_packet_too_big"] < 30 || c["drop_packet_too_big"] > c["icmp_sent"] {
		t.Errorf("no segments were split, or refused, or the sender was not told: %v", c)
	}
	for _, s := range []*space.Space{r1, r2} {
		a.Watch(s)
	}
	for _, h := range []*host{a, b} {
		h.NoLosses(t)
	}
}

// echo starts a UDP echo server on the node's pod.
func (h *host) echo(t *testing.T) *net.UDPAddr {
	t.Helper()
	var conn *net.UDPConn
	h.pod.Do(t, func() (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: h.address.AsSlice()})
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
	for deadline := time.Now().Add(60 * time.Second); len(h.Router.PathMTUs()) == 0; time.Sleep(time.Millisecond) {
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
	h.pod.Do(t, func() (err error) {
		conn, err = net.DialUDP("udp4", &net.UDPAddr{IP: h.address.AsSlice()}, to)
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

// connect returns both ends of a TCP connection between two pods. prepare, if any, is called with each side's socket before
// it listens or connects.
func connect(t *testing.T, from, to *host, prepare func(fd int) error) (client, server *net.TCPConn) {
	t.Helper()
	control := func(_, _ string, raw syscall.RawConn) (err error) {
		if prepare == nil {
			return nil
		}
		controlErr := raw.Control(func(fd uintptr) { err = prepare(int(fd)) })
		return errors.Join(controlErr, err)
	}
	var listener net.Listener
	to.pod.Do(t, func() (err error) {
		listener, err = (&net.ListenConfig{Control: control}).Listen(t.Context(), "tcp4", netip.AddrPortFrom(to.address, 0).String())
		return err
	})
	defer listener.Close()
	var conn net.Conn
	from.pod.Do(t, func() (err error) {
		d := net.Dialer{Control: control, LocalAddr: &net.TCPAddr{IP: from.address.AsSlice()}, Timeout: node.Patience}
		conn, err = d.Dial("tcp4", listener.Addr().String())
		return err
	})
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{conn, accepted} {
		t.Cleanup(func() { _ = c.Close() }) // most are closed by then
		if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	return conn.(*net.TCPConn), accepted.(*net.TCPConn)
}

// deliver sends bytes over a connection and compares what comes.
func deliver(from, to *net.TCPConn, length int) error {
	want := make([]byte, length)
	if _, err := rand.Read(want); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() {
		_, err := from.Write(want)
		sent <- err
	}()
	got := make([]byte, length)
	n, err := io.ReadFull(to, got)
	if err := errors.Join(err, <-sent); err != nil {
		return fmt.Errorf("%d of %d bytes: %w", n, length, err)
	}
	if !bytes.Equal(got, want) {
		return errors.New("other bytes came than were sent")
	}
	return nil
}

// transfer sends TCP and compares it.
func transfer(t *testing.T, from, to *host) {
	t.Helper()
	client, server := connect(t, from, to, nil)
	if err := deliver(client, server, 2<<20); err != nil {
		t.Fatal(err)
	}
}

// segments sends TCP whose segments are longer by one byte each time, about the boundaries: the narrow link's and the pods'
// interfaces', with DF set and clear. With DF the sender learns what fits; without, all segments keep their length.
func segments(t *testing.T, from, to *host) {
	t.Helper()
	const headers = 20 + 20 + 12 // timestamps are TCP's, and counted in by TCP_MAXSEG
	for _, df := range []bool{true, false} {
		mode := unix.IP_PMTUDISC_WANT
		if !df {
			mode = unix.IP_PMTUDISC_DONT
		}
		for _, about := range []int{innerMTU, podMTU} {
			for length := about - 12; length <= min(about+12, podMTU); length++ {
				for _, h := range []*host{from, to} { // what the last connection has learnt
					h.pod.Do(t, func() error { return space.Sysctls(map[string]string{"ipv4/route/flush": "1"}) })
				}
				client, server := connect(t, from, to, func(fd int) error {
					return errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, mode),
						unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG, length-20-20))
				})
				if err := errors.Join(deliver(client, server, 3*length+1), deliver(server, client, 3*length+1)); err != nil {
					t.Errorf("segments of %d bytes, DF %v: %v", length, df, err)
				}
				want := length
				if df {
					want = min(length, innerMTU)
				}
				for _, conn := range []*net.TCPConn{client, server} {
					if payload, err := segmentSize(conn); err != nil || headers+payload != want {
						t.Errorf("segments of %d bytes, DF %v: became %d, %v: expected %d", length, df, headers+payload, err, want)
					}
					if err := conn.Close(); err != nil {
						t.Error(err)
					}
				}
			}
		}
	}
}

// segmentSize is how many bytes a connection puts into a segment at most.
func segmentSize(conn *net.TCPConn) (size int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	controlErr := raw.Control(func(fd uintptr) { size, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG) })
	return size, errors.Join(controlErr, err)
}
