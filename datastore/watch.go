package datastore

import (
	"context"
	"errors"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// EventType says what an Event is about.
type EventType uint8

// The kinds of event.
const (
	Put    EventType = iota + 1 // KV is the new state; Prev the one before, if there was one
	Delete                      // KV has the key and the revision of the deletion; Prev what was deleted, where etcd still had it
	Resync                      // events were lost: list again, then ignore events with a revision not above that list's
)

func (t EventType) String() string {
	switch t {
	case Put:
		return "put"
	case Delete:
		return "delete"
	case Resync:
		return "resync"
	}
	return "unknown"
}

// Event is one change under a watched prefix.
type Event struct {
	Type EventType
	KV   KV
	Prev *KV
}

// watchRetry is the pause before a broken watch is set up again.
const watchRetry = 500 * time.Millisecond

// Watch reports every change under prefix after fromRev (a List's revision; 0 is from now on), in order. It survives
// etcd's restarts and network failures; when the history it needs was compacted away, or the store was replaced by an
// older one, it sends one Resync and continues from now. The channel is closed when ctx is done, and only then. A
// consumer that does not read holds up its own watch, and loses nothing.
func (s *Store) Watch(ctx context.Context, prefix string, fromRev int64) <-chan Event {
	out := make(chan Event, 64)
	w := &watcher{store: s, prefix: prefix, out: out}
	if fromRev > 0 {
		w.next = fromRev + 1
	}
	go func() {
		defer close(out)
		for ctx.Err() == nil {
			w.run(ctx)
			select {
			case <-ctx.Done():
			case <-time.After(watchRetry):
			}
		}
	}()
	return out
}

type watcher struct {
	store  *Store
	prefix string
	out    chan<- Event
	next   int64 // the first revision not yet reported; 0: from now on
	lost   bool  // a Resync is owed
}

// run watches until the watch breaks.
func (w *watcher) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	if w.next == 0 || w.lost {
		if !w.restart(ctx) {
			return
		}
	}
	events := w.store.client.Watch(ctx, w.prefix, clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithRev(w.next),
		clientv3.WithCreatedNotify(), clientv3.WithProgressNotify())
	for resp := range events {
		if err := resp.Err(); err != nil {
			w.lost = w.lost || resp.CompactRevision != 0 || errors.Is(err, rpctypes.ErrCompacted)
			return
		}
		if resp.Header.Revision < w.next-1 {
			// This etcd has not come as far as what we have seen: it was restored from a backup, or made anew.
			w.lost = true
			return
		}
		for _, ev := range resp.Events {
			if !w.send(ctx, convert(ev)) {
				return
			}
		}
		if n := len(resp.Events); n > 0 {
			// Never further than what was delivered: a long list of events comes in fragments.
			w.next = resp.Events[n-1].Kv.ModRevision + 1
		}
	}
}

// restart finds the revision from which to watch when there is none to continue from.
func (w *watcher) restart(ctx context.Context) bool {
	bounded, done := w.store.bound(ctx)
	defer done()
	resp, err := w.store.client.Get(bounded, w.prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return false
	}
	if w.lost && !w.send(ctx, Event{Type: Resync, KV: KV{Key: w.prefix, Revision: resp.Header.Revision}}) {
		return false
	}
	w.lost, w.next = false, resp.Header.Revision+1
	return true
}

func (w *watcher) send(ctx context.Context, ev Event) bool {
	select {
	case w.out <- ev:
		return true
	case <-ctx.Done():
		return false
	}
}

func convert(ev *clientv3.Event) Event {
	out := Event{Type: Put, KV: KV{Key: string(ev.Kv.Key), Value: ev.Kv.Value, Revision: ev.Kv.ModRevision}}
	if ev.Type == clientv3.EventTypeDelete {
		out.Type = Delete
	}
	if ev.PrevKv != nil {
		out.Prev = &KV{Key: string(ev.PrevKv.Key), Value: ev.PrevKv.Value, Revision: ev.PrevKv.ModRevision}
	}
	return out
}
