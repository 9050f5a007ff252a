package port

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
)

const (
	// resolvePace is the least time between two looks at the kernel's tables, in milliseconds.
	resolvePace = 10
	// resolveEvery is the time between looks when nothing seems to have changed, in milliseconds: destinations in use
	// are confirmed, as the kernel does for its own traffic.
	resolveEvery = 2000
	// forgetAfter is how long a destination that nobody sends to is kept.
	forgetAfter = 10 * time.Minute
)

// resolver keeps hops true to the kernel's routes and neighbours. Send asks it for destinations it does not know, and
// sends by way of the kernel meanwhile. Its goroutine looks again whenever the kernel announces a change.
type resolver struct {
	table  atomic.Pointer[hops]
	wanted [64]atomic.Uint32 // destinations that Send has missed
	index  atomic.Int32      // the underlay's interface, 0: none
	state  atomic.Pointer[string]

	links   *netlink.Handle
	events  int // netlink socket: something has changed
	wake    int // eventfd: wanted, index or stopped
	stopped atomic.Bool
	place   *namespace
	retag   *retag // nil: superpackets must be split
	noRetag error  // why
	known   map[uint32]time.Time
	done    sync.WaitGroup
	watcher atomic.Pointer[hopWatcher]
}

// hopWatcher is somebody else who sends to the same destinations. The resolver's goroutine calls it.
type hopWatcher interface {
	// used reports whether it has sent to the destination since it was asked last.
	used(to uint32) bool
	// changed is called when there is another table.
	changed()
}

// watch names the watcher, nil for none.
func (r *resolver) watch(w hopWatcher) {
	if w == nil {
		r.watcher.Store(nil)
		return
	}
	r.watcher.Store(&w)
}

// newResolver starts a resolver for the calling thread's namespace. load loads the program of retag.go.
func newResolver(load func() (*retag, error)) (_ *resolver, err error) {
	r := &resolver{events: -1, wake: -1, known: make(map[uint32]time.Time)}
	r.table.Store(new(hops))
	defer func() {
		if err != nil {
			err = errors.Join(err, r.free())
		}
	}()
	if r.place, err = thisNamespace(); err != nil {
		return nil, err
	}
	if r.links, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	if r.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, err
	}
	r.events, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	groups := uint32(1<<(unix.RTNLGRP_LINK-1) | 1<<(unix.RTNLGRP_NEIGH-1) | 1<<(unix.RTNLGRP_IPV4_ROUTE-1))
	if err := unix.Bind(r.events, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	r.retag, r.noRetag = load()
	r.describe(nil)
	r.done.Go(r.run)
	return r, nil
}

// want asks for a destination, without waiting. One that finds its place taken is asked for by its next packet.
func (r *resolver) want(to uint32) {
	slot := &r.wanted[(to^to>>8^to>>16)%uint32(len(r.wanted))]
	if slot.CompareAndSwap(0, to) {
		r.poke()
	}
}

func (r *resolver) poke() {
	// The counter cannot overflow: run reads it. A failed write is impossible on a valid eventfd.
	_, _ = unix.Write(r.wake, []byte{1, 0, 0, 0, 0, 0, 0, 1})
}

// setIndex names the interface that superpackets leave by.
func (r *resolver) setIndex(index int) {
	if r.index.Swap(int32(index)) != int32(index) {
		r.poke()
	}
}

// bypassPlace describes the interface as AF_XDP has to know it; what does not follow from the link is left out.
func (r *resolver) bypassPlace(index int) (bypassPlace, error) {
	l, err := r.links.LinkByIndex(index)
	if err != nil {
		return bypassPlace{}, err
	}
	a := l.Attrs()
	at := bypassPlace{name: a.Name, index: index, mtu: a.MTU, wired: l.Type() != "veth"}
	if copy(at.mac[:], a.HardwareAddr) != len(at.mac) {
		return at, errors.New("it is no Ethernet device")
	}
	return at, nil
}

// close stops the goroutine and frees everything.
func (r *resolver) close() error {
	r.stopped.Store(true)
	r.poke()
	r.done.Wait()
	return r.free()
}

func (r *resolver) free() error {
	var errs []error
	for _, fd := range []int{r.events, r.wake} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	if r.place != nil {
		errs = append(errs, r.place.close())
	}
	if r.links != nil {
		r.links.Close()
	}
	if r.retag != nil {
		errs = append(errs, r.retag.close())
	}
	return errors.Join(errs...)
}

// run looks whenever there is a reason to, on a thread that stays in the namespace.
func (r *resolver) run() {
	runtime.LockOSThread()
	if _, err := r.place.enter(); err != nil && r.retag != nil {
		r.noRetag, r.retag = err, errorsDrop(r.retag)
	}
	buffer := make([]byte, 1<<16)
	fds := []unix.PollFd{{Fd: int32(r.wake), Events: unix.POLLIN}, {Fd: int32(r.events), Events: unix.POLLIN}}
	for !r.stopped.Load() {
		r.look()
		// Events that come in a burst are answered by one look. Only stopping is worth hurrying for.
		pause := []unix.PollFd{{Fd: -1}}
		_, _ = unix.Poll(pause, resolvePace)
		timeout := resolveEvery
		if len(r.known) == 0 {
			timeout = -1
		}
		// An error, EINTR for one, only makes the next look come early.
		_, _ = unix.Poll(fds, timeout)
		_, _ = unix.Read(r.wake, buffer[:8])
		for range 1000 { // what they say does not matter, nor that some were lost (ENOBUFS)
			if _, err := unix.Read(r.events, buffer); err == unix.EAGAIN {
				break
			}
		}
	}
}

// errorsDrop closes what cannot be used.
func errorsDrop(t *retag) *retag {
	_ = t.close()
	return nil
}

// look brings the table in line with the kernel's.
func (r *resolver) look() {
	now := time.Now()
	old, watcher := *r.table.Load(), r.watcher.Load()
	used := make(map[uint32]bool)
	for _, h := range old {
		watched := watcher != nil && (*watcher).used(h.to)
		if h.used.Load() || watched {
			h.used.Store(false)
			used[h.to] = true
			r.known[h.to] = now
		}
	}
	for i := range r.wanted {
		if to := r.wanted[i].Swap(0); to != 0 {
			r.known[to], used[to] = now, true
		}
	}
	at := r.underlay()
	next := make(hops, 0, len(r.known))
	for to, last := range r.known {
		if now.Sub(last) > forgetAfter {
			delete(r.known, to)
			continue
		}
		next = append(next, r.resolve(at, to, used[to]))
	}
	next.sort()
	if !slices.EqualFunc(old, next, (*hop).same) {
		r.table.Store(&next)
		if watcher != nil {
			(*watcher).changed()
		}
	}
	r.describe(at)
}

// underlayLink is the interface as it is at one look.
type underlayLink struct {
	index      int
	mac        net.HardwareAddr
	whole      bool
	neighbours map[uint32]netlink.Neigh
	err        error // why superpackets are split
}

// underlay returns the interface, or nil where there is none that packets could be sent on by us.
func (r *resolver) underlay() *underlayLink {
	index := int(r.index.Load())
	if index == 0 {
		return nil
	}
	l, err := r.links.LinkByIndex(index)
	if err != nil || l.Attrs().Flags&net.FlagUp == 0 {
		if r.retag != nil && err != nil {
			r.retag.detach() // it went with the interface
		}
		return nil
	}
	at := &underlayLink{index: index, mac: l.Attrs().HardwareAddr, err: r.noRetag, neighbours: make(map[uint32]netlink.Neigh)}
	if l.Attrs().EncapType != "ether" || len(at.mac) != 6 {
		at.err = fmt.Errorf("%s is no Ethernet device", l.Attrs().Name)
		return at
	}
	if r.retag != nil {
		if !r.retag.attached(index) {
			at.err = r.retag.attach(index)
		}
		at.whole = at.err == nil
	}
	list, err := dump.Neighbours(r.links, index, netlink.FAMILY_V4)
	if err != nil {
		return at // nobody is a neighbour until the next look
	}
	for _, n := range list {
		if ip := n.IP.To4(); ip != nil {
			at.neighbours[binary.BigEndian.Uint32(ip)] = n
		}
	}
	return at
}

// States of a neighbour: those in which its address may be used, and those in which the kernel has no need to ask.
const (
	neighbourValid = unix.NUD_PERMANENT | unix.NUD_NOARP | unix.NUD_REACHABLE | unix.NUD_PROBE | unix.NUD_STALE | unix.NUD_DELAY
	neighbourQuiet = unix.NUD_PERMANENT | unix.NUD_NOARP | unix.NUD_REACHABLE | unix.NUD_PROBE | unix.NUD_DELAY
)

// resolve finds the way to one destination. Whatever is unusual is left to the kernel.
func (r *resolver) resolve(at *underlayLink, to uint32, used bool) *hop {
	raw := &hop{to: to, raw: true}
	if at == nil || len(at.mac) != 6 {
		return raw
	}
	var address [4]byte
	binary.BigEndian.PutUint32(address[:], to)
	routes, err := r.links.RouteGet(address[:])
	if err != nil || len(routes) != 1 {
		return raw
	}
	route := &routes[0]
	if route.LinkIndex != at.index || route.Type != unix.RTN_UNICAST || route.Encap != nil || len(route.MultiPath) > 0 || route.MTU != 0 {
		return raw
	}
	via := to
	if gateway := route.Gw.To4(); gateway != nil {
		via = binary.BigEndian.Uint32(gateway)
	} else if route.Via != nil {
		return raw
	}
	n, found := at.neighbours[via]
	if used && (!found || n.State&neighbourQuiet == 0) {
		// The kernel asks, and answers by an event. Its refusal shows as a neighbour that stays away.
		binary.BigEndian.PutUint32(address[:], via)
		_ = r.links.NeighSet(&netlink.Neigh{LinkIndex: at.index, Family: netlink.FAMILY_V4, IP: address[:], Flags: netlink.NTF_USE})
	}
	if !found || n.State&neighbourValid == 0 || len(n.HardwareAddr) != 6 {
		return raw
	}
	return newHop(to, at.index, at.mac, n.HardwareAddr, at.whole)
}

// describe says for people how packets leave.
func (r *resolver) describe(at *underlayLink) {
	text := "superpackets whole (AF_PACKET, TCX)"
	err := r.noRetag
	if at != nil {
		err = at.err
	}
	if err != nil {
		text = fmt.Sprintf("superpackets split by the vRouter, because: %v", err)
	}
	r.state.Store(&text)
}

// String returns what describe said last.
func (r *resolver) String() string { return *r.state.Load() }
