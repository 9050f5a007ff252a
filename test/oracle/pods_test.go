package oracle

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

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

// attached is a pod with an eye on its interface, and the lanes of markers from it and to it.
type attached struct {
	address netip.Addr
	tap     *tap
	mac     net.HardwareAddr
	// By the kernel to vr0; out of the tunnel to the pod's interface; and out of the tunnel to the kernel.
	toVr0, arriving, arrivingByKernel []lane
}

const attachedPods = 12

func newPodBox(t testing.TB, driver port.Options, options vrouter.Options, mtu int) *podBox {
	t.Helper()
	n := &podBox{}
	n.open(t, node.Config{Driver: driver, Options: options, Update: update(), CPUs: onOneCPU(t), Routes: func() error {
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
	for _, p := range n.pods {
		n.findLanes(t, p)
	}
	pod := n.pods[1].address
	plain := func(src, dst netip.Addr) []byte {
		return build(spec{src: src, dst: dst, ttl: 64, protocol: 17, payload: payloadOf(40)})
	}
	n.UntilCarried(t, func() {
		n.route(t, input{outward, plain(pod, remoteHost), pod})
		n.route(t, input{inward, plain(remoteHost, pod), pod})
	})
	return n
}

// The ways of markers.
const (
	wayQuick            = iota // to a worker
	waySlow                    // to the kernel, by the pod's interface
	wayHanded                  // to the kernel, by a worker
	wayVr0                     // to the kernel, and by vr0 to a worker
	wayArriving                // out of the tunnel, by a worker
	wayArrivingByKernel        // out of the tunnel, by a worker and the kernel
)

// findLanes finds the lanes of a pod's markers.
func (n *podBox) findLanes(t testing.TB, p *attached) {
	t.Helper()
	p.toVr0 = n.lanes(t, n.Queues(), func(l lane) { n.flushVr0(t, p, l) })
	p.arriving = n.lanes(t, n.arrivalQueues(), func(l lane) { n.flushArriving(t, p, []lane{l}, nil) })
	p.arrivingByKernel = n.lanes(t, n.arrivalQueues(), func(l lane) { n.flushArriving(t, p, nil, []lane{l}) })
}

// nextPod returns the sender's turn.
func (n *podBox) nextPod() netip.Addr {
	n.turn = n.turn%(len(n.pods)-1) + 1
	return n.pods[n.turn].address
}

// route sends a packet, and markers behind it.
func (n *podBox) route(t testing.TB, in input) result {
	t.Helper()
	pod, neighbour := n.of(in.pod), n.pods[0]
	if in.direction == inward {
		return n.arrive(t, tunnel(in.bytes), pod)
	}
	atPeer, atPod, atNeighbour := awaited{}, awaited{}, awaited{}
	pod.send(t, in.bytes)
	pod.send(t, n.quickly(atPeer, pod.address, remoteHost, 64, wayQuick))
	for _, to := range []struct {
		at  awaited
		ttl byte
	}{{atPod, 1}, {atNeighbour, 64}} { // an error about what comes from a pod goes back to it
		pod.send(t, n.quickly(to.at, pod.address, neighbour.address, to.ttl, wayQuick))
		pod.send(t, n.slowly(to.at, pod.address, neighbour.address, to.ttl, waySlow))
		// It does not fit what the vRouter takes for the pods' MTU.
		pod.send(t, n.mark(to.at, pod.address, neighbour.address, to.ttl, wayHanded, wayMTU, nil))
	}
	r := result{out: n.atPeer(t, atPeer), back: pod.until(t, atPod)}
	r.back = append(r.back, neighbour.until(t, atNeighbour)...)
	return n.afterKernel(t, pod, r)
}

// arrive is route for what comes on the underlay, and is or would be for a pod. nil: nothing but the markers.
func (n *podBox) arrive(t testing.TB, outer []byte, pod *attached) result {
	t.Helper()
	if outer != nil {
		n.fromPeer(t, outer)
	}
	return n.afterKernel(t, pod, result{back: n.flushArriving(t, pod, pod.arriving, pod.arrivingByKernel)})
}

// afterKernel adds to what has come of a packet what comes by vr0: the kernel has had it for the last time, so all of it is
// in vr0's queues, if not farther.
func (n *podBox) afterKernel(t testing.TB, pod *attached, r result) result {
	t.Helper()
	r.out = append(r.out, n.flushVr0(t, pod, pod.toVr0...)...)
	for b := pod.tap.read(t); b != nil; b = pod.tap.read(t) { // errors about it
		r.back = append(r.back, b)
	}
	return r
}

// flushVr0 sends markers from a pod by the kernel and vr0, and returns what comes to the other node besides until they do.
func (n *podBox) flushVr0(t testing.TB, pod *attached, lanes ...lane) [][]byte {
	t.Helper()
	marks := awaited{}
	for _, l := range lanes {
		pod.send(t, n.slowly(marks, pod.address, l, 64, wayVr0))
	}
	return n.atPeer(t, marks)
}

// flushArriving sends markers from the other node to a pod, by a worker and by the kernel behind it, and returns what comes to
// the pod besides until they do.
func (n *podBox) flushArriving(t testing.TB, pod *attached, byWorker, byKernel []lane) [][]byte {
	t.Helper()
	marks := awaited{}
	for _, l := range byWorker {
		n.fromPeer(t, tunnel(n.quickly(marks, l, pod.address, 64, wayArriving)))
	}
	for _, l := range byKernel {
		n.fromPeer(t, tunnel(n.slowly(marks, l, pod.address, 64, wayArrivingByKernel)))
	}
	return pod.until(t, marks)
}

// quickly is a marker that a worker forwards: programs leave what is padded to it.
func (n *podBox) quickly(at awaited, src, dst netip.Addr, ttl byte, way uint16) []byte {
	return append(n.mark(at, src, dst, ttl, way, 4, nil), 0)
}

// slowly is a marker that the kernel forwards: it has options.
func (n *podBox) slowly(at awaited, src, dst netip.Addr, ttl byte, way uint16) []byte {
	return n.mark(at, src, dst, ttl, way, 4, []byte{1, 1, 1, 1})
}

// of returns the pod that has an address.
func (n *podBox) of(address netip.Addr) *attached { return n.pods[address.As4()[3]-1] }

// send sends a packet from the pod.
func (p *attached) send(t testing.TB, b []byte) {
	t.Helper()
	p.tap.send(t, p.mac, node.PodMAC, b)
}

// until returns what comes to the pod besides markers, until the last one that is awaited.
func (p *attached) until(t testing.TB, marks awaited) [][]byte {
	t.Helper()
	return marks.until(t, "at pod "+p.address.String(), func() []byte { return p.tap.next(t) })
}

// onDirect runs a test on those of drivers that read pods' interfaces.
func onDirect(t *testing.T, drivers []port.Options, f func(t *testing.T, oracle *kernelBox, box *podBox, w world)) {
	node.OnEach(t, directOf(drivers), func(t *testing.T, d port.Options) {
		mtu := mtuFor(d)
		oracle, box := newKernelBox(t, mtu), newPodBox(t, d, nodeOptions(), mtu)
		f(t, oracle, box, world{nextPod: box.nextPod, neighbour: box.pods[0].address, mtu: mtu})
		if c := box.Counters(); c["forwarded_local"] == 0 || c["forwarded_encap"] == 0 || c["forwarded_decap"] == 0 || c["forwarded_host"] == 0 {
			t.Errorf("some way was not gone: %v", c)
		}
		if c := box.Carried(); d.IO == port.IOTC && (c.Encap.Packets < 200 || c.Decap.Packets < 200) {
			t.Errorf("the kernel has carried too few packets: %+v", c)
		}
		box.Balance(t)
	})
}

// directOf returns those of drivers that read pods' interfaces.
func directOf(drivers []port.Options) []port.Options {
	return slices.DeleteFunc(slices.Clone(drivers), func(d port.Options) bool { return d.Attach != port.AttachDirect })
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
	onDirect(t, node.Drivers, func(t *testing.T, oracle *kernelBox, box *podBox, w world) {
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
func TestPodsRandom(t *testing.T) { onDirect(t, node.Drivers, podsRandom) }

// TestPodsRandomQueued is TestPodsRandom with two queues.
func TestPodsRandomQueued(t *testing.T) { onDirect(t, node.Queued(2), podsRandom) }

func podsRandom(t *testing.T, oracle *kernelBox, box *podBox, w world) {
	random(t, w, oracle, func(in input) result { return box.route(t, in) })
}
