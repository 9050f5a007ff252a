// Package port holds the drivers behind vrouter.Port. All raw system calls and all BPF of the data plane live here.
//
//	tun.go       the TUN device vr0, through songgao/water: portable, no offloads, splits superpackets itself
//	underlay.go  the side of the other nodes: receives by AF_PACKET, sends by a raw IP socket
//	mem.go       an in-memory port, for tests and benchmarks
//
// A driver opened in a network namespace belongs to it, whatever thread uses it later; only a TUN device that was
// deleted is made anew in the namespace of the thread that receives.
package port
