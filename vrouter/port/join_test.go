package port_test

import (
	"bytes"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/packet"
	"margay/vrouter/port"
)

// segments cuts the TCP superpacket of superpackets, without its outer header, as another node sends it.
func segments(t *testing.T, finished bool) (whole []byte, batch []*vrouter.Packet) {
	t.Helper()
	super := superpackets()["TCP"]
	whole = super.Bytes()[20:]
	whole[20+13] = 0x18 // ACK, PSH
	var s packet.Splitter
	if fault := s.Start(whole, 0, packet.ProtocolTCP, int(super.Offload.Size)); fault != packet.FaultNone {
		t.Fatal(fault)
	}
	for {
		p := vrouter.NewPacket()
		n, payload := s.Next(p.Buf[p.Off:])
		if n == 0 {
			return whole, batch
		}
		p.Len = n + copy(p.Buf[p.Off+n:], payload)
		p.Offload = vrouter.Offload{NeedsChecksum: true, ChecksumStart: uint16(s.ChecksumStart()), ChecksumOffset: 16}
		if finished {
			packet.CompleteChecksum(p.Bytes(), s.ChecksumStart(), 16)
			p.Offload = vrouter.Offload{}
		}
		batch = append(batch, p)
	}
}

// TestJoin: the segments of one flow come out of vr0 as one packet; another packet among them, and one that is damaged,
// come out as they are.
func TestJoin(t *testing.T) {
	s := newSpace(t)
	var tun *port.TUN
	s.do(t, func() (err error) {
		tun, err = port.OpenOffloadTUN("eth0") // the name that capture asks for
		return err
	})
	defer func() {
		if err := tun.Close(); err != nil {
			t.Error(err)
		}
	}()
	captured := s.capture(t)
	read := func() []byte {
		for b := make([]byte, 65536); ; {
			n, err := unix.Read(captured, b)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if b[9] == 6 {
				return b[:n]
			}
		}
	}
	send := func(batch []*vrouter.Packet) {
		tun.Send(batch)
		for i, p := range batch {
			if p.Sent != 1 || p.Drop != vrouter.ReasonNotSet {
				t.Errorf("packet %d: sent %d, %v", i, p.Sent, p.Drop)
			}
		}
	}
	for _, finished := range []bool{false, true} {
		whole, batch := segments(t, finished)
		send(batch)
		got := read()
		if len(got) != len(whole) || !bytes.Equal(got[40:], whole[40:]) {
			t.Errorf("finished %v: %d bytes came of %d", finished, len(got), len(whole))
		}
	}
	whole, batch := segments(t, true)
	batch[3].Bytes()[100] ^= 1
	damaged := bytes.Clone(batch[3].Bytes())
	send(batch)
	var lengths []int
	for _, want := range []int{3, 1, len(batch) - 4} {
		got := read()
		if want == 1 && !bytes.Equal(got, damaged) {
			t.Error("the damaged packet was changed")
		}
		lengths = append(lengths, len(got))
	}
	if sum := lengths[0] + lengths[1] + lengths[2]; sum != len(whole)+2*52 || lengths[0] != 52+3*1428 {
		t.Errorf("lengths %v of %d", lengths, len(whole))
	}
	_, batch = segments(t, true)
	header := bytes.Clone(batch[0].Bytes()[:52]) // which joining changes
	if n := testing.AllocsPerRun(50, func() {
		copy(batch[0].Bytes(), header)
		tun.Send(batch)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
