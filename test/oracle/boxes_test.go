package oracle

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/test/node"
	"margay/test/space"
	"margay/vrouter"
	"margay/vrouter/port"
)

// The world of both routers: pods behind in0, the other node's pods behind out0 or the tunnel.
const (
	podsPrefix   = "10.245.0.0/16"
	remotePrefix = "10.244.2.0/24"
	holePrefix   = "10.244.5.0/24"
	poolPrefix   = "10.244.0.0/16"
	routerIn     = "10.244.1.1"
	routerOut    = "10.244.1.2"
	wayMTU       = 1480 // of the way to the other node's pods
	// queueLength holds the fragments of the longest packet.
	queueLength = 4096
)

var (
	nodeAddress = netip.MustParseAddr("198.18.0.1")
	peerAddress = netip.MustParseAddr("198.18.0.2")
)

// direction is the way of an input: from a pod of this node, or to one.
type direction int

const (
	outward direction = iota
	inward
)

// result is what a router does with one packet.
type result struct {
	out  [][]byte // toward the other node's pods, without the outer header
	back [][]byte // toward this node's pods
}

// kernelBox is the oracle. A TUN device's packets are routed before the write returns, so what comes of one is there
// to be read then.
type kernelBox struct {
	*space.Space
	in, out *tun
}

// newKernelBox makes one; podMTU is that of the pods' side.
func newKernelBox(t testing.TB, podMTU int) *kernelBox {
	t.Helper()
	k := &kernelBox{Space: space.New(t)}
	k.Do(t, func() (err error) {
		if err := space.BeRouter(); err != nil {
			return err
		}
		if k.in, err = openTUN("in0", podMTU, queueLength); err != nil {
			return err
		}
		if k.out, err = openTUN("out0", wayMTU, queueLength); err != nil {
			return err
		}
		return errors.Join(space.Address("in0", routerIn+"/32"), space.Address("out0", routerOut+"/32"),
			space.Route(podsPrefix, "in0"), space.Route(remotePrefix, "out0"), space.Route(holePrefix, ""))
	})
	t.Cleanup(func() { k.in.close(t); k.out.close(t) })
	return k
}

// route hands over one packet and returns all that comes of it.
func (k *kernelBox) route(t testing.TB, d direction, b []byte) result {
	t.Helper()
	if d == inward {
		k.out.write(t, b)
	} else {
		k.in.write(t, b)
	}
	return result{out: k.out.read(t), back: k.in.read(t)}
}

// nodeBox is a node with a vRouter, and another node beside it that only looks on.
type nodeBox struct {
	*node.Node
	in       *tun
	peer     *tap
	peerMAC  net.HardwareAddr
	nodeMAC  net.HardwareAddr
	sender   *rawSocket // for markers: what comes by in0 has its queue, whatever the flow
	injected uint64     // what the other node has sent
	markers
	lane [2][]lane // by direction
}

// newNodeBox starts the vRouter with a driver in a namespace. Its pods are behind the TUN device in0.
func newNodeBox(t testing.TB, driver port.Options, options vrouter.Options) *nodeBox {
	t.Helper()
	n := &nodeBox{}
	n.open(t, node.Config{Driver: driver, Options: options, Update: update(), CPUs: onOneCPU(t), Routes: func() (err error) {
		if n.in, err = openTUN("in0", wideWorld.mtu, queueLength); err != nil {
			return err
		}
		return errors.Join(space.Address("in0", routerIn+"/32"), space.Address("vr0", routerOut+"/32"),
			space.Route(podsPrefix, "in0"), space.Route(poolPrefix, "vr0"))
	}})
	n.Do(t, func() (err error) {
		n.sender, err = openRaw()
		return err
	})
	t.Cleanup(func() { n.in.close(t); n.sender.close(t) })
	n.lane[outward] = n.lanes(t, n.Queues(), func(l lane) { n.flushOutward(t, l) })
	n.lane[inward] = n.lanes(t, n.arrivalQueues(), func(l lane) { n.flushInward(t, l) })
	return n
}

// arrivalQueues is how many workers take packets out of the tunnel. To AF_XDP the underlay brings them by one queue, the only one
// that it has.
func (n *nodeBox) arrivalQueues() int {
	if n.Ports.IO == port.IOXDP {
		return 1
	}
	return n.Queues()
}

// onOneCPU keeps the caller's thread on one CPU, and returns it, for the workers. Packets that the kernel queues on different
// CPUs may overtake each other.
func onOneCPU(t testing.TB) []int {
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
	return []int{cpu}
}

// open makes both nodes.
func (n *nodeBox) open(t testing.TB, c node.Config) {
	t.Helper()
	here, there := space.New(t), space.New(t)
	here.Do(t, space.BeRouter)
	// The other node has no address: its kernel answers nothing.
	node.Cable(t, here, there, "eth0", "eth0", 1500, nodeAddress.String()+"/24", "")
	there.Do(t, func() (err error) {
		if n.peerMAC, err = macOf("eth0"); err != nil {
			return err
		}
		n.peer, err = openTap("eth0")
		return err
	})
	here.Do(t, func() (err error) {
		if n.nodeMAC, err = macOf("eth0"); err != nil {
			return err
		}
		return space.Neighbour("eth0", peerAddress, n.peerMAC)
	})
	n.Node = node.Start(t, here, c)
	n.Watch(there)
}

func macOf(link string) (net.HardwareAddr, error) {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return nil, err
	}
	return l.Attrs().HardwareAddr, nil
}

// update is what an agent would tell.
func update() vrouter.Update {
	pfx := netip.MustParsePrefix
	return vrouter.Update{
		Config:   &vrouter.Config{NodeAddress: nodeAddress, Underlay: "eth0", MTU: wayMTU, TunnelAddress: netip.MustParseAddr(routerIn)},
		AddNodes: []netip.Addr{peerAddress},
		Set: []vrouter.Route{
			{Prefix: pfx(podsPrefix), NextHop: vrouter.NextHop{Kind: vrouter.KindLocal}},
			{Prefix: pfx("10.244.1.0/26"), NextHop: vrouter.NextHop{Kind: vrouter.KindLocal}},
			{Prefix: pfx(remotePrefix), NextHop: vrouter.NextHop{Kind: vrouter.KindTunnel, Gateway: peerAddress}},
			{Prefix: pfx(holePrefix)},
		},
	}
}

// route sends a packet and behind it a marker by each worker, which goes through the whole node: what came before the last of
// them is what has come of the packet. An inward packet may come out at either end, so it has markers each way.
func (n *nodeBox) route(t testing.TB, d direction, b []byte) result {
	t.Helper()
	var r result
	if d == inward {
		n.fromPeer(t, tunnel(b))
		r.back = n.flushInward(t, n.lane[inward]...)
	} else {
		n.in.write(t, b)
	}
	r.out = n.flushOutward(t, n.lane[outward]...)
	r.back = append(r.back, n.in.read(t)...)
	return r
}

// fromPeer sends a packet from the other node.
func (n *nodeBox) fromPeer(t testing.TB, outer []byte) {
	t.Helper()
	n.peer.send(t, n.peerMAC, n.nodeMAC, outer)
	n.injected++
}

// The ways of markers.
const (
	wayOut = iota
	wayIn
)

// flushOutward sends markers, and returns what comes to the other node besides until they do.
func (n *nodeBox) flushOutward(t testing.TB, lanes ...lane) [][]byte {
	t.Helper()
	marks := awaited{}
	for _, l := range lanes {
		n.sender.send(t, n.mark(marks, podHost, l, 64, wayOut, 0, nil))
	}
	return n.atPeer(t, marks)
}

// flushInward sends markers, and returns what comes to the pods besides until they do.
func (n *nodeBox) flushInward(t testing.TB, lanes ...lane) [][]byte {
	t.Helper()
	marks := awaited{}
	for _, l := range lanes {
		n.fromPeer(t, tunnel(n.mark(marks, l, podHost, 64, wayIn, 0, nil)))
	}
	var came [][]byte
	out := marks.until(t, "toward the pods", func() []byte {
		if len(came) == 0 {
			came = n.in.wait(t)
		}
		b := came[0]
		came = came[1:]
		return b
	})
	return append(out, came...)
}

// atPeer returns what comes to the other node through the tunnel besides markers, until the last one that is awaited.
func (n *nodeBox) atPeer(t testing.TB, marks awaited) [][]byte {
	t.Helper()
	return marks.until(t, "at the other node", func() []byte {
		for {
			if inner, ok := untunnel(t, n.peer.next(t)); ok {
				return inner
			}
		}
	})
}

// tunnel is what the other node sends: b in IP-in-IP, by RFC 2003 section 3.1.
func tunnel(b []byte) []byte {
	tos, fragment := byte(0), uint16(0)
	if len(b) >= 20 {
		tos, fragment = b[1], binary.BigEndian.Uint16(b[6:])&0x4000
	}
	return build(spec{src: peerAddress, dst: nodeAddress, ttl: 64, protocol: 4, payload: b, tos: tos, fragment: fragment})
}

// untunnel checks the outer header of what the node sent to the other, and takes it off.
func untunnel(t testing.TB, b []byte) ([]byte, bool) {
	t.Helper()
	if len(b) < 40 || b[9] != 4 {
		return nil, false // not the vRouter's
	}
	total := int(binary.BigEndian.Uint16(b[2:]))
	if b[0] != 0x45 || total > len(b) || total > 1500 || sum(b[:20]) != 0xffff || b[8] != 64 {
		t.Fatalf("outer header % x of %d bytes", b[:20], len(b))
	}
	inner := b[20:total]
	if b[1] != inner[1] || binary.BigEndian.Uint16(b[6:]) != binary.BigEndian.Uint16(inner[6:])&0x4000 ||
		netip.AddrFrom4([4]byte(b[12:])) != nodeAddress || netip.AddrFrom4([4]byte(b[16:])) != peerAddress {
		t.Fatalf("outer header % x around % x", b[:20], inner[:20])
	}
	return inner, true
}

// balance checks that the vRouter takes all that the kernel gave to vr0 and the other node sent, and the node's books.
func (n *nodeBox) balance(t testing.TB) {
	t.Helper()
	node.Until(t, "all that the vRouter was given is taken", func() (all bool) {
		n.Do(t, func() error {
			l, err := netlink.LinkByName("vr0")
			if err == nil {
				all = l.Attrs().Statistics.TxPackets+n.injected == n.Books().Taken
			}
			return err
		})
		return all
	})
	if b := n.Balance(t); b.Counters["forwarded_encap"] == 0 {
		t.Errorf("nothing went to the other node: %v", b.Counters)
	}
}
