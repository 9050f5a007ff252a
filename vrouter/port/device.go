package port

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// Device is the port on vr0, to which the kernel routes what is for other nodes. The device stays, with its addresses
// and routes, when the port is closed or the process dies.
type Device interface {
	reader
	// SetMTU sets the device's MTU in bytes, now and whenever the device has to be made anew.
	SetMTU(mtu int) error
	// Offloads describes for people what passes whole.
	Offloads() string
	// spin says how long to look for packets before sleeping, at any queue. It comes before the first Recv.
	spin(longest time.Duration)
	// queues returns a port for each queue that the device has. The first is the Device itself; to stop and to close it does
	// so to all.
	queues() []reader
}

// vr0 is what every port on vr0 has to do with the kernel's links.
type vr0 struct {
	name    string
	links   *netlink.Handle // of the namespace that the port was opened in
	linksMu sync.Mutex
	mtu     atomic.Int64 // 0: not told yet
}

// addrGenModeNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const addrGenModeNone = 1

// open is for the thread whose namespace the device is in.
func (d *vr0) open() (err error) {
	d.links, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	return err
}

func (d *vr0) close() {
	if d.links != nil {
		d.links.Close()
	}
}

// Name returns the device's name.
func (d *vr0) Name() string { return d.name }

// change runs f on the device, alone.
func (d *vr0) change(f func(netlink.Link) error) error {
	d.linksMu.Lock()
	defer d.linksMu.Unlock()
	link, err := d.links.LinkByName(d.name)
	if err != nil {
		return err
	}
	return f(link)
}

// prepare gives the device its MTU, and the length of the longest superpacket if there are any, and takes it up.
func (d *vr0) prepare(link netlink.Link, super bool) error {
	if mtu := int(d.mtu.Load()); mtu != 0 {
		if err := d.links.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("set MTU %d: %w", mtu, err)
		}
	}
	if super {
		// The kernel splits what is longer, which no outer header would fit.
		if err := d.links.LinkSetGSOMaxSize(link, vrouter.MaxMTU+1); err != nil {
			return fmt.Errorf("set the longest superpacket: %w", err)
		}
	}
	// Without a link-local address the kernel sends no router solicitations, which would only be counted drops. A
	// kernel without IPv6 refuses, and needs it not.
	_ = d.links.LinkSetIP6AddrGenMode(link, addrGenModeNone)
	if err := d.links.LinkSetUp(link); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return nil
}

// SetMTU implements Device.
func (d *vr0) SetMTU(mtu int) error {
	err := d.change(func(link netlink.Link) error { return d.links.LinkSetMTU(link, mtu) })
	if err != nil {
		return fmt.Errorf("%s: set MTU %d: %w", d.name, mtu, err)
	}
	d.mtu.Store(int64(mtu))
	return nil
}

// Counters implements vrouter.Port. They start with the device, not with the process.
func (d *vr0) Counters() []vrouter.Counter {
	var dropped, refused uint64
	// A device that is gone has lost nothing.
	_ = d.change(func(link netlink.Link) error {
		if s := link.Attrs().Statistics; s != nil {
			dropped, refused = s.TxDropped, s.RxDropped+s.RxErrors
		}
		return nil
	})
	return []vrouter.Counter{
		{Name: "kernel_vr0_tx_dropped", Packets: dropped}, // its queue toward us was full, or nobody read
		{Name: "kernel_vr0_rx_dropped", Packets: refused}, // what we wrote and it did not take
	}
}
