package port_test

import (
	"bytes"
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/vrouter"
	"margay/vrouter/port"
)

// eth0 returns eth0 of the calling thread's namespace.
func eth0() (*netlink.LinkAttrs, error) {
	l, err := netlink.LinkByName("eth0")
	if err != nil {
		return nil, err
	}
	return l.Attrs(), nil
}

// TestXSK: what is for us comes to the socket, whatever else goes to the kernel; what we send arrives, again and again,
// more than there are frames; nothing is allocated.
func TestXSK(t *testing.T) {
	const slots = 64
	a, b := newSpace(t), newSpace(t)
	wire(t, a, b, 1)
	var x *port.XSK
	var own, peer *netlink.LinkAttrs
	b.do(t, func() (err error) {
		peer, err = eth0()
		return err
	})
	a.do(t, func() (err error) {
		if own, err = eth0(); err != nil {
			return err
		}
		x, err = port.OpenXSK(own.Index, own.MTU, slots, own.HardwareAddr, nodeAddress(1))
		return err
	})
	defer func() {
		if err := x.Close(); err != nil {
			t.Error(err)
		}
	}()
	if !x.Native() {
		t.Error("a veth runs the program itself, but it runs behind")
	}
	raw := b.raw(t)
	nodeA, nodeB, podA, podB := nodeAddress(1).As4(), nodeAddress(2).As4(), podAddress(1).As4(), podAddress(2).As4()
	ours := ipip(nodeB, nodeA, podB, podA)
	send := func(packet []byte) {
		t.Helper()
		if err := unix.Sendto(raw, packet, 0, &unix.SockaddrInet4{Addr: nodeA}); err != nil {
			t.Fatal(err)
		}
	}
	fragment := bytes.Clone(ours)
	fragment[6] = 0x20
	other := header(17, 28, nodeB, nodeA)
	other = append(other, 0x30, 0x39, 0x30, 0x39, 0, 8, 0, 0)
	kernel := a.capture(t)
	batch := []*vrouter.Packet{vrouter.NewPacket(), vrouter.NewPacket()}
	for i := range 3 * slots {
		send(other)
		send(fragment)
		send(ours)
		if n := x.Recv(batch); n != 1 || !bytes.Equal(batch[0].Bytes()[12:], ours[12:]) {
			t.Fatalf("round %d: %d packets came, %x", i, n, batch[0].Bytes())
		}
	}
	for _, want := range []byte{17, 4} { // what the kernel got, in this order; not ours, which is whole
		got := make([]byte, 100)
		n, err := unix.Read(kernel, got)
		if err != nil || got[9] != want || n == len(ours) && got[6] == 0 {
			t.Errorf("the kernel got %x, %v", got[:n], err)
		}
	}

	captured := b.capture(t)
	frame := append(append(bytes.Clone(peer.HardwareAddr), own.HardwareAddr...), 8, 0)
	frame = append(frame, ipip(nodeA, nodeB, podA, podB)...)
	for range 3 * slots {
		if n := x.Send(frame, frame); n != 2 {
			t.Fatalf("%d frames of 2 were taken", n)
		}
		for _, got := range receive(t, captured, 2) {
			if !bytes.Equal(got, frame[14:]) {
				t.Fatalf("%x came", got)
			}
		}
	}
	if n := testing.AllocsPerRun(100, func() { x.Send(frame) }); n != 0 {
		t.Errorf("sending: %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() {
		if unix.Sendto(raw, ours, 0, to) != nil || x.Recv(batch) != 1 {
			t.Error("nothing came")
		}
	}); n != 0 {
		t.Errorf("receiving: %v allocations", n)
	}
	if n := x.Dropped(); n != 0 {
		t.Errorf("%d frames dropped", n)
	}
	for range 2 * slots {
		send(ours)
	}
	if n := x.Dropped(); n == 0 {
		t.Error("more frames than there is room for came, and none was counted as dropped")
	}
	if receive, send := x.Occupancy(); receive.Used != slots || receive.Size != slots || send.Used != 0 || send.Size != slots {
		t.Errorf("queues %+v, %+v: expected one that is full, and one that is empty, of %d", receive, send, slots)
	}
}

// to is node A, for unix.Sendto.
var to = &unix.SockaddrInet4{Addr: nodeAddress(1).As4()}

// raw returns a socket that sends whole IP packets from the namespace.
func (s *space) raw(t *testing.T) (fd int) {
	t.Helper()
	s.do(t, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// TestXSKRefused: what a socket cannot be opened for is named in one line, with what to do instead.
func TestXSKRefused(t *testing.T) {
	a, b := newSpace(t), newSpace(t)
	wire(t, a, b, 1)
	refused := func(what string, want error, open func(index int) error) {
		t.Helper()
		a.do(t, func() error {
			link, err := eth0()
			if err != nil {
				return err
			}
			err = open(link.Index)
			var missing *port.Missing
			if !errors.As(err, &missing) || want != nil && !errors.Is(err, want) || !strings.Contains(missing.Do, "--io packet") || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: error %q: expected a Missing of one line for %v", what, err, want)
			}
			return nil
		})
	}
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	open := func(index, mtu int) error {
		x, err := port.OpenXSK(index, mtu, 64, mac, nodeAddress(1))
		if err == nil {
			return x.Close()
		}
		return err
	}
	refused("MTU of 9000", nil, func(index int) error { return open(index, 9000) })
	refused("no such interface", nil, func(int) error { return open(9999, 1500) })
	refused("second program", unix.EBUSY, func(index int) error {
		x, err := port.OpenXSK(index, 1500, 64, mac, nodeAddress(1))
		if err != nil {
			return err
		}
		second := open(index, 1500)
		if err := x.Close(); err != nil {
			t.Error(err)
		}
		return second
	})
}
