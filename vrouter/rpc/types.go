// Package rpc is the contract between margay-agent and the vRouter: gRPC over a unix socket. The two restart apart and
// may be one release apart, so the contract is versioned, and vrouterpb/vrouter.proto states the rules for changing it.
//
// The agent's side is Client: Dial, then Begin, any number of Updates, and End. Between Begin and End nothing that was
// there is removed unless an Update says so; End removes what no Update has set again.
package rpc

import (
	"errors"
	"net/netip"
	"time"

	"margay/vrouter"
)

// APIVersion is the version of the contract that this release speaks, and MinAPIVersion the oldest it still understands.
const (
	APIVersion    = 1
	MinAPIVersion = 1
)

// The client's types, under the names of this room, so that the agent imports no other room of the data plane.
type (
	// Config is what the agent tells about the node: its address, the underlay interface, vr0's MTU.
	Config = vrouter.Config
	// Update is one transaction, all or nothing; deletions come before additions.
	Update = vrouter.Update
	// Route is a prefix and its next hop.
	Route = vrouter.Route
	// NextHop is what becomes of a packet, and by way of which gateway.
	NextHop = vrouter.NextHop
	// Gateways is a set of gateways, those of a NextHop beside its first.
	Gateways = vrouter.Gateways
	// Kind is what becomes of a packet.
	Kind = vrouter.Kind
	// RouteEntry is a route, and whether a synchronisation has yet to confirm it.
	RouteEntry = vrouter.RouteEntry
	// Pod is a pod of this node, and the interface by which the vRouter may reach it.
	Pod = vrouter.Pod
	// PathMTU is what has been learned about the way to another node.
	PathMTU = vrouter.PathMTU
	// Counter is one named count of packets and of bytes.
	Counter = vrouter.Counter
)

// MaxGateways is the largest number of gateways that a route may have.
const MaxGateways = vrouter.MaxGateways

// The kinds of next hop.
const (
	KindDrop   = vrouter.KindDrop
	KindLocal  = vrouter.KindLocal
	KindTunnel = vrouter.KindTunnel
	KindDirect = vrouter.KindDirect
)

// Multipath returns the next hop for flows that are spread over all of gateways, for KindTunnel or KindDirect. A vRouter
// that knows only one gateway for a route takes the lowest.
func Multipath(kind Kind, gateways ...netip.Addr) NextHop {
	return vrouter.Multipath(kind, gateways...)
}

// Tunnel returns the next hop for IP-in-IP to the node at gateway.
func Tunnel(gateway netip.Addr) NextHop { return NextHop{Kind: vrouter.KindTunnel, Gateway: gateway} }

// Direct returns the next hop for what the kernel routes unencapsulated to the node at gateway.
func Direct(gateway netip.Addr) NextHop { return NextHop{Kind: vrouter.KindDirect, Gateway: gateway} }

// Local returns the next hop for a pod, a block or an announced address of this node.
func Local() NextHop { return NextHop{Kind: vrouter.KindLocal} }

// Blackhole returns the next hop for what is to be dropped.
func Blackhole() NextHop { return NextHop{Kind: vrouter.KindDrop} }

// Status tells what runs behind the socket.
type Status struct {
	APIVersion int
	Version    string
	// Instance is random and new for each process: a change means that the vRouter has restarted.
	Instance string
	// Restored says that forwarding state survived: the routes are those of a completed synchronisation (Begin … End),
	// made by this process or read from the snapshot of an earlier one. The agent sets the forwarding bit of BGP's
	// graceful restart (RFC 4724) by it, and has to ask before its own Begin.
	Restored   bool
	Configured bool
	Config     Config // zero unless Configured
	Routes     int
	Stale      int // routes, nodes and pods that the synchronisation under way has not confirmed
	Nodes      int
	Pods       int
	PathMTUs   []PathMTU // sorted by gateway
	Started    time.Time
	Port       string // the ports in words, for people
	IO         IO     // empty: an older vRouter, which does not tell
}

// IO is how packets go between Ethernet interfaces and the vRouter.
type IO string

// What IO may be: the values of the vRouter's --io.
const (
	IOPacket IO = "packet" // AF_PACKET, behind the programs and filters of the interface's ingress
	IOXDP    IO = "xdp"    // AF_XDP, before the kernel has seen them
	IOTC     IO = "tc"     // as IOPacket, and programs at tc forward some that the vRouter does not see
)

// ErrUnavailable is what every call returns, wrapped, while no vRouter answers on the socket.
var ErrUnavailable = errors.New("not reachable")

// ErrRefused is what Update returns, wrapped, when the vRouter found a field wrong; nothing was changed. Sending the
// same update again is of no use.
var ErrRefused = errors.New("refused")

// ErrVersion is what every call may return, wrapped, when the other side speaks a version of the contract that this
// one does not.
var ErrVersion = errors.New("incompatible version of the vrouter API")
