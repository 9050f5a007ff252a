package datastore

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// BGPFilter is an ordered list of rules about which routes a peer is told, and which are taken from it.
type BGPFilter struct {
	Header
	Spec BGPFilterSpec `json:"spec"`
}

// BGPFilterSpec is Calico's, field for field.
type BGPFilterSpec struct {
	ExportV4 []BGPFilterRule `json:"exportV4,omitempty"`
	ImportV4 []BGPFilterRule `json:"importV4,omitempty"`
	ExportV6 []BGPFilterRule `json:"exportV6,omitempty"`
	ImportV6 []BGPFilterRule `json:"importV6,omitempty"`
}

// BGPFilterRule accepts or rejects the routes that match all of what it names.
type BGPFilterRule struct {
	CIDR          string                 `json:"cidr,omitempty"`
	PrefixLength  *BGPFilterPrefixLength `json:"prefixLength,omitempty"`
	Source        string                 `json:"source,omitempty"` // RemotePeers
	Interface     string                 `json:"interface,omitempty"`
	MatchOperator string                 `json:"matchOperator,omitempty"` // Equal, NotEqual, In, NotIn
	PeerType      string                 `json:"peerType,omitempty"`      // eBGP, iBGP
	Communities   *BGPFilterCommunities  `json:"communities,omitempty"`
	ASPathPrefix  []ASNumber             `json:"asPathPrefix,omitempty"`
	Priority      *int                   `json:"priority,omitempty"`
	Action        string                 `json:"action"` // Accept, Reject
	Operations    []BGPFilterOperation   `json:"operations,omitempty"`
}

// BGPFilterPrefixLength narrows a rule to prefixes of these lengths.
type BGPFilterPrefixLength struct {
	Min *int32 `json:"min,omitempty"`
	Max *int32 `json:"max,omitempty"`
}

// BGPFilterCommunities is the community that a route must carry.
type BGPFilterCommunities struct {
	Values []string `json:"values"`
}

// BGPFilterOperation changes a route that a rule accepts.
type BGPFilterOperation struct {
	AddCommunity  *BGPFilterAddCommunity  `json:"addCommunity,omitempty"`
	PrependASPath *BGPFilterPrependASPath `json:"prependASPath,omitempty"`
	SetPriority   *BGPFilterSetPriority   `json:"setPriority,omitempty"`
}

// BGPFilterAddCommunity adds a community.
type BGPFilterAddCommunity struct {
	Value string `json:"value"`
}

// BGPFilterPrependASPath puts AS numbers before the path.
type BGPFilterPrependASPath struct {
	Prefix []ASNumber `json:"prefix"`
}

// BGPFilterSetPriority sets the route's priority.
type BGPFilterSetPriority struct {
	Value int `json:"value"`
}

// NewBGPFilter makes an empty filter of that name.
func NewBGPFilter(name string) *BGPFilter { return &BGPFilter{Header: BGPFilters.header(name)} }

func (f *BGPFilter) kind() *Kind { return BGPFilters }

// Default fills nothing.
func (f *BGPFilter) Default() {}

// Validate checks the rules.
func (f *BGPFilter) Validate() error {
	for _, list := range []struct {
		name  string
		rules []BGPFilterRule
		bits  int32
	}{
		{"spec.exportV4", f.Spec.ExportV4, 32}, {"spec.importV4", f.Spec.ImportV4, 32},
		{"spec.exportV6", f.Spec.ExportV6, 128}, {"spec.importV6", f.Spec.ImportV6, 128},
	} {
		for i, rule := range list.rules {
			if err := rule.validate(list.bits); err != nil {
				return fmt.Errorf("%s[%d].%w", list.name, i, err)
			}
		}
	}
	return nil
}

// maxPriority is the largest route priority that Calico allows.
const maxPriority = 1<<31 - 2

// validate checks a rule about prefixes of a family with so many bits; the error begins with the field's name.
func (r BGPFilterRule) validate(bits int32) error {
	for _, f := range []struct {
		name, value string
		allowed     []string
	}{
		{"action", r.Action, []string{"Accept", "Reject"}},
		{"matchOperator", r.MatchOperator, []string{"", "Equal", "NotEqual", "In", "NotIn"}},
		{"source", r.Source, []string{"", "RemotePeers"}},
		{"peerType", r.PeerType, []string{"", "eBGP", "iBGP"}},
	} {
		if !slices.Contains(f.allowed, f.value) {
			return fmt.Errorf("%s %q: expected %s", f.name, f.value, strings.TrimPrefix(strings.Join(f.allowed, ", "), ", "))
		}
	}
	if r.CIDR != "" {
		p, err := netip.ParsePrefix(r.CIDR)
		if err != nil || p.Addr().BitLen() != int(bits) {
			return fmt.Errorf("cidr %q: expected an IPv%d prefix", r.CIDR, map[int32]int{32: 4, 128: 6}[bits])
		}
	}
	if (r.CIDR == "") != (r.MatchOperator == "") {
		return errors.New("cidr and matchOperator: expected both or neither")
	}
	if len(r.Interface) > 15 {
		return fmt.Errorf("interface %q: expected at most 15 characters", r.Interface)
	}
	if l := r.PrefixLength; l != nil {
		if r.CIDR == "" {
			return errors.New("prefixLength: expected cidr beside it")
		}
		low, high := int32(0), bits
		if l.Min != nil {
			low = *l.Min
		}
		if l.Max != nil {
			high = *l.Max
		}
		if low < 0 || high > bits || low > high {
			return fmt.Errorf("prefixLength %d to %d: expected min not above max, both from 0 to %d", low, high, bits)
		}
	}
	if r.Communities != nil {
		if len(r.Communities.Values) != 1 {
			return errors.New("communities.values: expected exactly one community")
		}
		if err := validateCommunity("communities.values[0]", r.Communities.Values[0]); err != nil {
			return err
		}
	}
	if r.Priority != nil && (*r.Priority < 1 || *r.Priority > maxPriority) {
		return fmt.Errorf("priority %d: expected 1 to %d", *r.Priority, maxPriority)
	}
	if len(r.Operations) > 0 && r.Action != "Accept" {
		return errors.New("operations: expected action Accept beside them")
	}
	for i, op := range r.Operations {
		if err := op.validate(); err != nil {
			return fmt.Errorf("operations[%d]%w", i, err)
		}
	}
	return nil
}

// validate checks an operation; the error begins with the rest of the field's path.
func (op BGPFilterOperation) validate() error {
	set := 0
	if op.AddCommunity != nil {
		set++
		if err := validateCommunity(".addCommunity.value", op.AddCommunity.Value); err != nil {
			return err
		}
	}
	if op.PrependASPath != nil {
		set++
		if len(op.PrependASPath.Prefix) == 0 {
			return errors.New(".prependASPath.prefix: expected at least one AS number")
		}
	}
	if op.SetPriority != nil {
		set++
		if v := op.SetPriority.Value; v < 1 || v > maxPriority {
			return fmt.Errorf(".setPriority.value %d: expected 1 to %d", v, maxPriority)
		}
	}
	if set != 1 {
		return fmt.Errorf(": expected exactly one of addCommunity, prependASPath, setPriority, got %d", set)
	}
	return nil
}

// communityPattern is a community (RFC 1997: two numbers) or a large one (RFC 8092: three).
var communityPattern = regexp.MustCompile(`^\d{1,10}:\d{1,10}(:\d{1,10})?$`)

func validateCommunity(field, value string) error {
	if !communityPattern.MatchString(value) {
		return fmt.Errorf("%s %q: expected a community such as 65001:100 or 65001:100:200", field, value)
	}
	return nil
}
