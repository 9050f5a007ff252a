package port_test

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
	"margay/vrouter"
	"margay/vrouter/packet"
	"margay/vrouter/port"
)

// TestForward sends UDP of all sizes and bulk TCP between two nodes, in the two forms in which the underlay can hand
// packets over: one by one, and merged by GRO.
func TestForward(t *testing.T) { onEach(t, forward) }

func forward(t *testing.T, d driver) {
	for _, gro := range []bool{false, true} {
		name := map[bool]string{false: "single", true: "merged"}[gro]
		t.Run(name, func(t *testing.T) {
			a, b := newNodes(t, d)
			if gro {
				for _, n := range []*node{a, b} {
					sysfs := t.TempDir()
					n.do(t, func() error {
						if !d.xdp { // the other end's program has done it
							if err := errors.Join(ethtool(ethtoolSetTSO, 0), ethtool(ethtoolSetGSO, 0)); err != nil {
								return err
							}
						}
						return errors.Join(ethtool(ethtoolSetGRO, 1), holdGRO(sysfs))
					})
				}
			}
			conn := a.dialUDP(t, b.echo(t))
			eventually(t, "first answer", func() bool { return answered(conn, 1) })
			// 1452 is the largest that fits vr0's MTU of 1480; the others the kernel cuts in front of us.
			for _, size := range []int{1, 18, 1451, 1452, 1453, 4000, 20000, 65000} {
				if !answers(conn, size) {
					t.Errorf("no answer to a datagram of %d bytes", size)
				}
			}
			bulk(t, a, b)
			bulk(t, b, a)
			// Nothing is merged in front of AF_XDP.
			if merged := a.super.Load() + b.super.Load(); !d.xdp && (gro || d.whole) != (merged > 0) || d.xdp && merged > 0 {
				t.Errorf("superpackets that arrived: %d, with GRO %v", merged, gro)
			}
			if d.xdp != (a.underlay.ByXDP() && b.underlay.ByXDP()) {
				t.Errorf("by AF_XDP: %v, %v", a.underlay.ByXDP(), b.underlay.ByXDP())
			}
			noDrops(t, a.router, b.router)
			for _, n := range []*node{a, b} {
				if e, d := n.counter("forwarded_encap"), n.counter("forwarded_decap"); e < 100 || d < 100 {
					t.Errorf("%v: forwarded %d and %d packets: expected more", n.address, e, d)
				}
			}
		})
	}
}

// bulk sends 8 MiB over TCP and compares them.
func bulk(t *testing.T, from, to *node) {
	t.Helper()
	want := make([]byte, 8<<20)
	if _, err := rand.Read(want); err != nil {
		t.Fatal(err)
	}
	var listener *net.TCPListener
	to.do(t, func() (err error) {
		listener, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: to.pod.AsSlice()})
		return err
	})
	defer listener.Close()
	deadline := time.Now().Add(60 * time.Second)
	if err := listener.SetDeadline(deadline); err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	var conn *net.TCPConn
	from.do(t, func() (err error) {
		conn, err = net.DialTCP("tcp4", &net.TCPAddr{IP: from.pod.AsSlice()}, listener.Addr().(*net.TCPAddr))
		return err
	})
	go func() {
		_, err := conn.Write(want)
		sent <- errors.Join(err, conn.Close())
	}()
	in, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := errors.Join(in.SetDeadline(deadline), conn.SetDeadline(deadline)); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(in)
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes came, not the %d that were sent", len(got), len(want))
	}
}

// ipip builds a whole IP-in-IP packet with a UDP datagram inside.
func ipip(outerSrc, outerDst, innerSrc, innerDst [4]byte) []byte {
	inner := header(17, 20+8+4, innerSrc, innerDst)
	inner = append(inner, 0x30, 0x39, 0x30, 0x39, 0, 12, 0, 0, 'p', 'o', 'n', 'g')
	return append(header(4, 20+len(inner), outerSrc, outerDst), inner...)
}

func header(protocol byte, total int, src, dst [4]byte) []byte {
	h := []byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0}
	h = append(append(h, src[:]...), dst[:]...)
	binary.BigEndian.PutUint16(h[2:], uint16(total))
	binary.BigEndian.PutUint16(h[10:], packet.Checksum(h, 0))
	return h
}

// TestRefuse injects what a stranger could send, by a raw socket of the other node: each is counted under its name,
// nothing reaches the pod, and the kernel does not answer either.
func TestRefuse(t *testing.T) { onEach(t, refuse) }

func refuse(t *testing.T, d driver) {
	a, b := newNodes(t, d)
	a.device.Stop() // its router is out of the way: node A is the attacker
	a.underlay.Stop()
	nodeA, nodeB, podA, podB := a.address.As4(), b.address.As4(), a.pod.As4(), b.pod.As4()
	tests := []struct {
		name, counter string
		packet        []byte
	}{
		{"the good one", "forwarded_decap", ipip(nodeA, nodeB, podA, podB)},
		{"from no node", "drop_outer_source_not_node", ipip([4]byte{198, 18, 0, 99}, nodeB, podA, podB)},
		{"another's inner source", "drop_inner_source_not_routed_to_node", ipip(nodeA, nodeB, [4]byte{10, 244, 7, 1}, podB)},
		{"our own inner source", "drop_inner_source_not_routed_to_node", ipip(nodeA, nodeB, podB, podB)},
		{"inner destination elsewhere", "drop_inner_destination_not_local", ipip(nodeA, nodeB, podA, [4]byte{192, 0, 2, 1})},
		{"inner destination a third node's", "drop_inner_destination_not_local", ipip(nodeA, nodeB, podA, podA)},
	}
	var raw int
	a.do(t, func() (err error) {
		raw, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	defer unix.Close(raw)
	var pod *net.UDPConn
	b.do(t, func() (err error) {
		pod, err = net.ListenUDP("udp4", &net.UDPAddr{IP: b.pod.AsSlice(), Port: 0x3039})
		return err
	})
	defer pod.Close()
	for _, test := range tests {
		before := b.counter(test.counter)
		if err := unix.Sendto(raw, test.packet, 0, &unix.SockaddrInet4{Addr: nodeB}); err != nil {
			t.Fatalf("%s: %v", test.name, err)
		}
		eventually(t, test.name, func() bool { return b.counter(test.counter) == before+1 })
	}
	for i, limit := range []time.Duration{time.Minute, 200 * time.Millisecond} {
		if err := pod.SetReadDeadline(time.Now().Add(limit)); err != nil {
			t.Fatal(err)
		}
		_, err := pod.Read(make([]byte, 100))
		if (err == nil) != (i == 0) {
			t.Errorf("read %d of the pod: %v: expected exactly one datagram", i+1, err)
		}
	}
	if unreachable := icmpUnreachable(t, b); unreachable != 0 {
		t.Errorf("the kernel of node B sent %d ICMP destination unreachable", unreachable)
	}
}

// icmpUnreachable returns the node's count of ICMP destination unreachable messages sent.
func icmpUnreachable(t *testing.T, n *node) int {
	t.Helper()
	fields := map[string]int{}
	n.do(t, func() (err error) {
		fields, err = snmp("Icmp:")
		return err
	})
	count, ok := fields["OutDestUnreachs"]
	if !ok {
		t.Fatal("no OutDestUnreachs in /proc/net/snmp")
	}
	return count
}

// TestUnderlayRecovers takes the interface down and up, and removes it and makes it anew.
func TestUnderlayRecovers(t *testing.T) { onEach(t, underlayRecovers) }

func underlayRecovers(t *testing.T, d driver) {
	a, b := newNodes(t, d)
	conn := a.dialUDP(t, b.echo(t))
	eventually(t, "first answer", func() bool { return answered(conn, 10) })

	down := func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(eth0)
	}
	up := func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(eth0)
	}
	b.do(t, down)
	if answered(conn, 10) {
		t.Error("an answer over an interface that is down")
	}
	b.do(t, up)
	eventually(t, "answer after down and up", func() bool { return answered(conn, 10) })

	b.do(t, func() error { return deleteLink("eth0") })
	if answered(conn, 10) {
		t.Error("an answer over an interface that is gone")
	}
	wire(t, a.space, b.space, 1)
	eventually(t, "answer over the new interface", func() bool { return answered(conn, 10) })
}

// TestTUNRecovers deletes vr0 under the router.
func TestTUNRecovers(t *testing.T) { onEach(t, tunRecovers) }

func tunRecovers(t *testing.T, d driver) {
	a, b := newNodes(t, d)
	conn := a.dialUDP(t, b.echo(t))
	eventually(t, "first answer", func() bool { return answered(conn, 10) })
	a.do(t, func() error { return deleteLink("vr0") })
	eventually(t, "vr0 is made anew", func() bool {
		mtu := 0
		a.do(t, func() error {
			if vr0, err := netlink.LinkByName("vr0"); err == nil && vr0.Attrs().Flags&net.FlagUp != 0 {
				mtu = vr0.Attrs().MTU
			}
			return nil
		})
		return mtu == 1480
	})
	a.do(t, func() error { return addRoute("vr0", podBlock(2).String(), a.pod.String()) })
	eventually(t, "answer through the new vr0", func() bool { return answered(conn, 10) })
}

// TestTUNOpen covers what can stand in the way of opening vr0, and that it stays.
func TestTUNOpen(t *testing.T) {
	s := newSpace(t)
	expect := func(err error, want error) {
		t.Helper()
		var missing *port.Missing
		if !errors.As(err, &missing) || !errors.Is(err, want) || missing.Do == "" || strings.Contains(err.Error(), "\n") {
			t.Errorf("error %q: expected a Missing of one line for %v", err, want)
		}
	}
	s.do(t, func() error {
		first, err := port.OpenTUN("vr0")
		if err != nil {
			return err
		}
		_, err = port.OpenTUN("vr0")
		expect(err, unix.EBUSY)
		if err := addAddress("vr0", "10.244.1.1/32"); err != nil {
			return err
		}
		if err := first.Close(); err != nil {
			return err
		}
		again, err := port.OpenTUN("vr0")
		if err != nil {
			return err
		}
		vr0, err := netlink.LinkByName("vr0")
		if err != nil {
			return err
		}
		if addresses, err := dump.Addrs(dump.Here, vr0, netlink.FAMILY_V4); err != nil || len(addresses) != 1 {
			t.Errorf("addresses of vr0 after reopening: %v, %v: expected the one set before", addresses, err)
		}
		if vr0.Attrs().TxQLen != 2048 {
			t.Errorf("queue of vr0: %d", vr0.Attrs().TxQLen)
		}
		if err := again.SetMTU(100000); err == nil {
			t.Error("an MTU of 100000 was taken")
		}
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "other"}, PeerName: "another"}); err == nil {
			_, err = port.OpenTUN("other")
			expect(err, unix.EINVAL)
		} else {
			t.Error(err)
		}
		return again.Close()
	})
}

// TestAllocations checks that neither driver allocates while it forwards.
func TestAllocations(t *testing.T) {
	s := newSpace(t)
	s.do(t, func() error {
		tun, err := port.OpenTUN("vr0")
		if err != nil {
			return err
		}
		defer tun.Close()
		underlay, err := port.OpenUnderlay()
		if err != nil {
			return err
		}
		defer underlay.Close()
		p := vrouter.NewPacket()
		fill := func(b []byte) {
			p.Reset()
			p.Len = copy(p.Buf[p.Off:], b)
		}
		batch := []*vrouter.Packet{p}
		local := [4]byte{127, 0, 0, 1}
		check := func(name string, f func()) {
			if n := testing.AllocsPerRun(100, f); n != 0 {
				t.Errorf("%s: %v allocations", name, n)
			}
		}
		outer := ipip(local, local, local, local)
		check("underlay send", func() {
			fill(outer)
			underlay.Send(batch)
			if p.Sent != 1 {
				t.Errorf("not sent: %v", p.Drop)
			}
		})
		if err := underlay.SetInterface("lo"); err != nil {
			return err
		}
		check("underlay round", func() {
			fill(outer)
			underlay.Send(batch)
			p.Reset()
			if n, err := underlay.Recv(batch); n != 1 || err != nil || !bytes.Equal(p.Bytes()[12:], outer[12:]) {
				t.Errorf("received %d, %v", n, err)
			}
		})
		check("tun send", func() {
			fill(outer[20:])
			tun.Send(batch)
			if p.Sent != 1 {
				t.Errorf("not sent: %v", p.Drop)
			}
		})
		tcp := append(header(6, 20+20+3000, local, local), make([]byte, 20+3000)...)
		tcp[20+12] = 5 << 4
		check("tun split", func() {
			fill(tcp)
			p.Offload = vrouter.Offload{Segmentation: vrouter.SegmentTCPv4, Size: 1000}
			tun.Send(batch)
			if p.Sent != 3 {
				t.Errorf("sent %d segments of 3: %v", p.Sent, p.Drop)
			}
		})
		return nil
	})
}
