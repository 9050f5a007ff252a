package port

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// rewrittenFlows asks the kernel for the flows that its connection tracking rewrites, in the direction of the answers. A
// kernel without connection tracking has none.
func rewrittenFlows() ([]vrouter.Flow, error) {
	tracker, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, nil // no netfilter at all
	}
	defer tracker.Close()
	list, err := tracker.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		if errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("connection tracking table: %w", err)
		}
		return nil, nil
	}
	var flows []vrouter.Flow
	for _, c := range list {
		out, back := c.Forward, c.Reverse
		if out.SrcIP.Equal(back.DstIP) && out.DstIP.Equal(back.SrcIP) && out.SrcPort == back.DstPort && out.DstPort == back.SrcPort {
			continue
		}
		from, fromOK := addrPort(back.SrcIP, back.SrcPort)
		to, toOK := addrPort(back.DstIP, back.DstPort)
		if fromOK && toOK {
			flows = append(flows, vrouter.Flow{Source: from, Destination: to, Protocol: back.Protocol})
		}
	}
	return flows, nil
}

func addrPort(ip net.IP, port uint16) (netip.AddrPort, bool) {
	a, ok := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port), ok && a.Unmap().Is4()
}

// remember puts flows into the map of those that are the kernel's.
func (s *steering) remember(flows []vrouter.Flow) error {
	for _, f := range flows {
		key := f.Key()
		if err := s.flows.Update(key[:], uint32(1), ebpf.UpdateAny); err != nil {
			return fmt.Errorf("map of flows: %w", err)
		}
	}
	return nil
}
