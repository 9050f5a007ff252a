package rig

import (
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/bench/traffic"
)

// The addresses of every bed. The underlay's are of the range set aside for benchmarks (RFC 2544, appendix C.2.2).
const (
	pool    = "10.244.0.0/16"
	gateway = "169.254.1.1"
)

func nodeAddress(i int) string { return fmt.Sprintf("198.18.0.%d", i) }
func podAddress(i int) string  { return fmt.Sprintf("10.244.%d.2", i) }
func ownAddress(i int) string  { return fmt.Sprintf("10.244.%d.1", i) }
func podBlock(i int) string    { return fmt.Sprintf("10.244.%d.0/26", i) }

// The MAC addresses of every bed, and the names of the pods' interfaces on their node.
func podMAC(i int) string      { return fmt.Sprintf("02:4d:00:00:%02d:01", i) }
func cali(i int) string        { return fmt.Sprintf("cali%d", i) }
func caliMAC(i int) string     { return fmt.Sprintf("02:4d:00:00:%02d:02", i) }
func underlayMAC(i int) string { return fmt.Sprintf("02:4d:00:00:%02d:03", i) }

// nobodyMAC is where frames for the sink of a one-node bed go. It is not the sink's device's: so the sink's kernel
// drops them in the first line of its IP code, once the sink's socket has them.
const nobodyMAC = "02:4d:00:00:99:99"

// underlayMTU is in bytes.
const underlayMTU = 1500

// mtu is what the pods' interfaces have in bytes, by what the path's tunnel leaves of the underlay's.
func (p Path) mtu() int {
	switch p.Kind {
	case KindVXLAN:
		return underlayMTU - 50
	case KindWireGuard:
		return underlayMTU - 80
	case KindVRouter:
		return underlayMTU - 20
	}
	return underlayMTU
}

// Options say what a bed needs from its surroundings.
type Options struct {
	VRouter   string // the vrouter binary
	WireGuard string // the wireguard-go binary
	Self      string // this program, which is generator and sink as well
}

// Shape is what a bed consists of.
type Shape int

const (
	Edge  Shape = iota // pod – node – sink: it ends where the node's packets leave it, on the underlay
	Pair               // pod – node – node – pod
	Local              // pod – node – pod
)

// Bed is one path, built.
type Bed struct {
	Path  Path
	Shape Shape

	options  Options
	run      string // the beginning of all its names
	dir      string
	pods     []*Space
	nodes    []*Space
	wire     *Space // Edge: where the sink is
	vrouters []*daemon
	carriers []*daemon // the processes of a peer
	keys     []*ecdh.PrivateKey
	tunnels  []string       // names of WireGuard devices
	closers  []func() error // in the order of their making
	source   *child
	sink     *child
	overdue  uint64 // packets sent that the sink has not seen
}

// Build makes a bed. On an error nothing is left.
func Build(ctx context.Context, o Options, p Path, shape Shape) (_ *Bed, err error) {
	if shape == Edge && p.Kind == KindWireGuard {
		return nil, errors.New("wireguard: a single node has nobody to agree on keys with: expected two nodes")
	}
	run := runName(os.Getpid())
	b := &Bed{Path: p, Shape: shape, options: o, run: fmt.Sprintf("%s-%s%d", run, p.Label(), nextBed.Add(1))}
	b.dir = filepath.Join(runDirs, run, b.run)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("set up %s: %w", p.Name, err), b.Close())
		}
	}()
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return nil, err
	}
	b.closers = append(b.closers, func() error { return os.RemoveAll(b.dir) })
	if p.Kind == KindWire {
		return b, b.buildWire()
	}
	nodes := 1
	if shape == Pair {
		nodes = 2
	}
	for i := 1; i <= nodes; i++ {
		if err := b.buildNode(i); err != nil {
			return nil, err
		}
	}
	if shape == Local {
		if err := b.buildPod(2, b.nodes[0], b.target().String()); err != nil {
			return nil, err
		}
	}
	if err := b.buildUnderlay(); err != nil {
		return nil, err
	}
	for i := 1; i <= nodes; i++ {
		if err := b.carry(ctx, i); err != nil {
			return nil, err
		}
	}
	if shape != Edge {
		return b, b.swallow()
	}
	return b, nil
}

// target is the address that all traffic goes to.
func (b *Bed) target() netip.Addr {
	if b.Shape == Local {
		return netip.MustParseAddr("10.244.1.3")
	}
	return netip.MustParseAddr(podAddress(2))
}

// swallow opens a socket in the second pod that takes the generator's packets and drops them at once: otherwise the pod
// would answer each with an ICMP error. The sink sees them before that.
func (b *Bed) swallow() error {
	return b.pods[1].Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		b.closers = append(b.closers, func() error { return unix.Close(fd) })
		nothing := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
		err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing[0]})
		if err != nil {
			return fmt.Errorf("SO_ATTACH_FILTER: %w", err)
		}
		return unix.Bind(fd, &unix.SockaddrInet4{Port: traffic.Port})
	})
}

// space makes a namespace of the bed.
func (b *Bed) space(suffix string) (*Space, error) {
	s, err := newSpace(b.run + "-" + suffix)
	if err != nil {
		return nil, err
	}
	b.closers = append(b.closers, s.close)
	return s, s.Do(func() error {
		return errors.Join(
			sysctl("net.ipv6.conf.all.disable_ipv6", "1"), // no router solicitations in between
			sysctl("net.ipv4.conf.all.rp_filter", "0"),
			sysctl("net.ipv4.conf.default.rp_filter", "0"),
			sysctl("net.ipv4.conf.all.send_redirects", "0"),
		)
	})
}

func (b *Bed) buildWire() error {
	pod, err := b.space("pod1")
	if err != nil {
		return err
	}
	b.pods = append(b.pods, pod)
	if b.wire, err = b.space("wire"); err != nil {
		return err
	}
	if err := pair(end{pod, "eth0", podMAC(1), underlayMTU}, end{b.wire, "eth0", underlayMAC(2), underlayMTU}); err != nil {
		return err
	}
	return b.wire.Do(func() error { return offload("eth0", ethtoolGRO, true) })
}

// buildNode makes node i with a pod.
func (b *Bed) buildNode(i int) error {
	node, err := b.space(fmt.Sprintf("node%d", i))
	if err != nil {
		return err
	}
	b.nodes = append(b.nodes, node)
	if err := node.Do(func() error { return sysctl("net.ipv4.ip_forward", "1") }); err != nil {
		return err
	}
	return b.buildPod(i, node, podAddress(i))
}

// buildPod makes pod i of the bed, joined to its node as the CNI plugin does it.
func (b *Bed) buildPod(i int, node *Space, address string) error {
	pod, err := b.space(fmt.Sprintf("pod%d", i))
	if err != nil {
		return err
	}
	b.pods = append(b.pods, pod)
	mtu := b.Path.mtu()
	if err := pair(end{pod, "eth0", podMAC(i), mtu}, end{node, cali(i), caliMAC(i), mtu}); err != nil {
		return err
	}
	err = pod.Do(func() error {
		return errors.Join(
			linkUp("eth0", address+"/32"),
			neighbour("eth0", gateway, caliMAC(i)),
			route("eth0", gateway+"/32", "", ""),
			route("eth0", "0.0.0.0/0", gateway, address),
		)
	})
	if err != nil {
		return err
	}
	return node.Do(func() error {
		return errors.Join(
			neighbour(cali(i), address, podMAC(i)),
			route(cali(i), address+"/32", "", ""),
			offload(cali(i), ethtoolGRO, true), // the XDP generator's frames need it; what a pod's kernel sends goes past it
		)
	})
}

// buildUnderlay joins the nodes, or the node and the sink.
func (b *Bed) buildUnderlay() (err error) {
	other := b.nodes[len(b.nodes)-1]
	if b.Shape != Pair {
		if other, err = b.space("wire"); err != nil {
			return err
		}
	}
	if err := pair(end{b.nodes[0], "eth0", underlayMAC(1), underlayMTU}, end{other, "eth0", underlayMAC(2), underlayMTU}); err != nil {
		return err
	}
	for i, node := range b.nodes {
		mac := underlayMAC(2 - i)
		if b.Shape != Pair {
			b.wire, mac = other, nobodyMAC
		}
		err := node.Do(func() error {
			return errors.Join(linkUp("eth0", nodeAddress(i+1)+"/24"), neighbour("eth0", nodeAddress(2-i), mac))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// carry sets up the path's own way of carrying on node i.
func (b *Bed) carry(ctx context.Context, i int) error {
	node, other := b.nodes[i-1], 3-i
	switch b.Path.Kind {
	case KindRoute:
		if err := node.Do(func() error { return route("eth0", podBlock(other), nodeAddress(other), "") }); err != nil {
			return err
		}
	case KindVXLAN:
		if err := node.Do(func() error { return vxlan(i) }); err != nil {
			return err
		}
	case KindWireGuard:
		return b.wireguard(ctx, i)
	case KindVRouter:
		return b.vrouter(ctx, i)
	}
	if b.Path.RPS {
		return errors.Join(spread(node, cali(i)), spread(node, "eth0"))
	}
	return nil
}

// vxlan makes node i's VXLAN device: as flannel and Calico do, without learning and without UDP checksums, one
// gateway address for each node, neighbour and forwarding entries permanent.
func vxlan(i int) error {
	other := 3 - i
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	mac := func(i int) string { return fmt.Sprintf("02:4d:00:00:%02d:04", i) }
	hw, err := net.ParseMAC(mac(i))
	if err != nil {
		return err
	}
	err = netlink.LinkAdd(&netlink.Vxlan{
		LinkAttrs: netlink.LinkAttrs{Name: "vxlan0", HardwareAddr: hw, MTU: underlayMTU - 50}, VxlanId: 4096,
		VtepDevIndex: eth0.Attrs().Index, SrcAddr: net.ParseIP(nodeAddress(i)), Port: 4789,
	})
	if err != nil {
		return fmt.Errorf("VXLAN device: %w", err)
	}
	if err := linkUp("vxlan0", ownAddress(i)+"/32"); err != nil {
		return err
	}
	if err := neighbour("vxlan0", ownAddress(other), mac(other)); err != nil {
		return err
	}
	link, err := netlink.LinkByName("vxlan0")
	if err != nil {
		return err
	}
	peer, err := net.ParseMAC(mac(other))
	if err != nil {
		return err
	}
	err = netlink.NeighSet(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF,
		IP: net.ParseIP(nodeAddress(other)), HardwareAddr: peer,
	})
	if err != nil {
		return fmt.Errorf("forwarding entry: %w", err)
	}
	return route("vxlan0", podBlock(other), ownAddress(other), ownAddress(i))
}

// Underlay switches TSO and GSO of the nodes' underlay interfaces; GRO is always on.
func (b *Bed) Underlay(segmentation bool) error {
	for _, node := range b.nodes {
		err := node.Do(func() error {
			return errors.Join(
				offload("eth0", ethtoolTSO, segmentation),
				offload("eth0", ethtoolGSO, segmentation),
				offload("eth0", ethtoolGRO, true),
			)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Frame is what the generator of this bed sends.
func (b *Bed) frame(p traffic.Profile, flows int) traffic.Frame {
	parse := func(text string) net.HardwareAddr {
		hw, err := net.ParseMAC(text)
		if err != nil {
			panic(err) // it is ours
		}
		return hw
	}
	to := caliMAC(1)
	if b.Path.Kind == KindWire {
		to = nobodyMAC
	}
	return traffic.Frame{
		SourceMAC: parse(podMAC(1)), DestinationMAC: parse(to), Flows: flows, Profile: p,
		Source: netip.MustParseAddr(podAddress(1)), Destination: b.target(),
	}
}

// Close takes the bed apart. Calling it again does nothing.
func (b *Bed) Close() error {
	errs := []error{b.StopTraffic()}
	for i := len(b.closers) - 1; i >= 0; i-- {
		errs = append(errs, b.closers[i]())
	}
	b.closers = nil
	return errors.Join(errs...)
}
