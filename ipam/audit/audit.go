package audit

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/big"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"margay/datastore"
)

// reservedByWindows is the handle of the addresses that Windows keeps for itself in each block; no key stands for it.
const reservedByWindows = "windows-reserved-ipam-handle"

// Check looks at the whole store; version is written into the report. What is found is looked for a second time, and
// only what is there both times is reported: a pod that came or went meanwhile is no problem.
func Check(ctx context.Context, s *datastore.Store, version string) (*Report, error) {
	first, err := Look(ctx, s, version)
	if err != nil || len(first.Problems) == 0 {
		return first, err
	}
	second, err := Look(ctx, s, version)
	if err != nil {
		return nil, err
	}
	stays := func(p Problem) bool {
		return slices.ContainsFunc(first.Problems, func(o Problem) bool { return o.Kind == p.Kind && o.What == p.What })
	}
	second.Problems = slices.DeleteFunc(second.Problems, func(p Problem) bool { return !stays(p) })
	leaked := func(kind Kind, what string) bool {
		return slices.ContainsFunc(second.Problems, func(p Problem) bool { return p.Kind == kind && p.What == what })
	}
	// The report says what to release: nothing that only the second look saw.
	second.LeakedHandles = slices.DeleteFunc(second.LeakedHandles, func(h HandleInfo) bool { return !leaked(LeakedHandle, h.ID) })
	for ip, list := range second.Allocations {
		for _, a := range list {
			if !a.InUse && !a.CoolingDown && !leaked(LeakedAddress, ip) {
				a.InUse = true
			}
		}
	}
	return second, nil
}

// Look is Check without the second look: for a store that nobody writes.
func Look(ctx context.Context, s *datastore.Store, version string) (*Report, error) {
	snap, err := take(ctx, s)
	if err != nil {
		return nil, err
	}
	return snap.report(version), nil
}

func (s *snapshot) report(version string) *Report {
	info := s.info.Spec
	r := &Report{Version: version, ClusterGUID: info.ClusterGUID, ClusterType: info.ClusterType,
		DatastoreLocked:     info.DatastoreReady != nil && !*info.DatastoreReady,
		ClusterInfoRevision: revisionText(s.infoRevision), Allocations: map[string][]*Allocation{}, Problems: []Problem{},
		Owners: s.owners, byNode: map[string]int{}, inUse: map[netip.Addr]Owner{}}
	r.Problems = append(r.Problems, s.problems...)
	for _, p := range s.pools {
		if !p.disabled {
			r.Pools = append(r.Pools, p.cidr.String())
		}
	}
	for _, o := range s.owners {
		if _, ok := r.inUse[o.Addr]; !ok {
			r.inUse[o.Addr] = o
		}
	}
	counted := map[string]map[string]int{} // handle → block → addresses
	for i := range s.blocks {
		s.block(r, &s.blocks[i], counted)
	}
	s.ownersAllocated(r)
	s.checkHandles(r, counted)
	s.checkAffinities(r)
	slices.SortStableFunc(r.Problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.What, b.What))
	})
	return r
}

// block checks one block and records its addresses.
func (s *snapshot) block(r *Report, b *storedBlock, counted map[string]map[string]int) {
	stored := ""
	if b.Affinity != nil {
		stored = *b.Affinity
	}
	cidr := b.cidr.String()
	r.Blocks = append(r.Blocks, BlockInfo{cidr, stored})
	if why := b.invalid(); why != "" {
		r.note(InvalidBlock, cidr, "%s", why)
	}
	for ordinal, at := range b.Allocations {
		if at == nil {
			continue
		}
		var attr attributes
		if *at >= 0 && *at < len(b.Attributes) {
			attr = b.Attributes[*at]
		}
		a, addr := b.allocation(ordinal, attr)
		if !b.cidr.Contains(addr) {
			break // more entries than addresses: invalid, and said so
		}
		r.Allocations[a.IP] = append(r.Allocations[a.IP], a)
		r.byNode[a.Node]++
		if n := len(r.Allocations[a.IP]); n == 2 {
			r.note(DuplicateAddress, a.IP, "given out by block %s and by block %s", r.Allocations[a.IP][0].Block, cidr)
		}
		if !slices.ContainsFunc(s.pools, func(p pool) bool { return p.cidr.Contains(addr) }) {
			r.note(AllocationOutsidePool, a.IP, "block %s is in no IP pool", cidr)
		}
		if a.CoolingDown {
			continue
		}
		switch {
		case a.Handle == "":
			r.note(AddressWithoutHandle, a.IP, "given out by block %s to no handle", cidr)
		case a.Handle != reservedByWindows:
			if counted[a.Handle] == nil {
				counted[a.Handle] = map[string]int{}
			}
			counted[a.Handle][cidr]++
		}
		s.used(r, a, addr)
	}
}

func (b *storedBlock) allocation(ordinal int, attr attributes) (*Allocation, netip.Addr) {
	addr := nth(b.cidr.Addr(), ordinal)
	seq := b.Given[strconv.Itoa(ordinal)]
	a := &Allocation{IP: addr.String(), SequenceNumber: &seq, Block: b.cidr.String(), BlockOwner: b.owner(), Attrs: attr.Secondary,
		Pod: attr.Secondary["pod"], Namespace: attr.Secondary["namespace"], Type: attr.Secondary["type"],
		CreationTimestamp: attr.Secondary["timestamp"], CoolingDown: attr.ReleasedAt != nil}
	if attr.Handle != nil {
		a.Handle = *attr.Handle
	}
	a.Node = cmp.Or(attr.Secondary["node"], a.BlockOwner)
	a.Borrowed = a.Node != a.BlockOwner
	return a, addr
}

// used decides whether an address is in use. The store knows the nodes' tunnel addresses, and the pods of those nodes
// that write WorkloadEndpoints; of a pod on another node nothing is known, and it has to be taken for alive.
func (s *snapshot) used(r *Report, a *Allocation, addr netip.Addr) {
	_, owned := r.inUse[addr]
	switch {
	case owned:
		a.InUse = true
		for _, o := range s.owners {
			if o.Addr == addr {
				a.Owners = append(a.Owners, o.Name)
			}
		}
	case a.Handle == reservedByWindows:
		a.InUse, a.Owners = true, []string{"Reserved for Windows"}
	case !s.nodes[a.Node]:
		r.note(LeakedAddress, a.IP, "held by %s, and node %q is not in the datastore", cmp.Or(a.Handle, "no handle"), a.Node)
	case strings.HasSuffix(a.Type, "TunnelAddress"):
		r.note(LeakedAddress, a.IP, "held by %s, and node %s has another tunnel address, or none", a.Handle, a.Node)
	case s.vouched[a.Node]:
		r.note(LeakedAddress, a.IP, "held by %s, and no WorkloadEndpoint of node %s has it", cmp.Or(a.Handle, "no handle"), a.Node)
	default:
		r.Unknown++
		a.InUse = true
	}
}

// invalid says how a block contradicts itself; empty if it does not.
func (b *storedBlock) invalid() string {
	size := 1
	if host := b.cidr.Addr().BitLen() - b.cidr.Bits(); host > 12 {
		return "expected at most 4096 addresses"
	} else {
		size <<= host
	}
	if len(b.Allocations) != size {
		return fmt.Sprintf("allocations: expected %d entries, got %d", size, len(b.Allocations))
	}
	pointed := map[int]bool{}
	held := 0
	for ordinal, at := range b.Allocations {
		if at == nil {
			continue
		}
		held++
		pointed[*at] = true
		if *at < 0 || *at >= len(b.Attributes) {
			return fmt.Sprintf("allocations[%d]: expected an index below %d, got %d", ordinal, len(b.Attributes), *at)
		}
	}
	if len(pointed) != len(b.Attributes) {
		return fmt.Sprintf("attributes: %d of %d belong to no address", len(b.Attributes)-len(pointed), len(b.Attributes))
	}
	seen := map[int]bool{}
	for _, ordinal := range b.Unallocated {
		switch {
		case ordinal < 0 || ordinal >= size:
			return fmt.Sprintf("unallocated: ordinal %d is outside the block", ordinal)
		case seen[ordinal]:
			return fmt.Sprintf("unallocated: ordinal %d is there twice", ordinal)
		case b.Allocations[ordinal] != nil:
			return fmt.Sprintf("unallocated: ordinal %d is given out", ordinal)
		}
		seen[ordinal] = true
	}
	if held+len(seen) != size {
		return fmt.Sprintf("%d addresses: %d given out and %d free", size, held, len(seen))
	}
	return ""
}

// ownersAllocated looks for addresses in use that were never given out.
func (s *snapshot) ownersAllocated(r *Report) {
	for _, addr := range slices.SortedFunc(maps.Keys(r.inUse), netip.Addr.Compare) {
		if len(r.Allocations[addr.String()]) > 0 {
			continue
		}
		name := r.inUse[addr].Name
		if slices.ContainsFunc(s.pools, func(p pool) bool { return !p.disabled && p.cidr.Contains(addr) }) {
			r.note(AddressNotAllocated, addr.String(), "in use by %s and in an active IP pool, but never given out", name)
		} else {
			r.note(AddressOutsidePools, addr.String(), "in use by %s, and in no active IP pool", name)
		}
	}
}

// checkHandles compares what handles count with what blocks say.
func (s *snapshot) checkHandles(r *Report, counted map[string]map[string]int) {
	for _, id := range slices.Sorted(maps.Keys(s.handles)) {
		h, real := s.handles[id], counted[id]
		if len(real) == 0 {
			r.LeakedHandles = append(r.LeakedHandles, HandleInfo{ID: id, Revision: revisionText(h.revision)})
			r.note(LeakedHandle, id, "holds no address")
			continue
		}
		r.Handles++
		for _, cidr := range slices.Sorted(maps.Keys(h.Block)) {
			if n := h.Block[cidr]; n != real[cidr] {
				r.note(HandleMismatch, id, "counts %d addresses in block %s, which has %d", n, cidr, real[cidr])
			}
		}
		for _, cidr := range slices.Sorted(maps.Keys(real)) {
			if _, ok := h.Block[cidr]; !ok {
				r.note(HandleMismatch, id, "does not count the %d addresses in block %s", real[cidr], cidr)
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(counted)) {
		if _, ok := s.handles[id]; !ok {
			r.note(MissingHandle, id, "is in use in a block but doesn't exist")
		}
	}
}

// checkAffinities compares affinities with blocks. A pending one is a claim that is under way or will be finished, and
// counts as none.
func (s *snapshot) checkAffinities(r *Report) {
	owner := map[netip.Prefix]string{}
	for i := range s.blocks {
		b := &s.blocks[i]
		owner[b.cidr] = b.owner()
		held := len(b.Allocations) - len(b.Unallocated)
		switch node := b.owner(); {
		case node == "" && held == 0:
			r.note(BlockWithoutAffinity, b.cidr.String(), "nobody's, and empty: it keeps its range from being claimed")
		case node != "" && strings.HasPrefix(*b.Affinity, "host:"):
			if _, ok := s.affinities[affinityID{node, b.cidr}]; !ok {
				r.note(BlockWithoutAffinity, b.cidr.String(), "node %s's, which has no affinity for it", node)
			}
		}
	}
	for id, a := range s.affinities {
		if a.State != "confirmed" || a.Deleted {
			continue
		}
		what := id.node + " " + id.cidr.String()
		if got, ok := owner[id.cidr]; !ok {
			r.note(AffinityWithoutBlock, what, "confirmed, and there is no such block")
		} else if got != id.node {
			r.note(AffinityWithoutBlock, what, "confirmed, and the block is %s", cmp.Or("node "+got+"'s", "nobody's"))
		}
	}
}

// nth is the n-th address after a.
func nth(a netip.Addr, n int) netip.Addr {
	sum := new(big.Int).SetBytes(a.AsSlice())
	sum.Add(sum, big.NewInt(int64(n)))
	if sum.BitLen() > a.BitLen() {
		return netip.Addr{}
	}
	out, ok := netip.AddrFromSlice(sum.FillBytes(make([]byte, len(a.AsSlice()))))
	if !ok {
		return netip.Addr{}
	}
	return out
}
