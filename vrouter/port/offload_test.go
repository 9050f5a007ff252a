package port_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
	"margay/vrouter"
	"margay/vrouter/packet"
	"margay/vrouter/port"
)

// TestUDPSegmentation sends superpackets of UDP (UDP_SEGMENT) between pods: every datagram arrives as it was meant.
func TestUDPSegmentation(t *testing.T) {
	onEach(t, func(t *testing.T, d driver) {
		a, b := newNodes(t, d)
		conn := a.dialUDP(t, b.echo(t))
		eventually(t, "first answer", func() bool { return answered(conn, 1) })
		segmented(t, conn, true)
	})
}

// segmented sends superpackets of several segment sizes by conn, to an echo server. Where packets do not all pass one thread
// the answers, which the server sends one by one, may overtake each other: ordered says that they must not.
func segmented(t *testing.T, conn *net.UDPConn, ordered bool) {
	t.Helper()
	for _, size := range []int{1, 500, 1400, 1452} {
		raw, err := conn.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var sockErr error
		if err := raw.Control(func(fd uintptr) {
			sockErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size)
		}); errors.Join(err, sockErr) != nil {
			t.Fatal(err, sockErr)
		}
		const count = 20
		want := make([]byte, count*size-size/2)
		for i := range want {
			want[i] = byte(i / size)
		}
		if _, err := conn.Write(want); err != nil {
			t.Fatal(err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(60 * time.Second)); err != nil {
			t.Fatal(err)
		}
		var answers [][]byte
		received := 0
		buf := make([]byte, 65536)
		for received < len(want) {
			n, err := conn.Read(buf)
			if err != nil {
				t.Fatalf("segments of %d bytes: %d bytes of %d came back: %v", size, received, len(want), err)
			}
			if n != size && n != len(want)%size {
				t.Errorf("segments of %d bytes: one of %d", size, n)
			}
			answers = append(answers, bytes.Clone(buf[:n]))
			received += n
		}
		if !ordered {
			slices.SortFunc(answers, bytes.Compare) // each is full of its number
		}
		if !bytes.Equal(bytes.Join(answers, nil), want) {
			t.Errorf("segments of %d bytes: other bytes came back", size)
		}
	}
}

// capture returns a socket on eth0 of the namespace that sees protocol 4.
func (s *space) capture(t *testing.T) int {
	t.Helper()
	var fd int
	s.do(t, func() (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(30 * time.Second))
		return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 8, Ifindex: eth0.Attrs().Index})) // ETH_P_IP, network order
	})
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// superpackets are what a pod may send, in its outer header, with the checksum left undone; and the packets each is.
func superpackets() map[string]*vrouter.Packet {
	nodeA, nodeB, podA, podB := nodeAddress(1).As4(), nodeAddress(2).As4(), podAddress(1).As4(), podAddress(2).As4()
	all := map[string]*vrouter.Packet{}
	for _, c := range []struct {
		name      string
		protocol  byte
		transport int
		payload   int
		size      uint16
		kind      vrouter.Segmentation
	}{
		{"TCP", 6, 32, 20000, 1428, vrouter.SegmentTCPv4},
		{"TCP of the greatest length", 6, 20, 65515 - 40, 1440, vrouter.SegmentTCPv4},
		{"UDP", 17, 8, 20001, 1400, vrouter.SegmentUDP},
		{"one datagram", 17, 8, 501, 0, vrouter.SegmentNone},
		{"one segment", 6, 20, 1440, 0, vrouter.SegmentNone},
	} {
		transport := make([]byte, c.transport+c.payload)
		for i := range transport[c.transport:] {
			transport[c.transport+i] = byte(i*7 + i>>8)
		}
		offset := 16
		if c.protocol == 6 {
			transport[12], transport[13] = byte(c.transport)<<2, 0x99 // CWR, ACK, PSH, FIN
			for i := 20; i < c.transport; i++ {
				transport[i] = 1
			}
		} else {
			offset = 6
			binary.BigEndian.PutUint16(transport[4:], uint16(len(transport)))
		}
		inner := append(header(c.protocol, 20+len(transport), podA, podB), transport...)
		binary.BigEndian.PutUint16(inner[20+offset:], uint16(packet.PseudoSum(packet.IPv4(inner), len(transport))))
		p := vrouter.NewPacket()
		p.Len = 20 + copy(p.Buf[p.Off+20:], inner)
		copy(p.Buf[p.Off:], header(4, p.Len, nodeA, nodeB))
		p.Offload = vrouter.Offload{Segmentation: c.kind, Size: c.size, NeedsChecksum: true, ChecksumStart: 40,
			ChecksumOffset: uint16(offset), ECN: c.kind == vrouter.SegmentTCPv4}
		all[c.name] = p
	}
	return all
}

// senders are the drivers that send in different ways.
var senders = []driver{plain, whole, split, tunXDP, tunSplit}

// TestSameOnTheWire: what leaves the underlay is the same, byte for byte, whichever driver sends it, and its checksums
// are right.
func TestSameOnTheWire(t *testing.T) {
	sa, sb := newSpace(t), newSpace(t)
	wire(t, sa, sb, 1)
	// The kernel has to finish checksums and split before the wire, as on a plain NIC.
	sa.do(t, func() error { return errors.Join(ethtool(ethtoolSetTSO, 0), ethtool(ethtoolSetTxChecksum, 0)) })
	sb.do(t, func() error { return ethtool(ethtoolSetGRO, 0) })
	captured := sb.capture(t)
	wires := map[string]map[string][][]byte{}
	for _, d := range senders {
		wires[d.name] = map[string][][]byte{}
		var underlay *port.Underlay
		sa.do(t, func() (err error) {
			underlay, err = d.underlay()
			return err
		})
		if err := underlayOf(t, sa, underlay); err != nil {
			t.Fatalf("%s: %v", d.name, err)
		}
		if d.name != plain.name {
			eventually(t, d.name+" knows the way", func() bool {
				p := superpackets()["one datagram"]
				underlay.Send([]*vrouter.Packet{p})
				receive(t, captured, 1)
				frames, super := underlay.Resolved(nodeAddress(2))
				return frames && super == d.whole && underlay.ByXDP() == d.xdp
			})
		}
		for name, p := range superpackets() {
			underlay.Send([]*vrouter.Packet{p})
			if p.Drop != vrouter.ReasonNotSet || p.Sent == 0 {
				t.Fatalf("%s, %s: sent %d, %v", d.name, name, p.Sent, p.Drop)
			}
			wires[d.name][name] = receive(t, captured, p.Sent)
		}
		if err := underlay.Close(); err != nil {
			t.Error(err)
		}
	}
	for name := range superpackets() {
		want := wires[plain.name][name]
		for i, b := range want {
			inner := packet.IPv4(b[20:])
			if packet.Checksum(inner.Payload(), packet.PseudoSum(inner, len(inner.Payload()))) != 0 {
				t.Errorf("%s: wrong checksum in packet %d of %d", name, i, len(want))
			}
		}
		for _, d := range senders[1:] {
			got := wires[d.name][name]
			if len(got) != len(want) {
				t.Errorf("%s, %s: %d packets, %d with %s", d.name, name, len(got), len(want), plain.name)
				continue
			}
			for i := range want {
				if !bytes.Equal(got[i], want[i]) {
					t.Errorf("%s, %s, packet %d of %d:\n%x, with %s\n%x", d.name, name, i, len(want), got[i][:min(80, len(got[i]))], plain.name,
						want[i][:min(80, len(want[i]))])
					break
				}
			}
		}
	}
}

// underlayOf names eth0 as the interface of a port, from within the namespace.
func underlayOf(t *testing.T, s *space, u *port.Underlay) (err error) {
	t.Helper()
	s.do(t, func() error { err = errors.Join(u.SetInterface("eth0"), u.SetNode(nodeAddress(1))); return nil })
	return err
}

// receive reads n packets.
func receive(t *testing.T, fd, n int) (all [][]byte) {
	t.Helper()
	for len(all) < n {
		b := make([]byte, 65536)
		got, err := unix.Read(fd, b)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			t.Fatalf("%d packets of %d came: %v", len(all), n, err)
		}
		if b[9] == 4 {
			all = append(all, b[:got])
		}
	}
	return all
}

// TestNeighbours: packets follow the kernel's neighbours and routes, and none is lost while there is no neighbour yet.
func TestNeighbours(t *testing.T) {
	for _, d := range senders[1:] {
		t.Run(d.name, func(t *testing.T) { neighbours(t, d) })
	}
}

func neighbours(t *testing.T, d driver) {
	a, b := newNodes(t, d)
	conn := a.dialUDP(t, b.echo(t))
	frames := func(want bool) func() bool {
		return func() bool {
			ok := answered(conn, 10)
			got, super := a.underlay.Resolved(b.address)
			return ok && got == want && (!got || super == d.whole)
		}
	}
	eventually(t, "AF_PACKET is used", frames(true))
	// entry returns A's neighbour entry of B, once the kernel has resolved it.
	entry := func() (found netlink.Neigh) {
		eventually(t, "the kernel knows the neighbour", func() bool {
			a.do(t, func() error {
				eth0, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				list, err := dump.Neighbours(dump.Here, eth0.Attrs().Index, netlink.FAMILY_V4)
				for _, n := range list {
					if n.IP.Equal(b.address.AsSlice()) && len(n.HardwareAddr) == 6 {
						found = n
					}
				}
				return err
			})
			return found.IP != nil
		})
		return found
	}
	// Gone: the kernel resolves anew, and holds the packet meanwhile.
	right := entry()
	a.do(t, func() error { return netlink.NeighDel(&right) })
	if !answers(conn, 10) {
		t.Error("a packet was lost while the neighbour was resolved")
	}
	right = entry()
	eventually(t, "AF_PACKET is used again", frames(true))
	// Changed by somebody, and back.
	wrong := right
	wrong.State, wrong.HardwareAddr = netlink.NUD_PERMANENT, net.HardwareAddr{2, 0, 0, 0, 0, 99}
	a.do(t, func() error { return netlink.NeighSet(&wrong) })
	eventually(t, "the wrong address is used", func() bool { return !answered(conn, 10) })
	right.State = netlink.NUD_REACHABLE
	a.do(t, func() error { return netlink.NeighSet(&right) })
	eventually(t, "the right address is used", frames(true))
	// Routed elsewhere, and back.
	route := func(f func(*netlink.Route) error) {
		a.do(t, func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return f(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: &net.IPNet{IP: b.address.AsSlice(), Mask: net.CIDRMask(32, 32)}})
		})
	}
	route(netlink.RouteAdd)
	eventually(t, "the route is followed", func() bool {
		got, _ := a.underlay.Resolved(b.address)
		return !got && !answered(conn, 10)
	})
	route(netlink.RouteDel)
	eventually(t, "the first route is followed again", frames(true))
}

// TestRetagFollows: an interface that is replaced by another of the same index gets the program again.
func TestRetagFollows(t *testing.T) {
	a, b := newNodes(t, whole)
	conn := a.dialUDP(t, b.echo(t))
	works := func() bool {
		ok := answered(conn, 10)
		frames, super := a.underlay.Resolved(b.address)
		return ok && frames && super
	}
	eventually(t, "superpackets may go whole", works)
	a.do(t, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		again := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", MTU: 1500, Index: eth0.Attrs().Index},
			PeerName: "eth0", PeerNamespace: netlink.NsFd(b.handle)}
		return errors.Join(netlink.LinkDel(eth0), netlink.LinkAdd(again), addAddress("eth0", "198.18.0.1/24"))
	})
	b.do(t, func() error { return addAddress("eth0", "198.18.0.2/24") })
	eventually(t, "superpackets may go whole on the new interface", works)
	before := b.super.Load()
	bulk(t, a, b)
	if b.super.Load() == before {
		t.Error("no superpacket arrived")
	}
}

// TestOffloadAllocations: the offload drivers allocate nothing while they send, however they send.
func TestOffloadAllocations(t *testing.T) {
	for _, d := range drivers[1:] {
		sa, sb := newSpace(t), newSpace(t)
		wire(t, sa, sb, 1)
		var underlay *port.Underlay
		var tun port.Device
		sa.do(t, func() (err error) {
			if underlay, err = d.underlay(); err != nil {
				return err
			}
			tun, err = d.device("vr0")
			return err
		})
		if err := underlayOf(t, sa, underlay); err != nil {
			t.Fatal(err)
		}
		check := func(what string, send func([]*vrouter.Packet), outer int) {
			for name, original := range superpackets() {
				p, batch := vrouter.NewPacket(), make([]*vrouter.Packet, 1)
				batch[0] = p
				round := func() {
					copy(p.Buf, original.Buf)
					p.Reset()
					p.Off, p.Len, p.Offload = original.Off+outer, original.Len-outer, original.Offload
					p.Offload.ChecksumStart -= uint16(outer)
					send(batch)
					if p.Drop != vrouter.ReasonNotSet {
						t.Fatalf("%s, %s, %s: %v", d.name, what, name, p.Drop)
					}
				}
				// The resolver's goroutine allocates now and then: three times in a row it does not.
				n := testing.AllocsPerRun(50, round)
				for try := 0; try < 2 && n != 0; try++ {
					n = testing.AllocsPerRun(50, round)
				}
				if n != 0 {
					t.Errorf("%s, %s, %s: %v allocations", d.name, what, name, n)
				}
			}
		}
		check("vr0", tun.Send, 20)
		check("raw socket", func(batch []*vrouter.Packet) { underlay.Send(batch) }, 0)
		eventually(t, "AF_PACKET is used", func() bool {
			p := superpackets()["one datagram"]
			underlay.Send([]*vrouter.Packet{p})
			frames, _ := underlay.Resolved(nodeAddress(2))
			return frames
		})
		check("AF_PACKET", underlay.Send, 0)
		if err := errors.Join(tun.Close(), underlay.Close()); err != nil {
			t.Error(err)
		}
	}
}
