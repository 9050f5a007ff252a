// Package vrouter is the data plane of a Margay node: it takes pod packets from one port, decides each one's fate by
// the forwarding ladder, and hands it to another port. It knows neither etcd nor BGP nor Kubernetes.
//
// Where to start reading, in the order in which a packet travels:
//
//	port.go     the contract with the drivers, and who owns a buffer until when
//	worker.go   Recv, the ladder for each packet, Send: one thread, run to completion
//	ladder.go   the two ladders, encapsulation and decapsulation, rung by rung
//	transit.go  the ladder among pods' own interfaces (the attachment direct), with pods.go and flows.go
//	reason.go   every name under which a packet can be dropped
//	router.go   what the control plane tells, in transactions; mark and sweep
//	trace.go    a packet of ours up the same ladder, and the rungs it climbed
//	drops.go    samples and counts of what was dropped; capture.go packets as they pass
//	snapshot.go the state's encoding, and keeper.go the file that outlives the process
//
// In the attachments of this release the kernel routes pod traffic to the TUN device vr0, has already taken one from
// the TTL and answers expiry itself; the vRouter is a tunnel device (RFC 2003) and does neither.
package vrouter
