package ipam

import (
	"encoding/json"
	"net/netip"
	"time"
)

// A released address may have to cool down before it is given out again: connections of its last owner, and what others
// remember of it, have to die first. Until then its ordinal points to an attribute that only says when it was released.

const releasedAt = "releasedAt"

// cooling says whether the attribute is that of a released address, and since when. A time that cannot be read counts
// as now: the address stays away.
func (a attribute) cooling(now time.Time) (since time.Time, ok bool) {
	raw, ok := a.extra[releasedAt]
	if !ok || string(raw) == "null" {
		return time.Time{}, false
	}
	if err := json.Unmarshal(raw, &since); err != nil {
		return now, true
	}
	return since, true
}

// cooled says whether an ordinal was released, and for long enough.
func (b *block) cooled(ordinal int, now time.Time, cooldown time.Duration) bool {
	at := b.allocations[ordinal]
	if at == free {
		return false
	}
	since, ok := b.attributes[at].cooling(now)
	return ok && !now.Before(since.Add(cooldown)) && b.attributes[at].readable()
}

// readable says whether releasedAt is a time.
func (a attribute) readable() bool {
	var t time.Time
	return json.Unmarshal(a.extra[releasedAt], &t) == nil
}

// collect makes the addresses free that have cooled down.
func (b *block) collect(now time.Time, cooldown time.Duration) {
	found := false
	for ordinal := range b.allocations {
		if b.cooled(ordinal, now, cooldown) {
			b.allocations[ordinal] = free
			b.unallocated = append(b.unallocated, ordinal)
			delete(b.given, ordinal)
			found = true
		}
	}
	if found {
		b.compact()
	}
}

// spare says whether an address could be given out now.
func (b *block) spare(now time.Time, cooldown time.Duration, allowed func(netip.Addr) bool) bool {
	for _, ordinal := range b.unallocated {
		if allowed == nil || allowed(b.addr(ordinal)) {
			return true
		}
	}
	for ordinal := range b.allocations {
		if b.cooled(ordinal, now, cooldown) && (allowed == nil || allowed(b.addr(ordinal))) {
			return true
		}
	}
	return false
}

// retire is release, with a cool-down after it.
func (b *block) retire(a netip.Addr, given uint64, now time.Time, cooldown time.Duration) error {
	ordinal := b.ordinal(a)
	if at := b.allocations[ordinal]; cooldown <= 0 || at == free || b.given[ordinal] != given {
		return b.release(a, given)
	}
	stamp, err := json.Marshal(now.UTC().Truncate(time.Second))
	if err != nil {
		return err
	}
	mark := attribute{extra: map[string]json.RawMessage{releasedAt: stamp}}
	b.allocations[ordinal] = b.attributeIndex(mark)
	b.given[ordinal] = b.sequence
	b.compact()
	return nil
}

// retireHandle is releaseHandle, with a cool-down after it.
func (b *block) retireHandle(handle string, now time.Time, cooldown time.Duration) ([]netip.Addr, error) {
	held := b.held(handle)
	for _, a := range held {
		if err := b.retire(a, b.given[b.ordinal(a)], now, cooldown); err != nil {
			return nil, err
		}
	}
	return held, nil
}
