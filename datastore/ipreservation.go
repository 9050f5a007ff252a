package datastore

import (
	"fmt"
	"net/netip"
)

// IPReservation names addresses that are never given to a pod by themselves.
type IPReservation struct {
	Header
	Spec IPReservationSpec `json:"spec"`
}

// IPReservationSpec is Calico's, field for field.
type IPReservationSpec struct {
	ReservedCIDRs []string `json:"reservedCIDRs,omitempty"` // prefixes, or single addresses
}

// NewIPReservation makes an empty reservation of that name.
func NewIPReservation(name string) *IPReservation {
	return &IPReservation{Header: IPReservations.header(name)}
}

func (r *IPReservation) kind() *Kind { return IPReservations }

// Default fills nothing.
func (r *IPReservation) Default() {}

// Validate checks the prefixes.
func (r *IPReservation) Validate() error {
	_, err := r.Prefixes()
	return err
}

// Prefixes are the parsed spec.reservedCIDRs, masked; a single address is its host prefix.
func (r *IPReservation) Prefixes() ([]netip.Prefix, error) {
	var out []netip.Prefix
	for i, text := range r.Spec.ReservedCIDRs {
		p, err := parseAddress(text)
		if err != nil || p.Addr().Is4In6() {
			return nil, fmt.Errorf("spec.reservedCIDRs[%d] %q: expected an address, or a prefix such as 10.244.0.0/28", i, text)
		}
		out = append(out, p.Masked())
	}
	return out, nil
}

// IPAMConfiguration is Calico's resource about IPAM as a whole; there is one, named "default".
type IPAMConfiguration struct {
	Header
	Spec IPAMConfigurationSpec `json:"spec"`
}

// IPAMConfigurationSpec is Calico's, field for field.
type IPAMConfigurationSpec struct {
	StrictAffinity               bool    `json:"strictAffinity"`
	MaxBlocksPerHost             int32   `json:"maxBlocksPerHost,omitempty"`
	AutoAllocateBlocks           bool    `json:"autoAllocateBlocks"`
	KubeVirtVMAddressPersistence *string `json:"kubeVirtVMAddressPersistence,omitempty"`
	IPCooldownSeconds            int32   `json:"ipCooldownSeconds,omitempty"`
}

func (c *IPAMConfiguration) kind() *Kind { return IPAMConfigurations }

// Default fills nothing: both switches are always written.
func (c *IPAMConfiguration) Default() {}

// Validate checks the name and the spec.
func (c *IPAMConfiguration) Validate() error {
	if c.Metadata.Name != "default" {
		return fmt.Errorf("metadata.name %q: expected default, there is only one", c.Metadata.Name)
	}
	if n := c.Spec.MaxBlocksPerHost; n < 0 || n > 1_000_000 {
		return fmt.Errorf("spec.maxBlocksPerHost %d: expected 0 (no limit) to 1000000", n)
	}
	if n := c.Spec.IPCooldownSeconds; n < 0 || n > 1200 {
		return fmt.Errorf("spec.ipCooldownSeconds %d: expected 0 to 1200", n)
	}
	if v := c.Spec.KubeVirtVMAddressPersistence; v != nil && *v != "Enabled" && *v != "Disabled" {
		return fmt.Errorf("spec.kubeVirtVMAddressPersistence %q: expected Enabled or Disabled", *v)
	}
	return nil
}
