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
type Veth struct {
	vr0
	held    int // see holdDevice
	fd      int // AF_PACKET, bound to the twin
	waiter  *waiter
	drained *waiter
	bypass  *bypass // nil: no AF_XDP
	at      atomic.Pointer[handOff]
	lost    socketLosses

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
func OpenVeth(name string) (*Veth, error) { return openVeth(name, nil) }

// OpenXDPVeth is OpenVeth with AF_XDP. busyPoll is as in xskOptions.
func OpenXDPVeth(name string, busyPoll int) (*Veth, error) {
	b, err := newBypass(busyPoll)
	if err != nil {
		return nil, err
	}
	return openVeth(name, b)
}

func openVeth(name string, b *bypass) (_ *Veth, err error) {
	v := &Veth{vr0: vr0{name: name}, held: -1, fd: -1, bypass: b}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.Close())
		}
	}()
	if v.held, err = holdDevice(name); err != nil {
		return nil, err
	}
	if v.waiter, err = newWaiter(); err != nil {
		return nil, err
	}
	if v.drained, err = newWaiter(); err != nil {
		return nil, err
	}
	if v.fd, err = openTwinSocket(); err != nil {
		return nil, explainSocket("packet socket for "+name, err)
	}
	v.writer.fd = v.fd
	if err := v.ring.prepare(v.fd); err != nil {
		return nil, fmt.Errorf("packet socket for %s: %w", name, err)
	}
	if v.bypass != nil {
		if err := v.bypass.watch(v.fd); err != nil {
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

// openTwinSocket opens the AF_PACKET socket, deaf until it is bound.
func openTwinSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	for _, o := range []struct {
		name          string
		option, value int
	}{
		{"PACKET_VNET_HDR", unix.PACKET_VNET_HDR, 1},
		{"PACKET_IGNORE_OUTGOING (Linux 4.20)", unix.PACKET_IGNORE_OUTGOING, 1},
	} {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, o.option, o.value); err != nil {
			return -1, errors.Join(fmt.Errorf("%s: %w", o.name, err), unix.Close(fd))
		}
	}
	if err := errors.Join(enlarge(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF), enlarge(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF)); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// build makes or finds the pair, sets both ends up, and binds to the twin. The caller holds linksMu.
func (v *Veth) build() error {
	host, twin, err := ensurePair(v.links, v.name)
	if err != nil {
		return err
	}
	for _, end := range []netlink.Link{host, twin} {
		if err := v.links.LinkSetARPOff(end); err != nil {
			return fmt.Errorf("%s: switch ARP off: %w", end.Attrs().Name, err)
		}
		if err := v.prepare(end, end == host); err != nil {
			return fmt.Errorf("%s: %w", end.Attrs().Name, err)
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
	if err := unix.Bind(v.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: index}); err != nil {
		return fmt.Errorf("%s: bind: %w", twin.Attrs().Name, err)
	}
	at := &handOff{index: index}
	copy(at.ethernet[:6], host.Attrs().HardwareAddr)
	copy(at.ethernet[6:12], twin.Attrs().HardwareAddr)
	binary.BigEndian.PutUint16(at.ethernet[12:], unix.ETH_P_IP)
	at.address = unix.RawSockaddrLinklayer{Family: unix.AF_PACKET, Protocol: htons(unix.ETH_P_IP), Ifindex: int32(index), Halen: 6}
	copy(at.address.Addr[:], host.Attrs().HardwareAddr)
	v.at.Store(at)
	return nil
}

// openBypass opens AF_XDP on the twin, which has the MTU that was told, or the one that it is made with.
func (v *Veth) openBypass(index int) error {
	mtu := int(v.mtu.Load())
	if mtu == 0 {
		mtu = defaultMTU
	}
	return v.bypass.open(bypassPlace{name: twinName(v.name), index: index, mtu: mtu, queues: 1}, nil)
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
			v.waiter.found()
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
	v.linksMu.Lock()
	defer v.linksMu.Unlock()
	if at := v.at.Load(); at != nil && boundTo(v.fd, at.index) && (v.bypass == nil || v.bypass.intact()) {
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

// Counters implements vrouter.Port. Those of vr0 start with the device, not with the process.
func (v *Veth) Counters() []vrouter.Counter {
	lost := v.lost.read(v.fd) + v.ring.short.Load() + v.bypass.dropped()
	return append(v.vr0.Counters(), vrouter.Counter{Name: "kernel_vr0_queue_dropped", Packets: lost}) // we were too slow
}

// spin implements Device.
func (v *Veth) spin(longest time.Duration) { v.waiter.longest = longest }

// Stop implements vrouter.Port.
func (v *Veth) Stop() {
	v.waiter.stop()
	v.drained.stop()
}

// Close implements vrouter.Port. The pair stays.
func (v *Veth) Close() error {
	var errs []error
	if v.bypass != nil {
		errs = append(errs, v.bypass.close())
	}
	v.vr0.close()
	v.ring.close()
	for _, fd := range []int{v.fd, v.held} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	for _, w := range []*waiter{v.waiter, v.drained} {
		if w != nil {
			errs = append(errs, w.close())
		}
	}
	return errors.Join(errs...)
}
