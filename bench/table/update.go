package table

import (
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"margay/vrouter/fib"
)

// Updates is a full table that changes while it is read.
type Updates struct {
	table  *fib.Table
	routes []fib.Route
	rnd    *rand.Rand
	stop   func()
}

// NewUpdates loads the prefixes, and starts so many readers that look up random addresses at full speed until Close.
func NewUpdates(prefixes []netip.Prefix, readers int) (*Updates, error) {
	t, routes := fib.New(), routesOf(prefixes)
	if err := t.Update(routes, nil); err != nil {
		return nil, err
	}
	return &Updates{table: t, routes: routes, rnd: rand.New(rand.NewPCG(7, 8)), stop: read(t, prefixes, readers)}, nil
}

// Run makes n changes, so many in a transaction. A third of the transactions gives routes other next hops, a third takes routes
// away, and a third brings routes back.
func (u *Updates) Run(n, batch int) error {
	for done := 0; done < n; done += batch {
		if err := churn(u.table, u.rnd, u.routes, done/batch, batch); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the readers.
func (u *Updates) Close() { u.stop() }

// Load makes a table of the prefixes and returns how long that took, and the bytes of the heap that it keeps.
func Load(prefixes []netip.Prefix) (time.Duration, uint64, error) {
	routes := routesOf(prefixes)
	before := live()
	began := time.Now()
	t := fib.New()
	if err := t.Update(routes, nil); err != nil {
		return 0, 0, err
	}
	took := time.Since(began)
	kept := live() - before
	runtime.KeepAlive(t)
	runtime.KeepAlive(routes)
	return took, kept, nil
}

// churn makes the n-th transaction, of so many changes.
func churn(t *fib.Table, rnd *rand.Rand, routes []fib.Route, n, changes int) error {
	at := rnd.IntN(len(routes) - changes)
	some := routes[at : at+changes]
	switch n % 3 {
	case 0:
		moved := slices.Clone(some)
		for i := range moved {
			moved[i].NextHop = routes[rnd.IntN(len(routes))].NextHop
		}
		return t.Update(moved, nil)
	case 1:
		del := make([]netip.Prefix, changes)
		for i, r := range some {
			del[i] = r.Prefix
		}
		return t.Update(nil, del)
	default:
		return t.Update(some, nil)
	}
}

// read starts readers that look up random addresses; stop ends them and waits.
func read(t *fib.Table, prefixes []netip.Prefix, readers int) (stop func()) {
	var (
		wg   sync.WaitGroup
		done atomic.Bool
	)
	for i := range readers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(9, uint64(i)))
			dst, hops := make([]uint32, 1<<16), make([]fib.Hop, 64)
			for i := range dst {
				dst[i] = inside(rnd, prefixes[rnd.IntN(len(prefixes))])
			}
			for at := 0; !done.Load(); at = (at + len(hops)) % len(dst) {
				t.Forwarding().LookupBatch(dst[at:at+len(hops)], hops)
			}
		})
	}
	return func() {
		done.Store(true)
		wg.Wait()
	}
}

// live returns the bytes of the heap that are in use.
func live() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
