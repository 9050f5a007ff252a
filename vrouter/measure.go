package vrouter

import (
	"fmt"
	"math/bits"

	"margay/vrouter/fib"
)

// batchBuckets is the number of powers of two, from 1, up to batchSize.
const batchBuckets = 7

// It fails to compile if a batch can be larger than the last of them.
var _ [1<<(batchBuckets-1) - batchSize]struct{}

// Batches tells how many packets one worker took at once.
type Batches struct {
	Worker  string   // its direction, and a number where there are several
	Count   uint64   // batches
	Packets uint64   // in all of them
	UpTo    []uint64 // [i]: the batches of at most 1<<i packets
}

// countBatch counts a batch of n packets.
func (t *tallies) countBatch(n int) { t.batches[bits.Len(uint(max(n, 1)-1))].add(1, uint64(n)) }

// Batches returns each worker's.
func (r *Router) Batches() []Batches {
	r.mu.Lock()
	workers := r.workers
	r.mu.Unlock()
	all := make([]Batches, len(workers))
	seen := make(map[string]int)
	for i, w := range workers {
		b := Batches{Worker: w.direction.String(), UpTo: make([]uint64, batchBuckets)}
		if n := seen[b.Worker]; n > 0 {
			b.Worker = fmt.Sprintf("%s%d", b.Worker, n)
		}
		seen[w.direction.String()]++
		for j := range w.tallies.batches {
			b.Count += w.tallies.batches[j].packets.Load()
			b.Packets += w.tallies.batches[j].bytes.Load()
			b.UpTo[j] = b.Count
		}
		all[i] = b
	}
	return all
}

// Queue tells how full a queue between the kernel and a port is. Used and Size are in the same unit, whichever it is.
type Queue struct {
	Name       string
	Used, Size uint64
}

// QueuePort is a Port that can tell about its queues. Queues may be called from any goroutine at any time.
type QueuePort interface {
	Port
	Queues() []Queue
}

// Queues returns those of all ports that can tell.
func (r *Router) Queues() []Queue {
	r.mu.Lock()
	workers := r.workers
	r.mu.Unlock()
	var all []Queue
	seen := make(map[Port]bool)
	for _, w := range workers {
		for _, p := range []Port{w.in, w.out} {
			if q, ok := p.(QueuePort); ok && !seen[p] {
				seen[p] = true
				all = append(all, q.Queues()...)
			}
		}
	}
	return all
}

// TableSize is the size of the table of routes.
type TableSize = fib.Size

// Table returns it.
func (r *Router) Table() TableSize { return r.table.Size() }
