package node

import (
	"net"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/test/space"
)

// TestLossesAreSeen loses packets at an interface whose other side is down, in a packet socket and in a raw socket that nobody
// reads, and finds each of them.
func TestLossesAreSeen(t *testing.T) {
	here, there := space.New(t), space.New(t)
	for _, s := range []*space.Space{here, there} {
		s.Do(t, space.BeRouter) // IPv6 sends by itself
	}
	Cable(t, here, there, "eth0", "eth0", 1500, "198.18.0.1/24", "")
	n := &Node{Space: here}
	n.Watch(there)
	if got := n.losses(t); len(got) > 0 {
		t.Fatalf("nothing was sent, and lost are %v", got)
	}
	open := func(family, protocol int, bind func(fd int) error) {
		there.Do(t, func() error {
			fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
			if err != nil {
				return err
			}
			t.Cleanup(func() { _ = unix.Close(fd) })
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil { // the kernel's least
				return err
			}
			return bind(fd)
		})
	}
	const allOfIPv4 = unix.ETH_P_IP>>8 | unix.ETH_P_IP<<8&0xff00
	open(unix.AF_PACKET, 0, func(fd int) error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: allOfIPv4, Ifindex: l.Attrs().Index})
	})
	open(unix.AF_INET, unix.IPPROTO_UDP, func(int) error { return nil })
	var mac net.HardwareAddr
	there.Do(t, func() error {
		l, err := netlink.LinkByName("eth0")
		if err == nil {
			mac, err = l.Attrs().HardwareAddr, space.Address("eth0", "198.18.0.2/24")
		}
		return err
	})
	flood := func() {
		here.Do(t, func() error {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			own := l.Attrs().HardwareAddr
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			ip := []byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2, 0, 9, 0, 9, 0, 8, 0, 0}
			var sum uint32
			for i := 0; i < 20; i += 2 {
				sum += uint32(ip[i])<<8 | uint32(ip[i+1])
			}
			sum = ^(sum>>16 + sum&0xffff)
			ip[10], ip[11] = byte(sum>>8), byte(sum)
			frame := append(append(append([]byte(nil), mac...), own...), 8, 0)
			for range 100 {
				if err := unix.Sendto(fd, append(frame, ip...), 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	seen := func(what string) bool {
		for name := range n.losses(t) {
			if strings.Contains(name, what) {
				return true
			}
		}
		return false
	}
	flood()
	for _, what := range []string{"namespace 1: packet socket", "namespace 1: raw socket"} {
		Until(t, what, func() bool { return seen(what) })
	}
	if seen("eth0") {
		t.Fatalf("an interface lost something too: %v", n.losses(t))
	}
	there.Do(t, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(l)
	})
	Until(t, "an interface's loss", func() bool {
		flood()
		return seen("namespace 0: eth0 sending")
	})
}
