// Package addr measures IPAM beside its peers, and simulates clusters of thousands of nodes that take and give back
// addresses while agents are killed, connections break, etcd restarts and clocks jump.
//
// sim.go is the simulation, simcheck.go what it is held to; assign.go, claim.go, attach.go and pods.go measure; report.go
// prints what was measured beside what is wanted.
package addr
