package port

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/gaissmai/bart"

	"margay/vrouter"
)

// shortcutPlan keeps the maps of a shortcut true to the router, to the kernel's neighbours, and to the pods. All but what
// says otherwise belongs to the goroutine of directPods.
type shortcutPlan struct {
	*shortcut
	steering *steering
	underlay *Underlay
	host     string // the name of vr0
	router   atomic.Pointer[vrouter.Router]
	dirty    atomic.Bool // something has changed that hops are made of
	poke     func()      // makes the goroutine look
	inKernel atomic.Int32

	tunnels, others bart.Lite // IPv4 routes that lead into a tunnel, and those that do not
	arrivalAt       tcxPlace
	noteAt          tcxPlace

	mu       sync.Mutex // gateways, and closed, for who counts
	gateways map[netip.Addr]*shortcutGateway
	byWay    map[uint32]netip.Addr // the gateways again, by their way
	closed   bool
}

// shortcutGateway is a node that routes lead to.
type shortcutGateway struct {
	way    uint32
	routes int
}

// tcxPlace is where a program is.
type tcxPlace struct {
	at    link.Link
	index int // 0: nowhere
}

func newShortcutPlan(s *steering, underlay *Underlay, host string, poke func()) *shortcutPlan {
	p := &shortcutPlan{shortcut: s.shortcut, steering: s, underlay: underlay, host: host, poke: poke, gateways: make(map[netip.Addr]*shortcutGateway),
		byWay: make(map[uint32]netip.Addr)}
	underlay.frames.resolver.watch(p)
	return p
}

// follow names the router whose outcomes the programs carry out. Before that they carry out none.
func (p *shortcutPlan) follow(r *vrouter.Router) {
	p.router.Store(r)
	r.OnTerms(p.changed)
	r.OnCapture(p.stand)
	p.changed()
}

// stand makes the programs leave everything alone, or not any more.
func (p *shortcutPlan) stand(aside bool) {
	off := uint32(0)
	if aside {
		off = 1
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		atomic.StoreUint32(&p.rule.off, off)
	}
}

// changed implements hopWatcher.
func (p *shortcutPlan) changed() {
	p.dirty.Store(true)
	p.poke()
}

// used implements hopWatcher.
func (p *shortcutPlan) used(to uint32) bool {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], to)
	p.mu.Lock()
	defer p.mu.Unlock()
	g := p.gateways[netip.AddrFrom4(b)]
	return g != nil && !p.closed && p.takeUsed(g.way)
}

// Carried returns what the programs have forwarded. Any goroutine may call it.
func (p *shortcutPlan) carried() (c vrouter.Carried, failed vrouter.Counter) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return c, failed
	}
	return vrouter.Carried{Encap: p.count(countEncap), Decap: p.count(countDecap), Local: p.count(countLocal)}, p.count(countFailed)
}

// close takes the programs off, before the shortcut is closed.
func (p *shortcutPlan) close() error {
	p.underlay.frames.resolver.watch(nil)
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.arrivalAt.leave()
	p.noteAt.leave()
	return nil
}

// route takes one change of the routes over. A packet goes by the route before or by the one after it: what is more
// specific is put in place before a route that covers it, and taken away after it.
func (p *shortcutPlan) route(c routeChange) error {
	if !c.prefix.Addr().Is4() {
		return nil
	}
	if c.there && c.hop.Kind == vrouter.KindTunnel {
		return p.tunnel(c.prefix, c.hop)
	}
	var errs []error
	if c.there {
		p.others.Insert(c.prefix)
		if p.covered(c.prefix) {
			errs = append(errs, p.steering.own(c.prefix, ownedException, true, 0))
		}
	}
	if p.tunnels.Get(c.prefix) {
		p.tunnels.Delete(c.prefix)
		errs = append(errs, p.setGateway(c.prefix, false, netip.Addr{}))
		for inside := range p.others.Subnets(c.prefix) {
			if !p.covered(inside) {
				errs = append(errs, p.steering.own(inside, ownedException, false, 0))
			}
		}
	}
	if !c.there {
		p.others.Delete(c.prefix)
		errs = append(errs, p.steering.own(c.prefix, ownedException, false, 0))
	}
	return errors.Join(errs...)
}

// covered reports whether a prefix lies within that of a tunnel.
func (p *shortcutPlan) covered(prefix netip.Prefix) bool { return p.tunnels.LookupPrefix(prefix) }

func (p *shortcutPlan) tunnel(prefix netip.Prefix, hop vrouter.NextHop) error {
	var errs []error
	if !p.tunnels.Get(prefix) {
		p.tunnels.Insert(prefix)
		for inside := range p.others.Subnets(prefix) {
			if inside != prefix {
				errs = append(errs, p.steering.own(inside, ownedException, true, 0))
			}
		}
	}
	gateway := hop.Gateway
	if hop.IsGroup() {
		gateway = netip.Addr{} // the vRouter chooses
	}
	errs = append(errs, p.setGateway(prefix, true, gateway))
	p.others.Delete(prefix)
	errs = append(errs, p.steering.own(prefix, ownedException, false, 0))
	return errors.Join(errs...)
}

// setGateway makes a prefix lead to a gateway, to none that the programs could take (the zero Addr), or no longer into a
// tunnel at all.
func (p *shortcutPlan) setGateway(prefix netip.Prefix, on bool, gateway netip.Addr) error {
	now := time.Now()
	old := p.steering.prefixes[prefix].route
	way := uint32(0)
	if on && gateway.Is4() {
		p.mu.Lock()
		g := p.gateways[gateway]
		if g == nil {
			if way = p.newWay(now); way != 0 {
				g = &shortcutGateway{way: way}
				p.gateways[gateway], p.byWay[way] = g, gateway
			}
		}
		if g != nil { // else there is no room, and the prefix is the vRouter's
			g.routes++
			way = g.way
		}
		p.mu.Unlock()
		p.dirty.Store(true)
	}
	err := p.steering.own(prefix, ownedRoute, on, way)
	p.mu.Lock()
	defer p.mu.Unlock()
	if a, ok := p.byWay[old]; ok {
		g := p.gateways[a]
		if g.routes--; g.routes == 0 {
			delete(p.gateways, a)
			delete(p.byWay, old)
			p.freeWay(old, now)
		}
	}
	return err
}

// refresh brings rules and hops in line with what is known. pods are those that are taken, by their way.
func (p *shortcutPlan) refresh(devices map[string]device, pods map[uint32]shortcutPod) error {
	if !p.dirty.Swap(false) {
		return nil
	}
	router := p.router.Load()
	if router == nil {
		return nil
	}
	now, terms, table := time.Now(), router.Terms(), *p.underlay.frames.resolver.table.Load()
	err := p.place(devices)
	arrive := uint32(0)
	if terms.Configured && p.arrivalAt.index != 0 && p.noteAt.index != 0 {
		arrive = 1
	}
	if arrive == 0 {
		atomic.StoreUint32(&p.rule.arrive, 0)
	}
	if terms.Configured {
		atomic.StoreUint32(&p.rule.address, rawAddress(terms.Config.NodeAddress))
	}
	uniform := uint32(0)
	if terms.Options.DSCP.Mode == vrouter.DSCPUniform {
		uniform = 1
	}
	atomic.StoreUint32(&p.rule.uniform, uniform)
	room, inKernel := true, int32(0)
	for address, g := range p.gateways {
		h := hopToNode(terms, table, address, router.OuterOffset(address))
		room = p.lead(g.way, h, now) && room
		if h.flags&hopSend != 0 {
			inKernel++
		}
	}
	for way, pod := range pods {
		room = p.lead(way, pod.hop(terms, router), now) && room
	}
	p.inKernel.Store(inKernel)
	if !room {
		p.dirty.Store(true) // there is some when what is free has rested
	}
	atomic.StoreUint32(&p.rule.arrive, arrive)
	return err
}

// place puts the programs onto the interfaces as they are now.
func (p *shortcutPlan) place(devices map[string]device) error {
	underlay := int(p.underlay.frames.resolver.index.Load())
	if !slices.ContainsFunc(mapValues(devices), func(d device) bool { return d.index == underlay && d.up }) {
		underlay = 0 // gone, or no Ethernet
	}
	return errors.Join(
		p.arrivalAt.move(p.arrival, ebpf.AttachTCXIngress, underlay),
		p.noteAt.move(p.note, ebpf.AttachTCXEgress, devices[p.host].index),
	)
}

func mapValues(m map[string]device) []device {
	all := make([]device, 0, len(m))
	for _, d := range m {
		all = append(all, d)
	}
	return all
}

// move puts a program onto the interface index, 0: none. It comes before others there.
func (t *tcxPlace) move(program *ebpf.Program, where ebpf.AttachType, index int) error {
	if t.index == index && (index == 0 || tcxAttached(t.at, index)) {
		return nil
	}
	t.leave()
	if index == 0 {
		return nil
	}
	at, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: program, Attach: where, Anchor: link.Head()})
	if err != nil {
		return fmt.Errorf("attach the BPF program: %w", err)
	}
	t.at, t.index = at, index
	return nil
}

// leave is move's undoing. It cannot fail in a way that matters: the link goes with its descriptor.
func (t *tcxPlace) leave() {
	if t.at != nil {
		_ = t.at.Close()
	}
	t.at, t.index = nil, 0
}

// rawAddress returns an IPv4 address as it lies in a packet.
func rawAddress(a netip.Addr) uint32 {
	b := a.As4()
	return binary.NativeEndian.Uint32(b[:])
}

// hopToNode returns what becomes of packets that a route takes to a node.
func hopToNode(terms vrouter.Terms, table hops, node netip.Addr, offset uint16) tcHop {
	if !terms.Configured || node == terms.Config.NodeAddress {
		return tcHop{}
	}
	h := tcHop{gateway: rawAddress(node), source: rawAddress(terms.Config.NodeAddress), mtu: uint32(terms.MTU(node)), tosKeep: 0xff,
		offset: uint32(offset)}
	if dscp := terms.Options.DSCP; dscp.Mode == vrouter.DSCPPipe {
		h.tosKeep, h.tosSet = 3, uint32(dscp.Value)<<2
	}
	if terms.IsNode(node) {
		h.flags |= hopNode
	}
	if terms.Options.ClampMSS {
		h.flags |= hopClamp
	}
	b := node.As4()
	if by := table.find(binary.BigEndian.Uint32(b[:])); by != nil && !by.raw {
		h.flags |= hopSend
		h.ethernet, h.index = by.ethernet, uint32(by.address.Ifindex)
	}
	return h
}

// shortcutPod is a pod whose interface is taken.
type shortcutPod struct {
	address netip.Addr
	link    *podLink
	mtu     int  // of the interface, in bytes
	peer    bool // packets may be handed to the pod's side at once
}

// hop returns what becomes of packets for the pod.
func (s *shortcutPod) hop(terms vrouter.Terms, router *vrouter.Router) tcHop {
	if !terms.Configured {
		return tcHop{}
	}
	h := tcHop{ethernet: s.link.ethernet, index: uint32(s.link.index), mtu: uint32(min(terms.Config.MTU, s.mtu)), flags: hopSend | hopPod}
	if kind, found := router.KindTo(s.address); found && kind == vrouter.KindLocal {
		h.flags |= hopLocal
	}
	if s.peer {
		h.flags |= hopPeer
	}
	return h
}
