package audit

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// Report is what calicoctl's `ipam check -o FILE` writes, with the problems added.
type Report struct {
	Version             string                   `json:"version"`
	ClusterGUID         string                   `json:"clusterGUID"`
	DatastoreLocked     bool                     `json:"datastoreLocked"`
	ClusterInfoRevision string                   `json:"clusterInformationRevision"`
	ClusterType         string                   `json:"clusterType"`
	Allocations         map[string][]*Allocation `json:"allocations"` // by address; more than one where blocks overlap
	LeakedHandles       []HandleInfo             `json:"leakedHandles,omitempty"`
	Problems            []Problem                `json:"problems"` // ours: calicoctl ignores it

	// What the text for people says besides; not in the JSON.
	Blocks  []BlockInfo          `json:"-"`
	Pools   []string             `json:"-"` // CIDRs of the pools that are not disabled
	Owners  []Owner              `json:"-"` // addresses in use, by whom
	Handles int                  `json:"-"` // handles with at least one address
	Unknown int                  `json:"-"` // addresses of pods that nothing in the store vouches for, taken as in use
	byNode  map[string]int       // allocations
	inUse   map[netip.Addr]Owner // the first owner
}

// Allocation is one address given out, with what calicoctl says about it.
type Allocation struct {
	IP                string   `json:"ip"`
	Handle            string   `json:"handle,omitempty"`
	SequenceNumber    *uint64  `json:"sequenceNumber,omitempty"`
	Pod               string   `json:"pod,omitempty"`
	Namespace         string   `json:"namespace,omitempty"`
	Node              string   `json:"node,omitempty"`
	Type              string   `json:"type,omitempty"`
	CreationTimestamp string   `json:"creationTimestamp,omitempty"`
	InUse             bool     `json:"inUse"`
	Borrowed          bool     `json:"borrowed,omitempty"`
	CoolingDown       bool     `json:"coolingDown,omitempty"`
	Owners            []string `json:"owners"`

	Block      string            `json:"-"` // CIDR
	BlockOwner string            `json:"-"` // node, empty if nobody's
	Attrs      map[string]string `json:"-"`
}

// HandleInfo names a handle as it was at a revision.
type HandleInfo struct {
	ID       string
	UID      *string
	Revision string
}

// BlockInfo is a block that was looked at.
type BlockInfo struct {
	CIDR, Affinity string // affinity as stored, empty if nobody's
}

// Owner is who uses an address.
type Owner struct {
	Addr netip.Addr
	Name string // "Node(n1)", "Workload(default/web-0)"
}

// Kind says what sort of problem it is.
type Kind string

// The kinds. The first three compare the store's addresses with who uses them, the others the store with itself.
const (
	LeakedAddress         Kind = "leaked-address"           // given out, and nobody uses it
	AddressNotAllocated   Kind = "address-not-allocated"    // used, in a pool, and never given out
	AddressOutsidePools   Kind = "address-outside-pools"    // used, and in no active pool
	AllocationOutsidePool Kind = "allocation-outside-pools" // given out, and in no pool, not even a disabled one
	AddressWithoutHandle  Kind = "address-without-handle"   // given out to no handle
	DuplicateAddress      Kind = "duplicate-address"        // given out by two blocks
	LeakedHandle          Kind = "leaked-handle"            // holds no address
	MissingHandle         Kind = "missing-handle"           // named in a block, and not there
	HandleMismatch        Kind = "handle-mismatch"          // counts other addresses than it holds
	AffinityWithoutBlock  Kind = "affinity-without-block"   // confirmed, and the block is gone or another's
	BlockWithoutAffinity  Kind = "block-without-affinity"   // a node's without its affinity, or nobody's and empty
	InvalidBlock          Kind = "invalid-block"            // contradicts itself
	Malformed             Kind = "malformed"                // cannot be read
)

// Problem is one thing that is wrong.
type Problem struct {
	Kind   Kind   `json:"kind"`
	What   string `json:"what"` // the address, handle, block or key
	Detail string `json:"detail"`
}

func (p Problem) String() string { return fmt.Sprintf("%s: %s: %s", p.Kind, p.What, p.Detail) }

// Of returns the problems of some kinds.
func (r *Report) Of(kinds ...Kind) []Problem {
	var out []Problem
	for _, p := range r.Problems {
		if slices.Contains(kinds, p.Kind) {
			out = append(out, p)
		}
	}
	return out
}

// Integrity returns the problems of the store with itself, whoever uses the addresses.
func (r *Report) Integrity() []Problem {
	var out []Problem
	for _, p := range r.Problems {
		if p.Kind != LeakedAddress && p.Kind != AddressNotAllocated && p.Kind != AddressOutsidePools {
			out = append(out, p)
		}
	}
	return out
}

// NodeCount is how many addresses a node holds.
type NodeCount struct {
	Node  string
	Count int
}

// ByNode lists the nodes, those with the most addresses first.
func (r *Report) ByNode() []NodeCount {
	out := make([]NodeCount, 0, len(r.byNode))
	for node, n := range r.byNode {
		out = append(out, NodeCount{node, n})
	}
	slices.SortFunc(out, func(a, b NodeCount) int { return cmp.Or(b.Count-a.Count, cmp.Compare(a.Node, b.Node)) })
	return out
}

// Sorted lists all allocations in the order of their addresses.
func (r *Report) Sorted() []*Allocation {
	var out []*Allocation
	for _, list := range r.Allocations {
		out = append(out, list...)
	}
	slices.SortFunc(out, func(a, b *Allocation) int {
		x, _ := netip.ParseAddr(a.IP) // made by Addr.String
		y, _ := netip.ParseAddr(b.IP)
		return cmp.Or(x.Compare(y), cmp.Compare(a.Block, b.Block))
	})
	return out
}

// note records a problem.
func (r *Report) note(kind Kind, what, format string, args ...any) {
	r.Problems = append(r.Problems, Problem{kind, what, fmt.Sprintf(format, args...)})
}
