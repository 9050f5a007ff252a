package server

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// SetSysctl gives a net sysctl, written with slashes, the wanted value. It writes only when the value differs, so that
// a container with a read-only /proc/sys works on a node that is set up already.
func SetSysctl(name, want string) error {
	path := "/proc/sys/net/" + name
	have, err := os.ReadFile(path)
	if err == nil && string(bytes.TrimSpace(have)) == want {
		return nil
	}
	if err == nil {
		err = os.WriteFile(path, []byte(want), 0)
	}
	if err != nil {
		return fmt.Errorf("sysctl net.%s: wanted %s, set it on the node or mount /proc/sys writable: %w",
			strings.ReplaceAll(name, "/", "."), want, err)
	}
	return nil
}

// forwardOnNode makes the node a router, which pods need from the first packet on.
func forwardOnNode() error { return SetSysctl("ipv4/ip_forward", "1") }

// hostSideSysctls sets up the host's side of a pod. Pods need no proxy ARP, for their gateway is a permanent
// neighbour; a pod must not tell the node about IPv6 routers; and reverse-path filtering backs the anti-spoofing rules.
func hostSideSysctls(ifname string) error {
	for _, s := range [...][2]string{{"forwarding", "1"}, {"proxy_arp", "0"}, {"rp_filter", "1"}} {
		if err := SetSysctl("ipv4/conf/"+ifname+"/"+s[0], s[1]); err != nil {
			return err
		}
	}
	// No IPv6 in this kernel is fine.
	if err := SetSysctl("ipv6/conf/"+ifname+"/accept_ra", "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
