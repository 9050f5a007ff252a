package port

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// Veth is vr0 as one end of a veth pair; we receive and send at the other end, its twin, by an AF_PACKET socket with
// PACKET_VNET_HDR, whole superpackets and unfinished checksums included. With OpenXDPVeth single packets come and go by
// AF_XDP instead, and none is a superpacket on its way to us. It implements Device.
//
// The twin stands in the same namespace as vr0, so that the pair outlives the process without a namespace to be kept
// for it. It is out of the host's way all the same: neither end does ARP, so the kernel addresses what it routes to vr0
// to vr0's own MAC address, which is not the twin's, and drops it as another host's once we have a copy.
//
// Of several queues each is a Veth with a socket of its own, of which the first has what is the pair's as a whole.
type Veth struct {
	vr0
	lead    *Veth   // the first queue; nil: this is it
	more    []*Veth // of the first queue: the others
	number  int     // of the queue, from 0
	held    int     // see holdDevice; -1: not the first queue
	fd      int     // AF_PACKET, bound to the twin
	waiter  *waiter
	drained *waiter
	bypass  *bypass // nil: no AF_XDP
	at      atomic.Pointer[handOff]
	lost    socketLosses
	group   fanout // of all queues' fd; there is none where there is one queue
	joined  bool   // fd is of the group

	ring packetRing // Recv's

	// For Send only.
	writer packetWriter
	run    run
}

// handOff is what a frame to vr0 needs; immutable.
type handOff struct {
	index    int // the twin's
	ethernet [ethernetHeader]byte
	address  unix.RawSockaddrLinklayer
}

// OpenVeth creates the pair, or takes over the one that an earlier process left, and sets it up. A TUN device of that
// name that nobody has open is replaced. The pair stays when the port is closed or the process dies.
func OpenVeth(name string) (*Veth, error) { return openVeth(name, 1, nil) }

// OpenXDPVeth is OpenVeth with AF_XDP.
func OpenXDPVeth(name string, o XDPOptions) (*Veth, error) { return openXDPVeth(name, 1, o) }

func openXDPVeth(name string, queues int, o XDPOptions) (*Veth, error) {
	b, err := newBypass(queues, o)
	if err != nil {
		return nil, err
	}
	return openVeth(name, queues, b)
}

func openVeth(name string, queues int, b *bypass) (_ *Veth, err error) {
	v := &Veth{vr0: vr0{name: name}, held: -1, fd: -1, bypass: b}
	for i := range queues - 1 {
		q := &Veth{vr0: vr0{name: name}, lead: v, number: i + 1, held: -1, fd: -1}
		if b != nil {
			q.bypass = b.more[i]
		}
		v.more = append(v.more, q)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.Close())
		}
	}()
	if v.held, err = holdDevice(name); err != nil {
		return nil, err
	}
	for _, q := range v.all() {
		if err := q.open(); err != nil {
			return nil, err
		}
	}
	if err := v.vr0.open(); err != nil {
		return nil, fmt.Errorf("%s: netlink: %w", name, err)
	}
	if link, err := v.links.LinkByName(name); err == nil && link.Type() == "tuntap" {
		if err := removeTUN(name); err != nil {
			return nil, err
		}
	}
	v.linksMu.Lock()
	defer v.linksMu.Unlock()
	return v, v.build()
}

// open opens what each queue has.
func (v *Veth) open() (err error) {
	if v.waiter, err = newWaiter(); err != nil {
		return err
	}
	if v.drained, err = newWaiter(); err != nil {
		return err
	}
	if v.fd, err = v.openTwinSocket(); err != nil {
		return explainSocket("packet socket for "+v.name, err)
	}
	v.writer.fd = v.fd
	if err := v.ring.prepare(v.fd); err != nil {
		return fmt.Errorf("packet socket for %s: %w", v.name, err)
	}
	if v.bypass != nil {
		return v.bypass.watch(v.fd)
	}
	return nil
}

// all returns the queues, this one first.
func (v *Veth) all() []*Veth { return append([]*Veth{v}, v.more...) }

// queues implements Device.
func (v *Veth) queues() []reader { return readers(v.all()) }

// build makes or finds the pair, sets both ends up, and binds to the twin. The caller holds linksMu.
func (v *Veth) build() error {
	host, twin, err := v.ensurePair()
	if err != nil {
		return err
	}
	for _, end := range []netlink.Link{host, twin} {
		if err := v.links.LinkSetARPOff(end); err != nil {
			return explainSocket("switch ARP off on "+end.Attrs().Name, err)
		}
		if err := v.prepare(end, end == host); err != nil {
			return explainSocket(end.Attrs().Name, err)
		}
	}
	index := twin.Attrs().Index
	// What AF_XDP hands over says nothing of checksums that are left to a device.
	if err := setTxChecksum(v.fd, v.name, v.bypass == nil); err != nil {
		return err
	}
	if v.bypass != nil {
		if err := v.openBypass(index); err != nil {
			return err
		}
	}
	if err := v.bind(index); err != nil {
		return fmt.Errorf("%s: %w", twin.Attrs().Name, err)
	}
	at := &handOff{index: index}
	copy(at.ethernet[:6], host.Attrs().HardwareAddr)
	copy(at.ethernet[6:12], twin.Attrs().HardwareAddr)
	binary.BigEndian.PutUint16(at.ethernet[12:], unix.ETH_P_IP)
	at.address = unix.RawSockaddrLinklayer{Family: unix.AF_PACKET, Protocol: htons(unix.ETH_P_IP), Ifindex: int32(index), Halen: 6}
	copy(at.address.Addr[:], host.Attrs().HardwareAddr)
	for _, q := range v.all() {
		q.at.Store(at)
	}
	return nil
}

// openBypass opens AF_XDP on the twin, which has the MTU that was told, or the one that it is made with.
func (v *Veth) openBypass(index int) error {
	mtu := int(v.mtu.Load())
	if mtu == 0 {
		mtu = defaultMTU
	}
	return v.bypass.open(bypassPlace{name: twinName(v.name), index: index, mtu: mtu, queues: receiveQueues(v.fd, twinName(v.name))}, nil)
}

// pairQueues returns how many queues the pair itself has to have: with AF_PACKET the group does without.
func (v *Veth) pairQueues() int {
	if v.bypass == nil {
		return 1
	}
	return len(v.more) + 1
}

// defaultMTU is that of a new interface, in bytes.
const defaultMTU = 1500

// SetMTU implements Device. Both ends have the same.
func (v *Veth) SetMTU(mtu int) error {
	if err := v.vr0.SetMTU(mtu); err != nil {
		return err
	}
	v.linksMu.Lock()
	defer v.linksMu.Unlock()
	twin, err := v.links.LinkByName(twinName(v.name))
	if err == nil {
		err = v.links.LinkSetMTU(twin, mtu)
	}
	if err != nil {
		return fmt.Errorf("%s: set MTU %d: %w", twinName(v.name), mtu, err)
	}
	if v.bypass != nil {
		return v.openBypass(twin.Attrs().Index)
	}
	return nil
}

// Offloads implements Device.
func (v *Veth) Offloads() string {
	if v.bypass != nil {
		return "none toward us (AF_XDP " + v.bypass.String() + ")"
	}
	return "checksum, TSO, USO (AF_PACKET)"
}

// Recv implements vrouter.Port. A pair that was deleted is made anew.
func (v *Veth) Recv(batch []*vrouter.Packet) (int, error) {
	for {
		if v.waiter.stopped.Load() {
			return 0, vrouter.ErrStopped
		}
		if n := v.recvReady(batch); n > 0 {
			v.waiter.found(n)
			return n, nil
		}
		if v.waiter.again() {
			continue
		}
		if !v.waiter.wait(v.readFD(), unix.POLLIN, rebindInterval) {
			v.tend()
		}
	}
}

// readFD implements reader.
func (v *Veth) readFD() int {
	if v.bypass != nil {
		return v.bypass.epoll
	}
	return v.fd
}

// recvReady implements reader.
func (v *Veth) recvReady(batch []*vrouter.Packet) int {
	if v.bypass != nil {
		if n := v.bypass.receive(batch); n > 0 {
			return n
		}
	}
	n, err := v.ring.recv(v.fd, ethernetHeader, batch)
	if err == unix.ENETDOWN { // maybe the pair is gone
		v.tend()
	}
	return n
}

// tend implements reader: it looks whether the pair is still there.
func (v *Veth) tend() {
	if v.lead != nil {
		v.lead.tend()
		return
	}
	v.linksMu.Lock()
	defer v.linksMu.Unlock()
	if at := v.at.Load(); at != nil && v.bound(at.index) && (v.bypass == nil || v.bypass.intact()) {
		return
	}
	// What fails now is tried again at the next idle moment.
	_ = v.build()
}

// Send implements vrouter.Port.
func (v *Veth) Send(batch []*vrouter.Packet) {
	at := v.at.Load()
	x := v.bypass.hold(at.index)
	for len(batch) > 0 {
		n := v.run.gather(batch)
		for _, p := range batch[:n] {
			p.Sent, p.Drop = 0, vrouter.ReasonNotSet
		}
		switch {
		case n > 1:
			x.flush(v.drained)
			v.sendRun(at, batch[:n])
		case x != nil && batch[0].Offload.Segmentation == vrouter.SegmentNone:
			v.writer.flush(v.drained)
			x.send(batch[0], at.ethernet[:])
		default:
			x.flush(v.drained)
			v.sendWhole(at, batch[:1])
		}
		batch = batch[n:]
	}
	v.writer.flush(v.drained)
	v.bypass.release(x, v.drained)
}

// sendWhole puts one packet into the queue as it is, its headers in the headroom.
func (v *Veth) sendWhole(at *handOff, one []*vrouter.Packet) {
	p := one[0]
	if p.Offload.Segmentation == vrouter.SegmentUnsupported {
		p.Drop = vrouter.ReasonOffloadUnsupported
		return
	}
	headers, segments, fault := super(p.Bytes(), 0, &p.Offload)
	if fault != packet.FaultNone {
		p.Drop = vrouter.ReasonInnerMalformed
		return
	}
	if !v.writer.room(1) {
		v.writer.flush(v.drained)
	}
	v.writer.begin(&at.address, one, segments)
	v.front(at, p, &p.Offload, headers)
}

// sendRun puts several packets, which go together, into the queue.
func (v *Veth) sendRun(at *handOff, batch []*vrouter.Packet) {
	if !v.writer.room(len(batch)) {
		v.writer.flush(v.drained)
	}
	o, headers := v.run.finish()
	v.writer.begin(&at.address, batch, 1)
	v.front(at, batch[0], &o, headers)
	for _, payload := range v.run.payloads[1:len(batch)] {
		v.writer.piece(payload)
	}
}

// front adds a packet behind its virtio-net and Ethernet headers to the message begun last.
func (v *Veth) front(at *handOff, p *vrouter.Packet, o *vrouter.Offload, headers int) {
	start := p.Off - ethernetHeader - vnetHeader
	putVnet(p.Buf[start:], o, ethernetHeader, headers)
	copy(p.Buf[p.Off-ethernetHeader:], at.ethernet[:])
	v.writer.piece(p.Buf[start : p.Off+p.Len])
}

// Counters implements vrouter.Port. Those of vr0 start with the device, not with the process. The first queue tells of all.
func (v *Veth) Counters() []vrouter.Counter {
	if v.lead != nil {
		return nil
	}
	lost := v.bypass.dropped()
	for _, q := range v.all() {
		lost += q.lost.read(q.fd) + q.ring.short.Load()
	}
	return append(v.vr0.Counters(), vrouter.Counter{Name: "kernel_vr0_queue_dropped", Packets: lost}) // we were too slow
}

// spin implements Device.
func (v *Veth) spin(longest time.Duration) {
	for _, q := range v.all() {
		q.waiter.longest = longest
	}
}

// Stop implements vrouter.Port, for all queues.
func (v *Veth) Stop() {
	for _, q := range v.all() {
		q.waiter.stop()
		q.drained.stop()
	}
}

// Close implements vrouter.Port, for all queues. The pair stays.
func (v *Veth) Close() error {
	var errs []error
	if v.bypass != nil {
		errs = append(errs, v.bypass.close())
	}
	v.vr0.close()
	for _, q := range v.all() {
		q.ring.close()
		for _, fd := range []int{q.fd, q.held} {
			if fd >= 0 {
				errs = append(errs, unix.Close(fd))
			}
		}
		for _, w := range []*waiter{q.waiter, q.drained} {
			if w != nil {
				errs = append(errs, w.close())
			}
		}
	}
	return errors.Join(errs...)
}
