package ipam

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"margay/datastore"
)

// block is a run of addresses, their owners, and the order in which the free ones will be given out. Ordinal n is the
// n-th address of cidr.
type block struct {
	cidr        netip.Prefix
	affinity    string // "host:<node>", or empty: nobody's
	allocations []int  // ordinal → index into attributes, free where the ordinal is free
	unallocated []int  // free ordinals, first in first out
	attributes  []attribute
	sequence    uint64         // raised by one at each write
	given       map[int]uint64 // the sequence at which an ordinal was given out
	deleted     bool

	extra map[string]json.RawMessage // fields of the JSON that this version does not know
}

// free marks an ordinal that nobody holds.
const free = -1

// attribute says who holds an ordinal.
type attribute struct {
	handle    string
	hasHandle bool
	secondary map[string]string
	extra     map[string]json.RawMessage // releasedAt, and whatever else a newer version wrote
	raw       []byte                     // its JSON, nil where that was not made yet; never changed
}

// newBlock makes an empty block. The sequence should be one that the same block did not have in an earlier life.
func newBlock(cidr netip.Prefix, affinity string, sequence uint64) *block {
	n := blockSize(cidr)
	b := &block{cidr: cidr, affinity: affinity, sequence: sequence, given: map[int]uint64{}}
	b.allocations, b.unallocated = make([]int, n), make([]int, n)
	for i := range n {
		b.allocations[i], b.unallocated[i] = free, i
	}
	return b
}

// blockSize is the number of addresses in a block.
func blockSize(cidr netip.Prefix) int { return 1 << (cidr.Addr().BitLen() - cidr.Bits()) }

// clone copies what the operations below change.
func (b *block) clone() *block {
	c := *b
	c.allocations, c.unallocated = slices.Clone(b.allocations), slices.Clone(b.unallocated)
	c.attributes, c.given = slices.Clone(b.attributes), maps.Clone(b.given)
	return &c
}

// addr is the address of an ordinal.
func (b *block) addr(ordinal int) netip.Addr {
	raw := b.cidr.Addr().AsSlice()
	for i := len(raw) - 1; ordinal > 0; i-- {
		ordinal += int(raw[i])
		raw[i] = byte(ordinal)
		ordinal >>= 8
	}
	a, _ := netip.AddrFromSlice(raw)
	return a
}

// ordinal is the place of an address in the block, which must contain it.
func (b *block) ordinal(a netip.Addr) int {
	base, raw := b.cidr.Addr().AsSlice(), a.AsSlice()
	n := 0
	for i := range raw {
		n = n<<8 + int(raw[i]) - int(base[i])
	}
	return n
}

// inUse is the number of ordinals held.
func (b *block) inUse() int { return len(b.allocations) - len(b.unallocated) }

// assign gives the longest-free ordinal to the owner; false if there is none.
func (b *block) assign(owner attribute) (netip.Addr, bool) { return b.assignAllowed(owner, nil) }

// assignAllowed is assign among the addresses that allowed says yes to; nil is all of them.
func (b *block) assignAllowed(owner attribute, allowed func(netip.Addr) bool) (netip.Addr, bool) {
	i := slices.IndexFunc(b.unallocated, func(ordinal int) bool { return allowed == nil || allowed(b.addr(ordinal)) })
	if i < 0 {
		return netip.Addr{}, false
	}
	return b.take(i, owner), true
}

// assignAddr gives the owner that very address; false if it is held.
func (b *block) assignAddr(a netip.Addr, owner attribute) bool {
	i := slices.Index(b.unallocated, b.ordinal(a))
	if i < 0 {
		return false
	}
	b.take(i, owner)
	return true
}

// take gives out the ordinal at place i of the free list.
func (b *block) take(i int, owner attribute) netip.Addr {
	ordinal := b.unallocated[i]
	b.unallocated = slices.Delete(b.unallocated, i, i+1)
	b.allocations[ordinal] = b.attributeIndex(owner)
	b.given[ordinal] = b.sequence
	return b.addr(ordinal)
}

// attributeIndex is the place of an attribute, which is added where it is new.
func (b *block) attributeIndex(a attribute) int {
	at := slices.IndexFunc(b.attributes, a.equal)
	if at < 0 {
		at = len(b.attributes)
		b.attributes = append(b.attributes, a)
	}
	return at
}

func (a attribute) equal(o attribute) bool {
	return a.hasHandle == o.hasHandle && a.handle == o.handle && maps.Equal(a.secondary, o.secondary) &&
		maps.EqualFunc(a.extra, o.extra, slices.Equal[json.RawMessage])
}

// holds says whether the attribute is handle's. One that carries releasedAt was released already, and only keeps its
// address from being given out too soon.
func (a attribute) holds(handle string) bool {
	_, released := a.extra[releasedAt]
	return a.hasHandle && a.handle == handle && !released
}

// held lists the addresses that a handle holds, in order.
func (b *block) held(handle string) []netip.Addr {
	var out []netip.Addr
	for ordinal, at := range b.allocations {
		if at != free && b.attributes[at].holds(handle) {
			out = append(out, b.addr(ordinal))
		}
	}
	return out
}

// release frees an address if it was given out at that sequence; otherwise somebody else holds it by now, and the
// release is refused.
func (b *block) release(a netip.Addr, given uint64) error {
	ordinal := b.ordinal(a)
	if b.allocations[ordinal] == free {
		return fmt.Errorf("address %s: not assigned", a)
	}
	if got := b.given[ordinal]; got != given {
		return fmt.Errorf("address %s: sequence number %d: expected %d: it was released and assigned again since", a, given, got)
	}
	b.allocations[ordinal] = free
	b.unallocated = append(b.unallocated, ordinal)
	delete(b.given, ordinal)
	b.compact()
	return nil
}

// releaseHandle frees all addresses that a handle holds, and returns them.
func (b *block) releaseHandle(handle string) ([]netip.Addr, error) {
	held := b.held(handle)
	for _, a := range held {
		if err := b.release(a, b.given[b.ordinal(a)]); err != nil {
			return nil, err
		}
	}
	return held, nil
}

// compact drops the attributes that no ordinal refers to any more.
func (b *block) compact() {
	place := make([]int, len(b.attributes))
	used := make([]bool, len(b.attributes))
	for _, at := range b.allocations {
		if at != free {
			used[at] = true
		}
	}
	kept := b.attributes[:0:0]
	for i, a := range b.attributes {
		if used[i] {
			place[i] = len(kept)
			kept = append(kept, a)
		}
	}
	for ordinal, at := range b.allocations {
		if at != free {
			b.allocations[ordinal] = place[at]
		}
	}
	b.attributes = kept
}

// wireBlock and wireAttribute are the JSON.
type wireBlock struct {
	CIDR        string            `json:"cidr"`
	Affinity    *string           `json:"affinity"`
	Allocations []*int            `json:"allocations"`
	Unallocated []int             `json:"unallocated"`
	Attributes  []json.RawMessage `json:"attributes"`
	Sequence    uint64            `json:"sequenceNumber"`
	Given       map[string]uint64 `json:"sequenceNumberForAllocation"`
	Deleted     bool              `json:"deleted"`
}

type wireAttribute struct {
	Handle    *string           `json:"handle_id"`
	Secondary map[string]string `json:"secondary"`
}

// decodeBlock reads a stored block and checks that it agrees with itself: whatever passes can be worked on safely.
func decodeBlock(raw []byte) (*block, error) {
	var w wireBlock
	if err := json.Unmarshal(raw, &w); err != nil {
		return nil, fmt.Errorf("expected a block: %w", datastore.JSONError(err))
	}
	cidr, err := netip.ParsePrefix(w.CIDR)
	if err != nil || cidr != cidr.Masked() || cidr.Addr().Is4In6() || cidr.Addr().BitLen()-cidr.Bits() > 12 {
		return nil, fmt.Errorf("cidr %q: expected a masked prefix of at most 4096 addresses", w.CIDR)
	}
	b := &block{cidr: cidr, sequence: w.Sequence, given: make(map[int]uint64, len(w.Given)), deleted: w.Deleted}
	if w.Affinity != nil {
		b.affinity = *w.Affinity
	}
	for i, raw := range w.Attributes {
		a, err := decodeAttribute(raw)
		if err != nil {
			return nil, fmt.Errorf("attributes[%d]: %w", i, err)
		}
		b.attributes = append(b.attributes, a)
	}
	n := blockSize(cidr)
	if len(w.Allocations) != n {
		return nil, fmt.Errorf("allocations: expected %d entries, got %d", n, len(w.Allocations))
	}
	b.allocations = make([]int, n)
	for ordinal, at := range w.Allocations {
		switch {
		case at == nil:
			b.allocations[ordinal] = free
		case *at < 0 || *at >= len(b.attributes):
			return nil, fmt.Errorf("allocations[%d]: expected an index below %d, got %d", ordinal, len(b.attributes), *at)
		default:
			b.allocations[ordinal] = *at
		}
	}
	seen := make([]bool, n)
	for _, ordinal := range w.Unallocated {
		if ordinal < 0 || ordinal >= n || b.allocations[ordinal] != free || seen[ordinal] {
			return nil, fmt.Errorf("unallocated: expected each free ordinal once, got %d", ordinal)
		}
		seen[ordinal] = true
	}
	b.unallocated = w.Unallocated
	for ordinal, at := range b.allocations {
		if at == free && !seen[ordinal] {
			return nil, fmt.Errorf("unallocated: expected each free ordinal once, %d is missing", ordinal)
		}
	}
	for key, seq := range w.Given {
		ordinal, err := strconv.Atoi(key)
		if err != nil || ordinal < 0 || ordinal >= n || strconv.Itoa(ordinal) != key {
			return nil, fmt.Errorf("sequenceNumberForAllocation: expected an ordinal below %d, got %q", n, key)
		}
		b.given[ordinal] = seq
	}
	b.extra, err = unknown(raw, "cidr", "affinity", "allocations", "unallocated", "attributes", "sequenceNumber",
		"sequenceNumberForAllocation", "deleted")
	return b, err
}

func decodeAttribute(raw []byte) (attribute, error) {
	var w wireAttribute
	if err := json.Unmarshal(raw, &w); err != nil {
		return attribute{}, datastore.JSONError(err)
	}
	a := attribute{secondary: w.Secondary, raw: raw}
	if w.Handle != nil {
		a.handle, a.hasHandle = *w.Handle, true
	}
	var err error
	a.extra, err = unknown(raw, "handle_id", "secondary")
	return a, err
}

// encode gives the JSON to store. It is written by hand, as it is done for every pod that comes or goes: an attribute's
// part stays as it was read or first written.
func (b *block) encode() ([]byte, error) {
	affinity := []byte("null")
	if b.affinity != "" {
		var err error
		if affinity, err = json.Marshal(b.affinity); err != nil {
			return nil, err
		}
	}
	size := 256 + 8*len(b.allocations) + 28*len(b.given)
	for i := range b.attributes {
		if b.attributes[i].raw == nil {
			raw, err := b.attributes[i].encode()
			if err != nil {
				return nil, err
			}
			b.attributes[i].raw = raw
		}
		size += len(b.attributes[i].raw) + 1
	}
	out := make([]byte, 0, size)
	out = fmt.Appendf(out, `{"cidr":"%s","affinity":%s,"allocations":[`, b.cidr, affinity)
	for ordinal, at := range b.allocations {
		out = appendComma(out, ordinal)
		if at == free {
			out = append(out, "null"...)
		} else {
			out = strconv.AppendInt(out, int64(at), 10)
		}
	}
	out = append(out, `],"unallocated":[`...)
	for i, ordinal := range b.unallocated {
		out = strconv.AppendInt(appendComma(out, i), int64(ordinal), 10)
	}
	out = append(out, `],"attributes":[`...)
	for i, a := range b.attributes {
		out = append(appendComma(out, i), a.raw...)
	}
	out = fmt.Appendf(out, `],"sequenceNumber":%d,"sequenceNumberForAllocation":{`, b.sequence)
	n := 0
	for ordinal := range b.allocations {
		if seq, ok := b.given[ordinal]; ok {
			out = appendComma(out, n)
			n++
			out = append(strconv.AppendInt(append(out, '"'), int64(ordinal), 10), `":`...)
			out = strconv.AppendUint(out, seq, 10)
		}
	}
	out = fmt.Appendf(out, `},"deleted":%t}`, b.deleted)
	return appendUnknown(out, b.extra)
}

// appendComma separates the i-th element of a list from the one before it.
func appendComma(out []byte, i int) []byte {
	if i > 0 {
		return append(out, ',')
	}
	return out
}

func (a attribute) encode() ([]byte, error) {
	w := wireAttribute{Secondary: a.secondary}
	if a.hasHandle {
		w.Handle = &a.handle
	}
	return withUnknown(w, a.extra)
}

// unknown returns the fields of a JSON object other than the known ones; nil if there are none. Go matches field names
// without regard to case, so the known ones are recognised the same way.
func unknown(raw []byte, known ...string) (map[string]json.RawMessage, error) {
	var all map[string]json.RawMessage
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, datastore.JSONError(err)
	}
	if all == nil {
		return nil, errors.New("expected a JSON object")
	}
	maps.DeleteFunc(all, func(key string, _ json.RawMessage) bool {
		return slices.ContainsFunc(known, func(k string) bool { return strings.EqualFold(k, key) })
	})
	if len(all) == 0 {
		return nil, nil
	}
	return all, nil
}

// withUnknown marshals v and adds the fields that were kept aside.
func withUnknown(v any, extra map[string]json.RawMessage) ([]byte, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return appendUnknown(raw, extra)
}

// appendUnknown adds fields to a JSON object that has some.
func appendUnknown(raw []byte, extra map[string]json.RawMessage) ([]byte, error) {
	if len(extra) == 0 {
		return raw, nil
	}
	rest, err := json.Marshal(extra)
	if err != nil {
		return nil, err
	}
	return append(append(raw[:len(raw)-1], ','), rest[1:]...), nil
}
