// Package port holds the drivers behind vrouter.Port. All raw system calls and all BPF of the data plane live here.
//
//	attach.go     which drivers, by attachment and I/O
//	device.go     what every port on vr0 does with the kernel's links
//	tun.go        the TUN device vr0; without offloads through songgao/water: portable, splits superpackets itself
//	tunoffload.go the same with offloads: superpackets pass whole, behind a virtio-net header (vnet.go)
//	veth.go       vr0 as a veth pair (vethpair.go), read at the other end
//	tunjoin.go    joins segments of one TCP flow on their way to vr0
//	underlay.go   the side of the other nodes: receives by AF_PACKET, sends by a raw IP socket (rawsend.go)
//	packetio.go   AF_PACKET in batches, for all ports
//	frames.go     sends by AF_PACKET instead: superpackets whole, or their segments without copying
//	resolver.go   keeps the next hops' MAC addresses (hops.go) true to the kernel's tables
//	retag.go      the BPF program that makes the kernel split IP-in-IP superpackets
//	xsk.go        AF_XDP sockets with their memory and rings (xskring.go)
//	xdp.go        the XDP program that gives packets to them
//	bypass.go     both of them on one interface, for a port that has AF_PACKET beside
//	unfinished.go finds checksums that a sender left undone, which AF_XDP does not tell
//	mem.go        an in-memory port, for tests and benchmarks
//
// A driver opened in a network namespace belongs to it, whatever thread uses it later; only a TUN device that was
// deleted is made anew in the namespace of the thread that receives.
package port
