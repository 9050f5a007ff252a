package datastore

import (
	"fmt"
	"net/netip"
)

// Node is a machine of the cluster.
type Node struct {
	Header
	Spec   NodeSpec   `json:"spec"`
	Status NodeStatus `json:"status"` // stored also where there is nothing in it, as Calico does
}

// NodeSpec is Calico's, field for field.
type NodeSpec struct {
	Addresses            []NodeAddress  `json:"addresses,omitempty"`
	BGP                  *NodeBGP       `json:"bgp,omitempty"`
	IPv4VXLANTunnelAddr  string         `json:"ipv4VXLANTunnelAddr,omitempty"`
	VXLANTunnelMACAddr   string         `json:"vxlanTunnelMACAddr,omitempty"`
	IPv6VXLANTunnelAddr  string         `json:"ipv6VXLANTunnelAddr,omitempty"`
	VXLANTunnelMACAddrV6 string         `json:"vxlanTunnelMACAddrV6,omitempty"`
	OrchRefs             []OrchRef      `json:"orchRefs,omitempty"`
	Wireguard            *NodeWireguard `json:"wireguard,omitempty"`

	Interfaces []NodeInterface `json:"interfaces,omitempty"`
}

// NodeInterface is one of a node's interfaces, with its addresses.
type NodeInterface struct {
	Name      string   `json:"name,omitempty"`
	Addresses []string `json:"addresses,omitempty"`
}

// NodeAddress is one of a node's addresses.
type NodeAddress struct {
	Address string `json:"address"`
	Type    string `json:"type,omitempty"` // CalicoNodeIP, InternalIP, ExternalIP
}

// NodeBGP is how the node takes part in BGP. The addresses carry the subnet's prefix length: "198.18.0.1/24".
type NodeBGP struct {
	ASNumber                *ASNumber `json:"asNumber,omitempty"` // nil: the cluster's
	IPv4Address             string    `json:"ipv4Address,omitempty"`
	IPv6Address             string    `json:"ipv6Address,omitempty"`
	IPv4IPIPTunnelAddr      string    `json:"ipv4IPIPTunnelAddr,omitempty"`
	RouteReflectorClusterID string    `json:"routeReflectorClusterID,omitempty"`
	InterfaceIPv4Address    string    `json:"interfaceIPv4Address,omitempty"`
}

// OrchRef names the node in an orchestrator.
type OrchRef struct {
	NodeName     string `json:"nodeName,omitempty"`
	Orchestrator string `json:"orchestrator"`
}

// NodeWireguard is the node's WireGuard configuration.
type NodeWireguard struct {
	InterfaceIPv4Address string `json:"interfaceIPv4Address,omitempty"`
	InterfaceIPv6Address string `json:"interfaceIPv6Address,omitempty"`
}

// NodeStatus is what Calico's components write about a node.
type NodeStatus struct {
	WireguardPublicKey   string   `json:"wireguardPublicKey,omitempty"`
	WireguardPublicKeyV6 string   `json:"wireguardPublicKeyV6,omitempty"`
	PodCIDRs             []string `json:"podCIDRs,omitempty"`
}

// NewNode makes an empty node of that name.
func NewNode(name string) *Node { return &Node{Header: Nodes.header(name)} }

func (n *Node) kind() *Kind { return Nodes }

// Default fills nothing: a node has no defaults.
func (n *Node) Default() {}

// Validate checks the spec.
func (n *Node) Validate() error {
	b := n.Spec.BGP
	if b == nil {
		return nil
	}
	if b.IPv4Address != "" {
		if _, err := n.IPv4(); err != nil {
			return err
		}
	}
	if b.IPv6Address != "" {
		if p, err := parseAddress(b.IPv6Address); err != nil || !p.Addr().Is6() {
			return fmt.Errorf("spec.bgp.ipv6Address %q: expected an IPv6 address with prefix length", b.IPv6Address)
		}
	}
	if b.IPv4IPIPTunnelAddr != "" {
		if a, err := netip.ParseAddr(b.IPv4IPIPTunnelAddr); err != nil || !a.Is4() {
			return fmt.Errorf("spec.bgp.ipv4IPIPTunnelAddr %q: expected an IPv4 address", b.IPv4IPIPTunnelAddr)
		}
	}
	return nil
}

// IPv4 is the node's address with its subnet's prefix length (not masked); an error if it has none.
func (n *Node) IPv4() (netip.Prefix, error) {
	if n.Spec.BGP == nil || n.Spec.BGP.IPv4Address == "" {
		return netip.Prefix{}, fmt.Errorf("spec.bgp.ipv4Address: expected an IPv4 address, there is none")
	}
	p, err := parseAddress(n.Spec.BGP.IPv4Address)
	if err != nil || !p.Addr().Is4() {
		return netip.Prefix{}, fmt.Errorf("spec.bgp.ipv4Address %q: expected an IPv4 address with prefix length such as 192.0.2.1/24", n.Spec.BGP.IPv4Address)
	}
	return p, nil
}

// parseAddress reads an address with or without prefix length; without, it is the host prefix.
func parseAddress(text string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(text); err == nil {
		if a.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf("%q: expected no zone", text)
		}
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	return netip.ParsePrefix(text)
}
