package cluster

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// ipip builds an IP-in-IP packet around a UDP datagram: the outer header is complete but for what the kernel fills in
// on a raw socket (checksum, identification).
func ipip(outerSrc, outerDst, innerSrc, innerDst netip.Addr) []byte {
	const payload = 26
	inner := make([]byte, 20+8+payload)
	header(inner, 17, innerSrc, innerDst)
	binary.BigEndian.PutUint16(inner[20:], 4242)
	binary.BigEndian.PutUint16(inner[22:], 9)
	binary.BigEndian.PutUint16(inner[24:], 8+payload)
	out := make([]byte, 20, 20+len(inner))
	out = append(out, inner...)
	header(out, 4, outerSrc, outerDst)
	return out
}

// header writes an IPv4 header over the first 20 bytes of p.
func header(p []byte, proto byte, src, dst netip.Addr) {
	p[0], p[8], p[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	s, d := src.As4(), dst.As4()
	copy(p[12:], s[:])
	copy(p[16:], d[:])
	p[10], p[11] = 0, 0
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum))
}

// inject sends raw IPv4 packets from a namespace.
func inject(t *testing.T, ns string, to netip.Addr, count int, packet []byte) {
	t.Helper()
	inNetns(t, ns, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for range count {
			if err := unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: to.As4()}); err != nil {
				return err
			}
		}
		return nil
	})
}

// TestDecapsulationIsNoOpenDoor injects IP-in-IP that must not get in, and one packet of each kind that must.
func TestDecapsulationIsNoOpenDoor(t *testing.T) {
	const count = 20
	n1, n2, n3 := node(t, 1), node(t, 2), node(t, 3)
	target, a2, a3 := ip(t, n1.Address), ip(t, n2.Address), ip(t, n3.Address)
	pod1, pod2, pod3 := ip(t, n1.Pods[0].Address), ip(t, n2.Pods[0].Address), ip(t, n3.Pods[0].Address)
	stranger := netip.MustParseAddr("203.0.113.66")
	vr0 := tapOn(t, n1.Netns, "vr0")
	inside := tapOn(t, n1.Pods[0].Netns, "eth0")
	eth0 := onWire(t, 1)
	for _, tc := range []struct {
		name                                   string
		outerSrc, outerDst, innerSrc, innerDst netip.Addr
		counter                                string
	}{
		{"outer source is no node", stranger, target, pod2, pod1, "drop_outer_source_not_node"},
		{"outer source is this node", target, target, pod2, pod1, "drop_outer_source_not_node"},
		{"inner source belongs to another node", a2, target, pod3, pod1, "drop_inner_source_not_routed_to_node"},
		{"inner source belongs to nobody", a2, target, netip.MustParseAddr("192.0.2.1"), pod1, "drop_inner_source_not_routed_to_node"},
		{"inner source is this node's own pod", a3, target, pod1, ip(t, n1.Pods[1].Address), "drop_inner_source_not_routed_to_node"},
		{"inner destination is another node's", a2, target, pod2, pod3, "drop_inner_destination_not_local"},
		{"inner destination is outside", a2, target, pod2, netip.MustParseAddr("192.0.2.1"), "drop_inner_destination_not_local"},
		{"inner destination is the node itself", a2, target, pod2, target, "drop_inner_destination_not_local"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := counters(t, n1)
			if _, ok := before[tc.counter]; !ok {
				t.Fatalf("no counter %s in %v", tc.counter, before)
			}
			// From another node's wire: spoofed sources leave it because raw sockets do not ask.
			inject(t, n2.Netns, target, count, ipip(tc.outerSrc, tc.outerDst, tc.innerSrc, tc.innerDst))
			until(t, tc.counter+" to count them", func() bool {
				return counters(t, n1)[tc.counter] >= before[tc.counter]+count
			})
		})
	}
	for _, p := range []*tap{vr0, inside, eth0} {
		p.close()
	}
	ours := func(s seen) bool { return s.proto == 17 && !s.outgoing }
	if n := vr0.count(ours); n != 0 {
		t.Errorf("%d injected packets came out of vr0", n)
	}
	if n := inside.count(ours); n != 0 {
		t.Errorf("%d injected packets reached the pod", n)
	}
	if n := eth0.count(func(s seen) bool { return s.outgoing && (s.proto == 17 || s.innerSrc == pod3) }); n != 0 {
		t.Errorf("%d injected packets were forwarded", n)
	}
	t.Run("what is right gets in", func(t *testing.T) {
		inside := tapOn(t, n1.Pods[0].Netns, "eth0")
		inject(t, n2.Netns, target, count, ipip(a2, target, pod2, pod1))
		until(t, "the packets to reach the pod", func() bool {
			return inside.count(func(s seen) bool { return s.proto == 17 && s.src == pod2 && s.dst == pod1 }) >= count
		})
	})
}

// TestPodMayNotSpoof: a pod that sends with another's address reaches nobody.
func TestPodMayNotSpoof(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	victim := n2.Pods[0]
	at := tapOn(t, victim.Netns, "eth0")
	before := dropped(t, n1, "spoofed")
	packet := make([]byte, 20+8)
	header(packet, 17, ip(t, n1.Pods[1].Address), ip(t, victim.Address))
	binary.BigEndian.PutUint16(packet[24:], 8)
	inject(t, n1.Pods[0].Netns, ip(t, victim.Address), 10, packet)
	header(packet, 17, ip(t, n1.Pods[0].Address), ip(t, victim.Address))
	inject(t, n1.Pods[0].Netns, ip(t, victim.Address), 10, packet)
	until(t, "the honest packets to arrive", func() bool {
		return at.count(func(s seen) bool { return s.src == ip(t, n1.Pods[0].Address) && s.proto == 17 }) >= 10
	})
	if n := at.count(func(s seen) bool { return s.src == ip(t, n1.Pods[1].Address) && s.proto == 17 }); n != 0 {
		t.Errorf("%d spoofed packets arrived", n)
	}
	until(t, "the refusals to be counted", func() bool { return dropped(t, n1, "spoofed") >= before+10 })
}

// dropped returns how many packets a node has dropped for a reason, whoever it was.
func dropped(t *testing.T, n labNode, reason string) (packets uint64) {
	t.Helper()
	for _, d := range drops(t, "--node", n.Name).Drops {
		if d.Reason == reason {
			packets += d.Packets
		}
	}
	return packets
}

// TestMasquerade: a pod that leaves the cluster does so by its node's address.
func TestMasquerade(t *testing.T) {
	n1 := node(t, 1)
	gateway := netip.MustParsePrefix(ip(t, n1.Address).String() + "/24").Masked().Addr().As4()
	gateway[3] = 254
	world := netip.AddrFrom4(gateway)
	tap := onWire(t, 1)
	if !reached(n1.Pods[0].Netns, world) {
		t.Fatalf("a pod does not reach %s outside the cluster", world)
	}
	left := 0
	for _, s := range tap.all() {
		if s.proto != 1 || s.dst != world {
			continue
		}
		left++
		if s.src != ip(t, n1.Address) {
			t.Errorf("left with source %s, expected the node's %s", s.src, n1.Address)
		}
	}
	if left == 0 {
		t.Error("none of the pod's packets was seen on the wire")
	}
}
