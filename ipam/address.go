package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"margay/datastore"
)

// Errors of what is done to one address.
var (
	// ErrNotAssigned says that nobody holds the address.
	ErrNotAssigned = errors.New("not assigned")
	// ErrReassigned says that the address is not any more what the caller saw: another handle holds it, or it was
	// released and assigned again.
	ErrReassigned = errors.New("changed hands")
)

// Holder is who holds an address.
type Holder struct {
	Handle   string // empty if none
	Attrs    map[string]string
	Block    netip.Prefix
	Sequence uint64 // what a release has to carry
}

// Lookup says who holds an address; ErrNotAssigned if nobody does.
func Lookup(ctx context.Context, s *datastore.Store, addr netip.Addr) (Holder, error) {
	b, _, err := findBlock(ctx, s, addr)
	if err != nil {
		return Holder{}, err
	}
	ordinal := b.ordinal(addr)
	at := b.allocations[ordinal]
	if at == free {
		return Holder{}, fmt.Errorf("address %s: %w", addr, ErrNotAssigned)
	}
	attr := b.attributes[at]
	if _, released := attr.extra[releasedAt]; released {
		return Holder{}, fmt.Errorf("address %s: %w: it is cooling down after its release", addr, ErrNotAssigned)
	}
	return Holder{Handle: attr.handle, Attrs: attr.secondary, Block: b.cidr, Sequence: b.given[ordinal]}, nil
}

// findBlock reads the block that an address is in, whatever its size: it asks for all sizes a block can have at once,
// so that neither the pools nor the other blocks matter.
func findBlock(ctx context.Context, s *datastore.Store, addr netip.Addr) (*stored, Config, error) {
	largest, smallest := sizes(addr)
	names := []string{configKey, configResource}
	for bits := smallest; bits >= largest; bits-- {
		cidr, err := addr.Prefix(bits)
		if err != nil {
			return nil, Config{}, fmt.Errorf("address %s: %w", addr, err)
		}
		names = append(names, blockKey(cidr))
	}
	lists, _, err := s.ListMany(ctx, names...)
	if err != nil {
		return nil, Config{}, err
	}
	config, err := decodeConfig(lists[0], lists[1])
	if err != nil {
		return nil, Config{}, err
	}
	for _, kvs := range lists[2:] {
		if len(kvs) == 0 {
			continue
		}
		b, err := decodeBlock(kvs[0].Value)
		if err == nil && !b.cidr.Contains(addr) {
			err = fmt.Errorf("cidr %s: expected the key's", b.cidr)
		}
		if err != nil {
			return nil, config, fmt.Errorf("%s: %w: %w", kvs[0].Key, errMalformed, err)
		}
		return &stored{b, kvs[0].Revision}, config, nil
	}
	return nil, config, fmt.Errorf("address %s: %w", addr, ErrNotAssigned)
}

// Release says which address to free. What is given besides must be true of it, or nothing happens.
type Release struct {
	Addr     netip.Addr
	Handle   string  // if not empty: only if this handle holds it
	Sequence *uint64 // if not nil: only if it was given out at this sequence
}

// ReleaseAddress frees one address, whoever's block it is in, and takes it off its handle, in one transaction.
// ErrNotAssigned if nobody holds it; ErrReassigned if it is not what the caller saw.
func (a *Allocator) ReleaseAddress(ctx context.Context, r Release) error {
	if !r.Addr.IsValid() {
		return errors.New("address: expected one")
	}
	return a.retry(ctx, func() error { return a.releaseAddress(ctx, r) })
}

func (a *Allocator) releaseAddress(ctx context.Context, r Release) error {
	b, config, err := findBlock(ctx, a.store, r.Addr)
	if err != nil {
		return err
	}
	ordinal := b.ordinal(r.Addr)
	at := b.allocations[ordinal]
	if at == free {
		return fmt.Errorf("address %s: %w", r.Addr, ErrNotAssigned)
	}
	attr, given := b.attributes[at], b.given[ordinal]
	if _, released := attr.extra[releasedAt]; released {
		return fmt.Errorf("address %s: %w: it was released already", r.Addr, ErrNotAssigned)
	}
	if r.Handle != "" && r.Handle != attr.handle {
		return fmt.Errorf("address %s: %w: handle %q: expected %q", r.Addr, ErrReassigned, r.Handle, attr.handle)
	}
	if r.Sequence != nil && *r.Sequence != given {
		return fmt.Errorf("address %s: %w: sequence number %d: expected %d", r.Addr, ErrReassigned, *r.Sequence, given)
	}
	next := b.clone()
	if err := next.retire(r.Addr, given, a.now(), config.cooldown()); err != nil {
		return err
	}
	ops, err := a.blockOps(b, next)
	if err != nil {
		return err
	}
	handleOps, err := a.lessHandle(ctx, attr, map[netip.Prefix]int{b.cidr: 1})
	if err != nil {
		return err
	}
	delete(a.cache, b.cidr)
	_, err = a.store.Txn(ctx, append(ops, handleOps...)...)
	return err
}

// blockOps writes a changed block: a block that is nobody's and empty is deleted, as it would only keep its range from
// being claimed.
func (a *Allocator) blockOps(old *stored, next *block) ([]datastore.Op, error) {
	key := blockKey(next.cidr)
	if next.affinity == "" && next.inUse() == 0 {
		return []datastore.Op{datastore.OpDelete(key, old.revision)}, nil
	}
	next.sequence++
	value, err := next.encode()
	if err != nil {
		return nil, err
	}
	return []datastore.Op{datastore.OpUpdate(key, value, old.revision)}, nil
}

// lessHandle takes addresses off the handle of an attribute, and deletes it when none are left. A handle that is not
// there, or does not count what is taken off, is a leak of somebody else's: the address goes all the same.
func (a *Allocator) lessHandle(ctx context.Context, attr attribute, gone map[netip.Prefix]int) ([]datastore.Op, error) {
	if !attr.hasHandle || validateHandle(attr.handle) != nil {
		return nil, nil
	}
	h, rev, err := a.readHandle(ctx, attr.handle)
	if err != nil {
		return nil, err
	}
	key := handleKey(attr.handle)
	if rev == 0 {
		return []datastore.Op{datastore.OpCheck(key, 0)}, nil
	}
	for cidr, n := range gone {
		if h.blocks[cidr] -= n; h.blocks[cidr] <= 0 {
			delete(h.blocks, cidr)
		}
	}
	if len(h.blocks) == 0 {
		return []datastore.Op{datastore.OpDelete(key, rev)}, nil
	}
	value, err := h.encode()
	if err != nil {
		return nil, err
	}
	return []datastore.Op{datastore.OpUpdate(key, value, rev)}, nil
}

// DeleteHandle forgets a handle that holds no address, if it is still at that revision: datastore.ErrConflict if it
// changed, datastore.ErrNotFound if it is gone.
func DeleteHandle(ctx context.Context, s *datastore.Store, id string, revision int64) error {
	if err := validateHandle(id); err != nil {
		return err
	}
	if revision <= 0 {
		return fmt.Errorf("handle %s: revision %d: expected the one that was read", id, revision)
	}
	return s.Delete(ctx, handleKey(id), revision)
}
