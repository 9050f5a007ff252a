package server

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// RouteProtocol marks the routes that Margay installs (rtm_protocol), so that it removes none but its own.
const RouteProtocol = 80

// Calico's conventions: each pod's gateway is the same link-local address with the same hardware address, which the IPv6
// one is made of (RFC 4291, appendix A).
var (
	gateway    = netip.AddrFrom4([4]byte{169, 254, 1, 1})
	gateway6   = netip.MustParseAddr("fe80::ecee:eeff:feee:eeee")
	gatewayMAC = net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}
)

// gatewayOf is the gateway of a pod's address.
func gatewayOf(a netip.Addr) netip.Addr {
	if a.Is6() {
		return gateway6
	}
	return gateway
}

func familyOf(a netip.Addr) int {
	if a.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// addrGenModeNone is IN6_ADDR_GEN_MODE_NONE: no link-local address by itself.
const addrGenModeNone = 1

// createVeth makes the pair in one step, the pod's side at once in the pod's namespace under its final name, so that
// it never shows on the host. The host's side is left down.
func (s *Server) createVeth(a Attachment, ns *os.File, mtu int, podMAC string) (host netlink.Link, err error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = a.HostName, mtu, gatewayMAC
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerMTU, veth.PeerNamespace = a.IfName, uint32(mtu), netlink.NsFd(int(ns.Fd()))
	if podMAC != "" {
		if veth.PeerHardwareAddr, err = net.ParseMAC(podMAC); err != nil {
			return nil, fmt.Errorf("hardware address: %w", err)
		}
	}
	if err := s.nl.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("create veth %s: %w", a.HostName, err)
	}
	host, err = s.nl.LinkByName(a.HostName)
	if err != nil {
		return nil, fmt.Errorf("find veth %s: %w", a.HostName, err)
	}
	if err := s.nl.LinkSetAlias(host, a.alias()); err != nil {
		return host, fmt.Errorf("set alias of %s: %w", a.HostName, err)
	}
	return host, nil
}

// setUpHost brings the host's side into its final state; it is repeated at Reconcile and changes nothing then.
func (s *Server) setUpHost(a Attachment, host netlink.Link) error {
	// A kernel without IPv6 refuses, which is what was wanted anyway.
	_ = s.nl.LinkSetIP6AddrGenMode(host, addrGenModeNone)
	if err := hostSideSysctls(a.HostName); err != nil {
		return err
	}
	if err := s.nl.LinkSetUp(host); err != nil {
		return fmt.Errorf("set %s up: %w", a.HostName, err)
	}
	if a.Address6.IsValid() {
		if err := s.setUpHost6(a, host); err != nil {
			return err
		}
	}
	for _, addr := range a.addresses() {
		if err := s.nl.RouteReplace(hostRoute(addr, host)); err != nil {
			return fmt.Errorf("route %s to %s: %w", addr, a.HostName, err)
		}
	}
	return nil
}

func hostRoute(a netip.Addr, host netlink.Link) *netlink.Route {
	return &netlink.Route{LinkIndex: host.Attrs().Index, Dst: hostNet(a), Scope: netlink.SCOPE_LINK, Protocol: RouteProtocol}
}

// podHandle opens netlink in the pod's namespace; the socket keeps working from any thread.
func podHandle(ns *os.File) (h *netlink.Handle, err error) {
	err = inNetns(ns, func() error {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open netlink in the container: %w", err)
	}
	return h, nil
}

func hasInterface(h *netlink.Handle, name string) (bool, error) {
	_, err := h.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return false, nil
	}
	return err == nil, err
}

// setUpPod configures the pod's side: addresses, neighbours, routes. It returns the interface's hardware address.
func setUpPod(ns *os.File, h *netlink.Handle, a Attachment) (mac string, err error) {
	fail := func(what string, err error) (string, error) {
		return "", fmt.Errorf("%s in the container: %w", what, err)
	}
	if lo, err := h.LinkByName("lo"); err == nil {
		if err := h.LinkSetUp(lo); err != nil {
			return fail("set lo up", err)
		}
	}
	link, err := h.LinkByName(a.IfName)
	if err != nil {
		return fail("find "+a.IfName, err)
	}
	if a.Address6.IsValid() {
		if err := inNetns(ns, func() error { return podSysctls6(a.IfName) }); err != nil {
			return fail("set up IPv6", err)
		}
	}
	for _, addr := range a.addresses() {
		// Nobody else can have the address: duplicate address detection would only keep it from being used.
		if err := h.AddrAdd(link, &netlink.Addr{IPNet: hostNet(addr), Flags: nodad(addr)}); err != nil {
			return fail("add address "+addr.String(), err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fail("set "+a.IfName+" up", err)
	}
	index := link.Attrs().Index
	for _, addr := range a.addresses() {
		gateway := gatewayOf(addr)
		if err := h.NeighSet(&netlink.Neigh{LinkIndex: index, Family: familyOf(addr), State: netlink.NUD_PERMANENT,
			IP: gateway.AsSlice(), HardwareAddr: gatewayMAC}); err != nil {
			return fail("add neighbour "+gateway.String(), err)
		}
		for _, r := range podRoutes(index, gateway) {
			if err := h.RouteAdd(r); err != nil {
				return fail("add route "+r.String(), err)
			}
		}
	}
	return link.Attrs().HardwareAddr.String(), nil
}

func podRoutes(index int, gateway netip.Addr) []*netlink.Route {
	bits := gateway.BitLen()
	return []*netlink.Route{
		{LinkIndex: index, Dst: hostNet(gateway), Scope: netlink.SCOPE_LINK},
		{LinkIndex: index, Dst: &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}, Gw: gateway.AsSlice()},
	}
}

// removeHost deletes the host's side (and with it the pod's) if it is still the one made for this attachment: the name
// follows from the pod's name and may belong to the pod's next container by now. An interface without alias is one
// whose making was cut short.
func (s *Server) removeHost(a Attachment) error {
	link, err := s.nl.LinkByName(a.HostName)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find %s: %w", a.HostName, err)
	}
	if alias := link.Attrs().Alias; alias != "" {
		if b, ok := parseAlias(a.HostName, alias); !ok || b.Handle() != a.Handle() {
			return nil
		}
	}
	return s.deleteLink(link)
}

// deleteLink deletes by index, so that a link of the same name made meanwhile is safe.
func (s *Server) deleteLink(link netlink.Link) error {
	if err := s.nl.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete %s: %w", link.Attrs().Name, err)
	}
	return nil
}
