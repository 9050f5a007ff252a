// Package bgp is the node's BGP speaker: GoBGP v4, embedded, behind an interface that speaks in prefixes and peers. No
// other room sees a gobgp type.
//
// It owns the sessions (RFC 4271), what this node announces, the best path per prefix learned from the others, and
// graceful restart in both roles (RFC 4724). Policy, next-hop tracking and the question what to do with a route are its
// caller's.
//
// Start reading at Start (speaker.go). Peers and their sessions are in peers.go, routes in rib.go, and what GoBGP tells
// us, with the repairs that follow from it, in events.go.
//
// A process runs one Speaker at a time: GoBGP keeps its route selection options in package variables.
//
// # Restarts
//
// Graceful restart is offered to every peer, always. What happens to our routes at the others:
//
//   - Stop ends every session with a Cease NOTIFICATION: the others drop our routes at once. The RFC 8538 capability
//     that would turn a NOTIFICATION into a graceful restart is deliberately not offered.
//   - A process that dies is a broken TCP connection: the others keep our routes, stale, for Config.RestartTime. A
//     speaker started again with Config.Restarting sets the restart and forwarding bits in its OPENs, starts no session
//     before SetAnnounced was called (an early End-of-RIB would make the others drop what was not announced yet), and so
//     no route is ever lost.
//   - A node that loses power is silent: when the hold time is over its routes are dropped, as RFC 4724 has it; GoBGP
//     alone would keep them for a restart time more.
//
// # Where GoBGP differs from the RFC
//
// The forwarding bit is set only together with the restart bit, so a session that breaks while both speakers live is
// re-established without it: a strict peer (BIRD) then takes our routes out and back in again. In the helper's role a
// returning peer's missing forwarding bit does not flush at once; its stale routes go with its End-of-RIB instead.
package bgp
