package agent

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"margay/datastore"
)

// view mirrors everything under one prefix of the datastore. While etcd is away it keeps what it last saw: a node
// must not lose its routes because the datastore is down.
type view[T any] struct {
	store  *datastore.Store
	prefix string
	decode func(datastore.KV) (T, error)
	log    *slog.Logger

	mu     sync.Mutex
	items  map[string]T
	broken map[string]error // keys whose value cannot be read
}

// relistPause is the wait before a list that failed is tried again.
const relistPause = time.Second

// start lists once, so that the view is whole when it returns, and then follows changes until ctx is done. changed is
// called after each of them and must not block.
func (v *view[T]) start(ctx context.Context, changed func()) error {
	rev, err := v.list(ctx)
	if err != nil {
		return err
	}
	go v.follow(ctx, v.store.Watch(ctx, v.prefix, rev), rev, changed)
	return nil
}

func (v *view[T]) list(ctx context.Context) (int64, error) {
	kvs, rev, err := v.store.List(ctx, v.prefix)
	if err != nil {
		return 0, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	old := v.items
	v.items, v.broken = make(map[string]T, len(kvs)), make(map[string]error)
	for _, kv := range kvs {
		if item, ok := old[kv.Key]; ok {
			v.items[kv.Key] = item
		}
		v.put(kv)
	}
	return rev, nil
}

// put takes in one value; mu is held. One that cannot be read leaves the one before it in force: a slip in a manifest
// must not take a pool's routes away.
func (v *view[T]) put(kv datastore.KV) {
	item, err := v.decode(kv)
	if err != nil {
		v.log.Error("a value in the datastore cannot be read; what it was before stays in force", "key", kv.Key, "err", err)
		v.broken[kv.Key] = err
		return
	}
	v.items[kv.Key] = item
	delete(v.broken, kv.Key)
}

// blind returns a value that cannot be read and that nothing known stands in for; nil when there is none. As long as
// there is one, what follows from this view is incomplete.
func (v *view[T]) blind() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(v.broken)) {
		if _, known := v.items[key]; !known {
			return fmt.Errorf("%s cannot be read: %w", key, v.broken[key])
		}
	}
	return nil
}

func (v *view[T]) follow(ctx context.Context, events <-chan datastore.Event, rev int64, changed func()) {
	for ev := range events {
		if ev.Type == datastore.Resync {
			if rev = v.relist(ctx); rev == 0 {
				return
			}
			changed()
			continue
		}
		if ev.KV.Revision <= rev {
			continue
		}
		v.apply(ev)
		changed()
	}
}

// apply takes in one event.
func (v *view[T]) apply(ev datastore.Event) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if ev.Type == datastore.Put {
		v.put(ev.KV)
		return
	}
	delete(v.items, ev.KV.Key)
	delete(v.broken, ev.KV.Key)
}

// relist lists until it succeeds; 0 when ctx is done first.
func (v *view[T]) relist(ctx context.Context) int64 {
	for {
		rev, err := v.list(ctx)
		if err == nil {
			return rev
		}
		select {
		case <-ctx.Done():
			return 0
		case <-time.After(relistPause):
		}
	}
}

// all returns the current items, in no order.
func (v *view[T]) all() []T {
	v.mu.Lock()
	defer v.mu.Unlock()
	out := make([]T, 0, len(v.items))
	for _, item := range v.items {
		out = append(out, item)
	}
	return out
}
