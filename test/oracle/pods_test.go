package oracle

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"margay/test/node"
	"margay/test/space"
	"margay/vrouter/port"
)

// podBox is a node of the attachment `direct` whose vRouter reads the interfaces of the pods, which have namespaces of their
// own, and are mute. The first of them only receives.
//
// What a pod sends goes by the vRouter or by the kernel, and the test does not know which: so there is a marker behind it on
// each way, to each place where something can come out. That markers do not overtake each other takes one CPU for all.
type podBox struct {
	nodeBox
	pods []*attached
	last int
}

// attached is a pod with an eye on its interface.
type attached struct {
	address netip.Addr
	tap     *tap
	mac     net.HardwareAddr
}

const attachedPods = 12

// onlyCPU is the one that everything runs on, for node.Config.CPU.
const onlyCPU = 1

func newPodBox(t testing.TB, driver port.Options, mtu int) *podBox {
	t.Helper()
	if err := port.PinThread([]int{onlyCPU - 1}, 0); err != nil {
		t.Fatal(err)
	}
	n := &podBox{}
	n.open(t, node.Config{Driver: driver, Options: nodeOptions(), Update: update(), CPU: onlyCPU, Routes: func() error {
		if err := space.Address("lo", routerIn+"/32"); err != nil {
			return err
		}
		if err := space.Address("vr0", routerOut+"/32"); err != nil {
			return err
		}
		return space.Route(poolPrefix, "vr0")
	}})
	for i := range attachedPods {
		p := &attached{address: netip.AddrFrom4([4]byte{10, 245, 0, byte(1 + i)})}
		s := n.AddPod(t, node.Pod{Address: p.address, MTU: mtu, Source: addr(routerIn), Mute: true})
		s.Do(t, func() (err error) {
			if p.mac, err = macOf("eth0"); err != nil {
				return err
			}
			p.tap, err = openTap("eth0")
			return err
		})
		n.pods = append(n.pods, p)
	}
	return n
}

// nextPod returns the sender's turn.
func (n *podBox) nextPod() netip.Addr {
	n.last = n.last%(len(n.pods)-1) + 1
	return n.pods[n.last].address
}

// route sends a packet, and markers behind it.
func (n *podBox) route(t testing.TB, in input) result {
	t.Helper()
	pod, neighbour := n.pods[in.pod.As4()[3]-1], n.pods[0]
	// What comes out where, and how many markers there.
	var r result
	if in.direction == inward {
		n.fromPeer(t, in.bytes)
		n.fromPeer(t, n.mark(remoteHost, pod.address, 64, quick)) // the vRouter's way
		n.fromPeer(t, n.mark(remoteHost, pod.address, 64, slow))  // the kernel's
		n.fromPeer(t, n.mark(remoteHost, pod.address, 1, slow))   // the kernel's errors
		r.out, r.back = n.atPeer(t, 1), untilMarks(t, pod.tap, 2)
		return r
	}
	send := func(b []byte) { pod.tap.send(t, pod.mac, node.PodMAC, b) }
	send(in.bytes)
	for _, way := range []way{quick, slow} {
		send(n.mark(pod.address, remoteHost, 64, way))
		send(n.mark(pod.address, remoteHost, 1, way)) // errors
		send(n.mark(pod.address, neighbour.address, 64, way))
	}
	send(n.mark(pod.address, neighbour.address, 64, handed))
	send(n.mark(pod.address, neighbour.address, 1, handed))
	r.out, r.back = n.atPeer(t, 2), untilMarks(t, pod.tap, 3)
	r.back = append(r.back, untilMarks(t, neighbour.tap, 3)...)
	return r
}

// way is whose a marker is.
type way int

const (
	quick  way = iota // the vRouter's
	slow              // the kernel's, from the pod's interface on
	handed            // the vRouter hands it to the kernel
)

func (n *podBox) fromPeer(t testing.TB, b []byte) {
	t.Helper()
	n.peer.send(t, n.peerMAC, n.nodeMAC, tunnel(b))
}

// atPeer returns what comes to the other node, as far as so many markers.
func (n *podBox) atPeer(t testing.TB, marks int) (out [][]byte) {
	t.Helper()
	for marks > 0 {
		inner, ok := untunnel(t, n.peer.next(t))
		switch {
		case !ok:
		case isMark(inner):
			marks--
		default:
			out = append(out, inner)
		}
	}
	return out
}

// untilMarks returns what comes by a tap, as far as so many markers.
func untilMarks(t testing.TB, from *tap, marks int) (out [][]byte) {
	t.Helper()
	for marks > 0 {
		if b := from.next(t); isMark(b) {
			marks--
		} else {
			out = append(out, b)
		}
	}
	return out
}

// mark is a packet that everybody lets pass, or with a TTL of 1 answers. Each way has a flow of its own: what the kernel has
// been seen to handle stays the kernel's.
func (n *podBox) mark(src, dst netip.Addr, ttl byte, way way) []byte {
	payload := 4
	if way == handed {
		payload = wayMTU // it does not fit what the vRouter takes for the pods' MTU
	}
	s := spec{src: src, dst: dst, ttl: ttl, protocol: 17, payload: append([]byte{0, markPort, 0, markPort + byte(way), 0, 0, 0, 0}, make([]byte, payload)...)}
	binary.BigEndian.PutUint16(s.payload[4:], uint16(len(s.payload)))
	if way == slow {
		s.options = []byte{1, 1, 1, 1}
	}
	return build(s)
}

// isMark reports whether a packet is a marker, or an error about one.
func isMark(b []byte) bool {
	if isError(b) {
		b = b[int(b[0]&15)*4+8:]
	}
	hl := int(b[0]&15) * 4
	return len(b) >= hl+8 && b[9] == 17 && binary.BigEndian.Uint32(b[hl:])&^3 == markPort<<16|markPort&^3
}

// onDirect runs a test on each driver that reads pods' interfaces. AF_XDP carries no frame of 9,000 bytes.
func onDirect(t *testing.T, f func(t *testing.T, oracle *kernelBox, box *podBox, w world)) {
	for _, d := range node.Drivers {
		if d.Attach != port.AttachDirect {
			continue
		}
		t.Run(d.IO, func(t *testing.T) {
			mtu := 9000
			if d.IO == port.IOXDP {
				mtu = 3000
			}
			oracle, box := newKernelBox(t, mtu), newPodBox(t, d, mtu)
			f(t, oracle, box, world{nextPod: box.nextPod, neighbour: box.pods[0].address, mtu: mtu})
			if c := box.Counters(); c["forwarded_local"] == 0 || c["forwarded_encap"] == 0 || c["forwarded_decap"] == 0 || c["forwarded_host"] == 0 {
				t.Errorf("some way was not gone: %v", c)
			}
			box.Balance(t)
		})
	}
}

// TestPodsTable is TestTable where pods have interfaces of their own, which the vRouter reads.
func TestPodsTable(t *testing.T) {
	onDirect(t, func(t *testing.T, oracle *kernelBox, box *podBox, w world) {
		for _, c := range table() {
			// A pod with another's address is refused, as no kernel is asked to; the node has no other pods.
			if strings.HasPrefix(c.name, "source ") || c.name == "destination 10.245.64.255" || len(c.bytes) > w.mtu {
				continue
			}
			at := 12
			if c.direction == inward {
				at = 16
			}
			c.pod = w.nextPod()
			readdress(c.bytes, at, c.pod)
			if d := difference(oracle.route(t, c.direction, c.bytes), box.route(t, c.input)); d != "" {
				t.Errorf("%s: % x\n%s", c.name, head(c.bytes), d)
			}
		}
	})
}

// readdress changes an address; a header checksum that was right is right afterwards, and a wrong one wrong (RFC 1624).
func readdress(b []byte, at int, to netip.Addr) {
	check := uint32(^binary.BigEndian.Uint16(b[10:]))
	for i, half := range []uint16{binary.BigEndian.Uint16(to.AsSlice()), binary.BigEndian.Uint16(to.AsSlice()[2:])} {
		field := b[at+2*i:]
		check += uint32(^binary.BigEndian.Uint16(field)) + uint32(half)
		binary.BigEndian.PutUint16(field, half)
	}
	for check > 0xffff {
		check = check>>16 + check&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(check))
}

// TestPodsRandom is TestRandom in the same way.
func TestPodsRandom(t *testing.T) {
	onDirect(t, func(t *testing.T, oracle *kernelBox, box *podBox, w world) {
		sent, routed, answered := 0, 0, 0
		rapid.Check(t, func(r *rapid.T) {
			for i := range batch {
				in := w.draw(r)
				want := oracle.route(t, in.direction, in.bytes)
				if d := difference(want, box.route(t, in)); d != "" {
					r.Fatalf("packet %d: % x\n%s", i, head(in.bytes), d)
				}
				sent++
				routed += len(want.out)
				answered += len(want.back)
			}
		})
		t.Logf("%d packets, of which came %d toward the other node and %d toward pods", sent, routed, answered)
		if sent < 10_000 || routed < sent/5 || answered < sent/10 {
			t.Errorf("%d packets, %d and %d came of them: expected more", sent, routed, answered)
		}
	})
}
