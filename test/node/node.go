// Package node puts a vRouter of any attachment into a namespace of a test, as cmd/vrouter does into a node's, and pods
// beside it, as the CNI server does.
package node

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"margay/test/space"
	"margay/vrouter"
	"margay/vrouter/port"
)

// Drivers are all attachments with each way to read and write interfaces.
var Drivers = []port.Options{
	{Attach: port.AttachTUNPlain, IO: port.IOPacket, Name: "vr0", Queues: 1},
	{Attach: port.AttachTUN, IO: port.IOPacket, Name: "vr0", Queues: 1},
	{Attach: port.AttachTUN, IO: port.IOXDP, Name: "vr0", Queues: 1},
	{Attach: port.AttachVeth, IO: port.IOPacket, Name: "vr0", Queues: 1},
	{Attach: port.AttachVeth, IO: port.IOXDP, Name: "vr0", Queues: 1},
	{Attach: port.AttachDirect, IO: port.IOPacket, Name: "vr0", Queues: 1},
	{Attach: port.AttachDirect, IO: port.IOXDP, Name: "vr0", Queues: 1},
	{Attach: port.AttachDirect, IO: port.IOTC, Name: "vr0", Queues: 1},
}

// Queued are the drivers with so many queues each, and a worker for each queue.
func Queued(queues int) []port.Options {
	all := slices.Clone(Drivers)
	for i := range all {
		all[i].Queues = queues
	}
	return all
}

// OnEach runs a test on each of drivers.
func OnEach(t *testing.T, drivers []port.Options, f func(*testing.T, port.Options)) {
	for _, d := range drivers {
		name := d.Attach + "," + d.IO
		if d.Queues > 1 {
			name += fmt.Sprintf(",%d queues", d.Queues)
		}
		t.Run(name, func(t *testing.T) { f(t, d) })
	}
}

// Node is a namespace with a vRouter that forwards.
type Node struct {
	*space.Space
	Router  *vrouter.Router
	Ports   *port.Ports
	driver  port.Options
	pods    int
	watched []*space.Space
}

// Config is how a Node is.
type Config struct {
	Driver  port.Options
	Options vrouter.Options
	Update  vrouter.Update // what an agent would tell first
	// Routes is called in the namespace once vr0 is there, before anything is told: for addresses and routes.
	Routes func() error
	// CPUs are those that workers run on; none: any.
	CPUs []int
}

// Start runs a vRouter in s until the test ends. The underlay is there already.
func Start(t testing.TB, s *space.Space, c Config) *Node {
	t.Helper()
	n := &Node{Space: s, Router: vrouter.New(), driver: c.Driver}
	var replies []*port.Reply // one for each worker that answers
	var relay *port.Reply
	var icmp *port.ICMP
	s.Do(t, func() (err error) {
		for range c.Driver.Queues {
			reply, err := port.OpenReply()
			if err != nil {
				return err
			}
			replies = append(replies, reply)
		}
		if relay, err = port.OpenReply(); err != nil {
			return err
		}
		if icmp, err = port.OpenICMP(); err != nil {
			return err
		}
		if n.Ports, err = port.OpenPorts(c.Driver, func() error { return nil }); err != nil {
			return err
		}
		return space.Sysctls(map[string]string{"ipv4/conf/vr0/rp_filter": "0"})
	})
	if c.Routes != nil {
		s.Do(t, c.Routes)
	}
	if err := n.Router.SetOptions(c.Options); err != nil {
		t.Fatal(err)
	}
	n.Router.OnConfig(n.Ports.Configure)
	workers := n.Ports.Workers(n.Router)
	answering := 0
	for _, w := range workers {
		if w.Direction() != vrouter.Decap {
			w.SetReply(replies[answering])
			answering++
		}
	}
	if err := n.Router.Update(c.Update); err != nil {
		t.Fatal(err)
	}
	done, running := make(chan error), 0
	run := func(f func() error) {
		running++
		go func() {
			runtime.LockOSThread() // never given back: the thread stays in the namespace
			err := netns.Set(s.Handle)
			if err == nil {
				err = port.WorkerThread(c.CPUs, 0)
			}
			if err == nil {
				err = f()
			}
			done <- err
		}()
	}
	for _, f := range n.Ports.Threads(workers) {
		run(f)
	}
	run(func() error {
		relayed := []*vrouter.Packet{vrouter.NewPacket()}
		return icmp.Listen(time.Second, func(b []byte) {
			n.Router.LearnPathMTU(b, time.Now())
			if n.Router.Relay(b, time.Now(), relayed[0]) {
				relay.Send(relayed)
			}
		}, func() {})
	})
	t.Cleanup(func() {
		n.Ports.Stop()
		icmp.Stop()
		for range running {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		errs := []error{n.Ports.Close(), relay.Close(), icmp.Close()}
		for _, r := range replies {
			errs = append(errs, r.Close())
		}
		if err := errors.Join(errs...); err != nil {
			t.Error(err)
		}
	})
	return n
}

// Direct reports whether the vRouter reads the pods' own interfaces.
func (n *Node) Direct() bool { return n.driver.Attach == port.AttachDirect }

// Queues is how many the vRouter's ports have, with a worker each, or one for each direction.
func (n *Node) Queues() int { return n.Ports.Queues }

// Counters are those that are not zero.
func (n *Node) Counters() map[string]uint64 {
	all := map[string]uint64{}
	for _, c := range n.Router.Counters() {
		if c.Packets > 0 {
			all[c.Name] += c.Packets
		}
	}
	return all
}

// Carried is what the port has forwarded by itself, in the kernel, and no worker has taken: with IOTC only.
func (n *Node) Carried() vrouter.Carried {
	if n.Ports.Direct == nil {
		return vrouter.Carried{}
	}
	return n.Ports.Direct.Carried()
}

// UntilCarried calls send, after which packets have gone into the tunnel and come out of it, until the port carries those
// itself, which begins some time after the first of them. Where it carries none it returns at once.
func (n *Node) UntilCarried(t testing.TB, send func()) {
	t.Helper()
	if n.driver.IO != port.IOTC {
		return
	}
	Until(t, "packets carried in the kernel, there and back", func() bool {
		send()
		c := n.Carried()
		return c.Encap.Packets > 0 && c.Decap.Packets > 0
	})
}

// Books are what a vRouter has written down about its packets.
type Books struct {
	Counters  map[string]uint64 // those that are not zero
	Taken     uint64            // packets that the workers have taken, or the port has carried
	Accounted uint64            // of those: sent less pieces, split, or dropped
	Lost      uint64            // by the kernel, around the vRouter
}

// Books returns them as they are now. Of superpackets more are accounted for than were taken: as many as the segments.
func (n *Node) Books() Books {
	carried := n.Carried()
	b := Books{Taken: carried.Encap.Packets + carried.Decap.Packets + carried.Local.Packets}
	for _, w := range n.Router.Batches() {
		b.Taken += w.Packets
	}
	b.Counters = n.Counters()
	b.Accounted = b.Counters["split"] - b.Counters["pieces"]
	for name, packets := range b.Counters {
		switch {
		case IsOutcome(name):
			b.Accounted += packets
		case strings.HasPrefix(name, "kernel_"):
			b.Lost += packets
		}
	}
	return b
}

// Balance waits until every packet that the workers have taken, or the port has carried, is accounted for: in = out + dropped,
// pieces counted as one. It fails the test if one is not, or was dropped without a reason, or if the kernel has lost any,
// whether the vRouter has counted it or not. It is for tests without superpackets.
func (n *Node) Balance(t testing.TB) Books {
	t.Helper()
	b := n.Books()
	for deadline := time.Now().Add(Patience); b.Taken != b.Accounted && time.Now().Before(deadline); b = n.Books() {
		time.Sleep(time.Millisecond)
	}
	if b.Taken != b.Accounted || b.Counters["drop_not_set"] != 0 {
		t.Errorf("the vRouter took %d packets, and accounts for %d: %v", b.Taken, b.Accounted, b.Counters)
	}
	n.NoLosses(t)
	return b
}

// NoLosses fails the test if the kernel has lost any packet, whether the vRouter has counted it or not.
func (n *Node) NoLosses(t testing.TB) {
	t.Helper()
	b := n.Books()
	if lost := n.losses(t); b.Lost > 0 || len(lost) > 0 {
		t.Errorf("the kernel has lost packets: the vRouter has counted %d of them, and the kernel %v: %v", b.Lost, lost, b.Counters)
	}
}

// IsOutcome reports whether a counter is of those of which every packet is in exactly one.
func IsOutcome(counter string) bool {
	return strings.HasPrefix(counter, "drop_") || strings.HasPrefix(counter, "forwarded_")
}

// Patience is how long what has to come is waited for.
const Patience = 60 * time.Second

// Until waits until condition is true, for as long as Patience.
func Until(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Patience); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, Patience)
		}
	}
}

// PodMAC is the hardware address of the host's side of pods' interfaces.
var PodMAC = net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}

// Pod says how a pod is attached.
type Pod struct {
	Address netip.Addr
	MTU     int
	// Source is the one that the node's kernel uses toward it; the zero Addr: the kernel chooses.
	Source netip.Addr
	// Mute is a pod that answers ARP and nothing else: it has no route.
	Mute bool
}

// AddPod attaches a pod, and tells the vRouter of it, which in `direct` has taken its interface over then.
func (n *Node) AddPod(t testing.TB, p Pod) *space.Space {
	t.Helper()
	pod := space.New(t)
	n.pods++
	n.Watch(pod)
	name := fmt.Sprintf("cali%d", n.pods)
	pod.Do(t, func() error {
		return space.Sysctls(map[string]string{"ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0",
			"ipv6/conf/all/disable_ipv6": "1", "ipv6/conf/default/disable_ipv6": "1"})
	})
	n.Do(t, func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: p.MTU, HardwareAddr: PodMAC},
			PeerName: "eth0", PeerMTU: uint32(p.MTU), PeerNamespace: netlink.NsFd(pod.Handle)}); err != nil {
			return err
		}
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetUp(l), netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Src: p.Source.AsSlice(),
			Dst: &net.IPNet{IP: p.Address.AsSlice(), Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK}))
	})
	pod.Do(t, func() error {
		if err := space.Address("eth0", p.Address.String()+"/32"); err != nil || p.Mute {
			return err
		}
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		gateway := net.IPv4(169, 254, 1, 1)
		return errors.Join(space.Neighbour("eth0", netip.MustParseAddr("169.254.1.1"), PodMAC),
			netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: &net.IPNet{IP: gateway, Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: gateway}))
	})
	untilSends(t, n.Space, name)
	untilSends(t, pod, "eth0")
	if err := n.Router.Update(vrouter.Update{AddPods: []vrouter.Pod{{Address: p.Address, Interface: name}}}); err != nil {
		t.Fatal(err)
	}
	if n.Direct() {
		want := fmt.Sprintf("%d of %d pods ", n.pods, n.pods)
		Until(t, want, func() bool { return strings.Contains(n.Ports.Direct.String(), want) })
	}
	return pod
}

// Cable connects two namespaces by a veth pair, and gives each end its address, in CIDR form; none: it has none.
func Cable(t testing.TB, a, b *space.Space, atA, atB string, mtu int, addressA, addressB string) {
	t.Helper()
	a.Do(t, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: atA, MTU: mtu}, PeerName: atB,
			PeerNamespace: netlink.NsFd(b.Handle), PeerMTU: uint32(mtu)})
	})
	for _, end := range []struct {
		*space.Space
		link, address string
	}{{a, atA, addressA}, {b, atB, addressB}} {
		end.Do(t, func() error {
			if end.address != "" {
				return space.Address(end.link, end.address)
			}
			l, err := netlink.LinkByName(end.link)
			if err != nil {
				return err
			}
			return netlink.LinkSetUp(l)
		})
	}
	untilSends(t, a, atA)
	untilSends(t, b, atB)
}

// untilSends waits until the kernel has taken note that both sides of an interface are up. What it is to send before that it drops,
// an ARP request for one, which is asked again after a second only.
func untilSends(t testing.TB, s *space.Space, link string) {
	t.Helper()
	Until(t, link+" sends", func() (up bool) {
		s.Do(t, func() error {
			l, err := netlink.LinkByName(link)
			if err == nil {
				up = l.Attrs().OperState == netlink.OperUp
			}
			return err
		})
		return up
	})
}
