// Package rig builds what is measured: network namespaces with pods and nodes, joined by veth pairs, and in them one
// way to carry packets, ours or a peer's. Start reading at bed.go.
//
// Every namespace is named mgb<process id>-…, and whatever a killed run has left is swept by the next one.
package rig
