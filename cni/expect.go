package cni

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
)

// expectation reads from a previous result what CHECK must find: the container's interface with its address, and the
// host's side of it. Interfaces of other plugins in the chain are none of our business.
func expectation(prev *current.Result, req *Request) (*Attachment, error) {
	bad := func(format string, args ...any) error {
		return types.NewError(types.ErrInvalidNetworkConfig, "prevResult: "+fmt.Sprintf(format, args...), "")
	}
	a := &Attachment{}
	pod := -1
	for i, iface := range prev.Interfaces {
		switch {
		case iface == nil:
			return nil, bad("interfaces[%d]: null, expected an interface", i)
		case iface.Name == req.IfName && iface.Sandbox == req.Netns && iface.Sandbox != "":
			pod, a.PodMAC = i, iface.Mac
		case iface.Sandbox == "" && strings.HasPrefix(iface.Name, "cali"):
			a.HostName, a.HostMAC = iface.Name, iface.Mac
		}
	}
	if pod < 0 {
		return nil, bad("interfaces: no %s in %s, expected the container's interface", req.IfName, req.Netns)
	}
	if a.HostName == "" {
		return nil, bad("interfaces: none named cali… on the host, expected the host's side of %s", req.IfName)
	}
	for i, ip := range prev.IPs {
		if ip == nil {
			return nil, bad("ips[%d]: null, expected an address", i)
		}
		if ip.Interface == nil || *ip.Interface != pod {
			continue
		}
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return nil, bad("ips[%d].address: %s, expected an IP address", i, ip.Address.String())
		}
		if addr = addr.Unmap(); addr.Is4() {
			a.Address = addr
		} else {
			a.Address6 = addr
		}
	}
	if !a.Address.IsValid() && !a.Address6.IsValid() {
		return nil, bad("ips: none on %s, expected one", req.IfName)
	}
	return a, nil
}
