package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
)

// Interface names inside the namespaces.
const (
	bridgeName   = "br0"  // in the underlay
	hostPeerName = "host" // in the underlay, the twin of the host's veth
	nodeLink     = "eth0" // in a node
)

// manyNodes is from where on nodes get each other as permanent neighbours. The kernel's limit of 1024 neighbour
// entries (gc_thresh3) holds for all namespaces together, and a full mesh needs nodes times nodes; permanent entries
// do not count.
const manyNodes = 24

// linksIn returns a netlink handle inside the namespace at path. The caller closes it.
func linksIn(path string) (*netlink.Handle, error) {
	fd, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	defer fd.Close()
	h, err := netlink.NewHandleAt(fd, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink in %s: %w", path, err)
	}
	return h, nil
}

// raise gives the named interface its address (if valid) and brings it up.
func raise(h *netlink.Handle, name string, addr netip.Prefix) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	if addr.IsValid() {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), 32)}}
		if err := h.AddrReplace(link, a); err != nil {
			return fmt.Errorf("address %s on %s: %w", addr, name, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", name, err)
	}
	return nil
}

// setSysctls writes values below /proc/sys in the namespace at path. One that the kernel does not have is left out.
func setSysctls(path string, values map[string]string) error {
	return within(path, func() error {
		for name, value := range values {
			err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		return nil
	})
}

// makeUnderlay makes the namespace with the bridge between the nodes, and the host's way into it.
func (l *Lab) makeUnderlay(s *state) error {
	name := underlayName(l.name)
	if err := createNetNS(name); err != nil {
		return err
	}
	path := netnsPath(name)
	// The bridge is a wire: what is seen on it shall be the nodes' own packets.
	err := setSysctls(path, map[string]string{
		"net/ipv6/conf/all/disable_ipv6":     "1",
		"net/ipv6/conf/default/disable_ipv6": "1",
	})
	if err != nil {
		return err
	}
	h, err := linksIn(path)
	if err != nil {
		return err
	}
	defer h.Close()
	// A bridge takes the lowest address among its ports, unless told one: a port that comes or goes would change it, and
	// every neighbour would talk to the old one for seconds.
	octets := at(s.Subnet, etcdOctet).As4()
	mac := net.HardwareAddr{0x02, 0x00, octets[0], octets[1], octets[2], octets[3]}
	if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName, MTU: s.MTU, HardwareAddr: mac}}); err != nil {
		return fmt.Errorf("bridge %s: %w", bridgeName, err)
	}
	if err := raise(h, "lo", netip.Prefix{}); err != nil {
		return err
	}
	if err := raise(h, bridgeName, netip.PrefixFrom(at(s.Subnet, etcdOctet), s.Subnet.Bits())); err != nil {
		return err
	}
	hostNS := l.host.netns()
	if err := plug(h, hostPeerName, hostLink(l.name), hostNS, s.MTU); err != nil {
		return err
	}
	host, err := linksIn(hostNS)
	if err != nil {
		return err
	}
	defer host.Close()
	return raise(host, hostLink(l.name), netip.PrefixFrom(at(s.Subnet, hostOctet), s.Subnet.Bits()))
}

// plug makes a veth pair: one end a port of the bridge in h's namespace, the other in the namespace at peerNS.
func plug(h *netlink.Handle, port, peer, peerNS string, mtu int) error {
	fd, err := netns.GetFromPath(peerNS)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", peerNS, err)
	}
	defer fd.Close()
	veth := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: port, MTU: mtu},
		PeerName:      peer,
		PeerMTU:       uint32(mtu),
		PeerNamespace: netlink.NsFd(int(fd)),
	}
	if err := h.LinkAdd(veth); err != nil {
		return fmt.Errorf("veth %s to %s in %s: %w", port, peer, peerNS, err)
	}
	bridge, err := h.LinkByName(bridgeName)
	if err != nil {
		return fmt.Errorf("bridge %s: %w", bridgeName, err)
	}
	if err := h.LinkSetMaster(veth, bridge); err != nil {
		return fmt.Errorf("port %s of %s: %w", port, bridgeName, err)
	}
	return raise(h, port, netip.Prefix{})
}

// makeNode makes a node's namespace and plugs it into the underlay.
func (l *Lab) makeNode(s *state, n *node) error {
	if err := createNetNS(n.Name); err != nil {
		return err
	}
	path := netnsPath(n.Name)
	if err := setSysctls(path, map[string]string{"net/ipv4/ip_forward": "1"}); err != nil {
		return err
	}
	under, err := linksIn(netnsPath(underlayName(l.name)))
	if err != nil {
		return err
	}
	defer under.Close()
	if err := plug(under, fmt.Sprintf("n%d", n.Index), nodeLink, path, s.MTU); err != nil {
		return err
	}
	return raiseNode(s, n)
}

// raiseNode brings a node's interfaces up, with address and default route: at first, and after a power loss.
func raiseNode(s *state, n *node) error {
	h, err := linksIn(netnsPath(n.Name))
	if err != nil {
		return err
	}
	defer h.Close()
	if err := raise(h, "lo", netip.Prefix{}); err != nil {
		return err
	}
	if err := raise(h, nodeLink, netip.PrefixFrom(n.Address, s.Subnet.Bits())); err != nil {
		return err
	}
	link, err := h.LinkByName(nodeLink)
	if err != nil {
		return err
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: at(s.Subnet, etcdOctet).AsSlice()}
	if err := h.RouteReplace(route); err != nil {
		return fmt.Errorf("default route of %s: %w", n.Name, err)
	}
	return nil
}

// introduce gives each of the nodes all others as permanent neighbours, in a lab that is too large for ARP.
func introduce(s *state, nodes []*node) error {
	if len(s.Nodes) <= manyNodes {
		return nil
	}
	macs := map[*node]net.HardwareAddr{}
	for _, n := range s.Nodes {
		err := withLink(n, func(_ *netlink.Handle, link netlink.Link) error {
			macs[n] = link.Attrs().HardwareAddr
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, n := range nodes {
		err := withLink(n, func(h *netlink.Handle, link netlink.Link) error {
			for other, mac := range macs {
				neigh := &netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT,
					IP: other.Address.AsSlice(), HardwareAddr: mac}
				if other == n {
					continue
				}
				if err := h.NeighSet(neigh); err != nil {
					return fmt.Errorf("neighbour %s of %s: %w", other.Name, n.Name, err)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// withLink runs f with a node's eth0.
func withLink(n *node, f func(*netlink.Handle, netlink.Link) error) error {
	h, err := linksIn(netnsPath(n.Name))
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(nodeLink)
	if err != nil {
		return fmt.Errorf("interface %s of %s: %w", nodeLink, n.Name, err)
	}
	return f(h, link)
}

// unplugNode takes a node off the underlay at once, as a power loss does.
func unplugNode(n *node) error {
	return withLink(n, func(h *netlink.Handle, link netlink.Link) error { return h.LinkSetDown(link) })
}

// unplugHost removes the host's veth by its twin, wherever the host's end is. The kernel would do it too, but later.
func unplugHost(lab string) error {
	h, err := linksIn(netnsPath(underlayName(lab)))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EINVAL) {
		return nil // no namespace, or a file that never became one
	}
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(hostPeerName)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := h.LinkDel(link); err != nil && !errors.Is(err, syscall.ENODEV) {
		return fmt.Errorf("remove the host's veth: %w", err)
	}
	return nil
}

// usedSubnets returns what the host has addresses in or routes to, the default route aside.
func usedSubnets(hostNS string) ([]netip.Prefix, error) {
	h, err := linksIn(hostNS)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	var used []netip.Prefix
	routes, err := dump.Routes(h, nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst != nil {
			used = appendNet(used, r.Dst)
		}
	}
	addrs, err := dump.Addrs(h, nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		used = appendNet(used, a.IPNet)
	}
	return used, nil
}

func appendNet(list []netip.Prefix, n *net.IPNet) []netip.Prefix {
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	if !ok || ones == 0 {
		return list
	}
	return append(list, netip.PrefixFrom(addr.Unmap(), ones).Masked())
}
