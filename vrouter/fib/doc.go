// Package fib is the forwarding table: longest-prefix match from an address to a next hop.
//
// Readers and writers never meet. A forwarding worker takes an immutable [Snapshot] from the [Table] once per batch
// (one atomic load) and looks addresses up in it; [Table.Update] builds the next snapshot beside it, sharing what did
// not change, and swaps it in, so that a worker sees a transaction whole or not at all.
//
// The table also does the bookkeeping of mark and sweep. When its writer is lost and comes back, the writer marks all
// routes stale, tells what it knows, and sweeps what it did not mention; forwarding uses stale routes meanwhile as if
// nothing had happened.
//
// Start reading at table.go; route.go says what a valid route is, codec.go how routes are kept in a file.
package fib
