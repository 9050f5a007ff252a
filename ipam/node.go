package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"margay/datastore"
)

// releaseBatch is how many addresses one transaction frees: each comes with its handle, and etcd takes 128 operations.
const releaseBatch = 50

// ReleaseNode frees everything that a node holds that is gone for good: the addresses of its pods and tunnels in
// whichever block, and its blocks with their affinities; a block in which other nodes have addresses becomes nobody's.
// It returns the addresses freed, also when it fails on the way; calling it again goes on from there.
func (a *Allocator) ReleaseNode(ctx context.Context, node string) ([]netip.Addr, error) {
	return a.releaseNode(ctx, node, false)
}

// releaseNode is ReleaseNode, and with onlyGone no transaction frees anything while the Node is in the datastore: who comes
// back keeps what it still has, and ErrReassigned says so.
func (a *Allocator) releaseNode(ctx context.Context, node string, onlyGone bool) ([]netip.Addr, error) {
	if node == "" || strings.ContainsAny(node, "/ ") {
		return nil, fmt.Errorf("node %q: expected a node's name", node)
	}
	var out []netip.Addr
	for _, prefix := range []string{blockRootV4, blockRootV6} {
		kvs, _, err := a.store.List(ctx, prefix)
		if err != nil {
			return out, err
		}
		for _, kv := range kvs {
			b, err := decodeBlock(kv.Value)
			if err != nil {
				a.log.Error("block not usable", "key", kv.Key, "err", err)
				continue
			}
			if len(b.heldBy(node)) == 0 && b.affinity != "host:"+node {
				continue
			}
			freed, err := a.vacate(ctx, b.cidr, node, onlyGone)
			out = append(out, freed...)
			if err != nil {
				return out, err
			}
		}
	}
	// What is left are claims that were never finished.
	kvs, _, err := a.store.Keys(ctx, root+"host/"+node+"/")
	if err != nil {
		return out, err
	}
	for _, kv := range kvs {
		ops := []datastore.Op{datastore.OpDelete(kv.Key, kv.Revision)}
		if onlyGone {
			ops = append(ops, datastore.OpCheck(datastore.Nodes.Key(node), 0))
		}
		if _, err := a.store.Txn(ctx, ops...); err != nil && !contended(err) {
			return out, err
		}
	}
	return out, nil
}

// heldBy lists the addresses that a node's owners hold: those that name the node, or none at all in a block of the node.
func (b *block) heldBy(node string) []netip.Addr {
	var out []netip.Addr
	for ordinal, at := range b.allocations {
		if at == free {
			continue
		}
		attr := b.attributes[at]
		_, released := attr.extra[releasedAt]
		named := attr.secondary["node"]
		if !released && (named == node || named == "" && b.affinity == "host:"+node) {
			out = append(out, b.addr(ordinal))
		}
	}
	return out
}

// vacate frees what a node holds in one block, and then takes the block away from it.
func (a *Allocator) vacate(ctx context.Context, cidr netip.Prefix, node string, onlyGone bool) ([]netip.Addr, error) {
	var out []netip.Addr
	for {
		var freed []netip.Addr
		err := a.retry(ctx, func() (err error) {
			freed, err = a.vacateSome(ctx, cidr, node, onlyGone)
			return err
		})
		if err != nil {
			return out, err
		}
		out = append(out, freed...)
		if len(freed) < releaseBatch {
			return out, nil
		}
	}
}

// vacateSome is one attempt at one batch; the last batch takes the affinity with it.
func (a *Allocator) vacateSome(ctx context.Context, cidr netip.Prefix, node string, onlyGone bool) ([]netip.Addr, error) {
	var ops []datastore.Op
	if onlyGone {
		key := datastore.Nodes.Key(node)
		there, err := a.store.Existing(ctx, key)
		if err != nil {
			return nil, err
		}
		if len(there) > 0 {
			return nil, fmt.Errorf("node %s: %w: it is in the datastore again", node, ErrReassigned)
		}
		ops = append(ops, datastore.OpCheck(key, 0))
	}
	b, config, err := findBlock(ctx, a.store, cidr.Addr())
	if errors.Is(err, ErrNotAssigned) {
		return nil, nil // gone meanwhile
	}
	if err != nil {
		return nil, err
	}
	next, held := b.clone(), b.heldBy(node)
	held = held[:min(len(held), releaseBatch)]
	type share struct {
		attr attribute
		gone map[netip.Prefix]int
	}
	shares := map[string]share{}
	for _, addr := range held {
		ordinal := b.ordinal(addr)
		attr := b.attributes[b.allocations[ordinal]]
		if _, ok := shares[attr.handle]; !ok {
			shares[attr.handle] = share{attr, map[netip.Prefix]int{}}
		}
		shares[attr.handle].gone[b.cidr]++
		if err := next.retire(addr, b.given[ordinal], a.now(), config.cooldown()); err != nil {
			return nil, err
		}
	}
	if b.affinity == "host:"+node && len(held) < releaseBatch {
		next.affinity = ""
		key := affinityKey(node, b.cidr)
		kv, err := a.store.Get(ctx, key)
		switch {
		case err == nil:
			ops = append(ops, datastore.OpDelete(key, kv.Revision))
		case !errors.Is(err, datastore.ErrNotFound):
			return nil, err
		}
	}
	for _, s := range shares {
		handleOps, err := a.lessHandle(ctx, s.attr, s.gone)
		if err != nil {
			return nil, err
		}
		ops = append(ops, handleOps...)
	}
	if len(held) == 0 && next.affinity == b.affinity {
		return nil, nil
	}
	write, err := a.blockOps(b, next)
	if err != nil {
		return nil, err
	}
	delete(a.cache, b.cidr)
	if _, err := a.store.Txn(ctx, append(ops, write...)...); err != nil {
		return nil, err
	}
	return held, nil
}

// releaseBlock takes a block away from this node, if block and affinity are still what was seen: a block that is there was
// empty then.
func (a *Allocator) releaseBlock(ctx context.Context, s suspect) error {
	key, affinity := blockKey(s.block), affinityKey(a.node, s.block)
	if s.revision != 0 {
		return a.commitOps(ctx, datastore.OpDelete(key, s.revision), datastore.OpDelete(affinity, s.affinity))
	}
	kv, err := a.store.Get(ctx, key)
	switch {
	case errors.Is(err, datastore.ErrNotFound):
		return a.commitOps(ctx, datastore.OpCheck(key, 0), datastore.OpDelete(affinity, s.affinity))
	case err != nil:
		return err
	}
	b, err := decodeBlock(kv.Value)
	if err != nil || b.affinity == a.owner() {
		return nil // it cannot be read, or is this node's after all
	}
	return a.commitOps(ctx, datastore.OpCheck(key, kv.Revision), datastore.OpDelete(affinity, s.affinity))
}

// commitOps does a transaction in turn, and forgets what is remembered.
func (a *Allocator) commitOps(ctx context.Context, ops ...datastore.Op) error {
	select {
	case a.turn <- struct{}{}:
		defer func() { <-a.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	clear(a.cache)
	a.known = nil
	_, err := a.store.Txn(ctx, ops...)
	return err
}
