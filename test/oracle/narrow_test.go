package oracle

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"margay/test/node"
	"margay/test/space"
	"margay/vrouter/port"
)

// TestNarrowPod: a pod's interface is narrower than the pods' MTU, becomes narrower still, and wide, with packets from pods and
// from the other node by single bytes about every boundary. What does not fit is split, or its sender is told (RFC 1191, 4).
func TestNarrowPod(t *testing.T) {
	node.OnEach(t, directOf(node.Drivers), func(t *testing.T, d port.Options) {
		n := newNarrow(t, d, 1300)
		n.boundaries(t)
		n.become(t, 900)
		n.boundaries(t)
		n.become(t, mtuFor(d))
		n.boundaries(t)
		n.Balance(t)
	})
}

// narrow is a podBox and its oracle with one more pod, which only receives.
type narrow struct {
	*podBox
	oracle   *kernelBox
	atOracle *tun
	pod      *space.Space
	receiver *tap
	mtu      int // of the pod's interface
	id       uint16
}

var narrowPod = netip.MustParseAddr("10.245.0.200")

// The names of the narrow interface: the oracle's, and the host's side, which comes after the other pods'.
const (
	narrowAtOracle = "in1"
	narrowAtHost   = "cali13"
)

func newNarrow(t testing.TB, d port.Options, mtu int) *narrow {
	t.Helper()
	wide := mtuFor(d)
	n := &narrow{podBox: newPodBox(t, d, nodeOptions(), wide), oracle: newKernelBox(t, wide), mtu: mtu}
	n.oracle.Do(t, func() (err error) {
		if n.atOracle, err = openTUN(narrowAtOracle, mtu, queueLength); err != nil {
			return err
		}
		return space.Route(narrowPod.String()+"/32", narrowAtOracle)
	})
	t.Cleanup(func() { n.atOracle.close(t) })
	n.pod = n.AddPod(t, node.Pod{Address: narrowPod, MTU: mtu, Source: addr(routerIn), Mute: true})
	n.pod.Do(t, func() (err error) {
		n.receiver, err = openTap("eth0")
		return err
	})
	return n
}

// come is what comes of one packet.
type come struct {
	result
	narrow [][]byte // to the narrow pod
}

func (c come) count() int { return len(c.out) + len(c.back) + len(c.narrow) }

// boundaries compares both routers about the interface's MTU, what a veth carries beyond it, the pods' MTU, and two and three
// fragments.
func (n *narrow) boundaries(t *testing.T) {
	t.Helper()
	piece := (n.mtu - 20) &^ 7
	for _, about := range []int{n.mtu, n.mtu + 4, wayMTU, piece + n.mtu, 2*piece + n.mtu} {
		for length := about - 3; length <= about+3; length++ {
			for _, fragment := range []uint16{0, 0x4000} {
				if length <= mtuFor(port.Options{Attach: port.AttachDirect, IO: n.Ports.IO}) {
					n.compare(t, outward, n.packet(n.nextPod(), length, fragment))
				}
				if length <= wayMTU {
					n.compare(t, inward, n.packet(remoteHost, length, fragment))
				}
			}
		}
	}
}

// packet makes one to the narrow pod.
func (n *narrow) packet(from netip.Addr, length int, fragment uint16) []byte {
	n.id++
	return build(spec{src: from, dst: narrowPod, ttl: 64, protocol: 17, id: n.id, fragment: fragment, payload: payloadOf(length - 20)})
}

// compare gives both routers a packet. What is too much shows with the next one.
func (n *narrow) compare(t *testing.T, d direction, b []byte) {
	t.Helper()
	want := come{result: n.oracle.route(t, d, b)}
	want.narrow = n.atOracle.read(t)
	got := n.send(t, d, b, func(c come) bool { return c.count() >= want.count() })
	text := difference(want.result, got.result)
	var more strings.Builder
	compare(&more, "toward the narrow pod", want.narrow, got.narrow)
	if text += more.String(); text != "" || want.count() == 0 {
		t.Fatalf("MTU %d, %d bytes: % x\n%s", n.mtu, len(b), head(b), text)
	}
}

// send gives the vRouter a packet, and returns what has come of it as soon as that is enough.
func (n *narrow) send(t *testing.T, d direction, b []byte, enough func(come) bool) (c come) {
	t.Helper()
	sender := n.pods[0]
	if d == inward {
		n.fromPeer(t, tunnel(b))
	} else {
		sender = n.of(netip.AddrFrom4([4]byte(b[12:])))
		sender.send(t, b)
	}
	for deadline := time.Now().Add(node.Patience); !enough(c) && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		for b := n.peer.read(t); b != nil; b = n.peer.read(t) {
			if inner, ok := untunnel(t, b); ok {
				c.out = append(c.out, inner)
			}
		}
		for b := sender.tap.read(t); b != nil; b = sender.tap.read(t) {
			c.back = append(c.back, b)
		}
		for b := n.receiver.read(t); b != nil; b = n.receiver.read(t) {
			c.narrow = append(c.narrow, b)
		}
	}
	return c
}

// become changes the interface's MTU, and waits until the vRouter goes by it.
func (n *narrow) become(t *testing.T, mtu int) {
	t.Helper()
	setMTU := func(s *space.Space, name string) {
		s.Do(t, func() error {
			l, err := netlink.LinkByName(name)
			return errors.Join(err, netlink.LinkSetMTU(l, mtu))
		})
	}
	setMTU(n.oracle.Space, narrowAtOracle)
	wider, length := mtu > n.mtu, n.mtu
	if wider {
		setMTU(n.pod, "eth0") // the side that receives: what is longer it would lose
		length = n.mtu + 100
	}
	n.mtu = mtu
	setMTU(n.Space, narrowAtHost)
	from := n.nextPod()
	node.Until(t, "the vRouter goes by the interface's MTU", func() bool {
		before := n.Counters()
		fails := func() bool { return n.Counters()["drop_send_emsgsize"] > before["drop_send_emsgsize"] }
		c := n.send(t, outward, n.packet(from, length, 0x4000), func(c come) bool { return c.count() > 0 || fails() })
		if wider {
			return n.Counters()["forwarded_local"] > before["forwarded_local"]
		}
		return len(c.back) == 1 && int(binary.BigEndian.Uint16(c.back[0][26:])) == mtu
	})
	if !wider {
		setMTU(n.pod, "eth0")
	}
}
