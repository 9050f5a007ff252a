package vrouter

import (
	"context"
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"margay/vrouter/packet"
)

const (
	// SampleBytes is how much of a dropped packet is kept, in bytes.
	SampleBytes = 128
	// samplePeriod is how often workers may leave a sample of each reason, and by how much a sample's time is late.
	samplePeriod = 250 * time.Millisecond
	// recentSamples is how many samples are kept.
	recentSamples = 256
	// The flows that a worker counts the drops of apart: what is beyond, is counted together.
	dropSets = 64
	dropWays = 4
)

// DropSample is one packet that was dropped.
type DropSample struct {
	Seq       uint64    // counts up, from 1
	Time      time.Time // when it was noticed, at most a quarter of a second after the drop
	Direction Direction
	Reason    Reason
	Length    int    // of the packet, in bytes
	Bytes     []byte // its first bytes, SampleBytes at most; it begins with the IP header
}

// DropFlow counts what was dropped of one pair of addresses, those of the inner packet where there is one. Both are
// invalid for what bore none, and for the pairs that had to make room for others. The source of what was spoofed is the
// pod's that has sent it; the sample tells whose it bore.
type DropFlow struct {
	Direction      Direction
	Reason         Reason // ReasonNotSet for what had to make room
	Src, Dst       netip.Addr
	Packets, Bytes uint64
}

// dropNotes is what a worker writes down about its drops: one sample of each reason at a time, and counts by flow.
type dropNotes struct {
	slots   [reasonCount]sampleSlot
	flows   [dropSets]dropSet
	evicted tally
}

// sampleSlot belongs to the worker while full is false and to the collector while it is true; so neither waits, and the
// worker writes no more samples than the collector has taken away.
type sampleSlot struct {
	full   atomic.Bool
	length int
	bytes  [SampleBytes]byte
}

// dropSet is one set of the table of flows. changing is odd while the worker replaces an entry.
type dropSet struct {
	changing atomic.Uint32
	ways     [dropWays]dropEntry
}

// dropEntry counts one flow: pair is source and destination, kind the reason plus one; 0 is an empty entry.
type dropEntry struct {
	pair    atomic.Uint64
	kind    atomic.Uint32
	packets atomic.Uint64
	bytes   atomic.Uint64
}

// note is called by the worker for each drop. pod is the address of the pod that has sent the packet, where the source that
// it bears is another's, else 0.
func (n *dropNotes) note(p *Packet, reason Reason, pod uint32) {
	b := p.Bytes()
	if s := &n.slots[reason]; !s.full.Load() {
		s.length = len(b)
		copy(s.bytes[:], b)
		s.full.Store(true)
	}
	pair := pairOf(b)
	if pod != 0 {
		pair = uint64(pod)<<32 | pair&0xffffffff
	}
	kind := uint32(reason) + 1
	h := (pair ^ uint64(kind)<<56) * 0x9e3779b97f4a7c15
	set := &n.flows[h>>58]
	least := &set.ways[0]
	for i := range set.ways {
		e := &set.ways[i]
		if e.kind.Load() == kind && e.pair.Load() == pair {
			e.packets.Add(1)
			e.bytes.Add(uint64(len(b)))
			return
		}
		if e.packets.Load() < least.packets.Load() {
			least = e
		}
	}
	set.changing.Add(1)
	n.evicted.add(least.packets.Load(), least.bytes.Load())
	least.pair.Store(pair)
	least.kind.Store(kind)
	least.packets.Store(1)
	least.bytes.Store(uint64(len(b)))
	set.changing.Add(1)
}

// pairOf returns source and destination of an IPv4 packet, of the inner one for IP-in-IP; 0 for anything else.
func pairOf(b []byte) uint64 {
	if len(b) < 20 || b[0]>>4 != 4 {
		return 0
	}
	if b[9] == packet.ProtocolIPIP {
		if inner := b[min(int(b[0]&0x0f)<<2, len(b)):]; len(inner) >= 20 && inner[0]>>4 == 4 {
			b = inner
		}
	}
	return binary.BigEndian.Uint64(b[12:])
}

// read returns the flows that were counted; the worker may go on meanwhile.
func (n *dropNotes) read(d Direction) []DropFlow {
	var out []DropFlow
	for i := range n.flows {
		set := &n.flows[i]
		for {
			before := set.changing.Load()
			var found []DropFlow
			for j := range set.ways {
				e := &set.ways[j]
				kind := e.kind.Load()
				if kind == 0 {
					continue
				}
				// The worker counts the packet first: read last, there are never fewer packets than the bytes are of.
				f := DropFlow{Direction: d, Reason: Reason(kind - 1), Bytes: e.bytes.Load()}
				f.Packets = e.packets.Load()
				if pair := e.pair.Load(); pair != 0 {
					var a [8]byte
					binary.BigEndian.PutUint64(a[:], pair)
					f.Src, f.Dst = netip.AddrFrom4([4]byte(a[:4])), netip.AddrFrom4([4]byte(a[4:]))
				}
				found = append(found, f)
			}
			if before%2 == 0 && set.changing.Load() == before {
				out = append(out, found...)
				break
			}
		}
	}
	if p := n.evicted.packets.Load(); p > 0 {
		out = append(out, DropFlow{Direction: d, Packets: p, Bytes: n.evicted.bytes.Load()})
	}
	return out
}

// dropLog keeps the samples that the workers left.
type dropLog struct {
	mu     sync.Mutex
	seq    uint64
	recent []DropSample // the oldest first
}

// CollectDrops takes the workers' samples away, again and again until ctx is done, so that they may leave new ones.
func (r *Router) CollectDrops(ctx context.Context) {
	tick := time.NewTicker(samplePeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			r.collectDrops()
		}
	}
}

func (r *Router) collectDrops() {
	workers := r.Workers()
	r.drops.mu.Lock()
	defer r.drops.mu.Unlock()
	now := time.Now()
	for _, w := range workers {
		for reason := range w.notes.slots {
			s := &w.notes.slots[reason]
			if !s.full.Load() {
				continue
			}
			r.drops.seq++
			r.drops.recent = append(r.drops.recent, DropSample{Seq: r.drops.seq, Time: now, Direction: w.direction,
				Reason: Reason(reason), Length: s.length, Bytes: slices.Clone(s.bytes[:min(s.length, SampleBytes)])})
			s.full.Store(false)
		}
	}
	if n := len(r.drops.recent) - recentSamples; n > 0 {
		r.drops.recent = slices.Delete(r.drops.recent, 0, n)
	}
}

// Drops returns the flows whose packets were dropped since the start, in no order, and the samples whose Seq is greater
// than since, the oldest first: the last recentSamples at most, of each reason four in a second.
func (r *Router) Drops(since uint64) ([]DropFlow, []DropSample) {
	r.collectDrops()
	flows := r.dropFlows()
	r.drops.mu.Lock()
	defer r.drops.mu.Unlock()
	if since > r.drops.seq {
		since = 0 // it counted the samples of a process before this one
	}
	first, _ := slices.BinarySearchFunc(r.drops.recent, since+1, func(s DropSample, seq uint64) int {
		return int(int64(s.Seq - seq))
	})
	return flows, slices.Clone(r.drops.recent[first:])
}

// dropFlows returns what the workers have counted. Those of one direction may have counted the same flow: what belongs to no
// flow comes by any of them.
func (r *Router) dropFlows() []DropFlow {
	type key struct {
		direction Direction
		reason    Reason
		src, dst  netip.Addr
	}
	var flows []DropFlow
	at := make(map[key]int)
	for _, w := range r.Workers() {
		for _, f := range w.notes.read(w.direction) {
			k := key{f.Direction, f.Reason, f.Src, f.Dst}
			if i, ok := at[k]; ok {
				flows[i].Packets += f.Packets
				flows[i].Bytes += f.Bytes
				continue
			}
			at[k] = len(flows)
			flows = append(flows, f)
		}
	}
	return flows
}

// Workers returns the workers that there are.
func (r *Router) Workers() []*Worker {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.workers // replaced as a whole when one comes, never changed
}
