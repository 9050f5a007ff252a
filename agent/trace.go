package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"margay/agent/api"
	"margay/agent/netfilter"
	"margay/bgp"
	"margay/vrouter/packet"
	"margay/vrouter/rpc"
)

// askTimeout bounds one question of a trace to the vRouter.
const askTimeout = 3 * time.Second

// tracer follows one packet through this node. Who decides is asked: the vRouter about its ladder, the kernel about its
// routes and rules; the tracer only carries the packet from one to the next.
type tracer struct {
	*Agent
	ctx context.Context
	seg api.Segment
	pkt packet.IPv4

	state      api.ConnState
	question   api.Carrier // of the packet that this one answers
	noEcho     bool
	byTC       bool // programs of the vRouter's at tc forward it here, and not a worker
	handover   rpc.Handover
	node       *filters // this node's, once they have been read
	redirected bool     // a filter has made this host the destination
	// strayWhy, strayFix are about a frame that the pod addresses to nobody; empty for one that is well addressed.
	strayWhy, strayFix string
}

// trace says what would become of a packet at this node. The error says that the request is wrong, or the agent not far
// enough to tell.
func (a *Agent) trace(ctx context.Context, req api.TraceRequest) (api.Segment, error) {
	pkt, fault := packet.ParseIPv4(req.Packet)
	if fault != packet.FaultNone {
		return api.Segment{}, fmt.Errorf("packet: %s: expected an IPv4 packet", fault)
	}
	a.mu.Lock()
	ready := a.opened && a.speaker != nil
	self := a.underlay.Prefix.Addr()
	a.mu.Unlock()
	if !ready {
		return api.Segment{}, errors.New("the agent is still starting: " + fmt.Sprint(a.readyError()))
	}
	switch req.State {
	case api.StateNew, api.StateEstablished, api.StateUnknown:
	default:
		return api.Segment{}, fmt.Errorf("state %q: expected established, unknown, or none for a new connection", req.State)
	}
	switch req.Question {
	case api.CarrierUnknown, api.CarrierKernel, api.CarrierVRouter:
	default:
		return api.Segment{}, fmt.Errorf("question %q: expected kernel, vrouter, or none", req.Question)
	}
	t := &tracer{Agent: a, ctx: ctx, pkt: slices.Clone(pkt), state: req.State, question: req.Question, noEcho: req.NoEcho}
	t.seg.Node, t.seg.Address, t.seg.Carrier = a.cfg.Node, self, api.CarrierVRouter
	switch req.Entry {
	case api.EntryPod:
		t.fromPod()
	case api.EntryHost:
		t.fromHost()
	case api.EntryUnderlay:
		t.fromUnderlay()
	default:
		return api.Segment{}, fmt.Errorf("entry %q: expected pod, host or underlay", req.Entry)
	}
	return t.seg, nil
}

// pass notes a rung that the packet has climbed.
func (t *tracer) pass(by, name, detail string) {
	t.seg.Rungs = append(t.seg.Rungs, api.Rung{By: by, Name: name, Detail: detail, Passed: true})
}

// drop ends the trace at a rung.
func (t *tracer) drop(by, name, reason, why, fix string) {
	t.seg.Rungs = append(t.seg.Rungs, api.Rung{By: by, Name: name, Detail: why})
	t.seg.Outcome, t.seg.Reason, t.seg.Why, t.seg.Fix = api.Dropped, reason, why, fix
}

// unknown ends the trace because somebody could not be asked.
func (t *tracer) unknown(by, name string, err error) {
	t.drop(by, name, "not_asked", strings.ReplaceAll(err.Error(), "\n", "; "), "")
	t.seg.Outcome = api.Unknown
}

// doubt notes that it cannot be told whether the packet passes a rung, and lets it pass.
func (t *tracer) doubt(by, name, reason, why, fix string) {
	t.seg.Rungs = append(t.seg.Rungs, api.Rung{By: by, Name: name, Detail: why, Passed: true, Doubtful: true})
	t.seg.Doubts = append(t.seg.Doubts, api.Doubt{By: by, Rung: name, Reason: reason, Why: why, Fix: fix})
}

func (t *tracer) caveat(format string, args ...any) {
	t.seg.Caveats = append(t.seg.Caveats, fmt.Sprintf(format, args...))
}

// fromPod begins with a packet that one of this node's pods sends.
func (t *tracer) fromPod() {
	src := t.pkt.Src()
	device := t.pods.link(src)
	if device == "" {
		t.drop("agent", "the pod", "no_such_pod", fmt.Sprintf("no pod of this node has the address %s", src),
			"look for the pod's address with `margayctl ipam show --ip "+src.String()+"`")
		return
	}
	mtu, wrong, err := t.kernel.linkState(device)
	switch {
	case err != nil:
		t.unknown("kernel", "the pod's interface", err)
		return
	case wrong != "":
		t.drop("kernel", "the pod's interface", "pod_interface", wrong, "delete the pod, so that it is attached anew")
		return
	}
	local := false
	if !t.inPod(device, func(p *podSide) (passes bool) { local, passes = t.leavePod(device, p); return passes }) {
		return
	}
	if local {
		t.pass("pod", "delivered to the pod", t.pkt.Dst().String())
		t.seg.Outcome, t.seg.Via, t.seg.Packet = api.Delivered, device, slices.Clone(t.pkt)
		return
	}
	if length := t.pkt.TotalLen(); length > mtu+vlanHeader {
		t.drop("kernel", "the pod's interface", "mtu", fmt.Sprintf("%d bytes do not fit the MTU %d of %s, the host's side of the pod's interface: they are dropped without a word", length, mtu, device),
			"make both sides' MTUs the same: delete the pod, so that it is attached anew")
		return
	}
	t.pass("kernel", "the pod's interface", fmt.Sprintf("%s, MTU %d", device, mtu))
	done, handled := t.fromPodInterface(device)
	if !handled && t.strayed(false) {
		return
	}
	if handled {
		if !done {
			t.kernelForward(tunnelDevice) // the vRouter has handed it to the kernel
		}
		return
	}
	allowed, err := t.cni.MaySend(device, src)
	switch {
	case err != nil:
		t.unknown("kernel", "anti-spoofing", err)
		return
	case !allowed:
		t.drop("kernel", "anti-spoofing", "spoofed", fmt.Sprintf("%s may not send from %s", device, src),
			"restart the agent of this node: it writes the rules anew")
		return
	}
	t.pass("kernel", "anti-spoofing", fmt.Sprintf("%s may send from %s", device, src))
	t.kernelForward(device)
}

// fromPodInterface asks the vRouter, which has the pods' own interfaces in the attachment direct; handled is false where it
// has not. done is false when it hands the packet to the kernel.
func (t *tracer) fromPodInterface(device string) (done, handled bool) {
	traced, err := t.askVRouter(rpc.Transit)
	if errors.Is(err, rpc.ErrNoSwitch) || errors.Is(err, rpc.ErrUnavailable) {
		return false, false // the kernel has it then
	}
	if err != nil {
		t.vrouterSilent(err)
		return true, true
	}
	if traced.LeftToKernel != "" {
		t.pass("vrouter", "left to the kernel at the pod's interface", traced.LeftToKernel)
		return false, false
	}
	if !traced.ByTC && !t.atInterface(netfilter.Ingress, device) {
		return true, true
	}
	const rung = "takes it from the pod's interface"
	t.pass("vrouter", rung, device)
	t.strayed(true)
	if done = t.follow(traced); !done && !traced.Steers {
		t.doubt("vrouter", rung, "older_vrouter", "the kernel has it then, and the vRouter, an older one, does not tell whether by "+device+" or by "+tunnelDevice+", which packet filters may tell apart",
			"upgrade the vRouter of "+t.cfg.Node+"; or find out with --probe")
	}
	return done, true
}

// fromHost begins with a packet that a process of this node sends.
func (t *tracer) fromHost() {
	t.seg.Carrier = api.CarrierKernel
	answer, err := t.kernel.askRoute(t.pkt.Src(), t.pkt.Dst(), "")
	if err == nil && t.pkt.Src().IsUnspecified() && answer.source.Is4() {
		t.pkt = withSource(t.pkt, answer.source)
	}
	if !t.routed("routing, of the node's own packet", answer, err) || !t.nodeHook(netfilter.Output, "", answer.device) {
		return
	}
	t.out("", answer)
}

// withSource returns a copy of p that comes from another address; the transport's checksum stays, which nobody here asks for.
func withSource(p packet.IPv4, source netip.Addr) packet.IPv4 {
	out := slices.Clone(p)
	copy(out[12:16], source.AsSlice())
	out[10], out[11] = 0, 0
	binary.BigEndian.PutUint16(out[10:], packet.Checksum(out[:out.HeaderLen()], 0))
	return out
}

// fromUnderlay begins with a packet that another node has sent to this one.
func (t *tracer) fromUnderlay() {
	if t.pkt.Protocol() != packet.ProtocolIPIP {
		if t.takenFromWire(t.underlayName()) {
			t.kernelForward(t.underlayName())
		}
		return
	}
	traced, err := t.askVRouter(rpc.Decap)
	// Programs at tc come before a device's ingress filter, and before no other.
	early := err == nil && traced.ByTC
	if !t.takenFromWire(t.underlayName()) || !early && !t.atInterface(netfilter.Ingress, t.underlayName()) {
		return
	}
	if !t.vrouterAlive() {
		return
	}
	if err != nil {
		t.vrouterSilent(err)
		return
	}
	if !t.follow(traced) {
		t.kernelForward(tunnelDevice)
	}
}

// kernelForward carries the packet through the kernel's input side and on.
func (t *tracer) kernelForward(in string) {
	t.seg.Carrier = api.CarrierKernel
	if !t.nodeHook(netfilter.Ingress, in, "") || !t.nodeHook(netfilter.Prerouting, in, "") {
		return
	}
	answer, err := t.kernel.askRoute(t.pkt.Src(), t.pkt.Dst(), in)
	if !t.redirected && !t.routed("routing and reverse path, coming by "+in, answer, err) {
		return
	}
	answer.local = answer.local || t.redirected
	if !answer.local {
		if t.pkt.TTL() <= 1 {
			t.drop("kernel", "time to live", "ttl_expired", fmt.Sprintf("the TTL is %d, and this node is a hop", t.pkt.TTL()),
				"send with a greater TTL; the kernel answers with ICMP time exceeded")
			return
		}
		packet.DecrementTTL(t.pkt)
	}
	t.out(in, answer)
}

// routed notes the kernel's answer; false when the packet ends here.
func (t *tracer) routed(name string, answer kernelAnswer, err error) bool {
	if err != nil {
		t.unknown("kernel", name, err)
		return false
	}
	if answer.reason == "" {
		t.pass("kernel", name, answer.route)
		return true
	}
	why, fix := t.explainKernel(answer)
	t.drop("kernel", name, answer.reason, why, fix)
	return false
}

// out carries the packet, which has come by in or is the node's own, out of the kernel where the kernel has said.
func (t *tracer) out(in string, answer kernelAnswer) {
	if answer.local {
		if !t.nodeHook(netfilter.Input, orText(in, "lo"), "") {
			return
		}
		t.pass("kernel", "delivered to the node itself", t.pkt.Dst().String())
		t.seg.Outcome, t.seg.Packet = api.Delivered, slices.Clone(t.pkt)
		return
	}
	if in != "" && !t.nodeHook(netfilter.Forward, in, answer.device) || !t.nodeHook(netfilter.Postrouting, in, answer.device) {
		return
	}
	if strings.HasPrefix(answer.device, "cali") {
		if t.nodeHook(netfilter.Egress, "", answer.device) {
			t.toPod(answer.device)
		}
		return
	}
	if !t.fits("kernel", "MTU of "+answer.device, answer.mtu, answer.device) || !t.nodeHook(netfilter.Egress, "", answer.device) {
		return
	}
	switch answer.device {
	case tunnelDevice:
		t.intoTunnel()
	default:
		t.leave(answer, false)
	}
}

// intoTunnel is what follows when the kernel has routed the packet to vr0.
func (t *tracer) intoTunnel() {
	if !t.vrouterAlive() {
		return
	}
	traced, err := t.askVRouter(rpc.Encap)
	if err != nil {
		t.vrouterSilent(err)
		return
	}
	t.follow(traced)
}

// vrouterAlive looks whether a vRouter stands behind vr0.
func (t *tracer) vrouterAlive() bool {
	_, wrong, err := t.kernel.linkState(tunnelDevice)
	switch {
	case err != nil:
		t.unknown("kernel", "the device "+tunnelDevice, err)
	case wrong != "":
		t.drop("kernel", "the device "+tunnelDevice, "vrouter_dead", wrong+": no vRouter reads it",
			"start the vRouter of this node, and look into its log for why it ended")
	default:
		return true
	}
	return false
}

// vrouterSilent ends the trace: the vRouter cannot be asked.
func (t *tracer) vrouterSilent(err error) {
	if errors.Is(err, rpc.ErrVersion) {
		t.unknown("vrouter", "the ladder", fmt.Errorf("%w: upgrade the vRouter", err))
		return
	}
	t.drop("vrouter", "the ladder", "vrouter_dead", "the vRouter does not answer: "+err.Error(),
		"start the vRouter of this node, and look into its log for why it ended")
}

func (t *tracer) askVRouter(d rpc.Direction) (rpc.Traced, error) {
	ctx, cancel := context.WithTimeout(t.ctx, askTimeout)
	defer cancel()
	traced, err := t.plane.client.Trace(ctx, d, t.pkt)
	if err == nil {
		traced = t.afterQuestion(d, traced)
	}
	return traced, err
}

// follow goes on from what the vRouter has done with the packet; false when it has handed the packet to the kernel.
func (t *tracer) follow(traced rpc.Traced) bool {
	t.carrier(traced)
	for i, r := range traced.Rungs {
		detail := r.Detail
		if traced.Route.Prefix.IsValid() && strings.HasPrefix(r.Name, "route to") {
			detail += t.origin(traced.Route.Prefix, outerOf(traced.Packet).Dst)
		}
		if traced.Back.Prefix.IsValid() && strings.HasPrefix(r.Name, "the way back") {
			detail += t.origin(traced.Back.Prefix, outerOf(t.pkt).Src)
		}
		if !traced.Forwarded && i == len(traced.Rungs)-1 {
			why, fix := t.explainDrop(traced)
			if detail != "" {
				why += " (" + detail + ")"
			}
			t.drop("vrouter", r.Name, traced.Reason, why+t.answered(traced.Answer), fix)
			return true
		}
		t.pass("vrouter", r.Name, detail)
	}
	t.pkt = traced.Packet
	switch traced.Out {
	case "pod":
		if inside := traced.ByTC && traced.Handover == rpc.HandoverInside; inside || t.atInterface(netfilter.Egress, traced.OutInterface) {
			t.toPod(traced.OutInterface)
		}
	case "underlay":
		t.intoUnderlay()
	default:
		return false
	}
	return true
}

// answered says what the vRouter tells the sender.
func (t *tracer) answered(icmp []byte) string {
	a, fault := packet.ParseIPv4(icmp)
	if fault != packet.FaultNone || len(a.Payload()) < 8 {
		return ""
	}
	p := a.Payload()
	text := fmt.Sprintf("; the sender is told by ICMP type %d code %d", p[0], p[1])
	if p[0] == packet.ICMPUnreachable && p[1] == packet.CodeFragNeeded {
		text += fmt.Sprintf(", MTU %d", int(p[6])<<8|int(p[7]))
	}
	return text
}

// intoUnderlay is the way of an encapsulated packet to the next node.
func (t *tracer) intoUnderlay() {
	answer, err := t.kernel.askRoute(t.pkt.Src(), t.pkt.Dst(), "")
	if err == nil && answer.local {
		answer.reason, answer.detail = "send_failed", t.pkt.Dst().String()+" is this node itself"
	}
	if !t.routed("routing of the outer packet", answer, err) || !t.fits("kernel", "MTU of "+answer.device, answer.mtu, answer.device) {
		return
	}
	t.leave(answer, true)
}

// leave is the end of a packet's way through this node; outer says that the vRouter itself sends it.
func (t *tracer) leave(answer kernelAnswer, outer bool) {
	_, wrong, err := t.kernel.linkState(answer.device)
	switch {
	case err != nil:
		t.unknown("kernel", "the interface "+answer.device, err)
		return
	case wrong != "":
		t.drop("kernel", "the interface "+answer.device, "interface_down", wrong, "set it up again: ip link set "+answer.device+" up")
		return
	}
	if t.pkt.Protocol() != packet.ProtocolIPIP {
		masquerade, err := t.cni.Masquerades(t.pkt.Src(), t.pkt.Dst())
		if err != nil {
			t.caveat("the masquerade rules could not be read: %s", err)
		} else if masquerade {
			was := t.pkt.Src()
			t.masquerade(t.kernel.nl, answer.device)
			t.pass("kernel", "masquerade", fmt.Sprintf("%s becomes the node's own address on %s, %s", was, answer.device, t.pkt.Src()))
		}
	}
	mac, passes := t.resolve(answer.device, answer.gateway)
	if !passes || outer && !t.outerFilters(answer.device, mac != nil) {
		return
	}
	t.seg.Next, t.seg.Via, t.seg.Packet, t.seg.Outcome = answer.gateway, answer.device, slices.Clone(t.pkt), api.Left
	t.seg.NextMAC = mac.String()
	detail := answer.device
	if mac != nil {
		detail += ", neighbour " + mac.String()
	}
	if slices.ContainsFunc(t.cluster.members.all(), func(m Member) bool { return m.Address == answer.gateway }) {
		t.seg.Outcome = api.Forwarded
		t.askFabric(outer)
		t.pass("kernel", "sent to node "+answer.gateway.String(), detail)
		return
	}
	if t.pkt.Protocol() == packet.ProtocolIPIP { // an outer packet's destination may lie behind a router
		t.seg.Next, t.seg.Outcome = t.pkt.Dst(), api.Forwarded
		t.askFabric(outer)
	}
	t.pass("kernel", "sent to "+answer.gateway.String(), detail)
}

// toPod is the last step: out by a pod's interface, if the packet fits its MTU.
func (t *tracer) toPod(device string) {
	mtu, wrong, err := t.kernel.linkState(device)
	owner := t.pods.link(t.pkt.Dst())
	switch {
	case err != nil:
		t.unknown("kernel", "the pod's interface", err)
	case wrong != "":
		t.drop("kernel", "the pod's interface", "pod_interface", wrong, "delete the pod, so that it is attached anew")
	case owner == "":
		t.drop("agent", "the pod", "no_such_pod", fmt.Sprintf("%s leads to %s, but no pod of this node has the address", device, t.pkt.Dst()),
			"restart the agent of this node: it removes what belongs to no pod")
	case t.fits("kernel", "MTU of "+device, mtu, device) && t.inPod(device, func(p *podSide) bool { return t.enterPod(device, p) }):
		t.pass("kernel", "delivered to the pod", t.pkt.Dst().String()+" by "+device)
		t.seg.Outcome, t.seg.Via, t.seg.Packet = api.Delivered, device, slices.Clone(t.pkt)
	}
}

// fits compares the packet with an MTU. One that is too long ends, or is cut: its first fragment goes on.
func (t *tracer) fits(by, name string, mtu int, device string) bool {
	length := t.pkt.TotalLen()
	if mtu == 0 || length <= mtu {
		if by == "kernel" {
			t.pass(by, name, fmt.Sprintf("%d bytes, MTU %d", length, mtu))
		}
		return true
	}
	if t.pkt.DF() {
		why := fmt.Sprintf("%d bytes do not fit the MTU %d of %s, and DF is set", length, mtu, device)
		fix := fmt.Sprintf("send at most %d bytes, or clear DF", mtu)
		if by == "kernel" {
			why += fmt.Sprintf("; the sender is told by ICMP fragmentation needed, MTU %d", mtu)
		}
		t.drop(by, name, "mtu", why, fix)
		return false
	}
	var f packet.Fragmenter
	first := make([]byte, length)
	fault := f.Start(t.pkt, mtu)
	if fault == packet.FaultNone {
		first = first[:f.Next(first)]
		t.pkt, fault = packet.ParseIPv4(first)
	}
	if fault != packet.FaultNone {
		t.drop(by, name, "mtu", fmt.Sprintf("%d bytes do not fit the MTU %d of %s, and cannot be cut: %s", length, mtu, device, fault), "")
		return false
	}
	t.pass(by, name, fmt.Sprintf("%d bytes, MTU %d: fragments; the first goes on here", length, mtu))
	return true
}

func (t *tracer) underlayName() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.underlay.Interface
}

// outerOf returns IP-in-IP's outer addresses; the zero value for another packet.
func outerOf(b []byte) (outer struct{ Src, Dst netip.Addr }) {
	if p, fault := packet.ParseIPv4(b); fault == packet.FaultNone && p.Protocol() == packet.ProtocolIPIP {
		outer.Src, outer.Dst = p.Src(), p.Dst()
	}
	return outer
}

// origin says which peer a route has come from; of a route with several gateways, which the one has that the packet takes.
func (t *tracer) origin(p netip.Prefix, gateway netip.Addr) string {
	path, ok := t.speaker.Best()[p]
	if !ok {
		return ""
	}
	path = taken(path, gateway)
	text := fmt.Sprintf(", by BGP from %s (AS %d) since %s", path.Peer, path.AS, path.Since.UTC().Format(time.RFC3339))
	if path.Stale {
		text += ", stale: the peer is restarting"
	}
	return text
}

// taken returns the one of several equally good paths that leads by a gateway, the best where none does.
func taken(best bgp.Path, gateway netip.Addr) bgp.Path {
	all := best.All()
	if i := slices.IndexFunc(all, func(p bgp.Path) bool { return p.NextHop == gateway }); i >= 0 {
		return all[i]
	}
	return best
}
