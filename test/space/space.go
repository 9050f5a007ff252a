// Package space gives tests network namespaces to build in.
package space

import (
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Space is a network namespace without a name: it is gone with the test process, whatever happens.
type Space struct{ Handle netns.NsHandle }

// OnThread runs f on a thread of its own, which is thrown away afterwards with whatever namespace it is in.
func OnThread(t testing.TB, f func() error) {
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

// New makes one with its loopback device up.
func New(t testing.TB) *Space {
	t.Helper()
	s := &Space{}
	OnThread(t, func() (err error) {
		if s.Handle, err = netns.New(); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	t.Cleanup(func() {
		if err := s.Handle.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Do runs f in the namespace.
func (s *Space) Do(t testing.TB, f func() error) {
	t.Helper()
	OnThread(t, func() error {
		if err := netns.Set(s.Handle); err != nil {
			return err
		}
		return f()
	})
}

// BeRouter makes the caller's namespace a router that answers everything at once.
func BeRouter() error {
	return Sysctls(map[string]string{
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

// Sysctls writes values below /proc/sys/net in the caller's namespace.
func Sysctls(values map[string]string) error {
	for name, value := range values {
		err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0)
		if err != nil && !(errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(name, "ipv6/")) {
			return err
		}
	}
	return nil
}

// Address gives an interface of the caller's namespace an address, and sets it up.
func Address(link, cidr string) error {
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

// Route routes a prefix to an interface of the caller's namespace; without one it is a blackhole.
func Route(prefix, link string) error {
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

// Neighbour makes the hardware address of an IPv4 neighbour permanent.
func Neighbour(link string, ip netip.Addr, mac net.HardwareAddr) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	return netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: ip.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT})
}
