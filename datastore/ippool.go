package datastore

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"margay/datastore/selector"
)

// Values of an IPPool's ipipMode and vxlanMode.
const (
	Always      = "Always"      // to every other node
	CrossSubnet = "CrossSubnet" // only to nodes outside the own node's subnet
	Never       = "Never"
)

// Values of an IPPool's allowedUses.
const (
	UseWorkload     = "Workload"     // pods
	UseTunnel       = "Tunnel"       // the nodes' tunnel addresses
	UseLoadBalancer = "LoadBalancer" // services
)

// Values of an IPPool's assignmentMode.
const (
	Automatic = "Automatic"
	Manual    = "Manual" // only for pods that ask for the pool
)

// IPPool is a range of addresses for pods.
type IPPool struct {
	Header
	Spec IPPoolSpec `json:"spec"`
}

// IPPoolSpec is Calico's, field for field.
type IPPoolSpec struct {
	CIDR              string   `json:"cidr"`
	VXLANMode         string   `json:"vxlanMode,omitempty"`
	IPIPMode          string   `json:"ipipMode,omitempty"`
	NATOutgoing       bool     `json:"natOutgoing,omitempty"`
	Disabled          bool     `json:"disabled,omitempty"`
	DisableBGPExport  bool     `json:"disableBGPExport,omitempty"`
	BlockSize         int      `json:"blockSize,omitempty"` // prefix length of a block
	NodeSelector      string   `json:"nodeSelector,omitempty"`
	NamespaceSelector string   `json:"namespaceSelector,omitempty"`
	AllowedUses       []string `json:"allowedUses,omitempty"`
	AssignmentMode    string   `json:"assignmentMode,omitempty"`
}

// NewIPPool makes an empty pool of that name.
func NewIPPool(name string) *IPPool { return &IPPool{Header: IPPools.header(name)} }

func (p *IPPool) kind() *Kind { return IPPools }

// Prefix is the parsed spec.cidr.
func (p *IPPool) Prefix() (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(p.Spec.CIDR)
	if err != nil || prefix.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("spec.cidr %q: expected an IPv4 or IPv6 prefix such as 10.244.0.0/16", p.Spec.CIDR)
	}
	if masked := prefix.Masked(); masked != prefix {
		return netip.Prefix{}, fmt.Errorf("spec.cidr %q: expected no bits set behind the prefix length: %s", p.Spec.CIDR, masked)
	}
	return prefix, nil
}

// Default fills what Calico fills: no encapsulation, blocks of /26 (IPv6: /122), all nodes, pods and tunnels.
func (p *IPPool) Default() {
	s := &p.Spec
	setDefault(&s.VXLANMode, Never)
	setDefault(&s.IPIPMode, Never)
	setDefault(&s.NodeSelector, "all()")
	setDefault(&s.AssignmentMode, Automatic)
	if len(s.AllowedUses) == 0 {
		s.AllowedUses = []string{UseWorkload, UseTunnel}
	}
	if s.BlockSize == 0 {
		s.BlockSize = 26
		if strings.Contains(s.CIDR, ":") {
			s.BlockSize = 122
		}
	}
}

// Validate checks the spec, with its defaults filled.
func (p *IPPool) Validate() error {
	s := &p.Spec
	prefix, err := p.Prefix()
	if err != nil {
		return err
	}
	low, high := 20, 32
	if prefix.Addr().Is6() {
		low, high = 116, 128
	}
	if s.BlockSize < low || s.BlockSize > high {
		return fmt.Errorf("spec.blockSize %d: expected %d to %d", s.BlockSize, low, high)
	}
	if s.BlockSize < prefix.Bits() {
		return fmt.Errorf("spec.blockSize %d: expected at least the prefix length of spec.cidr, %d: a block must fit into its pool", s.BlockSize, prefix.Bits())
	}
	for _, f := range []struct {
		name, value string
		allowed     []string
	}{
		{"spec.ipipMode", s.IPIPMode, []string{Always, CrossSubnet, Never}},
		{"spec.vxlanMode", s.VXLANMode, []string{Always, CrossSubnet, Never}},
		{"spec.assignmentMode", s.AssignmentMode, []string{Automatic, Manual}},
	} {
		if !slices.Contains(f.allowed, f.value) {
			return fmt.Errorf("%s %q: expected %s", f.name, f.value, strings.Join(f.allowed, ", "))
		}
	}
	if s.IPIPMode != Never && s.VXLANMode != Never {
		return errors.New("spec.ipipMode and spec.vxlanMode: expected at most one of them to be other than Never")
	}
	if s.IPIPMode != Never && prefix.Addr().Is6() {
		return fmt.Errorf("spec.ipipMode %q: expected Never for an IPv6 pool", s.IPIPMode)
	}
	for _, f := range []struct{ name, value string }{{"spec.nodeSelector", s.NodeSelector}, {"spec.namespaceSelector", s.NamespaceSelector}} {
		if _, err := selector.Parse(f.value); err != nil {
			return fmt.Errorf("%s %q: %w", f.name, f.value, err)
		}
	}
	for _, use := range s.AllowedUses {
		if use != UseWorkload && use != UseTunnel && use != UseLoadBalancer {
			return fmt.Errorf("spec.allowedUses %q: expected %s, %s, %s", use, UseWorkload, UseTunnel, UseLoadBalancer)
		}
	}
	for _, reserved := range reservedRanges {
		if reserved.Overlaps(prefix) {
			return fmt.Errorf("spec.cidr %q: expected a range outside %s (link-local, loopback or multicast)", s.CIDR, reserved)
		}
	}
	return nil
}

// reservedRanges can never be pods' addresses: RFC 1122 3.2.1.3 (loopback), RFC 3927, RFC 1112; RFC 4291.
var reservedRanges = []netip.Prefix{
	netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// overlapGuard refuses a new pool that overlaps another, and gives the condition under which that finding still holds
// when the pool is written.
func overlapGuard(ctx context.Context, s *Store, pool *IPPool) (Op, error) {
	prefix, err := pool.Prefix()
	if err != nil {
		return Op{}, err
	}
	others, rev, err := ListResources[IPPool](ctx, s)
	if err != nil {
		return Op{}, err
	}
	for _, other := range others {
		if other.Metadata.Name == pool.Metadata.Name {
			return Op{}, ErrExists
		}
		// A stored pool whose cidr does not parse overlaps nothing; nothing is ever allocated from it.
		if p, err := other.Prefix(); err == nil && p.Overlaps(prefix) {
			return Op{}, fmt.Errorf("spec.cidr %q: overlaps pool %q (%s)", pool.Spec.CIDR, other.Metadata.Name, p)
		}
	}
	return OpUnchanged(IPPools.Prefix(), rev), nil
}

// checkImmutable refuses a change of what blocks in use depend on.
func checkImmutable(obj Object) error {
	pool, ok := obj.(*IPPool)
	if !ok {
		return nil
	}
	stored, err := decode(IPPools, KV{Key: IPPools.Key(pool.Metadata.Name), Value: pool.raw})
	if err != nil {
		return err
	}
	old := stored.(*IPPool)
	old.Default()
	if old.Spec.CIDR != pool.Spec.CIDR {
		return fmt.Errorf("spec.cidr %q: expected it unchanged, %q: make a new pool instead", pool.Spec.CIDR, old.Spec.CIDR)
	}
	if old.Spec.BlockSize != pool.Spec.BlockSize {
		return fmt.Errorf("spec.blockSize %d: expected it unchanged, %d: make a new pool instead", pool.Spec.BlockSize, old.Spec.BlockSize)
	}
	return nil
}

func setDefault(field *string, value string) {
	if *field == "" {
		*field = value
	}
}
