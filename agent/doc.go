// Package agent is the control plane of one node. It joins the datastore, IPAM, BGP and the CNI server into a desired
// state and drives the kernel and the vRouter to it.
//
// It owns the node's registration in the datastore, the tunnel address on vr0, the kernel routes of protocol 81 and
// what the vRouter is programmed with. Start reading at desired.go: it is the pure heart, from what is known to what
// must be. agent.go gathers what is known and applies the result, from one goroutine.
package agent
