package port_test

import (
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/vrouter/packet"
	"margay/vrouter/port"
)

// TestForgedPathMTUIsNotTheKernels: a forged "fragmentation needed" about a tunnel packet does not narrow the node's own way
// to the other node.
func TestForgedPathMTUIsNotTheKernels(t *testing.T) {
	a, b := newSpace(t), newSpace(t)
	wire(t, a, b, 1)
	var u *port.Underlay
	a.do(t, func() (err error) {
		u, err = port.OpenUnderlay()
		return err
	})
	defer u.Close()
	node, peer := [4]byte{198, 18, 0, 1}, [4]byte{198, 18, 0, 2}
	inner := make([]byte, packet.IPv4MinLen+1400)
	copy(inner, []byte{0x45, 0, byte(len(inner) >> 8), byte(len(inner) & 0xff), 0, 1, 0x40, 0, 64, 17})
	buf := append(make([]byte, packet.IPv4MinLen), inner...)
	outer, fault := packet.PushIPIP(buf, packet.IPv4MinLen, &packet.Outer{Src: node, Dst: peer, TTL: 64, ID: 1})
	if fault != packet.FaultNone {
		t.Fatal(fault)
	}
	message := make([]byte, packet.MaxICMPError)
	message = message[:packet.PutICMPError(message, outer, packet.ICMPError{Type: packet.ICMPUnreachable, Code: packet.CodeFragNeeded, Rest: 600}, peer, 1)]
	b.do(t, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		return errors.Join(unix.Sendto(fd, message, 0, &unix.SockaddrInet4{Addr: node}), unix.Close(fd))
	})
	time.Sleep(100 * time.Millisecond)
	a.do(t, func() error {
		routes, err := netlink.RouteGet(net.IP(peer[:]))
		if err == nil && (len(routes) != 1 || routes[0].MTU != 0) {
			err = fmt.Errorf("the kernel believes it: %+v", routes)
		}
		return err
	})
}
