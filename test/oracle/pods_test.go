package oracle

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"margay/test/node"
	"margay/test/space"
	"margay/vrouter"
	"margay/vrouter/port"
)

// podBox is a node whose pods have namespaces and interfaces of their own, and are mute. The first of them only receives.
//
// In `direct`, what a pod sends goes by the vRouter or by the kernel, and the test does not know which: so there is a marker
// behind it on each way, to each place where something can come out. That none overtakes another takes one CPU for all. With
// IOTC there is a third way, which needs no marker: what programs forward is out before the kernel looks at the next packet.
type podBox struct {
	nodeBox
	pods []*attached
	turn int
}

// attached is a pod with an eye on its interface.
type attached struct {
	address netip.Addr
	tap     *tap
	mac     net.HardwareAddr
}

const attachedPods = 12

func newPodBox(t testing.TB, driver port.Options, options vrouter.Options, mtu int) *podBox {
	t.Helper()
	var may unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		t.Fatal(err)
	}
	cpu := 0
	for !may.IsSet(cpu) {
		cpu++
	}
	if err := port.WorkerThread([]int{cpu}, 0); err != nil {
		t.Fatal(err)
	}
	n := &podBox{}
	n.open(t, node.Config{Driver: driver, Options: options, Update: update(), CPUs: []int{cpu}, Routes: func() error {
		return errors.Join(space.Address("lo", routerIn+"/32"), space.Address("vr0", routerOut+"/32"), space.Route(poolPrefix, "vr0"))
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
	n.turn = n.turn%(len(n.pods)-1) + 1
	return n.pods[n.turn].address
}

// route sends a packet, and markers behind it.
func (n *podBox) route(t testing.TB, in input) result {
	t.Helper()
	if in.direction == inward {
		return n.arrive(t, tunnel(in.bytes), in.pod)
	}
	pod, neighbour := n.of(in.pod), n.pods[0]
	atPeer, atPod, atNeighbour := awaited{}, awaited{}, awaited{}
	send := func(b []byte) { pod.tap.send(t, pod.mac, node.PodMAC, b) }
	send(in.bytes)
	for _, way := range []way{quick, slow, handed} {
		send(n.mark(atPeer, pod.address, markHost, 64, way))
		// An error about what comes from a pod goes back to it.
		send(n.mark(atPod, pod.address, neighbour.address, 1, way))
		send(n.mark(atNeighbour, pod.address, neighbour.address, 64, way))
	}
	r := result{out: n.atPeer(t, atPeer), back: pod.until(t, atPod)}
	r.back = append(r.back, neighbour.until(t, atNeighbour)...)
	return r
}

// arrive is route for what comes on the underlay, and is or would be for a pod. nil: nothing but the markers.
func (n *podBox) arrive(t testing.TB, outer []byte, to netip.Addr) result {
	t.Helper()
	pod := n.of(to)
	atPeer, atPod := awaited{}, awaited{}
	for _, b := range [][]byte{
		outer,
		tunnel(n.mark(atPod, markHost, pod.address, 64, quick)),
		tunnel(n.mark(atPod, markHost, pod.address, 64, slow)),
		tunnel(n.mark(atPeer, markHost, pod.address, 1, slow)), // the kernel's errors
	} {
		if b != nil {
			n.peer.send(t, n.peerMAC, n.nodeMAC, b)
		}
	}
	return result{out: n.atPeer(t, atPeer), back: pod.until(t, atPod)}
}

// of returns the pod that has an address.
func (n *podBox) of(address netip.Addr) *attached { return n.pods[address.As4()[3]-1] }

// until returns what comes to the pod besides markers, until the last one that is awaited.
func (p *attached) until(t testing.TB, marks awaited) [][]byte {
	t.Helper()
	return marks.until(t, "at pod "+p.address.String(), func() []byte { return p.tap.next(t) })
}

// way is whose a marker is.
type way int

const (
	quick  way = iota // the vRouter's workers'
	slow              // the kernel's, from the pod's interface on
	handed            // the vRouter hands it to the kernel
)

// mark is a marker that goes one of the ways, and is awaited at a place. Each way has a flow of its own: what the kernel has
// been seen to handle stays the kernel's.
func (n *podBox) mark(at awaited, src, dst netip.Addr, ttl byte, way way) []byte {
	switch {
	case way == quick:
		return append(n.udp(at, src, dst, ttl, uint16(way), 4, nil), 0) // programs leave what is padded to a worker
	case way == slow:
		return n.udp(at, src, dst, ttl, uint16(way), 4, []byte{1, 1, 1, 1})
	case dst == markHost:
		// An ICMP message without a byte is the kernel's, and who looks at padding takes that for one.
		return append(n.icmp(at, src, dst), 0)
	}
	// It does not fit what the vRouter takes for the pods' MTU.
	return n.udp(at, src, dst, ttl, uint16(way), wayMTU, nil)
}

// onDirect runs a test on each driver that reads pods' interfaces.
func onDirect(t *testing.T, f func(t *testing.T, oracle *kernelBox, box *podBox, w world)) {
	for _, d := range node.Drivers {
		if d.Attach != port.AttachDirect {
			continue
		}
		t.Run(d.IO, func(t *testing.T) {
			mtu := mtuFor(d)
			oracle, box := newKernelBox(t, mtu), newPodBox(t, d, nodeOptions(), mtu)
			f(t, oracle, box, world{nextPod: box.nextPod, neighbour: box.pods[0].address, mtu: mtu})
			if c := box.Counters(); c["forwarded_local"] == 0 || c["forwarded_encap"] == 0 || c["forwarded_decap"] == 0 || c["forwarded_host"] == 0 {
				t.Errorf("some way was not gone: %v", c)
			}
			if carried := box.Carried(); (carried > 0) != (d.IO == port.IOTC) {
				t.Errorf("the kernel has carried %d packets", carried)
			}
			if lost := box.Balance(t); lost > 0 {
				t.Errorf("the kernel has lost %d packets around the vRouter: %v", lost, box.Counters())
			}
		})
	}
}

// mtuFor is an MTU for pods: as much as the driver reads. AF_XDP carries no frame of 9,000 bytes.
func mtuFor(d port.Options) int {
	if d.Attach == port.AttachDirect && d.IO == port.IOXDP {
		return 3000
	}
	return 9000
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
		random(t, w, oracle, func(in input) result { return box.route(t, in) })
	})
}
