package port_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"margay/vrouter"
	"margay/vrouter/packet"
	"margay/vrouter/port"
)

// transportPacket is a packet with a transport header of zeros of which the checksum is unfinished, or finished.
func transportPacket(protocol byte, offset int, finished bool) []byte {
	b := append(header(protocol, 20+60, nodeAddress(1).As4(), nodeAddress(2).As4()), make([]byte, 60)...)
	copy(b[60:], "payload of some bytes")
	binary.BigEndian.PutUint16(b[20+offset:], uint16(packet.PseudoSum(packet.IPv4(b), 60)))
	if finished && !packet.CompleteChecksum(b, 20, offset) {
		panic("no such place")
	}
	return b
}

// TestMarkUnfinished: only a checksum that is the pseudo-header's sum, and not right, counts as unfinished.
func TestMarkUnfinished(t *testing.T) {
	mark := func(b []byte) vrouter.Offload {
		p := vrouter.NewPacket()
		p.Len = copy(p.Buf[p.Off:], b)
		port.MarkUnfinished(p)
		if !bytes.Equal(p.Bytes(), b) {
			t.Error("the packet was changed")
		}
		return p.Offload
	}
	tunnel := func(b []byte) []byte {
		return append(header(4, 20+len(b), nodeAddress(1).As4(), nodeAddress(2).As4()), b...)
	}
	fragment := func(b []byte) []byte {
		b = bytes.Clone(b)
		b[6] = 0x20
		return b
	}
	tcp, udp := transportPacket(6, 16, false), transportPacket(17, 6, false)
	unfinished := func(start, offset uint16) vrouter.Offload {
		return vrouter.Offload{NeedsChecksum: true, ChecksumStart: start, ChecksumOffset: offset}
	}
	none := vrouter.Offload{}
	for _, test := range []struct {
		name string
		b    []byte
		want vrouter.Offload
	}{
		{"TCP", tcp, unfinished(20, 16)},
		{"UDP", udp, unfinished(20, 6)},
		{"TCP in a tunnel", tunnel(tcp), unfinished(40, 16)},
		{"UDP in a tunnel", tunnel(udp), unfinished(40, 6)},
		{"UDP with padding of the link behind it", append(bytes.Clone(udp), 0, 0, 0), unfinished(20, 6)},
		{"in two tunnels", tunnel(tunnel(udp)), none},
		{"finished TCP", transportPacket(6, 16, true), none},
		{"finished UDP in a tunnel", tunnel(transportPacket(17, 6, true)), none},
		{"ICMP", transportPacket(1, 2, false), none},
		{"fragment", fragment(udp), none},
		{"fragment of the tunnel", fragment(tunnel(udp)), none},
		{"short", tcp[:36], none},
		{"empty", nil, none},
	} {
		if got := mark(test.b); got != test.want {
			t.Errorf("%s: %+v: expected %+v", test.name, got, test.want)
		}
	}
	// A wrong checksum that is not the pseudo-header's sum is wrong, and stays so.
	damaged := transportPacket(17, 6, true)
	damaged[70] ^= 1
	if got := mark(damaged); got != none {
		t.Errorf("damaged: %+v", got)
	}
}

// FuzzMarkUnfinished: whatever comes, nothing is read or marked past its end.
func FuzzMarkUnfinished(f *testing.F) {
	f.Add(transportPacket(6, 16, false))
	f.Add(transportPacket(17, 6, false))
	f.Add(append(header(4, 100, [4]byte{1}, [4]byte{2}), transportPacket(17, 6, false)...))
	p := vrouter.NewPacket()
	f.Fuzz(func(t *testing.T, b []byte) {
		p.Reset()
		p.Len = copy(p.Buf[p.Off:len(p.Buf)-1], b)
		port.MarkUnfinished(p)
		o := p.Offload
		if o.NeedsChecksum && !packet.CompleteChecksum(p.Bytes(), int(o.ChecksumStart), int(o.ChecksumOffset)) {
			t.Errorf("%x: marked %+v, which cannot be completed", b, o)
		}
	})
}
