package datastore

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// DefaultASNumber is Calico's AS number where nothing else is configured (private use, RFC 6996).
const DefaultASNumber ASNumber = 64512

// ASNumber is a four-octet AS number (RFC 6793). It is written as a number, and read also from text, plain ("64512")
// or dotted ("1.10", RFC 5396).
type ASNumber uint32

// String is the number.
func (n ASNumber) String() string { return strconv.FormatUint(uint64(n), 10) }

// UnmarshalJSON reads a number, or text in plain or dotted form.
func (n *ASNumber) UnmarshalJSON(raw []byte) error {
	text := string(raw)
	if strings.HasPrefix(text, `"`) {
		if err := json.Unmarshal(raw, &text); err != nil {
			return err
		}
	}
	v, err := ParseASNumber(text)
	if err != nil {
		return err
	}
	*n = v
	return nil
}

// ParseASNumber reads an AS number in plain or dotted form.
func ParseASNumber(text string) (ASNumber, error) {
	if high, low, dotted := strings.Cut(text, "."); dotted {
		h, err1 := strconv.ParseUint(high, 10, 16)
		l, err2 := strconv.ParseUint(low, 10, 16)
		if err1 == nil && err2 == nil {
			return ASNumber(h<<16 | l), nil
		}
	} else if v, err := strconv.ParseUint(text, 10, 32); err == nil {
		return ASNumber(v), nil
	}
	return 0, fmt.Errorf("asNumber %q: expected 0 to 4294967295, or two such as 1.10", text)
}

// BGPPeer is a BGP session beside the mesh.
type BGPPeer struct {
	Header
	Spec BGPPeerSpec `json:"spec"`
}

// BGPPeerSpec is Calico's, field for field.
type BGPPeerSpec struct {
	Node                     string       `json:"node,omitempty"`
	NodeSelector             string       `json:"nodeSelector,omitempty"`
	PeerIP                   string       `json:"peerIP,omitempty"` // address, or address:port
	ASNumber                 ASNumber     `json:"asNumber,omitempty"`
	PeerSelector             string       `json:"peerSelector,omitempty"`
	LocalWorkloadSelector    string       `json:"localWorkloadSelector,omitempty"`
	KeepOriginalNextHop      bool         `json:"keepOriginalNextHop,omitempty"`
	NextHopMode              string       `json:"nextHopMode,omitempty"`
	Password                 *BGPPassword `json:"password,omitempty"`
	SourceAddress            string       `json:"sourceAddress,omitempty"`
	MaxRestartTime           string       `json:"maxRestartTime,omitempty"` // a duration such as 120s
	NumAllowedLocalASNumbers *int32       `json:"numAllowedLocalASNumbers,omitempty"`
	TTLSecurity              *uint8       `json:"ttlSecurity,omitempty"`
	ReachableBy              string       `json:"reachableBy,omitempty"`
	Filters                  []string     `json:"filters,omitempty"`
	LocalASNumber            *ASNumber    `json:"localASNumber,omitempty"`
	KeepaliveTime            string       `json:"keepaliveTime,omitempty"` // a duration such as 30s
	ReversePeering           string       `json:"reversePeering,omitempty"`
}

// validateDuration checks a field that may be empty.
func validateDuration(field, value string) error {
	if value == "" {
		return nil
	}
	if d, err := time.ParseDuration(value); err != nil || d < 0 {
		return fmt.Errorf("%s %q: expected a duration such as 120s", field, value)
	}
	return nil
}

// validateWord checks a field that may be empty.
func validateWord(field, value string, allowed ...string) error {
	if value == "" || slices.Contains(allowed, value) {
		return nil
	}
	return fmt.Errorf("%s %q: expected %s", field, value, strings.Join(allowed, ", "))
}

// BGPPassword says where a session's TCP MD5 password (RFC 2385) is kept.
type BGPPassword struct {
	SecretKeyRef *SecretKeyRef `json:"secretKeyRef,omitempty"`
}

// SecretKeyRef is a key of a Kubernetes secret.
type SecretKeyRef struct {
	Name     string `json:"name"`
	Key      string `json:"key"`
	Optional *bool  `json:"optional,omitempty"`
}

// NewBGPPeer makes an empty peer of that name.
func NewBGPPeer(name string) *BGPPeer { return &BGPPeer{Header: BGPPeers.header(name)} }

func (p *BGPPeer) kind() *Kind { return BGPPeers }

// Default writes durations as Calico does. A peer without node and nodeSelector is for all nodes.
func (p *BGPPeer) Default() {
	p.Spec.MaxRestartTime = normalDuration(p.Spec.MaxRestartTime)
	p.Spec.KeepaliveTime = normalDuration(p.Spec.KeepaliveTime)
}

// Peer is the parsed spec.peerIP; port 0 where it names none.
func (p *BGPPeer) Peer() (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(p.Spec.PeerIP); err == nil {
		return netip.AddrPortFrom(a, 0), nil
	}
	ap, err := netip.ParseAddrPort(p.Spec.PeerIP)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("spec.peerIP %q: expected an address, or address:port", p.Spec.PeerIP)
	}
	return ap, nil
}

// Validate checks the spec.
func (p *BGPPeer) Validate() error {
	s := &p.Spec
	if s.Node != "" && s.NodeSelector != "" {
		return fmt.Errorf("spec.node and spec.nodeSelector: expected at most one of them")
	}
	if err := errors.Join(validateDuration("spec.maxRestartTime", s.MaxRestartTime), validateDuration("spec.keepaliveTime", s.KeepaliveTime),
		validateWord("spec.sourceAddress", s.SourceAddress, "UseNodeIP", "None"),
		validateWord("spec.nextHopMode", s.NextHopMode, "Auto", "Self", "Keep"),
		validateWord("spec.reversePeering", s.ReversePeering, "Auto", "Manual")); err != nil {
		return err
	}
	if s.PeerSelector != "" && (s.PeerIP != "" || s.ASNumber != 0) {
		return fmt.Errorf("spec.peerSelector: expected neither spec.peerIP nor spec.asNumber beside it")
	}
	if s.PeerSelector != "" || s.LocalWorkloadSelector != "" {
		return nil
	}
	if _, err := p.Peer(); err != nil {
		return err
	}
	if s.ASNumber == 0 {
		return fmt.Errorf("spec.asNumber: expected the peer's AS number")
	}
	return nil
}

// BGPConfiguration is the cluster's BGP settings ("default"), or one node's ("node.<name>").
type BGPConfiguration struct {
	Header
	Spec BGPConfigurationSpec `json:"spec"`
}

// BGPConfigurationSpec is Calico's, field for field.
type BGPConfigurationSpec struct {
	LogSeverityScreen      string                `json:"logSeverityScreen,omitempty"`
	NodeToNodeMeshEnabled  *bool                 `json:"nodeToNodeMeshEnabled,omitempty"` // nil: true
	ASNumber               *ASNumber             `json:"asNumber,omitempty"`              // nil: DefaultASNumber
	ServiceLoadBalancerIPs []CIDRBlock           `json:"serviceLoadBalancerIPs,omitempty"`
	ServiceExternalIPs     []CIDRBlock           `json:"serviceExternalIPs,omitempty"`
	ServiceClusterIPs      []CIDRBlock           `json:"serviceClusterIPs,omitempty"`
	Communities            []Community           `json:"communities,omitempty"`
	PrefixAdvertisements   []PrefixAdvertisement `json:"prefixAdvertisements,omitempty"`
	ListenPort             uint16                `json:"listenPort,omitempty"` // 0: 179
	NodeMeshPassword       *BGPPassword          `json:"nodeMeshPassword,omitempty"`
	NodeMeshMaxRestartTime string                `json:"nodeMeshMaxRestartTime,omitempty"` // a duration such as 120s
	BindMode               string                `json:"bindMode,omitempty"`
	IgnoredInterfaces      []string              `json:"ignoredInterfaces,omitempty"`

	ServiceLoadBalancerAggregation *string `json:"serviceLoadBalancerAggregation,omitempty"`
	LocalWorkloadPeeringIPV4       string  `json:"localWorkloadPeeringIPV4,omitempty"`
	LocalWorkloadPeeringIPV6       string  `json:"localWorkloadPeeringIPV6,omitempty"`
	ProgramClusterRoutes           *string `json:"programClusterRoutes,omitempty"`
	IPv4NormalRoutePriority        *int    `json:"ipv4NormalRoutePriority,omitempty"`
	IPv6NormalRoutePriority        *int    `json:"ipv6NormalRoutePriority,omitempty"`
}

// CIDRBlock is a range of service addresses.
type CIDRBlock struct {
	CIDR string `json:"cidr"`
}

// Community names a community value (RFC 1997, RFC 8092).
type Community struct {
	Name  string `json:"name,omitempty"`
	Value string `json:"value,omitempty"`
}

// PrefixAdvertisement tags a prefix with communities.
type PrefixAdvertisement struct {
	CIDR        string   `json:"cidr,omitempty"`
	Communities []string `json:"communities,omitempty"`
}

// NewBGPConfiguration makes an empty configuration of that name.
func NewBGPConfiguration(name string) *BGPConfiguration {
	return &BGPConfiguration{Header: BGPConfigurations.header(name)}
}

func (c *BGPConfiguration) kind() *Kind { return BGPConfigurations }

// Default writes durations as Calico does. Absent fields have their meaning in the readers.
func (c *BGPConfiguration) Default() {
	c.Spec.NodeMeshMaxRestartTime = normalDuration(c.Spec.NodeMeshMaxRestartTime)
}

// Validate checks the spec.
func (c *BGPConfiguration) Validate() error {
	if err := errors.Join(validateDuration("spec.nodeMeshMaxRestartTime", c.Spec.NodeMeshMaxRestartTime),
		validateWord("spec.bindMode", c.Spec.BindMode, "None", "NodeIP"),
		validateWord("spec.logSeverityScreen", strings.ToLower(c.Spec.LogSeverityScreen), "trace", "debug", "info", "warning", "error", "fatal", "none")); err != nil {
		return err
	}
	for i, community := range c.Spec.Communities {
		if err := validateCommunity(fmt.Sprintf("spec.communities[%d].value", i), community.Value); err != nil {
			return err
		}
	}
	for field, blocks := range map[string][]CIDRBlock{
		"spec.serviceLoadBalancerIPs": c.Spec.ServiceLoadBalancerIPs,
		"spec.serviceExternalIPs":     c.Spec.ServiceExternalIPs,
		"spec.serviceClusterIPs":      c.Spec.ServiceClusterIPs,
	} {
		for _, b := range blocks {
			if _, err := netip.ParsePrefix(b.CIDR); err != nil && b.CIDR != "" { // Calico takes an entry without
				return fmt.Errorf("%s: cidr %q: expected a prefix such as 10.96.0.0/12", field, b.CIDR)
			}
		}
	}
	for _, adv := range c.Spec.PrefixAdvertisements {
		if _, err := netip.ParsePrefix(adv.CIDR); err != nil {
			return fmt.Errorf("spec.prefixAdvertisements: cidr %q: expected a prefix such as 10.244.0.0/16", adv.CIDR)
		}
	}
	return nil
}

// ClusterInformation is what the cluster says about itself; there is one, named "default".
type ClusterInformation struct {
	Header
	Spec ClusterInformationSpec `json:"spec"`
}

// ClusterInformationSpec is Calico's, field for field.
type ClusterInformationSpec struct {
	ClusterGUID    string `json:"clusterGUID,omitempty"`
	ClusterType    string `json:"clusterType,omitempty"`
	CalicoVersion  string `json:"calicoVersion,omitempty"`
	DatastoreReady *bool  `json:"datastoreReady,omitempty"` // false: locked, nothing allocates
	Variant        string `json:"variant,omitempty"`
}

// NewClusterInformation makes an empty one of that name.
func NewClusterInformation(name string) *ClusterInformation {
	return &ClusterInformation{Header: ClusterInformations.header(name)}
}

func (c *ClusterInformation) kind() *Kind { return ClusterInformations }

// Default fills nothing.
func (c *ClusterInformation) Default() {}

// Validate checks the name: there is only one.
func (c *ClusterInformation) Validate() error {
	if c.Metadata.Name != "default" {
		return fmt.Errorf("metadata.name %q: expected default, there is only one", c.Metadata.Name)
	}
	return nil
}

// Ready says whether the datastore may be written to; absent means yes.
func (c *ClusterInformation) Ready() bool {
	return c.Spec.DatastoreReady == nil || *c.Spec.DatastoreReady
}
