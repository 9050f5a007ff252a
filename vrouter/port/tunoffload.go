package port

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// What the kernel may leave undone in what it hands to us. TSO_ECN, because otherwise it splits each superpacket that
// carries CWR itself.
const (
	offloadsTCP = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	offloadsUDP = unix.TUN_F_USO4 | unix.TUN_F_USO6 // Linux 6.2
)

// OpenOffloadTUN is OpenTUN for a device with offloads: superpackets and unfinished checksums pass whole, each behind a
// virtio-net header.
func OpenOffloadTUN(name string) (*TUN, error) {
	return newTUN(tunOptions{name: name, queues: 1, offloads: true}).start()
}

// openOffload attaches to the device. It opens /dev/net/tun itself, because songgao/water knows no IFF_VNET_HDR.
func (t *TUN) openOffload(name string) (_ int, err error) {
	fd, err := unix.Open(tunPath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, explainTUN(name, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	request, err := unix.NewIfreq(name)
	if err != nil {
		return -1, fmt.Errorf("TUN device %s: %w", name, err)
	}
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if t.multi {
		flags |= unix.IFF_MULTI_QUEUE
	}
	request.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return -1, explainTUN(name, err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return -1, explainTUN(name, err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetHeader); err != nil {
		return -1, missingOffload(name, err)
	}
	t.udp.Store(true)
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadsTCP|offloadsUDP) == nil {
		return fd, nil
	}
	t.udp.Store(false)
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadsTCP); err != nil {
		return -1, missingOffload(name, err)
	}
	return fd, nil
}

func missingOffload(name string, err error) error {
	return &Missing{What: "offloads of TUN device " + name, Err: err, Do: "choose --attach tun-plain"}
}

// withoutOffloads takes back what an earlier process may have set on the persistent device, and throws away what the
// kernel queued before that: it may be superpackets, which nothing would mark as such.
func withoutOffloads(fd int) error {
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0); err != nil {
		return fmt.Errorf("switch offloads off: %w", err)
	}
	var b [1]byte
	for range tunQueue {
		if _, err := unix.Read(fd, b[:]); err != nil && err != unix.EINTR {
			break
		}
	}
	return nil
}

// Offloads describes for people what passes whole.
func (t *TUN) Offloads() string {
	switch {
	case t.vnet == 0:
		return "none"
	case t.udp.Load():
		return "checksum, TSO, USO"
	}
	return "checksum, TSO"
}

// sendWhole hands one packet to the kernel as it is, its virtio-net header in the headroom.
func (t *TUN) sendWhole(p *vrouter.Packet) {
	b, o := p.Bytes(), &p.Offload
	if o.Segmentation == vrouter.SegmentUnsupported {
		t.failure = vrouter.ReasonOffloadUnsupported
		return
	}
	headers, segments, fault := super(b, 0, o)
	if fault != packet.FaultNone {
		t.failure = vrouter.ReasonInnerMalformed
		return
	}
	if o.Segmentation == vrouter.SegmentUDP && !t.udp.Load() {
		t.splitUDP(b, int(o.Size))
		return
	}
	start := p.Off - vnetHeader
	putVnet(p.Buf[start:], o, 0, headers)
	if t.write(p.Buf[start : p.Off+p.Len]); t.failure == vrouter.ReasonNotSet {
		t.written = segments
	}
}

// splitUDP splits a UDP superpacket for a kernel that does not. The segments leave room for their header in scratch.
func (t *TUN) splitUDP(b []byte, size int) {
	clear(t.scratch[:vnetHeader]) // nothing is left undone in what follows
	t.split(packet.SegmentUDP(packet.IPv4(b), size, t.scratch[vnetHeader:], t.emit))
}

// writeBehindHeader writes a segment that splitUDP has put into scratch.
func (t *TUN) writeBehindHeader(b []byte) { t.write(t.scratch[:vnetHeader+len(b)]) }
