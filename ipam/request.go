package ipam

import (
	"fmt"
	"maps"
	"net/netip"

	"margay/datastore"
)

// Request says for whom addresses are, and where from.
type Request struct {
	Handle string            // who holds them: "<network>.<containerID>", "ipip-tunnel-addr-<node>"
	Attrs  map[string]string // written beside them for people to read; node and, for a workload, timestamp are added
	Use    string            // datastore.UseWorkload (the default) or datastore.UseTunnel
	IPv4   Ask               // without any Want, IPv4 is required
	IPv6   Ask
	// Namespace is the pod's, for pools with a namespaceSelector; empty if there is none.
	Namespace string
}

// Ask says what is wanted of one address family.
type Ask struct {
	Want  Want
	Pools []string   // if not empty: only from these pools, by name or CIDR, whatever nodes they select
	IP    netip.Addr // if valid: this address and no other; it is required then
}

// Want is how much an address is wanted.
type Want int

const (
	No       Want = iota
	IfPool        // one, if there is a pool that serves this node and use
	Required      // one, or the assignment fails
)

// Assignment is an address that was given out.
type Assignment struct {
	Addr  netip.Addr
	Block netip.Prefix
	Pool  string
}

// asks lists what a request asks of each family that it asks of, IPv4 first.
func (r Request) asks() ([]familyAsk, error) {
	four, six := familyAsk{4, r.IPv4}, familyAsk{6, r.IPv6}
	var out []familyAsk
	for _, f := range []*familyAsk{&four, &six} {
		if f.IP.IsValid() {
			f.Want = Required
		}
		if f.IP.IsValid() && (f.family == 4) != f.IP.Is4() || f.IP.Is4In6() || f.IP.Zone() != "" {
			return nil, fmt.Errorf("address %s: expected IPv%d, without a zone", f.IP, f.family)
		}
	}
	if four.Want == No && six.Want == No {
		four.Want = Required
	}
	for _, f := range []familyAsk{four, six} {
		if f.Want != No {
			out = append(out, f)
		}
	}
	return out, nil
}

type familyAsk struct {
	family int // 4 or 6
	Ask
}

// attribute is what the block says about the owner.
func (a *Allocator) attribute(req Request) attribute {
	attrs := maps.Clone(req.Attrs)
	if attrs == nil {
		attrs = map[string]string{}
	}
	if attrs["node"] == "" {
		attrs["node"] = a.node
	}
	if req.Use == datastore.UseWorkload && attrs["timestamp"] == "" {
		attrs["timestamp"] = a.now().UTC().String()
	}
	return attribute{handle: req.Handle, hasHandle: true, secondary: attrs}
}
