package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/cni/server"
	"margay/datastore"
	"margay/internal/dump"
	"margay/ipam"
)

// ensureTunnel gives vr0 an address of this node's own block, so that host processes that talk to remote pods have a
// source to which the answers come back through the tunnel. The address is kept across restarts by its IPAM handle, and
// given up when its pool is.
func (a *Agent) ensureTunnel(ctx context.Context, in Inputs) error {
	inPool := func(addr netip.Addr) bool {
		_, ok := poolOf(in.Pools, netip.PrefixFrom(addr, addr.BitLen()))
		return ok
	}
	encap := func(p Pool) bool { return p.Unsupported == "" && encapsulates(p.IPIPMode) }
	if a.tunnel.IsValid() && inPool(a.tunnel) && !a.tunnelLost.Load() || !slices.ContainsFunc(in.Pools, encap) {
		return nil
	}
	addr, err := a.findTunnel(ctx, inPool)
	if err != nil {
		return fmt.Errorf("tunnel address: %w", err)
	}
	if err := recordTunnel(ctx, a.store, a.cfg.Node, addr); err != nil {
		return fmt.Errorf("tunnel address: %w", err)
	}
	a.locked(func() { a.tunnel = addr })
	a.tunnelLost.Store(false)
	a.log.Info("tunnel address", "address", addr, "device", tunnelDevice)
	return nil
}

// confirmTunnel has the next reconciliation get the tunnel address back where IPAM does not have it as this node's any more:
// somebody has released it, or deleted the node with calicoctl, and it would be given to a pod.
func (a *Agent) confirmTunnel(ctx context.Context) error {
	var tunnel netip.Addr
	a.locked(func() { tunnel = a.tunnel })
	if !tunnel.IsValid() {
		return nil
	}
	held, err := a.alloc.HandleAddresses(ctx, tunnelHandle(a.cfg.Node))
	if err != nil || slices.Contains(held, tunnel) {
		return err
	}
	a.tunnelLost.Store(true)
	a.wake()
	return nil
}

// findTunnel returns the address that the node's handle holds, the one that it has lost, or a new one.
func (a *Agent) findTunnel(ctx context.Context, inPool func(netip.Addr) bool) (netip.Addr, error) {
	handle := tunnelHandle(a.cfg.Node)
	held, err := a.alloc.HandleAddresses(ctx, handle)
	if err != nil {
		// A block that cannot be read must not cost the node its address: it stands in the Node, too.
		if addr, ok := recordedTunnel(ctx, a.store, a.cfg.Node); ok && inPool(addr) {
			a.log.Warn("the tunnel address cannot be confirmed in IPAM; using the one recorded in the Node", "address", addr, "err", err)
			return addr, nil
		}
		return netip.Addr{}, err
	}
	for _, h := range held {
		if inPool(h) {
			return h, nil
		}
	}
	lost := a.tunnel.IsValid() && inPool(a.tunnel)
	switch {
	case lost:
		a.log.Warn("the tunnel address was released while the agent runs", "address", a.tunnel)
	case len(held) > 0:
		a.log.Info("tunnel address is in no pool any more", "addresses", held)
	}
	if lost || len(held) > 0 { // the handle may be left of one that was lost
		if _, err := a.alloc.ReleaseHandle(ctx, handle); err != nil {
			return netip.Addr{}, fmt.Errorf("release %v: %w", held, err)
		}
	}
	req := ipam.Request{Handle: handle, Use: datastore.UseTunnel, Attrs: map[string]string{"node": a.cfg.Node, "type": "ipipTunnelAddress"}}
	if lost {
		req.IPv4.IP = a.tunnel
		got, err := a.alloc.Assign(ctx, req)
		if err == nil || !errors.Is(err, ipam.ErrAddressInUse) {
			return got.Addr, err
		}
		a.log.Warn("the tunnel address cannot be had back: the node gets another", "err", err)
		req.IPv4.IP = netip.Addr{}
	}
	a.locked(func() { a.tunnel = netip.Addr{} }) // not ours any more, also if a pool of the same addresses comes back
	got, err := a.alloc.Assign(ctx, req)
	return got.Addr, err
}

// keepTunnel uses the address that the node's handle holds in a pool that is only retained, where there is no other.
func (a *Agent) keepTunnel(ctx context.Context, retained []Pool) error {
	encap := func(p Pool) bool { return encapsulates(p.IPIPMode) }
	if a.tunnel.IsValid() || !slices.ContainsFunc(retained, encap) {
		return nil
	}
	held, err := a.alloc.HandleAddresses(ctx, tunnelHandle(a.cfg.Node))
	if err != nil {
		return fmt.Errorf("tunnel address: %w", err)
	}
	for _, addr := range held {
		if p, ok := poolOf(retained, netip.PrefixFrom(addr, addr.BitLen())); ok && encap(p) {
			a.locked(func() { a.tunnel = addr })
			return nil
		}
	}
	return nil
}

// applyTunnel gives vr0 the tunnel address.
func (a *Agent) applyTunnel() error {
	link, err := a.kernel.nl.LinkByName(tunnelDevice)
	if err != nil {
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return fmt.Errorf("device %s is not there yet: the vRouter makes it", tunnelDevice)
		}
		return err
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		if err := a.kernel.nl.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s up: %w", tunnelDevice, err)
		}
	}
	// The vRouter checks what comes out of the tunnel itself, and against more than a reverse path.
	if err := server.SetSysctl("ipv4/conf/"+tunnelDevice+"/rp_filter", "0"); err != nil {
		return err
	}
	// One that is there is left alone: the kernel would tell us of a change, and that would bring us here again.
	_, present, err := a.tunnelAddresses(link)
	if err != nil || present || !a.tunnel.IsValid() {
		return err
	}
	p := netip.PrefixFrom(a.tunnel, a.tunnel.BitLen())
	if err := a.kernel.nl.AddrReplace(link, &netlink.Addr{IPNet: ipNet(p)}); err != nil {
		return fmt.Errorf("add address %s to %s: %w", p, tunnelDevice, err)
	}
	return nil
}

// trimTunnel takes every other IPv4 address from vr0. It comes after the kernel's routes: with an address go those that have
// it as their source.
func (a *Agent) trimTunnel() error {
	link, err := a.kernel.nl.LinkByName(tunnelDevice)
	if err != nil {
		return err
	}
	others, _, err := a.tunnelAddresses(link)
	if err != nil {
		return err
	}
	for _, old := range others {
		if err := a.kernel.nl.AddrDel(link, &old); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s from %s: %w", old.IPNet, tunnelDevice, err)
		}
	}
	return nil
}

// tunnelAddresses lists vr0's IPv4 addresses but the tunnel's, and tells whether that one is there.
func (a *Agent) tunnelAddresses(link netlink.Link) (others []netlink.Addr, present bool, err error) {
	addrs, err := dump.Addrs(a.kernel.nl, link, unix.AF_INET)
	if err != nil {
		return nil, false, fmt.Errorf("list addresses of %s: %w", tunnelDevice, err)
	}
	for _, at := range addrs {
		if p, ok := prefixOf(at.IPNet); ok && p.Addr() == a.tunnel {
			present = true
		} else {
			others = append(others, at)
		}
	}
	return others, present, nil
}

// prepareHost makes the node a router.
func prepareHost() error {
	return server.SetSysctl("ipv4/ip_forward", "1")
}
