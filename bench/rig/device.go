package rig

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// end is one end of a veth pair.
type end struct {
	space *Space
	name  string
	mac   string
	mtu   int
}

// pair makes a veth pair between two namespaces, both ends up.
func pair(a, b end) error {
	h, err := netns.GetFromName(b.space.Name)
	if err != nil {
		return fmt.Errorf("namespace %s: %w", b.space.Name, err)
	}
	defer h.Close()
	macs := [2]net.HardwareAddr{}
	for i, text := range []string{a.mac, b.mac} {
		if macs[i], err = net.ParseMAC(text); err != nil {
			return err
		}
	}
	err = a.space.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs:        netlink.LinkAttrs{Name: a.name, HardwareAddr: macs[0], MTU: a.mtu},
			PeerName:         b.name,
			PeerHardwareAddr: macs[1],
			PeerMTU:          uint32(b.mtu),
			PeerNamespace:    netlink.NsFd(h),
		})
	})
	if err != nil {
		return fmt.Errorf("veth %s–%s: %w", a.name, b.name, err)
	}
	for _, e := range []end{a, b} {
		if err := e.space.Do(func() error { return linkUp(e.name) }); err != nil {
			return err
		}
	}
	return nil
}

// neighbour makes a permanent neighbour entry.
func neighbour(device, address, mac string) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return err
	}
	hw, err := net.ParseMAC(mac)
	if err != nil {
		return err
	}
	return netlink.NeighSet(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP(address), HardwareAddr: hw,
	})
}

// route makes a route; via and src may be empty.
func route(device, prefix, via, src string) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return err
	}
	_, dst, err := net.ParseCIDR(prefix)
	if err != nil {
		return err
	}
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Src: net.ParseIP(src)}
	if via == "" {
		r.Scope = netlink.SCOPE_LINK
	} else {
		r.Gw, r.Flags = net.ParseIP(via), int(netlink.FLAG_ONLINK)
	}
	if err := netlink.RouteReplace(r); err != nil {
		return fmt.Errorf("route %s dev %s via %s: %w", prefix, device, via, err)
	}
	return nil
}

// The commands of SIOCETHTOOL that switch an offload, from the kernel's include/uapi/linux/ethtool.h.
const (
	ethtoolTSO = 0x1f
	ethtoolGSO = 0x24
	ethtoolGRO = 0x2c
)

// offload switches an offload of a device in the calling thread's namespace.
func offload(device string, command uint32, on bool) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	value := struct{ command, data uint32 }{command: command}
	if on {
		value.data = 1
	}
	var ifreq struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(ifreq.name[:unix.IFNAMSIZ-1], device)
	ifreq.data = unsafe.Pointer(&value)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&ifreq))); errno != 0 {
		if errno == unix.EOPNOTSUPP && command != ethtoolGRO {
			return nil // an XDP program at the other end of a veth keeps segmentation off
		}
		return fmt.Errorf("offload %#x of %s: %w", command, device, errno)
	}
	return nil
}

// spread lets every processor work on what arrives at a device of the space (RPS). A NAPI thread, the other way to the same
// end, sees nothing here: a veth gives its NAPI context only what GRO could merge.
func spread(s *Space, device string) error {
	online, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err != nil {
		return err
	}
	mask, err := cpuMask(strings.TrimSpace(string(online)))
	if err != nil {
		return err
	}
	// sysfs shows the devices of whoever mounted it, and `ip netns exec` mounts one of its own.
	script := `for q in /sys/class/net/` + device + `/queues/rx-*/rps_cpus; do echo ` + mask + ` >$q || exit 1; done`
	if out, err := exec.Command("ip", "netns", "exec", s.Name, "sh", "-c", script).CombinedOutput(); err != nil {
		return fmt.Errorf("RPS of %s: %w: %s", device, err, out)
	}
	return nil
}

// cpuMask turns a list of processors, as in "0-3,6", into RPS's hexadecimal mask; above 64 processors it is the first 64.
func cpuMask(list string) (string, error) {
	var mask uint64
	for _, part := range strings.Split(list, ",") {
		var from, to int
		if n, _ := fmt.Sscanf(part, "%d-%d", &from, &to); n != 2 {
			if n, err := fmt.Sscanf(part, "%d", &from); n != 1 {
				return "", fmt.Errorf("list of processors %q: %w", list, err)
			}
			to = from
		}
		for cpu := from; cpu <= min(to, 63); cpu++ {
			mask |= 1 << cpu
		}
	}
	if mask>>32 == 0 { // the kernel takes no more digits than it has processors for
		return fmt.Sprintf("%x", mask), nil
	}
	return fmt.Sprintf("%x,%08x", mask>>32, mask&0xffffffff), nil
}
