package agent

import (
	"fmt"
	"strings"

	"margay/vrouter/rpc"
)

// explainKernel turns what the kernel refuses into a sentence, and says what would mend it.
func (t *tracer) explainKernel(a kernelAnswer) (why, fix string) {
	dst := t.pkt.Dst()
	switch a.reason {
	case "rp_filter":
		return "the reverse path filter refuses it: " + a.detail,
			"take away the route that leads elsewhere, or set net.ipv4.conf.all.rp_filter and that of the interface to 0 or 2"
	case "forwarding_off":
		return "the kernel does not forward: " + a.detail, "sysctl -w net.ipv4.ip_forward=1"
	case "martian":
		return "the kernel refuses the addresses: " + a.detail, ""
	case "no_kernel_route":
		if t.inPool() {
			return "the kernel has " + a.detail + ", not even the pool's", "look at `margayctl node status`: the agent installs the pools' routes"
		}
		return "the kernel has " + a.detail, "add one, or a default route"
	case "blackhole":
		switch own := t.ownBlock(); {
		case own != "" && strings.Contains(a.route, fmt.Sprintf("proto %d", routeProtocol)):
			return fmt.Sprintf("%s is in this node's block %s, and no pod of this node has it", dst, own),
				"see whose it is with `margayctl ipam show --ip " + dst.String() + "`"
		case strings.Contains(a.route, fmt.Sprintf("proto %d", routeProtocol)):
			t.seg.Peers = peersOf(t.speaker)
			return "no route to its block has been learned, and the pool's blackhole keeps it off the default route: " + a.detail, t.noRouteFix()
		}
		return "the kernel's route is a blackhole: " + a.detail, "ip route del " + strings.SplitN(a.detail, " proto", 2)[0]
	case "policy_rule":
		return "a rule of the kernel's routing policy refuses it: " + a.detail, "ip rule del " + a.detail
	case "prohibited", "unreachable":
		return "the kernel's route refuses it: " + a.detail, "ip route del " + strings.SplitN(a.detail, " proto", 2)[0]
	}
	return a.detail, ""
}

// explainDrop does the same for the vRouter's reasons.
func (t *tracer) explainDrop(d rpc.Traced) (why, fix string) {
	dst := t.pkt.Dst()
	switch d.Reason {
	case "not_configured":
		return "the vRouter has not been told this node's address", "look into the agent's log: it programs the vRouter"
	case "no_route":
		t.seg.Peers = peersOf(t.speaker)
		return "no route to " + dst.String() + " has been learned", t.noRouteFix()
	case "blackhole":
		return "the route to " + dst.String() + " is a drop route", ""
	case "no_pod":
		return fmt.Sprintf("%s is in a block of this node, and no pod has it", dst),
			"see whose it is with `margayctl ipam show --ip " + dst.String() + "`"
	case "direct_route":
		return "it should have gone unencapsulated, by the kernel's own route", "look at `margayctl node status` for why the agent has not installed it"
	case "gateway_is_self":
		return "the route's gateway is this node", "find who announces it: the other node has this one's address"
	case "packet_too_big":
		return fmt.Sprintf("%d bytes do not fit the tunnel, and DF is set", t.pkt.TotalLen()), "send less, or clear DF"
	case "ttl_expired":
		return fmt.Sprintf("the TTL is %d, and this node is a hop", t.pkt.TTL()), "send with a greater TTL"
	case "spoofed":
		return "the source is not the pod's own address", ""
	case "outer_source_not_node":
		return fmt.Sprintf("%s sends it in IP-in-IP, and is no node of the cluster in the datastore", t.pkt.Src()),
			"see whether its Node resource is there, with that address: `margayctl get nodes -o wide`; its agent registers it at start"
	case "outer_not_for_us":
		return fmt.Sprintf("the outer destination %s is not the address that this node's vRouter has", t.pkt.Dst()),
			"two nodes disagree about this node's address: `margayctl get nodes -o wide`"
	case "outer_fragment":
		return "it is a fragment of an outer packet", "make the underlay's MTU the same on all nodes"
	case "inner_source_not_routed_to_node":
		return "the way back to its source does not lead to the node that sends it: spoofed, or the route has not arrived here",
			"look at `margayctl node status` on this node: is the session with that node up?"
	case "inner_destination_not_local":
		return "its destination is no pod and no block of this node", "the sending node has a stale route: `margayctl node routes` there"
	case "nested_tunnel":
		return "it carries a tunnel within the tunnel", "start the vRouter so that it accepts nested tunnels, if you mean them"
	}
	return "the vRouter drops it: " + d.Reason, ""
}

// noRouteFix looks for what keeps the route away.
func (t *tracer) noRouteFix() string {
	dst := t.pkt.Dst()
	t.mu.Lock()
	rejected := t.desired.Rejected
	t.mu.Unlock()
	for _, r := range rejected {
		if r.Prefix.Contains(dst) && r.Prefix.Bits() > 0 {
			return fmt.Sprintf("%s was announced by %s and refused: %s", r.Prefix, r.Peer, r.Why)
		}
	}
	var down []string
	for _, p := range t.seg.Peers {
		if p.State != "Established" {
			down = append(down, fmt.Sprintf("%s is %s", p.Address, strings.TrimSuffix(p.State+": "+p.LastError, ": ")))
		}
	}
	switch {
	case len(down) > 0:
		return "bring the BGP sessions up: " + strings.Join(down, "; ")
	case len(t.seg.Peers) == 0:
		return "this node has no BGP peers: switch the mesh on (BGPConfiguration nodeToNodeMeshEnabled), or add a BGPPeer"
	}
	return "all BGP sessions are up, and nobody announces it: see which node has the block with `margayctl ipam show --ip " + dst.String() + "`"
}

// inPool reports whether the destination lies in a pool.
func (t *tracer) inPool() bool {
	for _, p := range t.cluster.inputs().Pools {
		if p.CIDR.Contains(t.pkt.Dst()) {
			return true
		}
	}
	return false
}

// ownBlock returns this node's block that has the destination, "" when none has.
func (t *tracer) ownBlock() string {
	for _, b := range t.cluster.blocks() {
		if b.Contains(t.pkt.Dst()) {
			return b.String()
		}
	}
	return ""
}
