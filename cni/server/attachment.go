package server

import (
	"net/netip"
	"strings"

	"margay/cni"
)

// Attachment is one interface of one pod, as the host sees it.
type Attachment struct {
	Network     string
	ContainerID string
	IfName      string     // inside the pod
	HostName    string     // "cali…"
	Address     netip.Addr // IPv4, Address6 IPv6; at least one of them is valid
	Address6    netip.Addr
}

// addresses lists what the attachment has, IPv4 first.
func (a Attachment) addresses() []netip.Addr {
	out := make([]netip.Addr, 0, 2)
	for _, addr := range []netip.Addr{a.Address, a.Address6} {
		if addr.IsValid() {
			out = append(out, addr)
		}
	}
	return out
}

// setAddresses takes in addresses, at most one of each family; false if they are others.
func (a *Attachment) setAddresses(addrs []netip.Addr) bool {
	a.Address, a.Address6 = netip.Addr{}, netip.Addr{}
	for _, addr := range addrs {
		into := &a.Address
		if addr.Is6() {
			into = &a.Address6
		}
		if into.IsValid() || !addr.IsValid() || addr.Is4In6() || addr.Zone() != "" {
			return false
		}
		*into = addr
	}
	return len(addrs) > 0
}

// keys are the attachment's elements of the anti-spoofing sets.
func (a Attachment) keys() []podKey {
	var out []podKey
	for _, addr := range a.addresses() {
		out = append(out, podKey{a.HostName, addr})
	}
	return out
}

// Handle is the IPAM handle that holds the address.
func (a Attachment) Handle() string {
	r := cni.Request{Network: a.Network, ContainerID: a.ContainerID, IfName: a.IfName}
	return r.Handle()
}

const aliasMark = "margay"

// alias is what the host's side carries: "margay NETWORK CONTAINER IFNAME ADDRESS", the addresses of two families with a
// comma between them. The parts hold no spaces; the protocol checks that, and that they fit the 255 bytes of an alias.
func (a Attachment) alias() string {
	var addrs []string
	for _, addr := range a.addresses() {
		addrs = append(addrs, addr.String())
	}
	return strings.Join([]string{aliasMark, a.Network, a.ContainerID, a.IfName, strings.Join(addrs, ",")}, " ")
}

// parseAlias reads an interface's alias; ok is false for an interface that is none of ours.
func parseAlias(hostName, alias string) (a Attachment, ok bool) {
	f := strings.Split(alias, " ")
	if len(f) != 5 || f[0] != aliasMark || f[1] == "" || f[2] == "" || f[3] == "" {
		return Attachment{}, false
	}
	var addrs []netip.Addr
	for text := range strings.SplitSeq(f[4], ",") {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return Attachment{}, false
		}
		addrs = append(addrs, addr)
	}
	a = Attachment{Network: f[1], ContainerID: f[2], IfName: f[3], HostName: hostName}
	return a, a.setAddresses(addrs)
}
