package port_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
	"margay/vrouter/port"
)

// carried waits until the kernel carries the pod's datagrams out and back, and returns the connection. It takes new ones, for
// one whose first datagram was sent before the way was known is the kernel's stack's.
func (n *directNode) carried(t *testing.T, p, to *node, count func(vrouter.Carried) uint64) *net.UDPConn {
	t.Helper()
	server := to.echo(t)
	var conn *net.UDPConn
	eventually(t, "the kernel carries it", func() bool {
		before := count(n.direct.Carried())
		conn = p.dialUDP(t, server)
		return answered(conn, 100) && count(n.direct.Carried()) > before
	})
	return conn
}

func encapsulated(c vrouter.Carried) uint64 { return c.Encap.Packets }
func local(c vrouter.Carried) uint64        { return c.Local.Packets }

// TestShortcutCarries: once the vRouter knows the way, packets between pods no longer come to it, and are counted all the
// same; while a capture runs they do come.
func TestShortcutCarries(t *testing.T) {
	a, b := newDirectNodes(t, port.IOTC)
	p, q, r := a.addPod(t, 1), a.addPod(t, 2), b.addPod(t, 1)
	a.reads(t, 2, 2)
	b.reads(t, 1, 1)
	near, far := a.carried(t, p, q, local), a.carried(t, p, r, encapsulated)
	eventually(t, "the kernel takes it out of the tunnel", func() bool {
		return answered(far, 10) && a.direct.Carried().Decap.Packets > 0 && b.direct.Carried().Decap.Packets > 0 && b.direct.Carried().Encap.Packets > 0
	})
	counted := func() [3]uint64 {
		c := a.direct.Carried()
		return [3]uint64{c.Encap.Packets, c.Decap.Packets, c.Local.Packets}
	}
	router := func() [3]uint64 {
		return [3]uint64{a.counter("forwarded_encap"), a.counter("forwarded_decap"), a.counter("forwarded_local")}
	}
	// Every datagram that is answered has gone each way once.
	exchange := func() {
		t.Helper()
		for range 100 {
			if !answers(far, 200) || !answers(near, 200) {
				t.Fatal("no answer")
			}
		}
	}
	was, routed := counted(), router()
	exchange()
	now, routedNow := counted(), router()
	for i, packets := range [3]uint64{100, 100, 200} {
		if now[i]-was[i] < packets || routedNow[i]-routed[i] != now[i]-was[i] {
			t.Errorf("by the kernel %d, counted by the router %d: expected %d or more, and no others", now[i]-was[i], routedNow[i]-routed[i], packets)
		}
	}
	bulk(t, p, r)
	bulk(t, r, p)
	bulk(t, p, q)
	noDrops(t, a.router, b.router)

	c, err := a.router.StartCapture(vrouter.CaptureOptions{Filter: "udp"})
	if err != nil {
		t.Fatal(err)
	}
	was = counted()
	exchange()
	if now := counted(); now[0]-was[0] > 20 || now[2]-was[2] > 20 { // what the pods have to say beside
		t.Errorf("by the kernel while a capture ran: %v, then %v", was, now)
	}
	if got := len(c.Drain()); got < 300 {
		t.Errorf("%d packets captured", got)
	}
	c.Stop()
	was = counted()
	exchange()
	if now := counted(); now[0]-was[0] < 100 || now[2]-was[2] < 200 {
		t.Errorf("by the kernel after the capture: %v, then %v", was, now)
	}
}

// TestShortcutFollows: when a neighbour has another hardware address, or a node another way, packets go where they should.
func TestShortcutFollows(t *testing.T) {
	a, b := newDirectNodes(t, port.IOTC)
	p, r := a.addPod(t, 1), b.addPod(t, 1)
	a.reads(t, 1, 1)
	b.reads(t, 1, 1)
	conn := a.carried(t, p, r, encapsulated)
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 77}
	b.do(t, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetHardwareAddr(eth0, mac)
	})
	a.do(t, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.NeighSet(&netlink.Neigh{LinkIndex: eth0.Attrs().Index, Family: unix.AF_INET, State: unix.NUD_REACHABLE, IP: b.address.AsSlice(), HardwareAddr: mac})
	})
	again := func(what string) {
		t.Helper()
		eventually(t, what, func() bool {
			before := a.direct.Carried().Encap.Packets
			return answered(conn, 100) && a.direct.Carried().Encap.Packets > before
		})
	}
	again("the kernel carries it to another hardware address")
	if err := a.router.Update(vrouter.Update{Set: []vrouter.Route{{Prefix: podBlock(2), NextHop: vrouter.NextHop{Kind: vrouter.KindDrop}}}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a blackhole holds", func() bool { return !answered(conn, 100) })
	a.configure(t, 1)
	// The connection before is the kernel's stack's by now: that was asked for the way, and has sent packets of it to vr0.
	eventually(t, "an answer", func() bool { return answered(conn, 100) })
	a.carried(t, p, r, encapsulated)
}

// TestShortcutSegments sends superpackets of UDP between pods of two nodes: every datagram arrives as it was meant.
func TestShortcutSegments(t *testing.T) {
	a, b := newDirectNodes(t, port.IOTC)
	p, r := a.addPod(t, 1), b.addPod(t, 1)
	a.reads(t, 1, 1)
	b.reads(t, 1, 1)
	conn := a.carried(t, p, r, encapsulated)
	before := a.direct.Carried().Encap.Packets
	segmented(t, conn, false)
	if got := a.direct.Carried().Encap.Packets - before; got < 80 {
		t.Errorf("%d packets by the kernel: expected more", got)
	}
	noDrops(t, a.router, b.router)
}

// TestShortcutSameOnTheWire: what a pod sends leaves the underlay the same, byte for byte but for the identification of what
// may be fragmented, whether the vRouter sends it or its programs in the kernel; and that counts up, from packet to packet too
// (RFC 6864, 4.3).
func TestShortcutSameOnTheWire(t *testing.T) {
	wires := map[string]map[string][][]byte{}
	for _, way := range []string{port.IOPacket, port.IOTC} {
		wires[way] = map[string][][]byte{}
		n := &directNode{node: &node{space: newSpace(t)}, index: 1, io: way, queues: 1}
		n.address = nodeAddress(1)
		other := newSpace(t)
		wire(t, n.space, other, 1)
		n.do(t, func() error {
			return errors.Join(os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0), ethtool(ethtoolSetTSO, 0), ethtool(ethtoolSetTxChecksum, 0))
		})
		other.do(t, func() error { return ethtool(ethtoolSetGRO, 0) })
		n.start(t)
		p := n.addPod(t, 1)
		n.reads(t, 1, 1)
		captured := other.capture(t)
		fd := p.rawSocket(t)
		all := superpackets()
		eventually(t, way+" knows the way", func() bool {
			sendAsPod(t, fd, all["one datagram"])
			receive(t, captured, 1)
			frames, _ := n.underlay.Resolved(nodeAddress(2))
			return frames && (way != port.IOTC || n.direct.Carried().Encap.Packets > 0)
		})
		given := map[uint16]string{}
		for name, super := range all {
			before := n.direct.Carried().Encap.Packets
			sendAsPod(t, fd, super)
			segments := 1
			if size := int(super.Offload.Size); size > 0 {
				headers, _ := packet.SegmentHeaders(packet.IPv4(super.Bytes()[20:]), super.Offload.Protocol(), size)
				segments = (super.Len - 20 - headers + size - 1) / size
			}
			got := receive(t, captured, segments)
			wires[way][name] = got
			if byKernel := int(n.direct.Carried().Encap.Packets - before); way == port.IOTC && byKernel != segments {
				t.Errorf("%s: %d packets by the kernel, expected %d", name, byKernel, segments)
			}
			for i, b := range got {
				inner := packet.IPv4(b[20:])
				if packet.Checksum(b[:20], 0) != 0 || packet.Checksum(inner[:20], 0) != 0 ||
					packet.Checksum(inner.Payload(), packet.PseudoSum(inner, len(inner.Payload()))) != 0 {
					t.Errorf("%s, %s: wrong checksum in packet %d of %d", way, name, i, len(got))
				}
				if id, first := binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(got[0][4:]); id != first+uint16(i) {
					t.Errorf("%s, %s: identification %d of packet %d, the first has %d", way, name, id, i, first)
				} else if other, ok := given[id]; ok {
					t.Errorf("%s, %s: identification %d of packet %d, as one of %s has", way, name, id, i, other)
				} else {
					given[id] = name
				}
			}
		}
	}
	for name, want := range wires[port.IOPacket] {
		got := wires[port.IOTC][name]
		if !slices.EqualFunc(got, want, func(a, b []byte) bool { return bytes.Equal(withoutID(a), withoutID(b)) }) {
			t.Errorf("%s: differs: %d and %d packets, the first\n% x\n% x", name, len(got), len(want), got[0][:60], want[0][:60])
		}
	}
}

// withoutID returns a packet without its outer identification.
func withoutID(b []byte) []byte {
	b = bytes.Clone(b)
	clear(b[4:6])
	clear(b[10:12])
	return b
}

// rawSocket returns a socket by which the pod sends frames with a virtio-net header.
func (n *node) rawSocket(t *testing.T) (fd int) {
	t.Helper()
	n.do(t, func() (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
			unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: eth0.Attrs().Index}))
	})
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// sendAsPod sends the packet inside one that superpackets has made.
func sendAsPod(t *testing.T, fd int, p *vrouter.Packet) {
	t.Helper()
	inner := p.Bytes()[20:]
	h := make([]byte, 10, 24+len(inner))
	h[0] = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
	binary.NativeEndian.PutUint16(h[6:], p.Offload.ChecksumStart-20+14)
	binary.NativeEndian.PutUint16(h[8:], p.Offload.ChecksumOffset)
	if size := p.Offload.Size; size > 0 {
		headers, _ := packet.SegmentHeaders(packet.IPv4(inner), p.Offload.Protocol(), int(size))
		h[1] = unix.VIRTIO_NET_HDR_GSO_UDP_L4
		if p.Offload.Segmentation == vrouter.SegmentTCPv4 {
			h[1] = unix.VIRTIO_NET_HDR_GSO_TCPV4 | unix.VIRTIO_NET_HDR_GSO_ECN
		}
		binary.NativeEndian.PutUint16(h[2:], uint16(14+headers))
		binary.NativeEndian.PutUint16(h[4:], size)
	}
	frame := append(append(append(h, calicoMAC...), 2, 0, 0, 0, 0, 1, 8, 0), inner...)
	if _, err := unix.Write(fd, frame); err != nil {
		t.Fatal(err)
	}
}

// TestShortcutDies: without its process there is no program left, and pods of one node reach each other by the kernel.
func TestShortcutDies(t *testing.T) {
	a, _ := newDirectNodes(t, port.IOTC)
	p, q := a.addPod(t, 1), a.addPod(t, 2)
	a.reads(t, 2, 2)
	conn := a.carried(t, p, q, local)
	a.stop()
	eventually(t, "an answer through the kernel", func() bool { return answered(conn, 1) })
	if strings.Contains(a.direct.String(), "because") {
		t.Error(a.direct.String())
	}
}
