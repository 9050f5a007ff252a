package server

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// nodad is the flag that has an IPv6 address in use at once, without duplicate address detection (RFC 4862 5.4).
func nodad(a netip.Addr) int {
	if a.Is6() {
		return unix.IFA_F_NODAD
	}
	return 0
}

// setUpHost6 makes the host's side of a pod with an IPv6 address a router for it: forwarding, and the link-local address
// that the pod's default route goes by and that the host asks for neighbours with.
func (s *Server) setUpHost6(a Attachment, host netlink.Link) error {
	if err := forwardOnNode6(); err != nil {
		return err
	}
	if err := SetSysctl("ipv6/conf/"+a.HostName+"/disable_ipv6", "0"); err != nil {
		return err
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: gateway6.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}
	if err := s.nl.AddrReplace(host, addr); err != nil {
		return fmt.Errorf("add address %s to %s: %w", gateway6, a.HostName, err)
	}
	return nil
}

// forwardOnNode6 makes the node an IPv6 router, as the first pod with an IPv6 address comes. A router does not listen to
// other routers' advertisements (RFC 4861 6.2.7), which the node may have its own default route from: interfaces that
// listened go on listening.
func forwardOnNode6() error {
	const all = "ipv6/conf/all/forwarding"
	if have, err := os.ReadFile("/proc/sys/net/" + all); err == nil && string(bytes.TrimSpace(have)) == "1" {
		return nil
	}
	paths, err := filepath.Glob("/proc/sys/net/ipv6/conf/*/accept_ra")
	if err != nil {
		return err
	}
	for _, path := range paths {
		have, err := os.ReadFile(path)
		name := strings.TrimPrefix(path, "/proc/sys/net/")
		if err != nil || string(bytes.TrimSpace(have)) != "1" || strings.HasPrefix(filepath.Base(filepath.Dir(path)), hostPrefix) {
			continue
		}
		if err := SetSysctl(name, "2"); err != nil {
			return err
		}
	}
	return SetSysctl(all, "1")
}

// podSysctls6 runs in the pod: a runtime may have turned IPv6 off there, and no router but its gateway is to be believed.
func podSysctls6(ifname string) error {
	for _, s := range [...][2]string{{"disable_ipv6", "0"}, {"accept_ra", "0"}, {"accept_dad", "0"}} {
		if err := SetSysctl("ipv6/conf/"+ifname+"/"+s[0], s[1]); err != nil {
			return err
		}
	}
	return nil
}
