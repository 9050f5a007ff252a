package oracle

import (
	"errors"
	"fmt"
	"net"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tun is a TUN device of the test's own: what is written to it the kernel receives, what the kernel sends is read.
type tun struct{ fd int }

// openTUN makes one in the caller's namespace. queue is its length in packets.
func openTUN(name string, mtu, queue int) (*tun, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var request struct {
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(request.name[:], name)
	request.flags = unix.IFF_TUN | unix.IFF_NO_PI
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return nil, errors.Join(fmt.Errorf("TUNSETIFF %s: %w", name, errno), unix.Close(fd))
	}
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = errors.Join(netlink.LinkSetMTU(l, mtu), netlink.LinkSetTxQLen(l, queue), netlink.LinkSetUp(l))
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &tun{fd}, nil
}

// write hands a packet to the kernel; no device takes one whose version is neither 4 nor 6.
func (d *tun) write(t testing.TB, b []byte) {
	t.Helper()
	if version := b[0] >> 4; version != 4 && version != 6 {
		return
	}
	if _, err := unix.Write(d.fd, b); err != nil {
		t.Fatalf("write %d bytes to a TUN device: %v", len(b), err)
	}
}

// read returns what waits, without waiting.
func (d *tun) read(t testing.TB) [][]byte {
	t.Helper()
	var out [][]byte
	b := make([]byte, 1<<16)
	for {
		n, err := unix.Read(d.fd, b)
		if err == unix.EAGAIN {
			return out
		}
		if err != nil {
			t.Fatalf("read from a TUN device: %v", err)
		}
		out = append(out, append([]byte(nil), b[:n]...))
	}
}

// wait is read for what has to come.
func (d *tun) wait(t testing.TB) [][]byte {
	t.Helper()
	for {
		if out := d.read(t); len(out) > 0 {
			return out
		}
		ready := []unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(ready, 10_000); n == 0 || err != nil && err != unix.EINTR {
			t.Fatalf("nothing came within ten seconds: %v", err)
		}
	}
}

func (d *tun) close(t testing.TB) {
	if err := unix.Close(d.fd); err != nil {
		t.Error(err)
	}
}

// tap is a packet socket on an Ethernet interface that sees what arrives and sends whole frames.
type tap struct {
	fd    int
	index int
	poll  [1]unix.PollFd
}

// openTap opens one in the caller's namespace.
func openTap(link string) (*tap, error) {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return nil, err
	}
	const protocol = unix.ETH_P_IP&0xff<<8 | unix.ETH_P_IP>>8 // in the order of the network
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, err
	}
	at := &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: l.Attrs().Index}
	err = errors.Join(unix.Bind(fd, at), unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20))
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &tap{fd: fd, index: l.Attrs().Index}, nil
}

// next returns the next packet, from its IPv4 header on. It waits for one up to ten seconds.
func (d *tap) next(t testing.TB) []byte {
	t.Helper()
	for {
		if b := d.read(t); b != nil {
			return b
		}
		d.poll[0] = unix.PollFd{Fd: int32(d.fd), Events: unix.POLLIN}
		if n, err := unix.Poll(d.poll[:], 10_000); n == 0 || err != nil && err != unix.EINTR {
			t.Fatalf("nothing came within ten seconds: %v", err)
		}
	}
}

// read is next for what is there: nil means nothing.
func (d *tap) read(t testing.TB) []byte {
	t.Helper()
	b := make([]byte, 1<<16)
	for {
		n, err := unix.Read(d.fd, b)
		switch err {
		case nil:
			return b[14:n]
		case unix.EAGAIN:
			return nil
		case unix.EINTR:
		default:
			t.Fatal(err)
		}
	}
}

// send sends a packet to the hardware address to.
func (d *tap) send(t testing.TB, from, to net.HardwareAddr, b []byte) {
	t.Helper()
	frame := append(append(append([]byte(nil), to...), from...), 8, 0)
	if err := unix.Sendto(d.fd, append(frame, b...), 0, &unix.SockaddrLinklayer{Ifindex: d.index}); err != nil {
		t.Fatalf("send %d bytes: %v", len(b), err)
	}
}

// rawSocket sends IPv4 packets as the node's own kernel would.
type rawSocket struct{ fd int }

// openRaw opens one in the caller's namespace.
func openRaw() (*rawSocket, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	return &rawSocket{fd}, err
}

// send sends a packet, whole with its header.
func (s *rawSocket) send(t testing.TB, b []byte) {
	t.Helper()
	if err := unix.Sendto(s.fd, b, 0, &unix.SockaddrInet4{Addr: [4]byte(b[16:])}); err != nil {
		t.Fatalf("send %d bytes: %v", len(b), err)
	}
}

func (s *rawSocket) close(t testing.TB) {
	if err := unix.Close(s.fd); err != nil {
		t.Error(err)
	}
}
