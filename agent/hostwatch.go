package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// recheckInterval is how often the agent looks at the kernel without having been told of a change: it bounds how long
// a lost notification can matter.
const recheckInterval = 30 * time.Second

// hostWatch tells the agent when somebody else has changed what the agent keeps in the kernel: a deleted vr0, an
// address or a route taken away by a network manager, an underlay that has another address now.
type hostWatch struct {
	device   string        // the underlay
	changed  func()        // vr0, its address or a route of ours
	underlay chan struct{} // the underlay itself; capacity 1
}

// watchHost subscribes to the kernel's notifications until ctx is done.
func watchHost(ctx context.Context, device string, changed func()) (*hostWatch, error) {
	h := &hostWatch{device: device, changed: changed, underlay: make(chan struct{}, 1)}
	sub, err := subscribe()
	if err != nil {
		return nil, err
	}
	go h.run(ctx, sub)
	return h, nil
}

// subscription is one set of netlink sockets; its channels are closed when the kernel had to drop notifications.
type subscription struct {
	done   chan struct{}
	links  chan netlink.LinkUpdate
	addrs  chan netlink.AddrUpdate
	routes chan netlink.RouteUpdate
}

func subscribe() (*subscription, error) {
	s := &subscription{done: make(chan struct{}), links: make(chan netlink.LinkUpdate), addrs: make(chan netlink.AddrUpdate),
		routes: make(chan netlink.RouteUpdate)}
	err := netlink.LinkSubscribe(s.links, s.done)
	if err == nil {
		err = netlink.AddrSubscribe(s.addrs, s.done)
	}
	if err == nil {
		err = netlink.RouteSubscribe(s.routes, s.done)
	}
	if err != nil {
		close(s.done)
		return nil, fmt.Errorf("subscribe to the kernel's changes: %w", err)
	}
	return s, nil
}

func (h *hostWatch) run(ctx context.Context, sub *subscription) {
	tick := time.NewTicker(recheckInterval)
	defer tick.Stop()
	for {
		alive := h.follow(ctx, sub, tick.C)
		sub.close()
		if !alive {
			return
		}
		// Notifications were lost: start over, and look at everything.
		var err error
		for sub, err = subscribe(); err != nil; sub, err = subscribe() {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
		h.both()
	}
}

// follow passes notifications on until the subscription breaks (true) or ctx is done (false).
func (h *hostWatch) follow(ctx context.Context, sub *subscription, tick <-chan time.Time) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick:
			h.both()
		case u, ok := <-sub.links:
			if !ok {
				return true
			}
			h.about(u.Attrs().Name)
		case u, ok := <-sub.addrs:
			if !ok {
				return true
			}
			// The name of an interface that went away is gone too; its address may have been any of ours.
			if link, err := netlink.LinkByIndex(u.LinkIndex); err == nil {
				h.about(link.Attrs().Name)
			} else {
				h.both()
			}
		case u, ok := <-sub.routes:
			if !ok {
				return true
			}
			if u.Type == unix.RTM_DELROUTE && u.Protocol == routeProtocol {
				h.changed()
			}
		}
	}
}

func (h *hostWatch) about(name string) {
	switch name {
	case tunnelDevice:
		h.changed()
	case h.device:
		h.both()
	}
}

func (h *hostWatch) both() {
	select {
	case h.underlay <- struct{}{}:
	default:
	}
	h.changed()
}

// close ends the subscription; what its goroutines still want to say is read away, so that they end.
func (s *subscription) close() {
	close(s.done)
	go func() {
		for range s.links {
		}
	}()
	go func() {
		for range s.addrs {
		}
	}()
	go func() {
		for range s.routes {
		}
	}()
}

// absenceGrace is how long the node's address may be away before the agent believes it: links flap, and DHCP clients
// take an address off for a moment.
const absenceGrace = 10 * time.Second

// redetect looks at the underlay again. Another MTU is taken over. Another address means another identity toward the
// peers and the datastore, which only a restart can take on: the error says so. As long as the old address is there, on
// an interface that is up or down, it stays in force whatever else a detection would find.
func (a *Agent) redetect() error {
	cands, err := listCandidates()
	if err != nil {
		return nil // the next look will do
	}
	for _, c := range cands {
		if c.name != a.underlay.Interface || c.prefix != a.underlay.Prefix {
			continue
		}
		a.absent = time.Time{}
		if c.mtu != a.underlay.MTU {
			a.log.Info("underlay has another MTU; pods that are there keep theirs", "was", a.underlay.MTU, "is", c.mtu)
			a.locked(func() { a.underlay.MTU = c.mtu })
		}
		return nil
	}
	if a.absent.IsZero() {
		a.absent = time.Now()
		time.AfterFunc(absenceGrace, a.host.both)
	}
	now, err := DetectUnderlay(a.cfg.Autodetection)
	if err != nil || time.Since(a.absent) < absenceGrace {
		return nil // what was known stays in force until there is something else
	}
	return fmt.Errorf("this node's address was %s on %s and is %s on %s now: the agent has to start anew",
		a.underlay.Prefix, a.underlay.Interface, now.Prefix, now.Interface)
}
