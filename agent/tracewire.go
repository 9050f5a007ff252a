package agent

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"

	"margay/vrouter/rpc"
)

// What lies between two nodes a trace does not see; this file holds what each end knows of it.

// arpPatience is how long the kernel is given to find a neighbour: three questions, a second apart, and some more.
const arpPatience = 4 * time.Second

// resolve finds the hardware address of the next hop, and has the kernel ask for it where it is not known, as a packet would.
// It is nil where none is needed; false when nobody answers.
func (t *tracer) resolve(device string, addr netip.Addr) (mac net.HardwareAddr, passes bool) {
	const rung = "the neighbour"
	link, err := t.kernel.nl.LinkByName(device)
	if err != nil {
		t.unknown("kernel", rung, err)
		return nil, false
	}
	if link.Attrs().Flags&(net.FlagPointToPoint|net.FlagLoopback) != 0 || len(link.Attrs().HardwareAddr) == 0 {
		return nil, true
	}
	asked := false
	for limit := time.Now().Add(arpPatience); ; {
		n, ok := t.kernel.entry(device, addr)
		switch {
		case ok && n.State&(netlink.NUD_FAILED|netlink.NUD_INCOMPLETE) == 0 && n.HardwareAddr != nil:
			t.seg.Pinned = n.State&netlink.NUD_PERMANENT != 0
			return n.HardwareAddr, true
		case ok && asked && n.State&netlink.NUD_FAILED != 0, time.Now().After(limit):
			t.drop("kernel", rung, "neighbour", fmt.Sprintf("%s does not answer ARP on %s", addr, device),
				"see whether that node is up and on the same network as "+device)
			return nil, false
		case !asked:
			asked = true
			// NTF_USE: the kernel does what it would for a packet.
			if err := t.kernel.nl.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: addr.AsSlice(), Flags: netlink.NTF_USE}); err != nil {
				t.unknown("kernel", rung, fmt.Errorf("ask for %s on %s: %w", addr, device, err))
				return nil, false
			}
		}
		select {
		case <-t.ctx.Done():
			t.unknown("kernel", rung, t.ctx.Err())
			return nil, false
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// takenFromWire compares a packet that another node has sent with what the interface takes. A veth is known to drop what is
// too long; of a network card nobody can tell.
func (t *tracer) takenFromWire(device string) bool {
	link, err := t.kernel.nl.LinkByName(device)
	if err != nil {
		t.unknown("kernel", "the interface "+device, err)
		return false
	}
	t.seg.MAC = link.Attrs().HardwareAddr.String()
	length, mtu := t.pkt.TotalLen(), link.Attrs().MTU
	if length <= mtu {
		return true
	}
	why := fmt.Sprintf("%d bytes come from the other node, and the MTU of %s is %d", length, device, mtu)
	const rung, fix = "MTU of the receiving interface", "make the MTU of the underlay the same on all nodes"
	if link.Type() == "veth" && length > mtu+vlanHeader {
		t.drop("kernel", rung, "underlay_mtu", why+": they are dropped without a word", fix)
		return false
	}
	t.doubt("kernel", rung, "underlay_mtu", why+": some interfaces drop that", fix+"; or find out with --probe")
	return true
}

// carrier notes who forwards the packet where programs of the vRouter's at tc may: they, before the kernel's stack sees it, or
// the stack and a worker.
func (t *tracer) carrier(traced rpc.Traced) {
	t.byTC, t.handover = traced.ByTC, traced.Handover
	switch {
	case traced.ByTC:
		t.pass("vrouter", "forwarded by BPF at tc", "neither the kernel's stack nor user space sees it")
	case traced.LeftAlone != "":
		t.pass("vrouter", "left alone by BPF at tc", traced.LeftAlone)
	}
}
