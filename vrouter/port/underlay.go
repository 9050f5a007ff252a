package port

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

const (
	// socketBuffer is the size asked for the sockets' buffers, in bytes: some 40 ms of 1,500-byte packets at 1 Gbit/s.
	socketBuffer = 8 << 20
	// rebindInterval is how often an idle port looks whether its interface is still the same, in milliseconds.
	rebindInterval = 250
	// sendPatience is how long a full socket buffer is waited for before the packet is dropped, in milliseconds.
	sendPatience = 50
	// ethernetHeader is the length of a frame's header on Ethernet-like interfaces, in bytes; VLAN tags are gone when a
	// frame comes to us.
	ethernetHeader = 14
	protoIPIP      = 4
)

// Underlay is the port to the other nodes. It receives by an AF_PACKET socket with PACKET_VNET_HDR, because a raw
// socket gives packets that GRO has merged without saying so; it sends by a raw socket, so that the kernel does
// routing and neighbours. A second raw socket, for protocol 4, is never read: while it is open the kernel does not
// answer "protocol unreachable". Opened by OpenOffloadUnderlay it sends by AF_PACKET what it can, see frames.go, and
// the rest by the raw socket. Opened by OpenXDPUnderlay it does the same, but receives and sends single packets by
// AF_XDP. It implements vrouter.Port.
//
// Of several queues each is an Underlay with sockets of its own, of which the first has what is the port's as a whole. The
// kernel shares out what comes among their AF_PACKET sockets by flow, and the sockets of AF_XDP are shared out in turn.
type Underlay struct {
	lead   *Underlay   // the first queue; nil: this is it
	more   []*Underlay // of the first queue: the others
	number int         // of the queue, from 0

	frames *frames // nil: everything goes by the raw socket
	bypass *bypass // nil: no AF_XDP

	recv, send, guard int
	ring              packetRing
	waiter            *waiter // Recv's
	drained           *waiter // Send's

	mu     sync.Mutex // SetInterface and the idle Recv
	name   string
	node   [4]byte      // this node's address; zero: not told yet
	index  int          // of the interface that recv is bound to; 0: none
	header atomic.Int32 // length of its link-layer header, in bytes
	lost   socketLosses
	group  fanout // of all queues' recv
	joined bool   // recv is of the group, and gets fragments put together: see defrag.go

	// For Send only.
	to       unix.SockaddrInet4
	scratch  []byte
	splitter packet.Splitter
}

// SetInterface names the interface to receive on. One that is not there is no error: the port takes it up when it
// comes, or comes back.
func (u *Underlay) SetInterface(name string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.name = name
	return u.rebind()
}

// SetNode tells this node's address: packets to it are ours. Only a port with AF_XDP has to know.
func (u *Underlay) SetNode(address netip.Addr) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.node = address.As4()
	return u.rebind()
}

// rebind goes to the interface that has the name now. The caller holds mu.
func (u *Underlay) rebind() error {
	if err := u.bind(); err != nil {
		return err
	}
	return u.openBypass()
}

// openBypass opens AF_XDP on the interface, or closes it where there is none. What fails is tried again at the next
// idle moment; until then all packets come to the AF_PACKET socket.
func (u *Underlay) openBypass() error {
	if u.bypass == nil {
		return nil
	}
	if u.index == 0 || u.node == [4]byte{} {
		u.bypass.shut()
		return nil
	}
	at, err := u.frames.resolver.bypassPlace(u.index)
	if err != nil {
		u.bypass.shut()
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return nil // it went away in this moment
		}
		return &Missing{What: "AF_XDP on " + u.name, Err: err, Do: doPacket}
	}
	at.queues, at.address = receiveQueues(u.send, u.name), u.node
	if err := u.bypass.open(at, matchIPIP(at.mac, u.node)); err != nil {
		return err
	}
	if u.bypass.generic() && mergesReceived(u.send, u.name) {
		u.bypass.shut()
		return &Missing{What: "AF_XDP on " + u.name, Err: errors.New("its driver has no XDP, and with GRO on merged packets would be lost"),
			Do: "ethtool -K " + u.name + " gro off, or " + doPacket}
	}
	return nil
}

// bind binds the receiving socket to the interface that has the name now.
func (u *Underlay) bind() error {
	if u.name == "" {
		return nil
	}
	request, err := unix.NewIfreq(u.name)
	if err != nil {
		return fmt.Errorf("underlay %q: %w", u.name, err)
	}
	index := 0
	if err := unix.IoctlIfreq(u.send, unix.SIOCGIFINDEX, request); err == nil {
		index = int(int32(request.Uint32()))
	}
	if u.frames != nil {
		u.frames.resolver.setIndex(index)
	}
	if index == u.index && (index == 0 || u.bound(index)) {
		u.joinGroup()
		return nil
	}
	if index == 0 {
		u.index = 0 // gone; the kernel has unbound the socket
		return nil
	}
	header := u.linkHeader(request)
	for _, q := range u.all() {
		if err := q.renewReceiver(); err != nil {
			return fmt.Errorf("underlay %s: %w", u.name, err)
		}
		q.header.Store(header)
		address := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: index}
		if err := unix.Bind(q.recv, address); err != nil {
			if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENETDOWN) {
				u.index = 0 // it went away in this moment
				return nil
			}
			return fmt.Errorf("underlay %s: bind: %w", u.name, err)
		}
	}
	u.index = index
	u.joinGroup()
	return nil
}

// bound reports whether all queues receive on the interface index.
func (u *Underlay) bound(index int) bool {
	for _, q := range u.all() {
		if !boundTo(q.recv, index) {
			return false
		}
	}
	return true
}

// linkHeader returns the length of the link-layer header, in bytes, of the interface that request names.
func (u *Underlay) linkHeader(request *unix.Ifreq) int32 {
	if err := unix.IoctlIfreq(u.send, unix.SIOCGIFHWADDR, request); err != nil {
		return ethernetHeader // it went away; the next bind asks again
	}
	switch request.Uint16() {
	case unix.ARPHRD_ETHER, unix.ARPHRD_LOOPBACK:
		return ethernetHeader
	}
	return 0 // a tunnel or another interface without frames
}

func htons(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}

// Name returns the interface's name, empty as long as there is none.
func (u *Underlay) Name() string {
	if u.lead != nil {
		return u.lead.Name()
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.name
}

// String describes the port for people.
func (u *Underlay) String() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.name == "":
		return "no underlay named"
	case u.index == 0:
		return u.name + " (not there)"
	}
	if u.frames != nil {
		text := u.frames.resolver.String()
		if u.bypass != nil {
			text += "; AF_XDP " + u.bypass.String()
		}
		return u.name + " (" + text + ")"
	}
	return u.name
}

// Sending describes for people how packets leave.
func (u *Underlay) Sending() string {
	switch {
	case u.bypass != nil:
		return "AF_XDP; " + u.frames.resolver.String()
	case u.frames != nil:
		return u.frames.resolver.String()
	}
	return "raw socket"
}

// Recv implements vrouter.Port. An interface that is down, or gone, is waited for.
func (u *Underlay) Recv(batch []*vrouter.Packet) (int, error) {
	for {
		if u.waiter.stopped.Load() {
			return 0, vrouter.ErrStopped
		}
		if n := u.recvReady(batch); n > 0 {
			u.waiter.found(n)
			return n, nil
		}
		if u.waiter.again() {
			continue
		}
		if !u.waiter.wait(u.readFD(), unix.POLLIN, rebindInterval) {
			u.tend()
		}
	}
}

// tend implements reader: it looks whether the interface is still the same.
func (u *Underlay) tend() {
	if u.lead != nil {
		u.lead.tend()
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	// What fails now is tried again at the next idle moment.
	_ = u.rebind()
}

// readFD implements reader.
func (u *Underlay) readFD() int {
	if u.bypass != nil {
		return u.bypass.epoll
	}
	return u.recv
}

// recvReady implements reader.
func (u *Underlay) recvReady(batch []*vrouter.Packet) int {
	if u.bypass != nil {
		if n := u.bypass.receive(batch); n > 0 {
			return n
		}
	}
	// EAGAIN, or once ENETDOWN when the interface goes down or away: in both cases there is nothing more.
	n, _ := u.ring.recv(u.recv, int(u.header.Load()), batch)
	return n
}

// Send implements vrouter.Port. It sends what decides itself where it goes: the destination of the outer header.
func (u *Underlay) Send(batch []*vrouter.Packet) {
	if u.frames == nil {
		for _, p := range batch {
			p.Sent, p.Drop = 0, vrouter.ReasonNotSet
			u.sendRaw(p)
		}
		return
	}
	u.frames.sendBatch(u, batch)
}

// Counters implements vrouter.Port. The first queue tells of all.
func (u *Underlay) Counters() []vrouter.Counter {
	if u.lead != nil {
		return nil
	}
	lost := u.bypass.dropped()
	for _, q := range u.all() {
		lost += q.lost.read(q.recv) + q.ring.short.Load()
	}
	return []vrouter.Counter{{Name: "kernel_underlay_rx_dropped", Packets: lost}} // we were too slow
}

// spin says how long to look for packets before sleeping, at any queue; it comes before the first Recv.
func (u *Underlay) spin(longest time.Duration) {
	for _, q := range u.all() {
		q.waiter.longest = longest
	}
}

// Stop implements vrouter.Port, for all queues.
func (u *Underlay) Stop() {
	for _, q := range u.all() {
		q.waiter.stop()
		q.drained.stop()
	}
}

// Close implements vrouter.Port, for all queues.
func (u *Underlay) Close() error {
	var errs []error
	if u.bypass != nil {
		errs = append(errs, u.bypass.close())
	}
	if u.frames != nil {
		errs = append(errs, u.frames.resolver.close())
	}
	for _, q := range u.all() {
		q.ring.close()
		if q.frames != nil {
			errs = append(errs, q.frames.close())
		}
		for _, fd := range []int{q.recv, q.send, q.guard} {
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
