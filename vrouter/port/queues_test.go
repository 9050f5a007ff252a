package port_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/port"
)

// queueWays are the ports that can have several queues. flows is how many packets of each flow are on their way at once: a
// veth's ring in front of AF_XDP holds 256.
var queueWays = []struct {
	port.Options
	flows int
}{
	{port.Options{Attach: port.AttachTUNPlain, IO: port.IOPacket}, 8},
	{port.Options{Attach: port.AttachTUN, IO: port.IOPacket}, 8},
	{port.Options{Attach: port.AttachVeth, IO: port.IOPacket}, 8},
	{port.Options{Attach: port.AttachTUN, IO: port.IOXDP}, 2},
	{port.Options{Attach: port.AttachVeth, IO: port.IOXDP}, 2},
}

// newQueueNodes returns two nodes whose ports have so many queues, wired by as many.
func newQueueNodes(t *testing.T, o port.Options) (*node, *node) {
	t.Helper()
	spaces := []*space{newSpace(t), newSpace(t)}
	wire(t, spaces[0], spaces[1], o.Queues)
	var nodes []*node
	for i, s := range spaces {
		n := &node{space: s, address: nodeAddress(i + 1), pod: podAddress(i + 1)}
		n.do(t, func() error { return addAddress("lo", n.pod.String()+"/32") })
		n.open(t, i+1, o)
		nodes = append(nodes, n)
	}
	return nodes[0], nodes[1]
}

// open opens the node's ports, starts a router on them, and configures it.
func (n *node) open(t *testing.T, index int, o port.Options) {
	t.Helper()
	o.Name = "vr0"
	var ports *port.Ports
	n.do(t, func() (err error) {
		ports, err = port.OpenPorts(o, func() error { return nil })
		return err
	})
	n.router, n.device, n.underlay = vrouter.New(), ports.Device, ports.Underlay
	n.router.OnConfig(ports.Configure)
	n.stop = n.run(t, ports, ports.Threads(ports.Workers(n.router))...)
	n.do(t, func() error { return addRoute("vr0", podBlock(3-index).String(), n.pod.String()) })
	n.configure(t, index)
}

// queueShape is a number of queues, and of threads for each.
type queueShape struct{ queues, threads int }

// onQueues runs a test for each way and shape.
func onQueues(t *testing.T, shapes []queueShape, f func(t *testing.T, o port.Options, flows int)) {
	for _, way := range queueWays {
		for _, shape := range shapes {
			t.Run(fmt.Sprintf("%s %s, %d of %d", way.Attach, way.IO, shape.queues, shape.threads), func(t *testing.T) {
				o := way.Options
				o.Queues, o.Threads = shape.queues, shape.threads
				f(t, o, way.flows)
			})
		}
	}
}

// TestQueuesKeepOrder sends 64 flows at once through several queues, there and back: of no flow is a packet lost or
// overtaken by a later one, and no queue stays idle. TCP comes whole, too.
func TestQueuesKeepOrder(t *testing.T) {
	onQueues(t, []queueShape{{1, 1}, {2, 2}, {2, 1}, {4, 2}}, func(t *testing.T, o port.Options, window int) {
		a, b := newQueueNodes(t, o)
		server := newOrderedEcho(t, b)
		first := a.dialUDP(t, server.address())
		eventually(t, "first answer", func() bool { return answered(first, 1) })
		// Until the other node's MAC address is known packets leave by the raw socket, for which the kernel chooses the
		// device's queue anew: a flow that begins then may overtake itself once.
		eventually(t, "neighbours", func() bool {
			for _, way := range []struct{ from, to *node }{{a, b}, {b, a}} {
				if way.from.underlay.Raw() {
					continue
				}
				if resolved, _ := way.from.underlay.Resolved(way.to.address); !resolved {
					return false
				}
			}
			return true
		})
		const flows, rounds = 64, 20
		conns := make([]*net.UDPConn, flows)
		for i := range conns {
			conns[i] = a.dialUDP(t, server.address())
		}
		var wg sync.WaitGroup
		for _, conn := range conns {
			wg.Go(func() {
				if err := inOrder(conn, rounds, window); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		for _, err := range server.close() {
			t.Error(err)
		}
		for range 4 {
			wg.Go(func() { bulk(t, a, b) })
		}
		wg.Wait()
		noDrops(t, a.router, b.router)
		for _, n := range []*node{a, b} {
			named := n.queueNames(t)
			if !named["underlay_receive"] || !named[fmt.Sprintf("underlay_receive%d", o.Queues-1)] && o.Queues > 1 {
				t.Errorf("%v: queues %v", n.address, named)
			}
			batches := n.router.Batches()
			if len(batches) != 2*o.Queues {
				t.Errorf("%d workers, expected %d", len(batches), 2*o.Queues)
			}
			for _, w := range batches {
				if w.Packets == 0 {
					t.Errorf("%v: worker %s had nothing to do", n.address, w.Worker)
				}
			}
		}
	})
}

// queueNames returns the names of the queues that the router tells of, each of which there may be once.
func (n *node) queueNames(t *testing.T) map[string]bool {
	t.Helper()
	named := make(map[string]bool)
	for _, q := range n.router.Queues() {
		if named[q.Name] {
			t.Errorf("%v: two queues are named %s", n.address, q.Name)
		}
		named[q.Name] = true
	}
	return named
}

// inOrder sends rounds of numbered datagrams, and expects them back in order.
func inOrder(conn *net.UDPConn, rounds, window int) error {
	b := make([]byte, 100)
	for round := range rounds {
		for i := range window {
			binary.BigEndian.PutUint32(b, uint32(round*window+i))
			if _, err := conn.Write(b); err != nil {
				return err
			}
		}
		for i := range window {
			if err := conn.SetReadDeadline(time.Now().Add(60 * time.Second)); err != nil {
				return err
			}
			if _, err := conn.Read(b); err != nil {
				return fmt.Errorf("answer %d of flow %v: %w", round*window+i, conn.LocalAddr(), err)
			}
			if got := binary.BigEndian.Uint32(b); got != uint32(round*window+i) {
				return fmt.Errorf("answer %d of flow %v came when %d was expected", got, conn.LocalAddr(), round*window+i)
			}
		}
	}
	return nil
}

// orderedEcho answers datagrams of 100 bytes, and looks whether those of each flow come in order; others it answers.
type orderedEcho struct {
	conn *net.UDPConn
	done chan []error
}

func newOrderedEcho(t *testing.T, n *node) *orderedEcho {
	t.Helper()
	e := &orderedEcho{done: make(chan []error, 1)}
	n.do(t, func() (err error) {
		if e.conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: n.pod.AsSlice()}); err != nil {
			return err
		}
		raw, err := e.conn.SyscallConn()
		if err != nil {
			return err
		}
		var sizeErr error
		return errors.Join(raw.Control(func(fd uintptr) {
			sizeErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
		}), sizeErr)
	})
	go e.run()
	t.Cleanup(func() { e.conn.Close() })
	return e
}

func (e *orderedEcho) address() *net.UDPAddr { return e.conn.LocalAddr().(*net.UDPAddr) }

func (e *orderedEcho) run() {
	var errs []error
	next := make(map[int]uint32)
	b := make([]byte, 65536)
	for {
		n, from, err := e.conn.ReadFromUDP(b)
		if err != nil {
			e.done <- errs
			return
		}
		if n == 100 {
			if got := binary.BigEndian.Uint32(b); got != next[from.Port] {
				errs = append(errs, fmt.Errorf("packet %d of flow %v came when %d was expected", got, from, next[from.Port]))
			}
			next[from.Port] = binary.BigEndian.Uint32(b) + 1
		}
		// What cannot be answered shows as a missing answer.
		_, _ = e.conn.WriteToUDP(b[:n], from)
	}
}

// close ends the echo and returns what came out of order.
func (e *orderedEcho) close() []error {
	e.conn.Close()
	return <-e.done
}

// TestQueueOfFlow: all packets of a flow come by one queue, those of the other direction by the one of the same number where
// the kernel chooses both.
func TestQueueOfFlow(t *testing.T) {
	onQueues(t, []queueShape{{4, 2}}, func(t *testing.T, o port.Options, _ int) {
		a, b := newQueueNodes(t, o)
		server := b.echo(t)
		first := a.dialUDP(t, server)
		eventually(t, "first answer", func() bool { return answered(first, 1) })
		if o.IO == port.IOXDP { // until the neighbours are known the kernel chooses the wire's queue, by a hash of its own
			eventually(t, "neighbours", func() bool {
				toB, _ := a.underlay.Resolved(b.address)
				toA, _ := b.underlay.Resolved(a.address)
				return toB && toA
			})
		}
		used := make(map[int]bool)
		for range 24 {
			conn := a.dialUDP(t, server)
			before := a.router.Batches()
			for range 10 {
				if !answers(conn, 50) {
					t.Fatal("no answer")
				}
			}
			var queues [2][]int // by direction
			for i, w := range a.router.Batches() {
				if w.Packets != before[i].Packets {
					queues[i%2] = append(queues[i%2], i/2)
				}
			}
			if len(queues[0]) != 1 || len(queues[1]) != 1 {
				t.Fatalf("one flow used the queues %v, and %v back", queues[0], queues[1])
			}
			if o.IO == port.IOPacket && queues[0][0] != queues[1][0] {
				t.Errorf("a flow used queue %d, and %d back", queues[0][0], queues[1][0])
			}
			used[queues[0][0]] = true
		}
		if len(used) < 2 {
			t.Errorf("24 flows used the queues %v", used)
		}
	})
}

// TestQueuesChange: a device that was left with another number of queues is taken over, or replaced where the kernel does
// not allow that; and two vRouters never share one.
func TestQueuesChange(t *testing.T) {
	for _, attach := range []string{port.AttachTUNPlain, port.AttachTUN, port.AttachVeth} {
		t.Run(attach, func(t *testing.T) {
			a, b := newQueueNodes(t, port.Options{Attach: attach, IO: port.IOPacket, Queues: 1})
			index := func() (index int) {
				a.do(t, func() error {
					vr0, err := netlink.LinkByName("vr0")
					index = vr0.Attrs().Index
					return err
				})
				return index
			}
			server := b.echo(t)
			last, lastQueues := index(), 1
			for _, queues := range []int{4, 2, 1, 3, 1} {
				a.stop()
				o := port.Options{Attach: attach, IO: port.IOPacket, Queues: queues}
				a.open(t, 1, o)
				now := index()
				if replaced := attach != port.AttachVeth && (queues > 1) != (lastQueues > 1); replaced != (now != last) {
					t.Errorf("from %d to %d queues: device %d, then %d", lastQueues, queues, last, now)
				}
				last, lastQueues = now, queues
				conn := a.dialUDP(t, server)
				eventually(t, fmt.Sprintf("answer with %d queues", queues), func() bool { return answered(conn, 50) })
				for _, other := range []int{1, 2} {
					o.Queues, o.Name = other, "vr0"
					a.do(t, func() error {
						_, err := port.OpenPorts(o, func() error { return nil })
						if missing := port.MissingOf(err); missing == nil || !errors.Is(err, unix.EBUSY) {
							t.Errorf("a second vRouter with %d queues beside one with %d: %v", other, queues, err)
						}
						return nil
					})
				}
				eventually(t, "answer in spite of the second vRouter", func() bool { return answered(conn, 50) })
			}
		})
	}
}

// TestQueuesRecover takes the underlay and vr0 away from ports of several queues.
func TestQueuesRecover(t *testing.T) {
	onQueues(t, []queueShape{{3, 2}, {2, 1}}, func(t *testing.T, o port.Options, _ int) {
		a, b := newQueueNodes(t, o)
		server := newOrderedEcho(t, b)
		conns := make([]*net.UDPConn, 16)
		for i := range conns {
			conns[i] = a.dialUDP(t, server.address())
		}
		all := func(when string) {
			for _, conn := range conns {
				eventually(t, "answers "+when, func() bool { return answered(conn, 50) })
			}
		}
		all("at first")
		b.do(t, func() error { return deleteLink("eth0") })
		wire(t, a.space, b.space, o.Queues)
		all("over the new interface")
		a.do(t, func() error { return deleteLink("vr0") })
		eventually(t, "vr0 is made anew", func() bool {
			var err error
			a.do(t, func() error {
				err = addRoute("vr0", podBlock(2).String(), a.pod.String())
				return nil
			})
			return err == nil
		})
		all("through the new vr0")
		for _, n := range []*node{a, b} {
			before := n.router.Batches()
			eventually(t, "all queues at work", func() bool {
				answered(a.dialUDP(t, server.address()), 50) // a flow more: a few may all miss one queue
				busy := 0
				for i, w := range n.router.Batches() {
					if w.Packets > before[i].Packets {
						busy++
					}
				}
				return busy == len(before)
			})
		}
	})
}
