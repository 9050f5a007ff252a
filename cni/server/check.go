package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/cni"
	"margay/internal/dump"
)

// check compares the attachment with what the previous result said, and with how we would make it today.
func (s *Server) check(ctx context.Context, req *cni.Request, ns *os.File) error {
	if err := requireNetns(req, ns); err != nil {
		return err
	}
	if req.Expect == nil || !req.Expect.Address.IsValid() && !req.Expect.Address6.IsValid() {
		return types.NewError(types.ErrInvalidNetworkConfig, "prevResult: no address in it", "")
	}
	defer s.locks.lock(req.Handle())()
	want := Attachment{Network: req.Network, ContainerID: req.ContainerID, IfName: req.IfName,
		HostName: req.Expect.HostName, Address: req.Expect.Address, Address6: req.Expect.Address6}
	pod, err := podHandle(ns)
	if err != nil {
		return types.NewError(cni.CodePlumbing, err.Error(), "")
	}
	defer pod.Close()
	err = errors.Join(s.checkHost(want), checkPod(pod, want, req.Expect.PodMAC), s.checkAddress(ctx, want))
	if err != nil {
		return types.NewError(cni.CodeCheck, fmt.Sprintf("container %s, %s: not as it was made", req.ContainerID, req.IfName), err.Error())
	}
	return nil
}

func (s *Server) checkHost(want Attachment) error {
	link, err := s.nl.LinkByName(want.HostName)
	if err != nil {
		return fmt.Errorf("host: %s: %w", want.HostName, err)
	}
	if a, ok := parseAlias(want.HostName, link.Attrs().Alias); !ok || a != want {
		return fmt.Errorf("host: %s: alias %q, expected %q", want.HostName, link.Attrs().Alias, want.alias())
	}
	if link.Attrs().RawFlags&unix.IFF_UP == 0 {
		return fmt.Errorf("host: %s: expected to be up", want.HostName)
	}
	for _, addr := range want.addresses() {
		routes, err := dump.RoutesLike(s.nl, familyOf(addr), hostRoute(addr, link), netlink.RT_FILTER_DST|netlink.RT_FILTER_OIF)
		if err != nil {
			return fmt.Errorf("host: list routes: %w", err)
		}
		if len(routes) == 0 {
			return fmt.Errorf("host: no route to %s by %s", addr, want.HostName)
		}
	}
	return nil
}

func checkPod(h *netlink.Handle, want Attachment, mac string) error {
	link, err := h.LinkByName(want.IfName)
	if err != nil {
		return fmt.Errorf("container: %s: %w", want.IfName, err)
	}
	attrs := link.Attrs()
	if attrs.RawFlags&unix.IFF_UP == 0 {
		return fmt.Errorf("container: %s: expected to be up", want.IfName)
	}
	if mac != "" && attrs.HardwareAddr.String() != mac {
		return fmt.Errorf("container: %s: hardware address %s, expected %s", want.IfName, attrs.HardwareAddr, mac)
	}
	for _, addr := range want.addresses() {
		if err := checkPodFamily(h, link, addr); err != nil {
			return err
		}
	}
	return nil
}

// checkPodFamily looks at what the container has for one of its addresses.
func checkPodFamily(h *netlink.Handle, link netlink.Link, addr netip.Addr) error {
	name, index, family := link.Attrs().Name, link.Attrs().Index, familyOf(addr)
	addrs, err := dump.Addrs(h, link, family)
	if err != nil {
		return fmt.Errorf("container: list addresses: %w", err)
	}
	if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IPNet.String() == hostNet(addr).String() }) {
		return fmt.Errorf("container: %s: address %s missing", name, hostNet(addr))
	}
	gateway := gatewayOf(addr)
	for _, r := range podRoutes(index, gateway) {
		found, err := dump.RoutesLike(h, family, r, netlink.RT_FILTER_DST|netlink.RT_FILTER_OIF|netlink.RT_FILTER_GW)
		if err != nil {
			return fmt.Errorf("container: list routes: %w", err)
		}
		if len(found) == 0 {
			return fmt.Errorf("container: route %s missing", r)
		}
	}
	neighbours, err := dump.Neighbours(h, index, family)
	if err != nil {
		return fmt.Errorf("container: list neighbours: %w", err)
	}
	if !slices.ContainsFunc(neighbours, func(n netlink.Neigh) bool {
		a, _ := netip.AddrFromSlice(n.IP)
		return a.Unmap() == gateway && n.State&netlink.NUD_PERMANENT != 0 && bytes.Equal(n.HardwareAddr, gatewayMAC)
	}) {
		return fmt.Errorf("container: permanent neighbour %s missing", gateway)
	}
	return nil
}

func (s *Server) checkAddress(ctx context.Context, want Attachment) error {
	held, err := s.cfg.IPAM.Addresses(ctx, want.Handle())
	if err != nil {
		return fmt.Errorf("IPAM: %w", err)
	}
	for _, addr := range want.addresses() {
		if !slices.Contains(held, addr) {
			return fmt.Errorf("IPAM: %s is not assigned to %s", addr, want.Handle())
		}
	}
	return nil
}
