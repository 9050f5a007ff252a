package agent

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/agent/api"
	"margay/agent/netfilter"
	"margay/internal/dump"
	"margay/vrouter/rpc"
)

// What happens inside a pod is asked of the kernel in the pod's own network namespace: its routes, its neighbours, its
// reverse path filter and its packet filters.

// vlanHeader is what the kernel grants a frame beyond the MTU of the interface that a veth's other end is.
const vlanHeader = 4

// podSide is a pod's end of its interface, looked at from inside; its handle is the namespace's.
type podSide struct {
	kernelTable
	link netlink.Link
	host net.HardwareAddr // of the host's side
}

func (p *podSide) name() string { return p.link.Attrs().Name }

// inPod runs f inside the pod behind an interface. A pod that cannot be entered leaves a doubt.
func (t *tracer) inPod(device string, f func(*podSide) bool) bool {
	host, err := t.kernel.nl.LinkByName(device)
	if err != nil {
		t.unknown("kernel", "the pod's interface", err)
		return false
	}
	passes := false
	err = t.cni.EnterPod(device, func(index int) error {
		nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("netlink in the pod: %w", err)
		}
		defer nl.Close()
		p := &podSide{kernelTable: kernelTable{nl: nl}, host: host.Attrs().HardwareAddr}
		if p.link, err = nl.LinkByIndex(index); err != nil {
			return fmt.Errorf("the pod's side of %s: %w", device, err)
		}
		passes = f(p)
		return nil
	})
	if err != nil {
		t.doubt("pod", "inside the pod", "pod_not_entered", "nobody could look into the pod: "+err.Error(),
			"give the agent SYS_ADMIN and /run/netns, as deploy/ does, or find out with --probe")
		return true
	}
	return passes
}

// leavePod is the packet's way out of its pod. local reports that it never leaves: it is for the pod itself.
func (t *tracer) leavePod(device string, p *podSide) (local, passes bool) {
	answer, err := p.askRoute(t.pkt.Src(), t.pkt.Dst(), "")
	const rung = "routing in the pod"
	if err == nil && !p.has(t.pkt.Src()) { // kernels differ in what they call that
		answer.reason = "martian"
	}
	switch {
	case err != nil:
		t.unknown("pod", rung, err)
		return false, false
	case answer.reason == "no_kernel_route":
		t.drop("pod", rung, "pod_no_route", "the pod has no route to "+t.pkt.Dst().String(),
			fmt.Sprintf("ip route add default via %s dev %s, in the pod, or delete the pod, so that it is attached anew", podGateway, p.name()))
		return false, false
	case answer.reason == "martian":
		t.drop("pod", rung, "pod_no_address", fmt.Sprintf("the pod does not have the address %s itself", t.pkt.Src()),
			fmt.Sprintf("ip address add %s/32 dev %s, in the pod, or delete the pod, so that it is attached anew", t.pkt.Src(), p.name()))
		return false, false
	case answer.reason != "":
		t.drop("pod", rung, "pod_"+answer.reason, "the pod's own routing refuses it: "+answer.detail, "take that away in the pod")
		return false, false
	}
	f, err := t.podFilters(p)
	if err != nil {
		t.unknown("pod", "packet filter in the pod", err)
		return false, false
	}
	if answer.local {
		t.pass("pod", rung, "to itself")
		return true, t.filtered(f, "pod", " in the pod", netfilter.Output, "", "lo") && t.filtered(f, "pod", " in the pod", netfilter.Input, "lo", "")
	}
	if answer.device != p.name() {
		t.drop("pod", rung, "pod_other_interface", fmt.Sprintf("the pod sends it by %s, and not by %s: what is behind that is not Margay's", answer.device, p.name()), "")
		t.seg.Outcome = api.Unknown
		return false, false
	}
	t.pass("pod", rung, answer.route)
	hooks := func(h netfilter.Hook) bool { return t.filtered(f, "pod", " in the pod", h, "", p.name()) }
	return false, hooks(netfilter.Output) && hooks(netfilter.Postrouting) && t.fits("pod", "the pod's MTU", answer.mtu, p.name()) &&
		t.podGateway(device, p, answer) && hooks(netfilter.Egress)
}

// podFilters are those in the pod, whose own kernel has always seen the question to an answer.
func (t *tracer) podFilters(p *podSide) (*filters, error) {
	state, reply := tracked(t.pkt, t.state, api.CarrierKernel)
	return loadFilters(p.nl, state, reply)
}

// podGateway is the gateway that pods have by Calico's convention.
const podGateway = "169.254.1.1"

// podGateway looks whether the pod addresses its frames to the host's side.
func (t *tracer) podGateway(device string, p *podSide, answer kernelAnswer) bool {
	const rung = "the gateway, as the pod knows it"
	mend := fmt.Sprintf("ip neigh replace %s lladdr %s dev %s nud permanent, in the pod, or delete the pod, so that it is attached anew", answer.gateway, p.host, p.name())
	n, ok := p.entry(p.name(), answer.gateway)
	switch {
	case ok && n.HardwareAddr != nil && n.State&(netlink.NUD_FAILED|netlink.NUD_INCOMPLETE) == 0:
		if !bytes.Equal(n.HardwareAddr, p.host) {
			t.strayWhy = fmt.Sprintf("the pod has %s for %s, and the host's side of the interface has %s", n.HardwareAddr, answer.gateway, p.host)
			t.strayFix = mend
			return true
		}
		t.pass("pod", rung, fmt.Sprintf("%s has %s", answer.gateway, n.HardwareAddr))
	case sysctl(device+"/proxy_arp") == 0 && !t.kernel.has(answer.gateway):
		t.drop("pod", rung, "pod_neighbour", fmt.Sprintf("the pod knows no hardware address of %s, and nobody on this node answers ARP for it", answer.gateway), mend)
		return false
	default:
		t.pass("pod", rung, answer.gateway.String()+" is asked for by ARP")
	}
	return true
}

// strayed ends the trace of a packet that the pod has addressed to hardware that is not there: for the kernel it is somebody
// else's. The vRouter, where it reads the pod's interface itself, does not look.
func (t *tracer) strayed(byVRouter bool) bool {
	switch {
	case t.strayWhy == "":
		return false
	case byVRouter:
		t.pass("vrouter", "the frame's hardware address", "not looked at: "+t.strayWhy)
		return false
	}
	t.drop("kernel", "the frame's hardware address", "pod_neighbour", t.strayWhy, t.strayFix)
	return true
}

// enterPod is the packet's way into the pod that it is for.
func (t *tracer) enterPod(device string, p *podSide) bool {
	a := p.link.Attrs()
	if a.Flags&net.FlagUp == 0 {
		t.drop("pod", "the pod's interface", "pod_interface", a.Name+" is down in the pod", "ip link set "+a.Name+" up, in the pod")
		return false
	}
	if !t.podNeighbour(device, p) {
		return false
	}
	// A veth hands over no frame that is longer than its receiving end takes (is_skb_forwardable in the kernel's
	// net/core/dev.c).
	if length := t.pkt.TotalLen(); length > a.MTU+vlanHeader {
		why := fmt.Sprintf("%d bytes do not fit the MTU %d of %s in the pod that it is for: they are dropped without a word", length, a.MTU, a.Name)
		fix := fmt.Sprintf("send at most %d bytes, or ip link set %s mtu, in the pod, as the host's side has it", a.MTU, a.Name)
		const rung = "the pod's MTU"
		switch {
		case !t.byTC || t.handover == rpc.HandoverOutside:
			t.drop("pod", rung, "mtu", why, fix)
			return false
		case t.handover == rpc.HandoverInside: // where nobody compares
			t.pass("pod", rung, fmt.Sprintf("%d bytes, MTU %d: BPF at tc hands them to the pod's side all the same", length, a.MTU))
		default:
			t.doubt("pod", rung, "mtu", why+", unless BPF at tc hands them to the pod's side, which an older vRouter does not tell", fix+"; or find out with --probe")
		}
	}
	f, err := t.podFilters(p)
	if err != nil {
		t.unknown("pod", "packet filter in the pod", err)
		return false
	}
	hooks := func(h netfilter.Hook) bool { return t.filtered(f, "pod", " in the pod", h, a.Name, "") }
	if !hooks(netfilter.Ingress) || !hooks(netfilter.Prerouting) {
		return false
	}
	const rung = "routing and reverse path in the pod"
	answer, err := p.askRoute(t.pkt.Src(), t.pkt.Dst(), a.Name)
	switch {
	case err != nil:
		t.unknown("pod", rung, err)
		return false
	case answer.reason == "rp_filter":
		t.drop("pod", rung, "pod_rp_filter", "the reverse path filter in the pod refuses it: "+answer.detail,
			"mend the pod's route back, or set net.ipv4.conf.all.rp_filter and that of "+a.Name+" to 0, in the pod")
		return false
	case answer.reason != "" || !answer.local:
		t.drop("pod", rung, "pod_no_address", fmt.Sprintf("the pod does not take it for its own: %s", orText(answer.detail, "it has another address")),
			fmt.Sprintf("ip address add %s/32 dev %s, in the pod, or delete the pod, so that it is attached anew", t.pkt.Dst(), a.Name))
		return false
	}
	t.pass("pod", rung, orText(answer.route, "local"))
	return hooks(netfilter.Input)
}

// podNeighbour looks whether the host addresses its frames to the pod.
func (t *tracer) podNeighbour(device string, p *podSide) bool {
	const rung = "the pod, as the host knows it"
	dst, mac := t.pkt.Dst(), p.link.Attrs().HardwareAddr
	if n, ok := t.kernel.entry(device, dst); ok && n.HardwareAddr != nil && n.State&(netlink.NUD_FAILED|netlink.NUD_INCOMPLETE) == 0 {
		why, fix := fmt.Sprintf("the node has %s for %s on %s, and the pod's interface has %s", n.HardwareAddr, dst, device, mac), fmt.Sprintf("ip neigh del %s dev %s", dst, device)
		switch {
		case bytes.Equal(n.HardwareAddr, mac):
			t.pass("kernel", rung, fmt.Sprintf("%s has %s", dst, mac))
		case !t.byTC || t.handover == rpc.HandoverOutside:
			t.drop("kernel", rung, "neighbour", why, fix)
			return false
		case t.handover == rpc.HandoverInside:
			t.pass("kernel", rung, "not looked at where BPF at tc hands packets to the pod's side: "+why)
		default:
			t.doubt("kernel", rung, "neighbour", why+", which does not matter if BPF at tc hands packets to the pod's side, and an older vRouter does not tell", fix+"; or find out with --probe")
		}
		return true
	}
	if p.link.Attrs().RawFlags&unix.IFF_NOARP != 0 {
		t.drop("kernel", rung, "neighbour", p.name()+" in the pod answers no ARP", "ip link set "+p.name()+" arp on, in the pod")
		return false
	}
	t.pass("kernel", rung, dst.String()+" is asked for by ARP")
	return true
}

// entry finds the neighbour entry for an address on a link.
func (k *kernelTable) entry(device string, addr netip.Addr) (netlink.Neigh, bool) {
	link, err := k.nl.LinkByName(device)
	if err != nil {
		return netlink.Neigh{}, false
	}
	entries, err := dump.Neighbours(k.nl, link.Attrs().Index, unix.AF_INET)
	if err != nil {
		return netlink.Neigh{}, false
	}
	for _, n := range entries {
		if a, ok := netip.AddrFromSlice(n.IP); ok && a.Unmap() == addr {
			return n, true
		}
	}
	return netlink.Neigh{}, false
}

// has reports whether an address is one of the namespace's own.
func (k *kernelTable) has(addr netip.Addr) bool {
	routes, err := k.nl.RouteGet(addr.AsSlice())
	return err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL
}
