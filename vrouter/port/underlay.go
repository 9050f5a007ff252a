package port

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/net/bpf"
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
// the rest by the raw socket. It implements vrouter.Port.
type Underlay struct {
	frames *frames // nil: everything goes by the raw socket

	recv, send, guard int
	waiter            *waiter // Recv's
	drained           *waiter // Send's

	mu      sync.Mutex // SetInterface and the idle Recv
	name    string
	index   int          // of the interface that recv is bound to; 0: none
	header  atomic.Int32 // length of its link-layer header, in bytes
	dropped atomic.Uint64

	// For Send only.
	to       unix.SockaddrInet4
	scratch  []byte
	splitter packet.Splitter
}

// OpenOffloadUnderlay is OpenUnderlay for a port that carries superpackets and unfinished checksums on, whole where the
// kernel lets a BPF program help.
func OpenOffloadUnderlay() (*Underlay, error) { return openOffloadUnderlay(newRetag) }

func openOffloadUnderlay(load func() (*retag, error)) (*Underlay, error) {
	u, err := OpenUnderlay()
	if err != nil {
		return nil, err
	}
	if u.frames, err = newFrames(load); err != nil {
		return nil, errors.Join(err, u.Close())
	}
	return u, nil
}

// OpenUnderlay opens the sockets. The port receives nothing until SetInterface has named the interface.
func OpenUnderlay() (_ *Underlay, err error) {
	u := &Underlay{recv: -1, send: -1, guard: -1, scratch: make([]byte, vrouter.BufferSize)}
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Close())
		}
	}()
	if u.waiter, err = newWaiter(); err != nil {
		return nil, err
	}
	if u.drained, err = newWaiter(); err != nil {
		return nil, err
	}
	if err := u.openGuard(); err != nil {
		return nil, explainSocket("raw socket for protocol 4", err)
	}
	if err := u.openSend(); err != nil {
		return nil, explainSocket("raw socket for sending", err)
	}
	if err := u.openRecv(); err != nil {
		return nil, explainSocket("packet socket for receiving", err)
	}
	return u, nil
}

func (u *Underlay) openGuard() (err error) {
	u.guard, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protoIPIP)
	if err != nil {
		return err
	}
	return attach(u.guard, bpf.RetConstant{Val: 0})
}

func (u *Underlay) openSend() (err error) {
	// IPPROTO_RAW implies IP_HDRINCL: the bytes on the wire are the ones we wrote, but for the header checksum, which
	// the kernel writes again, and an identification of 0, which it replaces.
	u.send, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	return enlarge(u.send, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF)
}

// networkOffset is SKF_NET_OFF of linux/filter.h, -0x100000: from here on offsets count from the IP header.
const networkOffset = 0xfff00000

func (u *Underlay) openRecv() (err error) {
	// Protocol 0: deaf until it is bound, so that nothing of another interface slips in.
	// SOCK_RAW, because PACKET_VNET_HDR is not for SOCK_DGRAM.
	u.recv, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	if err := unix.SetsockoptInt(u.recv, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return fmt.Errorf("PACKET_VNET_HDR: %w", err)
	}
	if err := unix.SetsockoptInt(u.recv, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return fmt.Errorf("PACKET_IGNORE_OUTGOING (Linux 4.20): %w", err)
	}
	if err := attach(u.recv,
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.PACKET_HOST, SkipTrue: 3},
		bpf.LoadAbsolute{Off: networkOffset + 9, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: protoIPIP, SkipTrue: 1},
		bpf.RetConstant{Val: 0x40000},
		bpf.RetConstant{Val: 0},
	); err != nil {
		return err
	}
	return enlarge(u.recv, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF)
}

func attach(fd int, program ...bpf.Instruction) error {
	raw, err := bpf.Assemble(program)
	if err != nil {
		return fmt.Errorf("socket filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}); err != nil {
		return fmt.Errorf("socket filter: %w", err)
	}
	return nil
}

// enlarge sets a socket's buffer past the system's limit, or up to it where NET_ADMIN is missing.
func enlarge(fd, force, polite int) error {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, socketBuffer) == nil {
		return nil
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, polite, socketBuffer); err != nil {
		return fmt.Errorf("socket buffer: %w", err)
	}
	return nil
}

// SetInterface names the interface to receive on. One that is not there is no error: the port takes it up when it
// comes, or comes back.
func (u *Underlay) SetInterface(name string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.name = name
	return u.rebind()
}

// rebind binds the receiving socket to the interface that has the name now. The caller holds mu.
func (u *Underlay) rebind() error {
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
	if index == u.index && u.bound(index) {
		return nil
	}
	if index == 0 {
		u.index = 0 // gone; the kernel has unbound the socket
		return nil
	}
	address := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: index}
	if err := unix.Bind(u.recv, address); err != nil {
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENETDOWN) {
			u.index = 0 // it went away in this moment
			return nil
		}
		return fmt.Errorf("underlay %s: bind: %w", u.name, err)
	}
	u.index = index
	u.header.Store(u.linkHeader(request))
	return nil
}

// bound reports whether the receiving socket is on the interface index: the kernel takes it off one that goes, and the
// index may come back with another.
func (u *Underlay) bound(index int) bool {
	if index == 0 {
		return true // to none, then
	}
	address, err := unix.Getsockname(u.recv)
	link, ok := address.(*unix.SockaddrLinklayer)
	return err == nil && ok && link.Ifindex == index
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
		return u.name + " (" + u.frames.resolver.String() + ")"
	}
	return u.name
}

// Sending describes for people how packets leave.
func (u *Underlay) Sending() string {
	if u.frames != nil {
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
			return n, nil
		}
		if !u.waiter.wait(u.recv, unix.POLLIN, rebindInterval) {
			u.tend()
		}
	}
}

// tend implements reader: it looks whether the interface is still the same.
func (u *Underlay) tend() {
	u.mu.Lock()
	defer u.mu.Unlock()
	// What fails now is tried again at the next idle moment.
	_ = u.rebind()
}

// readFD implements reader.
func (u *Underlay) readFD() int { return u.recv }

// recvReady implements reader.
func (u *Underlay) recvReady(batch []*vrouter.Packet) int {
	n := 0
	header := int(u.header.Load())
	start := vrouter.Headroom - header - vnetHeader
	for n < len(batch) {
		p := batch[n]
		got, err := unix.Read(u.recv, p.Buf[start:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			// EAGAIN, or once ENETDOWN when the interface goes down or away: in both cases there is nothing more.
			break
		}
		p.Off, p.Len = vrouter.Headroom, max(got-vnetHeader-header, 0)
		p.Offload = parseVnet(p.Buf[start:start+vnetHeader], header)
		n++
	}
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
	table := *u.frames.resolver.table.Load()
	for _, p := range batch {
		p.Sent, p.Drop = 0, vrouter.ReasonNotSet
		if !u.frames.send(u, table, p) {
			u.sendRaw(p)
		}
	}
	u.frames.flush(u)
}

// Counters implements vrouter.Port.
func (u *Underlay) Counters() []vrouter.Counter {
	// Reading resets the kernel's count, so the sum is kept here.
	if s, err := unix.GetsockoptTpacketStats(u.recv, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
		u.dropped.Add(uint64(s.Drops))
	}
	return []vrouter.Counter{{Name: "kernel_underlay_rx_dropped", Packets: u.dropped.Load()}} // the socket's buffer was full
}

// Stop implements vrouter.Port.
func (u *Underlay) Stop() {
	u.waiter.stop()
	u.drained.stop()
}

// Close implements vrouter.Port.
func (u *Underlay) Close() error {
	var errs []error
	if u.frames != nil {
		errs = append(errs, u.frames.close())
	}
	for _, fd := range []int{u.recv, u.send, u.guard} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	for _, w := range []*waiter{u.waiter, u.drained} {
		if w != nil {
			errs = append(errs, w.close())
		}
	}
	return errors.Join(errs...)
}
