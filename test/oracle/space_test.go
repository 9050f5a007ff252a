package oracle

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// space is a network namespace without a name: it is gone with the test process, whatever happens.
type space struct{ handle netns.NsHandle }

// onThread runs f on a thread of its own, which is thrown away afterwards with whatever namespace it is in.
func onThread(t testing.TB, f func() error) {
	t.Helper()
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		result <- f()
	}()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
}

func newSpace(t testing.TB) *space {
	t.Helper()
	s := &space{}
	onThread(t, func() (err error) {
		if s.handle, err = netns.New(); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	t.Cleanup(func() {
		if err := s.handle.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// do runs f in the namespace.
func (s *space) do(t testing.TB, f func() error) {
	t.Helper()
	onThread(t, func() error {
		if err := netns.Set(s.handle); err != nil {
			return err
		}
		return f()
	})
}

// beRouter makes the caller's namespace a router that answers everything at once.
func beRouter() error {
	return sysctls(map[string]string{
		"ipv4/ip_forward":                  "1",
		"ipv4/icmp_ratelimit":              "0",
		"ipv4/icmp_ratemask":               "0",
		"ipv4/conf/all/send_redirects":     "0",
		"ipv4/conf/default/send_redirects": "0",
		"ipv4/conf/all/rp_filter":          "0", // of this and the interface's the larger value counts
		"ipv4/conf/default/rp_filter":      "1",
		"ipv6/conf/all/disable_ipv6":       "1",
		"ipv6/conf/default/disable_ipv6":   "1",
	})
}

func sysctls(values map[string]string) error {
	for name, value := range values {
		err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0)
		if err != nil && !(errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(name, "ipv6/")) {
			return err
		}
	}
	return nil
}

// address gives an interface of the caller's namespace an address, and sets it up.
func address(link, cidr string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
}

// route routes a prefix to an interface of the caller's namespace; without one it is a blackhole.
func route(prefix, link string) error {
	p := netip.MustParsePrefix(prefix)
	r := &netlink.Route{Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}, Type: unix.RTN_BLACKHOLE}
	if link != "" {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		r.LinkIndex, r.Type = l.Attrs().Index, unix.RTN_UNICAST
	}
	return netlink.RouteReplace(r)
}

// neighbour makes the hardware address of an IPv4 neighbour permanent.
func neighbour(link string, ip netip.Addr, mac net.HardwareAddr) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	return netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: ip.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT})
}

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

// write hands a packet to the kernel. It takes none whose version is neither 4 nor 6.
func (d *tun) write(t testing.TB, b []byte) {
	t.Helper()
	if _, err := unix.Write(d.fd, b); err != nil && err != unix.EINVAL {
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
	b := make([]byte, 1<<16)
	for {
		n, err := unix.Read(d.fd, b)
		switch err {
		case nil:
			return b[14:n]
		case unix.EINTR:
		case unix.EAGAIN:
			d.poll[0] = unix.PollFd{Fd: int32(d.fd), Events: unix.POLLIN}
			if n, err := unix.Poll(d.poll[:], 10_000); n == 0 || err != nil && err != unix.EINTR {
				t.Fatalf("nothing came within ten seconds: %v", err)
			}
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
