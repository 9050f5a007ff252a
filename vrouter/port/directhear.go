package port

import (
	"bytes"
	"net"
	"net/netip"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
)

// What a directPods knows of the kernel's interfaces and neighbours, which it hears of by netlink.

// device is what matters of an interface.
type device struct {
	index int
	mac   net.HardwareAddr
	mtu   int // bytes
	up    bool
	sends bool // its other side is up too, and the kernel has taken note: before that it drops what it is to send
	peer  bool // a veth whose other side is in another namespace
}

// neighbour is a pod at an interface.
type neighbour struct {
	index   int
	address netip.Addr
}

// listen takes in what the kernel has announced.
func (p *directPods) listen(buffer []byte) {
	for {
		n, err := unix.Read(p.events, buffer)
		switch err {
		case nil:
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return
		default: // ENOBUFS: something was lost
			p.stale = true
			continue
		}
		messages, err := syscall.ParseNetlinkMessage(buffer[:n])
		if err != nil {
			p.stale = true
			return
		}
		for i := range messages {
			p.hear(&messages[i])
		}
	}
}

func (p *directPods) hear(m *syscall.NetlinkMessage) {
	if p.stale {
		return // all is read anew
	}
	switch m.Header.Type {
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		n, err := netlink.NeighDeserialize(m.Data)
		if err != nil {
			p.stale = true
			return
		}
		p.setHost(n, m.Header.Type == unix.RTM_NEWNEIGH)
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		l, err := netlink.LinkDeserialize(nil, m.Data)
		if err != nil {
			p.stale = true
			return
		}
		p.setDevice(l, m.Header.Type == unix.RTM_NEWLINK)
	case unix.RTM_NEWQDISC, unix.RTM_DELQDISC:
		p.stale = true // seldom enough
	}
}

func (p *directPods) setHost(n *netlink.Neigh, there bool) {
	address, ok := netip.AddrFromSlice(n.IP)
	if !ok || n.Family != unix.AF_INET {
		return
	}
	at := neighbour{n.LinkIndex, address.Unmap()}
	if there && n.State&neighbourValid != 0 && len(n.HardwareAddr) == 6 {
		p.hosts[at] = bytes.Clone(n.HardwareAddr) // it lies in the buffer of listen
		return
	}
	delete(p.hosts, at)
	if !there || n.State&unix.NUD_FAILED != 0 {
		delete(p.asked, at) // the kernel is asked to ask again
	}
}

func (p *directPods) setDevice(l netlink.Link, there bool) {
	a := l.Attrs()
	if name, ok := p.names[a.Index]; ok && (!there || name != a.Name) {
		delete(p.devices, name)
		delete(p.names, a.Index)
	}
	if !there {
		return
	}
	p.names[a.Index] = a.Name
	p.devices[a.Name] = device{index: a.Index, mac: bytes.Clone(a.HardwareAddr), mtu: a.MTU,
		up:    a.Flags&net.FlagUp != 0 && a.EncapType == "ether" && len(a.HardwareAddr) == 6,
		sends: a.OperState == netlink.OperUp || a.OperState == netlink.OperUnknown && l.Type() != "veth", // some never say
		peer:  l.Type() == "veth" && a.NetNsID >= 0}
	if p.plan != nil {
		p.plan.dirty.Store(true)
	}
}

// refresh reads devices and neighbours anew.
func (p *directPods) refresh() {
	p.devices, p.names, p.hosts = make(map[string]device), make(map[int]string), make(map[neighbour]net.HardwareAddr)
	clear(p.asked)
	links, err := dump.Links(p.links)
	if err != nil {
		return // stale it stays
	}
	for _, l := range links {
		p.setDevice(l, true)
	}
	neighbours, err := dump.Neighbours(p.links, 0, netlink.FAMILY_V4)
	if err != nil {
		return
	}
	for i := range neighbours {
		p.setHost(&neighbours[i], true)
	}
	disciplines, err := dump.Disciplines(p.links, nil)
	if err != nil {
		return
	}
	p.queued = make(map[int]bool)
	for _, q := range disciplines {
		if a := q.Attrs(); a.Parent == netlink.HANDLE_ROOT && q.Type() != "noqueue" {
			p.queued[a.LinkIndex] = true
		}
	}
	p.stale = false
}

// ask makes the kernel find out a pod's hardware address and keep it fresh, on its own from then on. A question that is lost is
// asked again after a second only.
func (p *directPods) ask(d device, address netip.Addr) {
	at := neighbour{d.index, address}
	if !d.up || !d.sends || !address.Is4() || p.asked[at] {
		return
	}
	p.asked[at] = true
	n := &netlink.Neigh{LinkIndex: d.index, Family: netlink.FAMILY_V4, IP: address.AsSlice(), FlagsExt: netlink.NTF_EXT_MANAGED}
	if err := p.links.NeighSet(n); err != nil {
		// Before Linux 5.16 it asks once. Its refusal shows as a neighbour that stays away.
		n.FlagsExt, n.Flags = 0, netlink.NTF_USE
		_ = p.links.NeighSet(n)
	}
}
