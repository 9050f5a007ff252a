package port

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/vrouter"
)

const (
	// directPace is the least time between two looks at the pods, in milliseconds.
	directPace = 5
	// directTend is the time between looks when nothing seems to have changed, in milliseconds.
	directTend = rebindInterval
)

// directPods brings a Direct's table in line with the pods that the control plane tells of, and with what the kernel says
// about their interfaces. An interface is taken as soon as it is there, up, and the pod has answered for its address;
// the kernel asks it, and goes on asking by itself. Until then, and whenever the pod no longer answers, the interface is
// the kernel's.
type directPods struct {
	direct   *Direct
	io       string // IOPacket, IOXDP or IOTC
	steering *steering
	plan     *shortcutPlan // with IOTC only
	// rewritten is what the kernel rewrote when the port was opened.
	rewritten []vrouter.Flow
	links     *netlink.Handle
	place     *namespace
	events    int // netlink socket: links and neighbours
	wake      int // eventfd: pods, routes, or stopped
	stopped   atomic.Bool
	done      sync.WaitGroup

	mu     sync.Mutex // what the control plane has told, the open interfaces for who reads their counters, and freed
	told   []vrouter.Pod
	routes []routeChange
	open   map[*podLink]bool
	lost   uint64 // by interfaces that are closed
	state  string
	freed  bool // the maps of steering are closed, or about to be

	// The goroutine's own.
	pods    []vrouter.Pod
	devices map[string]device // by name
	names   map[int]string    // of devices, by index
	hosts   map[neighbour]net.HardwareAddr
	asked   map[neighbour]bool
	queued  map[int]bool // devices, by index, at which a queueing discipline holds packets back
	stale   bool         // devices and hosts have to be read anew
	slots   []*podLink
	mtus    []int              // of slots, in bytes, as the table has them
	frames  int                // of a pod's AF_XDP socket, see XDPOptions
	taken   map[netip.Addr]int // slots
	retired []retiredLink
	trouble map[string]error // by interface: why it is left to the kernel
	noXDP   error            // why an interface is read by AF_PACKET instead
}

// retiredLink is an interface that is closed as soon as Recv has taken the table of that generation.
type retiredLink struct {
	link       *podLink
	slot       int
	generation uint64
}

func newDirectPods(d *Direct, underlay *Underlay, io string) (_ *directPods, err error) {
	p := &directPods{direct: d, io: io, events: -1, wake: -1, open: make(map[*podLink]bool), stale: true,
		asked: make(map[neighbour]bool), taken: make(map[netip.Addr]int), trouble: make(map[string]error)}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.free())
		}
	}()
	if p.steering, err = newSteering(io); err != nil {
		return nil, err
	}
	if p.rewritten, err = rewrittenFlows(); err != nil {
		return nil, err
	}
	if err := p.steering.remember(p.rewritten); err != nil {
		return nil, err
	}
	if p.place, err = thisNamespace(); err != nil {
		return nil, err
	}
	if p.links, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	if p.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, err
	}
	p.events, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	groups := uint32(1<<(unix.RTNLGRP_LINK-1) | 1<<(unix.RTNLGRP_NEIGH-1) | 1<<(unix.RTNLGRP_TC-1))
	if err := unix.Bind(p.events, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	if p.steering.shortcut != nil {
		p.plan = newShortcutPlan(p.steering, underlay, d.host.Name(), p.poke)
	}
	p.describe()
	p.done.Go(p.run)
	return p, nil
}

// set takes over what vrouter.Router.OnPods tells.
func (p *directPods) set(pods []vrouter.Pod) {
	p.mu.Lock()
	p.told = pods
	p.mu.Unlock()
	p.poke()
}

func (p *directPods) poke() {
	// The counter cannot overflow: run reads it. A failed write is impossible on a valid eventfd.
	_, _ = unix.Write(p.wake, []byte{1, 0, 0, 0, 0, 0, 0, 1})
}

// close ends the goroutine, and gives all interfaces back to the kernel.
func (p *directPods) close() error {
	p.stopped.Store(true)
	p.poke()
	p.done.Wait()
	return p.free()
}

func (p *directPods) free() error {
	var errs []error
	for l := range p.open {
		errs = append(errs, l.close())
	}
	if p.plan != nil {
		errs = append(errs, p.plan.close())
	}
	if p.steering != nil {
		p.mu.Lock()
		p.freed = true
		p.mu.Unlock()
		errs = append(errs, p.steering.close())
	}
	if p.links != nil {
		p.links.Close()
	}
	if p.place != nil {
		errs = append(errs, p.place.close())
	}
	for _, fd := range []int{p.events, p.wake} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	return errors.Join(errs...)
}

// run looks whenever there is a reason to, on a thread that stays in the namespace.
func (p *directPods) run() {
	runtime.LockOSThread() // never given back: the thread may have entered the namespace
	if _, err := p.place.enter(); err != nil {
		p.mu.Lock()
		p.state = err.Error()
		p.mu.Unlock()
		return
	}
	buffer := make([]byte, 1<<16)
	fds := []unix.PollFd{{Fd: int32(p.wake), Events: unix.POLLIN}, {Fd: int32(p.events), Events: unix.POLLIN}}
	for !p.stopped.Load() {
		p.listen(buffer)
		p.look()
		// What comes in a burst is answered by one look.
		pause := []unix.PollFd{{Fd: -1}}
		_, _ = unix.Poll(pause, directPace)
		// An error, EINTR for one, only makes the next look come early.
		if n, err := unix.Poll(fds, directTend); n == 0 && err == nil {
			p.direct.host.tend()
			p.direct.underlay.tend()
			for _, q := range p.direct.all() {
				q.relisten()
			}
		}
		_, _ = unix.Read(p.wake, buffer[:8])
	}
}

// look brings the table in line with what is known.
func (p *directPods) look() {
	if p.stale {
		p.refresh()
	}
	p.mu.Lock()
	p.pods = p.told
	routes := p.routes
	p.routes = nil
	p.mu.Unlock()
	clear(p.trouble)
	for _, r := range lastChanges(routes) {
		if err := p.route(r); err != nil {
			p.trouble[r.prefix.String()] = err
		}
	}
	changed := p.release()
	changed = p.acquire() || changed
	changed = p.measure() || changed
	if changed {
		p.publish()
	}
	if p.plan != nil {
		if err := p.plan.refresh(p.devices, p.shortcutPods()); err != nil {
			p.trouble["the shortcut"] = err
		}
	}
	p.reap()
	p.describe()
}

// shortcutPods returns the pods that are taken, by their ways.
func (p *directPods) shortcutPods() map[uint32]shortcutPod {
	pods := make(map[uint32]shortcutPod, len(p.taken))
	for address, slot := range p.taken {
		if l := p.slots[slot]; l.way != 0 {
			d := p.devices[p.names[l.index]]
			pods[l.way] = shortcutPod{address: address, link: l, mtu: d.mtu, peer: d.peer && !p.queued[l.index]}
		}
	}
	return pods
}

// wanted returns the device of a pod's interface and the pod's hardware address, if the vRouter can have the interface.
func (p *directPods) wanted(pod vrouter.Pod) (device, net.HardwareAddr, bool) {
	d, ok := p.devices[pod.Interface]
	if !ok || !d.up || !pod.Address.Is4() {
		return d, nil, false
	}
	mac, ok := p.hosts[neighbour{d.index, pod.Address}]
	return d, mac, ok
}

// release gives interfaces back whose pod has gone, or that are others now.
func (p *directPods) release() (changed bool) {
	named := make(map[netip.Addr]vrouter.Pod, len(p.pods))
	for _, pod := range p.pods {
		named[pod.Address] = pod
	}
	for address, slot := range p.taken {
		l := p.slots[slot]
		if pod, ok := named[address]; ok {
			if d, mac, ok := p.wanted(pod); ok && d.index == l.index && !l.moved(d.mac, mac) && l.holds(d.mtu) {
				continue
			}
		}
		p.own(address, l, false)
		if err := p.steering.take(l.index, slot, address, false); err != nil {
			p.trouble[address.String()] = err
		}
		p.slots[slot] = nil
		delete(p.taken, address)
		p.retired = append(p.retired, retiredLink{l, slot, p.direct.next.Load().generation + 1})
		changed = true
	}
	return changed
}

func (p *directPods) own(address netip.Addr, l *podLink, on bool) {
	if p.plan != nil && on {
		l.way = p.plan.newWay(time.Now())
		p.plan.dirty.Store(true)
	}
	if err := p.steering.own(netip.PrefixFrom(address, address.BitLen()), ownedPod, on, l.way); err != nil {
		p.trouble[address.String()] = err
	}
	if p.plan != nil && !on {
		p.plan.freeWay(l.way, time.Now())
		l.way = 0
	}
}

// acquire takes interfaces that can be had.
func (p *directPods) acquire() (changed bool) {
	used := make(map[int]bool, len(p.taken))
	for _, slot := range p.taken {
		used[p.slots[slot].index] = true
	}
	for _, r := range p.retired {
		used[r.link.index] = true // an AF_XDP socket has its queue to itself, until it is closed
	}
	for _, pod := range p.pods {
		if _, ok := p.taken[pod.Address]; ok {
			continue
		}
		d, mac, ok := p.wanted(pod)
		if !ok {
			p.ask(d, pod.Address)
			continue
		}
		// A pod's new container may have the interface already, while its old one still waits to be forgotten.
		if used[d.index] || bytes.Equal(mac, d.mac) {
			continue
		}
		slot := p.freeSlot()
		l, err := p.openLink(d, slot, mac)
		if err != nil {
			p.trouble[pod.Interface] = err
			continue
		}
		l.queue = p.direct.reads(slot).number
		p.mu.Lock()
		p.open[l] = true
		p.mu.Unlock()
		used[d.index] = true
		p.slots[slot], p.taken[pod.Address] = l, slot
		changed = true
	}
	return changed
}

// openLink opens an interface by AF_XDP where that was asked for and works, else by AF_PACKET.
func (p *directPods) openLink(d device, slot int, mac net.HardwareAddr) (*podLink, error) {
	if p.io == IOXDP {
		var l *podLink
		err := whileBusy(podPatience, func() (err error) {
			l, err = openPodXSK(p.steering, d.index, slot, p.frames, d.mtu, d.mac, mac)
			return err
		})
		if err == nil {
			return l, nil
		}
		p.noXDP = err
	}
	return openPodLink(p.steering, d.index, d.mac, mac)
}

// measure takes note of the interfaces' MTUs, and reports whether one has changed.
func (p *directPods) measure() (changed bool) {
	p.mtus = append(p.mtus, make([]int, len(p.slots)-len(p.mtus))...)
	for _, slot := range p.taken {
		if mtu := p.devices[p.names[p.slots[slot].index]].mtu; p.mtus[slot] != mtu {
			p.mtus[slot], changed = mtu, true
		}
	}
	return changed
}

// freeSlot returns a slot that no interface has, nor one had that is not closed yet.
func (p *directPods) freeSlot() int {
	busy := make(map[int]bool, len(p.retired))
	for _, r := range p.retired {
		busy[r.slot] = true
	}
	for i, l := range p.slots {
		if l == nil && !busy[i] {
			return i
		}
	}
	p.slots = append(p.slots, nil)
	return len(p.slots) - 1
}

// publish hands a new table to Recv, and makes it listen to the interfaces that are new in it.
func (p *directPods) publish() {
	old := p.direct.next.Load()
	addresses := make([]netip.Addr, len(p.slots))
	for address, slot := range p.taken {
		addresses[slot] = address
	}
	next := &directTable{generation: old.generation + 1, pods: vrouter.NewPods(addresses, slices.Clone(p.mtus)), links: slices.Clone(p.slots)}
	for _, q := range p.direct.all() {
		q.next.Store(next)
		q.poke()
	}
	for address, slot := range p.taken {
		l := p.slots[slot]
		if at := vrouter.FirstPodInterface + vrouter.Interface(slot); old.link(at) != l {
			if err := p.direct.reads(slot).listen(l.readFD(), int32(at)); err != nil {
				p.trouble[address.String()] = err
			}
			if err := p.steering.take(l.index, slot, address, true); err != nil {
				p.trouble[address.String()] = err
			}
			p.own(address, l, true)
		}
	}
}

// reap closes what Recv no longer uses.
func (p *directPods) reap() {
	taken := p.direct.taken.Load()
	for _, q := range p.direct.more {
		taken = min(taken, q.taken.Load())
	}
	kept := p.retired[:0]
	for _, r := range p.retired {
		if taken < r.generation {
			kept = append(kept, r)
			continue
		}
		p.mu.Lock()
		p.lost += r.link.dropped()
		delete(p.open, r.link)
		p.mu.Unlock()
		_ = r.link.close() // an interface that has gone refuses what is done to it
	}
	p.retired = kept
}

// dropped returns what the pods' sockets have lost so far.
func (p *directPods) dropped() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	sum := p.lost
	for l := range p.open {
		sum += l.dropped()
	}
	return sum
}

// describe says for people which interfaces we have.
func (p *directPods) describe() {
	text := fmt.Sprintf("%d of %d pods read by AF_PACKET", len(p.taken), len(p.pods))
	if p.plan != nil {
		text = fmt.Sprintf("%d of %d pods by tc, hops in the kernel: %d", len(p.taken), len(p.pods), p.plan.inKernel.Load())
	}
	if p.io == IOXDP {
		packet := 0
		for _, slot := range p.taken {
			if p.slots[slot].xsk == nil {
				packet++
			}
		}
		text = fmt.Sprintf("%d of %d pods read by AF_XDP", len(p.taken), len(p.pods))
		if packet > 0 {
			text += fmt.Sprintf(", %d of them by AF_PACKET, because: %v", packet, p.noXDP)
		}
	}
	for what, err := range p.trouble {
		text += fmt.Sprintf("; %s left to the kernel: %v", what, err)
		break // one is enough to tell what is wrong
	}
	p.mu.Lock()
	p.state = text
	p.mu.Unlock()
}

// String returns what describe said last.
func (p *directPods) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state
}
