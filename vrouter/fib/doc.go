// Package fib is the forwarding table: longest-prefix match from an address to a next hop.
//
// It holds the routes twice. The exact table (bart) is what the control plane asks: [Table.Load] gives an immutable
// [Snapshot] of it. [Forwarding] is what workers ask: flat arrays without pointers, made for batches of lookups;
// docs/fib.md has what it was measured against. A worker takes it from the [Table] once per batch, with one atomic load,
// and never waits for a writer.
//
// A route may have several gateways (ECMP). [Forwarding.Select] says which of them a flow takes, by the flow's hash.
//
// [Table.Update] changes Forwarding in place, so that each lookup has the next hop from before the transaction or from
// after it. What changes much, and [Table.Sweep], makes a new one beside it and swaps it in, so that a worker sees all
// of it at once.
//
// The table also does the bookkeeping of mark and sweep. When its writer is lost and comes back, the writer marks all
// routes stale, tells what it knows, and sweeps what it did not mention; forwarding uses stale routes meanwhile as if
// nothing had happened.
//
// Start reading at table.go, then forwarding.go, trie4.go and trie6.go for the lookup and edit.go for the order of
// changes; hop.go is the next hop as one word, group.go is about several gateways, route.go says what a valid route is,
// codec.go how routes are kept in a file.
package fib
