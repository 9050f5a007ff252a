//go:build interop

// Command guest is the init of a virtual machine whose kernel has the real IP-in-IP module: the other node of the
// interoperability test. It loads the modules, sets tunl0 up as Calico does, and echoes what it is sent.
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The addresses, which the test knows too.
var (
	nodeAddress = net.IPv4(198, 18, 0, 2)
	peerAddress = net.IPv4(198, 18, 0, 1)
	podAddress  = net.IPv4(10, 244, 2, 5)
)

func main() {
	if err := run(); err != nil {
		fmt.Println("guest:", err)
	}
	// What remains to be said is on the console; nobody needs this machine any more.
	time.Sleep(time.Second)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	for dir, kind := range map[string]string{"/proc": "proc", "/sys": "sysfs"} {
		if err := errors.Join(os.MkdirAll(dir, 0o755), unix.Mount(kind, dir, kind, 0, "")); err != nil {
			return err
		}
	}
	if err := loadModules("/modules"); err != nil {
		return err
	}
	if err := setUp(); err != nil {
		return err
	}
	failed := make(chan error)
	go func() { failed <- echoUDP() }()
	go func() { failed <- echoTCP() }()
	fmt.Println("guest: ready")
	return <-failed
}

// loadModules loads what is there, as often as that lets others follow.
func loadModules(dir string) error {
	files, err := filepath.Glob(dir + "/*.ko")
	if err != nil {
		return err
	}
	var last error
	for len(files) > 0 {
		var left []string
		for _, name := range files {
			f, err := os.Open(name)
			if err != nil {
				return err
			}
			if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
				last, left = fmt.Errorf("%s: %w", filepath.Base(name), err), append(left, name)
			}
			_ = f.Close()
		}
		if len(left) == len(files) {
			return last
		}
		files = left
	}
	return nil
}

func setUp() error {
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		return err
	}
	up := func(name string, mtu int, address *net.IPNet) (netlink.Link, error) {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		err = errors.Join(netlink.LinkSetMTU(l, mtu), netlink.LinkSetUp(l))
		if address != nil {
			err = errors.Join(err, netlink.AddrAdd(l, &netlink.Addr{IPNet: address}))
		}
		return l, err
	}
	one := func(ip net.IP) *net.IPNet { return &net.IPNet{IP: ip.To4(), Mask: net.CIDRMask(32, 32)} }
	if _, err := up("lo", 65536, nil); err != nil {
		return err
	}
	if _, err := up("eth0", 1500, &net.IPNet{IP: nodeAddress, Mask: net.CIDRMask(24, 32)}); err != nil {
		return err
	}
	tunl0, err := up("tunl0", 1480, one(podAddress))
	if err != nil {
		return err
	}
	// The other pods, as Calico routes them: by way of the node, which the tunnel need not resolve.
	routes := []*netlink.Route{{LinkIndex: tunl0.Attrs().Index, Gw: peerAddress, Flags: unix.RTNH_F_ONLINK,
		Dst: &net.IPNet{IP: net.IPv4(10, 244, 1, 0).To4(), Mask: net.CIDRMask(26, 32)}, Src: podAddress}}
	// Another tunnel to the same node lets its outer packets be fragmented: what goes to one pod is too long for the
	// underlay and has DF clear outside.
	if err := netlink.LinkAdd(&netlink.Iptun{LinkAttrs: netlink.LinkAttrs{Name: "frag0"}, Local: nodeAddress, Remote: peerAddress}); err != nil {
		return fmt.Errorf("frag0: %w", err)
	}
	frag0, err := up("frag0", 9000, nil)
	if err != nil {
		return err
	}
	routes = append(routes, &netlink.Route{LinkIndex: frag0.Attrs().Index, Dst: one(net.IPv4(10, 244, 1, 7)), Src: podAddress})
	for _, r := range routes {
		if err := netlink.RouteAdd(r); err != nil {
			return fmt.Errorf("route %v: %w", r, err)
		}
	}
	return nil
}

// echoUDP answers every datagram with the type of service that it had and its own bytes, in a packet of that type of
// service.
func echoUDP() error {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: podAddress, Port: 7})
	if err != nil {
		return err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	set := func(option, value int) (err error) {
		controlErr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, option, value) })
		return errors.Join(controlErr, err)
	}
	if err := errors.Join(set(unix.IP_RECVTOS, 1), set(unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)); err != nil {
		return err
	}
	b, oob := make([]byte, 65536), make([]byte, 64)
	for {
		n, m, _, from, err := conn.ReadMsgUDP(b[1:], oob)
		if err != nil {
			return err
		}
		b[0] = 0
		messages, err := syscall.ParseSocketControlMessage(oob[:m])
		if err != nil {
			return err
		}
		for _, c := range messages {
			if c.Header.Level == unix.IPPROTO_IP && c.Header.Type == unix.IP_TOS && len(c.Data) > 0 {
				b[0] = c.Data[0]
			}
		}
		if err := set(unix.IP_TOS, int(b[0])); err != nil {
			return err
		}
		if _, err := conn.WriteToUDP(b[:n+1], from); err != nil {
			fmt.Println("guest: answer:", err) // the way back is what is tested
		}
	}
}

func echoTCP() error {
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: podAddress, Port: 7})
	if err != nil {
		return err
	}
	for {
		conn, err := l.AcceptTCP()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			if _, err := io.Copy(conn, conn); err != nil {
				fmt.Println("guest: TCP:", err)
			}
		}()
	}
}
