package port

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// joinMax is the number of packets that one write can make a superpacket of.
const joinMax = 64

// run is what it takes to hand several segments of one TCP flow to the kernel as one superpacket: where neither the
// sender nor the kernel's GRO has kept it whole, each packet's way from vr0 to the pod costs more than ours.
type run struct {
	joiner packet.Joiner
	pieces [joinMax]unix.Iovec
}

// sendRun sends the packets at the front of batch that can go together, and returns how many.
func (t *TUN) sendRun(batch []*vrouter.Packet) int {
	first := batch[0]
	n := 1
	if len(batch) > 1 && joinable(first) && t.run.joiner.Start(packet.IPv4(first.Bytes()), first.Offload.NeedsChecksum) {
		for n < min(len(batch), joinMax) && joinable(batch[n]) {
			p := batch[n]
			payload, ok := t.run.joiner.Add(packet.IPv4(p.Bytes()), p.Offload.NeedsChecksum)
			if !ok {
				break
			}
			t.run.pieces[n].Base = &payload[0]
			t.run.pieces[n].SetLen(len(payload))
			n++
		}
	}
	t.written, t.failure = 0, vrouter.ReasonNotSet
	if n == 1 {
		t.sendWhole(first)
		first.Sent, first.Drop = t.written, t.failure
		return 1
	}
	t.writeRun(first, n)
	for _, p := range batch[:n] {
		p.Sent, p.Drop = t.written, t.failure
	}
	return n
}

// joinable reports whether p is a single packet, and what is left undone in it, if anything, is its TCP checksum.
func joinable(p *vrouter.Packet) bool {
	o := &p.Offload
	if o.Segmentation != vrouter.SegmentNone || p.Len < packet.IPv4MinLen {
		return false
	}
	return !o.NeedsChecksum || o.ChecksumOffset == tcpChecksum && int(o.ChecksumStart) == packet.IPv4(p.Bytes()).HeaderLen()
}

// tcpChecksum is the offset of the checksum in a TCP header, in bytes.
const tcpChecksum = 16

// writeRun writes the superpacket of the first n pieces; the first is the packet first with its virtio-net header.
func (t *TUN) writeRun(first *vrouter.Packet, n int) {
	j := &t.run.joiner
	j.Finish()
	o := vrouter.Offload{Segmentation: vrouter.SegmentTCPv4, Size: uint16(j.Size()), NeedsChecksum: true,
		ChecksumStart: uint16(j.ChecksumStart()), ChecksumOffset: tcpChecksum}
	start := first.Off - vnetHeader
	putVnet(first.Buf[start:], &o, 0, j.HeaderLen())
	t.run.pieces[0].Base = &first.Buf[start]
	t.run.pieces[0].SetLen(vnetHeader + first.Len)
	for {
		// Not unix.Writev, which allocates.
		_, _, errno := unix.Syscall(unix.SYS_WRITEV, uintptr(t.fd), uintptr(unsafe.Pointer(&t.run.pieces[0])), uintptr(n))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			t.failure = vrouter.ReasonSendFailed
		} else {
			t.written = 1
		}
		return
	}
}
