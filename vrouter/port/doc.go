// Package port holds the drivers behind vrouter.Port. All raw system calls and all BPF of the data plane live here.
//
//	attach.go     which drivers: a TUN device with offloads (tun), or without (tun-plain)
//	tun.go        the TUN device vr0; without offloads through songgao/water: portable, splits superpackets itself
//	tunoffload.go the same with offloads: superpackets pass whole, behind a virtio-net header (vnet.go)
//	tunjoin.go    joins segments of one TCP flow on their way to vr0
//	underlay.go   the side of the other nodes: receives by AF_PACKET, sends by a raw IP socket (rawsend.go)
//	frames.go     sends by AF_PACKET instead: superpackets whole, or their segments without copying
//	resolver.go   keeps the next hops' MAC addresses (hops.go) true to the kernel's tables
//	retag.go      the BPF program that makes the kernel split IP-in-IP superpackets
//	xsk.go        AF_XDP sockets with their memory and rings (xskring.go)
//	xdp.go        the XDP program that gives packets to them
//	mem.go        an in-memory port, for tests and benchmarks
//
// A driver opened in a network namespace belongs to it, whatever thread uses it later; only a TUN device that was
// deleted is made anew in the namespace of the thread that receives.
package port
