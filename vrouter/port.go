package vrouter

import (
	"errors"

	"margay/vrouter/packet"
)

const (
	// Headroom is the number of free bytes, at least, that precede a received packet in its buffer: room for the
	// 20-byte outer header (RFC 2003), for an Ethernet header and for a virtio-net header.
	Headroom = 64
	// MaxPacket is the longest packet a buffer holds, in bytes: the limit of IPv4's total length field.
	MaxPacket = 65535
	// BufferSize is the length of Packet.Buf in bytes.
	BufferSize = Headroom + MaxPacket + 1
)

// ErrStopped is what Recv returns after Stop.
var ErrStopped = errors.New("port stopped")

// Segmentation says how a superpacket, which stands for several packets of one flow, has to be split.
type Segmentation uint8

// The kinds of segmentation. SegmentUnsupported marks a superpacket that this release cannot split.
const (
	SegmentNone Segmentation = iota
	SegmentTCPv4
	SegmentUDP
	SegmentUnsupported
)

// Offload is the work that the kernel left undone in a packet, as the virtio-net header tells it. The zero value means
// none. It travels with the packet to the last port, which carries it on or does the work.
type Offload struct {
	Segmentation Segmentation
	// NeedsChecksum says that the checksum of the bytes from ChecksumStart to the end is still to be stored at
	// ChecksumStart+ChecksumOffset. Both are in bytes, ChecksumStart from the packet's first byte.
	NeedsChecksum  bool
	ChecksumStart  uint16
	ChecksumOffset uint16
	// Size is the payload of each segment in bytes.
	Size uint16
	// ECN says that a TCP superpacket carries CWR, which only its first segment may keep (RFC 3168, 6.1.2).
	ECN bool
}

// Protocol returns the IP protocol that the segmentation is for, 0 where there is none.
func (o *Offload) Protocol() uint8 {
	switch o.Segmentation {
	case SegmentTCPv4:
		return packet.ProtocolTCP
	case SegmentUDP:
		return packet.ProtocolUDP
	}
	return 0
}

// Packet is one packet in its buffer. The packet is Buf[Off : Off+Len] and begins with its IP header.
type Packet struct {
	Buf     []byte
	Off     int
	Len     int
	Offload Offload
	// In is the interface by which a SwitchPort received the packet, and Out the one by which it is to send it. Other
	// ports leave both alone.
	In, Out Interface

	// Drop is set by Port.Send on a packet that it could not send; Sent is the number of packets that it wrote for
	// this one. A superpacket counts as the segments it stands for, whoever splits it.
	Drop Reason
	Sent int
}

// NewPacket returns a packet with a buffer of BufferSize bytes.
func NewPacket() *Packet {
	return &Packet{Buf: make([]byte, BufferSize), Off: Headroom}
}

// newPackets returns n packets for one batch, with their buffers one behind the other. Each buffer begins a cache line
// further on in its page than the one before, BufferSize being what it is: were the headers of all at the same place in a
// page, as they are in buffers of their own, they would have the same few lines of the first cache to share.
func newPackets(n int) []*Packet {
	batch, packets, memory := make([]*Packet, n), make([]Packet, n), make([]byte, n*BufferSize)
	for i := range batch {
		packets[i].Buf, memory = memory[:BufferSize:BufferSize], memory[BufferSize:]
		packets[i].Reset()
		batch[i] = &packets[i]
	}
	return batch
}

// Bytes returns the packet from its IP header on. The slice is a view of the buffer.
func (p *Packet) Bytes() []byte { return p.Buf[p.Off : p.Off+p.Len] }

// Reset empties the packet and gives it back its headroom; Buf's bytes stay as they are.
func (p *Packet) Reset() {
	p.Off, p.Len, p.Offload, p.Drop, p.Sent = Headroom, 0, Offload{}, ReasonNotSet, 0
	p.In, p.Out = HostInterface, HostInterface
}

// Port is a driver: it receives and sends whole IP packets in batches.
//
// Who owns a buffer: the caller allocates every Packet and owns it for ever. Recv and Send may use the packets of a
// batch only until they return; a driver that wants to keep bytes copies them. Recv writes a packet at Off = Headroom
// and sets Len and Offload. Send may change the bytes of a packet, and sets Drop and Sent of each.
//
// Threads: one goroutine at a time calls Recv, one (it may be another) calls Send, and nobody else sends on this port.
// Stop and Counters may be called from any goroutine at any time.
type Port interface {
	// Name is for people: the interface, as in "vr0".
	Name() string
	// Recv fills packets from the front of batch and returns how many; it blocks until there is at least one.
	// Conditions that can pass, such as an interface that is down, are waited out inside. The error is ErrStopped
	// after Stop, and any other error is final.
	Recv(batch []*Packet) (int, error)
	// Send writes every packet of batch in order. What fails is told per packet, in Packet.Drop.
	Send(batch []*Packet)
	// Counters reports the kernel's own losses around this port, each under a name that begins with "kernel_".
	Counters() []Counter
	// Stop makes Recv return ErrStopped, now and from then on.
	Stop()
	// Close frees what the port holds. The caller has seen Recv and Send return for the last time.
	Close() error
}

// SwitchPort is a port of many interfaces: the host's, the underlay's, and one for each pod. Pods' come and go while it
// runs. Recv sets Packet.In, Send obeys Packet.Out. One goroutine calls Recv, Pods and Send.
type SwitchPort interface {
	Port
	// Pods returns the pods' interfaces as they are until the next Recv.
	Pods() *Pods
}
