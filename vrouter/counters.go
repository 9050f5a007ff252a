package vrouter

import "sync/atomic"

// Counter is one named count of packets and of bytes. Bytes are those of the IP packet as it came to the ladder;
// counters of the kernel know packets only.
type Counter struct {
	Name    string
	Packets uint64
	Bytes   uint64
}

// tally is a counter that one worker writes and anyone reads.
type tally struct {
	packets atomic.Uint64
	bytes   atomic.Uint64
}

func (t *tally) add(packets, bytes uint64) {
	t.packets.Add(packets)
	t.bytes.Add(bytes)
}

// path is the way of a forwarded packet. The first two are the Directions of the same names.
type path uint8

const (
	pathEncap = path(Encap)
	pathDecap = path(Decap)
	pathLocal = path(Decap) + 1 // from one pod of this node to another
	pathHost  = path(Decap) + 2 // from a pod to the node's kernel, which does what the vRouter does not
	pathCount = path(Decap) + 3
)

var pathNames = [pathCount]string{pathEncap: "encap", pathDecap: "decap", pathLocal: "local", pathHost: "host"}

// tallies are one worker's counters.
type tallies struct {
	forwarded [pathCount]tally
	dropped   [reasonCount]tally
	batches   [batchBuckets]tally // packets: batches, bytes: packets in them
	more      [moreCount]tally
}

// The counters beside those two. With them every packet is accounted for: what was received is what was forwarded, less
// the pieces, plus what was split, plus what was dropped.
const (
	moreSplit       = iota // packets that were too long for the way, and went in pieces; bytes are theirs
	morePieces             // the pieces: fragments, and segments of superpackets
	moreICMPSent           // ICMP errors of ours
	moreICMPFailed         // and those that the reply port could not send
	moreICMPLimited        // packets that would have been answered, but for the rate
	moreECNUnused          // packets out of the tunnel with a combination of ECN fields that nothing sends (RFC 6040, 4.2)
	moreCount
)

var moreNames = [moreCount]string{
	moreSplit: "split", morePieces: "pieces", moreICMPSent: "icmp_sent", moreICMPFailed: "icmp_send_failed", moreICMPLimited: "icmp_rate_limited",
	moreECNUnused: "ecn_unexpected",
}

// Counters returns every counter: what was forwarded by path, what was dropped by reason, and the kernel's own
// losses around the ports. Those that are zero are there too, so that a reader knows their names.
func (r *Router) Counters() []Counter {
	r.mu.Lock()
	workers, refused, relays := r.workers, r.forgers.refused, r.relays
	r.mu.Unlock()

	var forwarded [pathCount]Counter
	for i, name := range pathNames {
		forwarded[i].Name = "forwarded_" + name
	}
	var dropped [reasonCount]Counter
	var more [moreCount]Counter
	var kernel []Counter
	seen := make(map[Port]bool)
	for _, w := range workers {
		for i := range w.tallies.forwarded {
			forwarded[i].Packets += w.tallies.forwarded[i].packets.Load()
			forwarded[i].Bytes += w.tallies.forwarded[i].bytes.Load()
		}
		for i := range w.tallies.dropped {
			dropped[i].Packets += w.tallies.dropped[i].packets.Load()
			dropped[i].Bytes += w.tallies.dropped[i].bytes.Load()
		}
		for i := range w.tallies.more {
			more[i].Packets += w.tallies.more[i].packets.Load()
			more[i].Bytes += w.tallies.more[i].bytes.Load()
		}
		for _, p := range []Port{w.in, w.out, w.reply} {
			if p != nil && !seen[p] {
				seen[p] = true
				countCarried(p, &forwarded)
				kernel = append(kernel, p.Counters()...)
			}
		}
	}
	all := append(make([]Counter, 0, len(forwarded)+len(dropped)+len(kernel)), forwarded[:]...)
	for i := range dropped {
		dropped[i].Name = "drop_" + Reason(i).String()
	}
	all = append(all, dropped[:]...)
	for i := range more {
		more[i].Name = moreNames[i]
	}
	more[moreICMPLimited].Packets += relays.limited
	all = append(all, more[:]...)
	all = append(all, relays.counters()...)
	all = append(all, Counter{Name: "path_mtu_refused", Packets: refused})
	return append(all, kernel...)
}
