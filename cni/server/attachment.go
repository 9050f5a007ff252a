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
	IfName      string // inside the pod
	HostName    string // "cali…"
	Address     netip.Addr
}

// Handle is the IPAM handle that holds the address.
func (a Attachment) Handle() string {
	r := cni.Request{Network: a.Network, ContainerID: a.ContainerID, IfName: a.IfName}
	return r.Handle()
}

const aliasMark = "margay"

// alias is what the host's side carries: "margay NETWORK CONTAINER IFNAME ADDRESS". The parts hold no spaces; the
// protocol checks that, and that they fit the 255 bytes of an alias.
func (a Attachment) alias() string {
	return strings.Join([]string{aliasMark, a.Network, a.ContainerID, a.IfName, a.Address.String()}, " ")
}

// parseAlias reads an interface's alias; ok is false for an interface that is none of ours.
func parseAlias(hostName, alias string) (a Attachment, ok bool) {
	f := strings.Split(alias, " ")
	if len(f) != 5 || f[0] != aliasMark || f[1] == "" || f[2] == "" || f[3] == "" {
		return Attachment{}, false
	}
	addr, err := netip.ParseAddr(f[4])
	if err != nil {
		return Attachment{}, false
	}
	return Attachment{Network: f[1], ContainerID: f[2], IfName: f[3], HostName: hostName, Address: addr}, true
}
