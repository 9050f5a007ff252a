package agent

import (
	"context"
	"log/slog"
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

	mu    sync.Mutex
	items map[string]T
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
	items := make(map[string]T, len(kvs))
	for _, kv := range kvs {
		if item, ok := v.read(kv); ok {
			items[kv.Key] = item
		}
	}
	v.mu.Lock()
	v.items = items
	v.mu.Unlock()
	return rev, nil
}

func (v *view[T]) read(kv datastore.KV) (T, bool) {
	item, err := v.decode(kv)
	if err != nil {
		v.log.Error("ignoring what this version cannot read in the datastore", "key", kv.Key, "err", err)
		return item, false
	}
	return item, true
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

// apply takes in one event. A value that cannot be read leaves the one before it in force: a slip in a manifest must
// not take a pool's routes away.
func (v *view[T]) apply(ev datastore.Event) {
	if ev.Type != datastore.Put {
		v.mu.Lock()
		delete(v.items, ev.KV.Key)
		v.mu.Unlock()
		return
	}
	if item, ok := v.read(ev.KV); ok {
		v.mu.Lock()
		v.items[ev.KV.Key] = item
		v.mu.Unlock()
	}
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
