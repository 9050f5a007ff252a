package agent

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
	"margay/ipam"
)

// collect gives back, until ctx is done, the addresses and blocks that nobody owns any more.
func (a *Agent) collect(ctx context.Context) {
	if a.cfg.IPAMGrace <= 0 {
		return
	}
	c := ipam.NewCollector(a.alloc, a.cfg.IPAMGrace, a.owned)
	// Agents that start together do not look together.
	pause := time.NewTimer(rand.N(c.Period()))
	defer pause.Stop()
	reported := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		}
		got, err := c.Look(ctx)
		if err == nil {
			err = a.cni.Forget(got.Addresses)
		}
		if text := fmt.Sprint(err); text != reported && ctx.Err() == nil {
			if reported = text; err != nil {
				a.log.Warn("looking for addresses that nobody owns", "err", err)
			}
		}
		pause.Reset(c.Period())
	}
}

// owned lists what is in use on this node: by pods, whoever attached them, by the tunnel, and by the node's interfaces.
// The kernel is asked and not the agent's memory.
func (a *Agent) owned(context.Context) (ipam.Owned, error) {
	out := ipam.Owned{Handles: map[string]bool{tunnelHandle(a.cfg.Node): true}, Addrs: map[netip.Addr]bool{}}
	live, err := a.cni.Live()
	if err != nil {
		return out, err
	}
	for _, pod := range live {
		out.Handles[pod.Handle()] = true
	}
	routes, err := dump.Routes(a.kernel.nl, nil, netlink.FAMILY_ALL)
	if err != nil {
		return out, fmt.Errorf("list kernel routes: %w", err)
	}
	for _, r := range routes {
		// Another plugin's pods have routes like ours: a single address by an interface of the host.
		if p, ok := prefixOf(r.Dst); ok && p.IsSingleIP() && r.Type == unix.RTN_UNICAST && r.Gw == nil {
			out.Addrs[p.Addr()] = true
		}
	}
	addrs, err := dump.Addrs(a.kernel.nl, nil, netlink.FAMILY_ALL)
	if err != nil {
		return out, fmt.Errorf("list addresses: %w", err)
	}
	for _, at := range addrs {
		if p, ok := prefixOf(at.IPNet); ok {
			out.Addrs[p.Addr()] = true
		}
	}
	return out, nil
}

// tunnelHandle is the IPAM handle of a node's tunnel address.
func tunnelHandle(node string) string { return "ipip-tunnel-addr-" + node }
