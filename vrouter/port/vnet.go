package port

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// vnetHeader is the length of struct virtio_net_hdr, in bytes.
const vnetHeader = 10

// parseVnet reads a virtio-net header (virtio 1.2, 5.1.6) of a packet in front of which a link-layer header has link
// bytes.
func parseVnet(h []byte, link int) vrouter.Offload {
	o := vrouter.Offload{
		NeedsChecksum:  h[0]&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0,
		Size:           binary.NativeEndian.Uint16(h[4:]),
		ChecksumStart:  binary.NativeEndian.Uint16(h[6:]) - uint16(link),
		ChecksumOffset: binary.NativeEndian.Uint16(h[8:]),
		ECN:            h[1]&unix.VIRTIO_NET_HDR_GSO_ECN != 0,
	}
	switch h[1] &^ unix.VIRTIO_NET_HDR_GSO_ECN {
	case unix.VIRTIO_NET_HDR_GSO_NONE:
	case unix.VIRTIO_NET_HDR_GSO_TCPV4:
		o.Segmentation = vrouter.SegmentTCPv4
	case unix.VIRTIO_NET_HDR_GSO_UDP_L4:
		o.Segmentation = vrouter.SegmentUDP
	default:
		o.Segmentation = vrouter.SegmentUnsupported
	}
	return o
}

// putVnet writes the virtio-net header of a packet that o describes, in front of which a link-layer header has link
// bytes. headers is the length of the packet's headers up to the payload, in bytes; only superpackets need it.
func putVnet(h []byte, o *vrouter.Offload, link, headers int) {
	clear(h[:vnetHeader])
	if o.NeedsChecksum {
		h[0] = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
		binary.NativeEndian.PutUint16(h[6:], o.ChecksumStart+uint16(link))
		binary.NativeEndian.PutUint16(h[8:], o.ChecksumOffset)
	}
	switch o.Segmentation {
	case vrouter.SegmentTCPv4:
		h[1] = unix.VIRTIO_NET_HDR_GSO_TCPV4
		if o.ECN {
			h[1] |= unix.VIRTIO_NET_HDR_GSO_ECN
		}
	case vrouter.SegmentUDP:
		h[1] = unix.VIRTIO_NET_HDR_GSO_UDP_L4
	default:
		return
	}
	binary.NativeEndian.PutUint16(h[2:], uint16(link+headers))
	binary.NativeEndian.PutUint16(h[4:], o.Size)
}

// super looks at a superpacket whose first outer bytes are a tunnel's header, and returns the length of all its
// headers and the number of its segments. A packet that is none has one segment.
func super(b []byte, outer int, o *vrouter.Offload) (headers, segments int, fault packet.Fault) {
	if o.Segmentation == vrouter.SegmentNone {
		return 0, 1, packet.FaultNone
	}
	headers, fault = packet.SegmentHeaders(packet.IPv4(b[outer:]), o.Protocol(), int(o.Size))
	if fault != packet.FaultNone {
		return 0, 0, fault
	}
	headers += outer
	return headers, max(1, (len(b)-headers+int(o.Size)-1)/int(o.Size)), packet.FaultNone
}
