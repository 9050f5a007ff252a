package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/ipam"
)

// ensureTunnel gives vr0 an address of this node's own block, so that host processes that talk to remote pods have a
// source to which the answers come back through the tunnel. The address is kept across restarts by its IPAM handle.
func (a *Agent) ensureTunnel(ctx context.Context, in Inputs) error {
	if a.tunnel.IsValid() || !slices.ContainsFunc(in.Pools, func(p Pool) bool { return encapsulates(p.IPIPMode) }) {
		return nil
	}
	handle := "ipip-tunnel-addr-" + a.cfg.Node
	held, err := a.alloc.HandleAddresses(ctx, handle)
	if err != nil {
		return fmt.Errorf("tunnel address: %w", err)
	}
	var addr netip.Addr
	for _, h := range held {
		if _, ok := poolOf(in.Pools, netip.PrefixFrom(h, h.BitLen())); ok {
			addr = h
		}
	}
	if !addr.IsValid() {
		if len(held) > 0 {
			if _, err := a.alloc.ReleaseHandle(ctx, handle); err != nil {
				return fmt.Errorf("tunnel address: release %v, which is in no pool any more: %w", held, err)
			}
		}
		got, err := a.alloc.Assign(ctx, ipam.Request{Handle: handle, Use: "Tunnel",
			Attrs: map[string]string{"node": a.cfg.Node, "type": "ipipTunnelAddress"}})
		if err != nil {
			return fmt.Errorf("tunnel address: %w", err)
		}
		addr = got.Addr
	}
	if err := recordTunnel(ctx, a.store, a.cfg.Node, addr); err != nil {
		return fmt.Errorf("tunnel address: %w", err)
	}
	a.locked(func() { a.tunnel = addr })
	a.log.Info("tunnel address", "address", addr, "device", tunnelDevice)
	return nil
}

// applyTunnel makes the tunnel address the only IPv4 address of vr0.
func (a *Agent) applyTunnel() error {
	link, err := a.kernel.nl.LinkByName(tunnelDevice)
	if err != nil {
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return fmt.Errorf("device %s is not there yet: the vRouter makes it", tunnelDevice)
		}
		return err
	}
	// The vRouter checks what comes out of the tunnel itself, and against more than a reverse path.
	if err := writeSysctl("net/ipv4/conf/"+tunnelDevice+"/rp_filter", "0"); err != nil {
		return err
	}
	addrs, err := a.kernel.nl.AddrList(link, unix.AF_INET)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", tunnelDevice, err)
	}
	present := false
	for _, old := range addrs {
		p, ok := prefixOf(old.IPNet)
		if ok && p.Addr() == a.tunnel {
			present = true
			continue
		}
		if err := a.kernel.nl.AddrDel(link, &old); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s from %s: %w", old.IPNet, tunnelDevice, err)
		}
	}
	if present || !a.tunnel.IsValid() {
		return nil
	}
	p := netip.PrefixFrom(a.tunnel, a.tunnel.BitLen())
	if err := a.kernel.nl.AddrReplace(link, &netlink.Addr{IPNet: ipNet(p)}); err != nil {
		return fmt.Errorf("add address %s to %s: %w", p, tunnelDevice, err)
	}
	return nil
}

// prepareHost makes the node a router.
func prepareHost() error {
	return writeSysctl("net/ipv4/ip_forward", "1")
}

// writeSysctl writes a value that is not already there: on a node whose /proc/sys is read-only, one that is right is
// good enough.
func writeSysctl(name, value string) error {
	path := "/proc/sys/" + name
	old, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("sysctl %s: %w", name, err)
	}
	if string(old) == value+"\n" {
		return nil
	}
	if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
		return fmt.Errorf("sysctl %s: set it to %s: %w", name, value, err)
	}
	return nil
}
