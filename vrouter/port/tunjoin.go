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
	joiner   packet.Joiner
	payloads [joinMax][]byte // of all packets but the first
}

// gather returns how many packets at the front of batch can go together.
func (r *run) gather(batch []*vrouter.Packet) int {
	first := batch[0]
	if len(batch) == 1 || !joinable(first) || !r.joiner.Start(packet.IPv4(first.Bytes()), first.Offload.NeedsChecksum) {
		return 1
	}
	n := 1
	for n < min(len(batch), joinMax) && joinable(batch[n]) {
		p := batch[n]
		payload, ok := r.joiner.Add(packet.IPv4(p.Bytes()), p.Offload.NeedsChecksum)
		if !ok {
			break
		}
		r.payloads[n] = payload
		n++
	}
	return n
}

// finish makes the first packet the front of the superpacket, and returns what is left undone in it and the length of
// its headers.
func (r *run) finish() (o vrouter.Offload, headers int) {
	j := &r.joiner
	j.Finish()
	return vrouter.Offload{Segmentation: vrouter.SegmentTCPv4, Size: uint16(j.Size()), NeedsChecksum: true,
		ChecksumStart: uint16(j.ChecksumStart()), ChecksumOffset: tcpChecksum}, j.HeaderLen()
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

// sendRun sends the packets at the front of batch that can go together, and returns how many.
func (t *TUN) sendRun(batch []*vrouter.Packet) int {
	first := batch[0]
	n := t.run.gather(batch)
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

// writeRun writes the superpacket of n packets; the first is the packet first with its virtio-net header.
func (t *TUN) writeRun(first *vrouter.Packet, n int) {
	o, headers := t.run.finish()
	start := first.Off - vnetHeader
	putVnet(first.Buf[start:], &o, 0, headers)
	t.pieces[0].Base = &first.Buf[start]
	t.pieces[0].SetLen(vnetHeader + first.Len)
	for i, payload := range t.run.payloads[1:n] {
		t.pieces[1+i].Base = &payload[0]
		t.pieces[1+i].SetLen(len(payload))
	}
	for {
		// Not unix.Writev, which allocates.
		_, _, errno := unix.Syscall(unix.SYS_WRITEV, uintptr(t.fd), uintptr(unsafe.Pointer(&t.pieces[0])), uintptr(n))
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
