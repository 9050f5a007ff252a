// Package ipam gives addresses to pods and tunnels: blocks of a pool are claimed for a node, addresses come out of the
// node's blocks, and a handle remembers what an owner holds. Keys and JSON are Calico's, so that both can work on one
// store.
//
// block.go is the arithmetic of one block, pure: no clock, no etcd. records.go has the keys and the smaller values.
// assign.go is the way of an address, claim.go that of a block, release.go the way back, usage.go the report.
//
// Every write is a compare-and-swap. An address and its handle are written in one transaction, and a handle is released
// in one, so that no crash can leave half of either. A block is claimed in two phases, affinity pending, block, affinity
// confirmed; a pending affinity counts as none, for routing too.
package ipam
