// Package server is the agent's side of pod attachment: it serves margay-cni on a unix socket and does the host
// plumbing — veth pairs, addresses, routes and neighbours in pods and host, anti-spoofing and masquerade.
//
// What is attached is written on the interfaces themselves: the host's side of each veth carries, as its alias,
// the network, container, interface and address it stands for. So an agent that comes back needs no file of its own:
// Reconcile reads the links and puts routes, sysctls and nftables right again without touching a pod.
//
// Start reading at Server.Run (server.go), then the verbs (verbs.go), plumbing.go and firewall.go.
package server
