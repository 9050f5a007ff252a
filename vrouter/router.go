package vrouter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"margay/vrouter/fib"
)

// The range of vr0's MTU in bytes: the least that IPv4 allows (RFC 791), and what an outer header leaves of the longest
// packet.
const (
	MinMTU = 68
	MaxMTU = MaxPacket - 20
)

// Config is what the agent tells about this node.
type Config struct {
	// NodeAddress is the source of every outer header, and the only outer destination accepted. IPv4 in this release.
	NodeAddress netip.Addr
	// Underlay is the name of the interface on which the other nodes' packets arrive.
	Underlay string
	// MTU is vr0's in bytes: the underlay's, less 20 for the outer header.
	MTU int
	// TunnelAddress is vr0's own, in the pods' network: the source of ICMP errors that the vRouter sends where it is the
	// router. The zero Addr: NodeAddress in its place.
	TunnelAddress netip.Addr
}

// Validate returns an error that names the first field that is wrong, and what was expected.
func (c Config) Validate() error {
	if !c.NodeAddress.Is4() || c.NodeAddress.IsUnspecified() || c.NodeAddress.IsMulticast() {
		return fmt.Errorf("config: node address %q: expected a unicast IPv4 address", c.NodeAddress)
	}
	if !validInterfaceName(c.Underlay) {
		return fmt.Errorf("config: underlay %q: expected an interface name of 1 to 15 characters", c.Underlay)
	}
	if c.MTU < MinMTU || c.MTU > MaxMTU {
		return fmt.Errorf("config: mtu %d: expected %d to %d", c.MTU, MinMTU, MaxMTU)
	}
	if a := c.TunnelAddress; a.IsValid() && (!a.Is4() || a.IsUnspecified() || a.IsMulticast()) {
		return fmt.Errorf("config: tunnel address %q: expected a unicast IPv4 address, or none", a)
	}
	return nil
}

// ErrPort is what Update returns, wrapped, when the ports cannot follow a valid configuration.
var ErrPort = errors.New("port")

// Update is one transaction: all of it or, with an error, nothing. Deletions come before additions.
type Update struct {
	Config   *Config // nil: unchanged
	AddNodes []netip.Addr
	DelNodes []netip.Addr
	Set      []Route
	Del      []netip.Prefix
	AddPods  []Pod // a pod whose address is known already has another interface now
	DelPods  []netip.Addr
}

// RouteEntry is a route, and whether a synchronisation has yet to confirm it.
type RouteEntry struct {
	Route
	Stale bool
}

// Status is the router's state in numbers.
type Status struct {
	Configured bool
	Config     Config
	// Restored says that forwarding state survived: the routes are those of a completed synchronisation, made by this
	// process or read from the snapshot of an earlier one.
	Restored bool
	Routes   int
	Stale    int // routes, nodes and pods that the synchronisation under way has not confirmed
	Nodes    int
	Pods     int
}

// state is what workers read beside the routes; immutable once published.
type state struct {
	configured bool
	config     Config
	source     [4]byte      // config.NodeAddress
	address    uint32       // the same as a number, as fib.Hop has its gateway
	key        outerKey     // the same for as long as the router lives
	nodes      []netip.Addr // sorted

	options   Options
	pipe      bool      // options.DSCP.Mode is DSCPPipe
	answers   [4]byte   // source of ICMP errors
	paths     []pathMTU // sorted by gateway
	narrowest int       // bytes; every packet up to here fits, whatever its gateway
}

// isNode reports whether a is a node of this cluster.
func (s *state) isNode(a netip.Addr) bool {
	_, found := slices.BinarySearchFunc(s.nodes, a, netip.Addr.Compare)
	return found
}

// Router holds what the control plane told, and the workers that forward by it. Its methods are safe for concurrent
// use, and workers never wait for them.
type Router struct {
	table *fib.Table
	state atomic.Pointer[state]

	mu       sync.Mutex          // writers
	nodes    map[netip.Addr]bool // true: stale
	pods     podSet
	complete bool // see Status.Restored
	apply    func(Config) error
	routesTo func(set []Route, del []netip.Prefix)
	// For a port that forwards by itself: see shortcut.go.
	termsTo    func()
	capturesTo func(running bool)
	workers    []*Worker
	captures   []*Capture
	drops      dropLog
	forgers    forgers
	relays     relays
	changed    chan struct{}
}

// New returns a router that is not configured and has no routes: it drops everything.
func New() *Router {
	r := &Router{table: fib.New(), nodes: make(map[netip.Addr]bool), pods: podSet{pods: make(map[netip.Addr]*knownPod)},
		relays: relays{answerer: newAnswerer()}, changed: make(chan struct{}, 1)}
	r.state.Store(&state{key: newOuterKey(), options: Options{ICMPRate: DefaultICMPRate}})
	return r
}

// OnConfig names the function that brings the ports in line with a new configuration. It is called inside Update,
// before the configuration is published; its error refuses the update.
func (r *Router) OnConfig(apply func(Config) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.apply = apply
}

// Changed is signalled, never blocking and at most once until it is read, after each change of the state.
func (r *Router) Changed() <-chan struct{} { return r.changed }

// Begin opens a synchronisation: all routes, nodes and pods become stale. Nothing is removed, and forwarding goes on.
func (r *Router) Begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.markStale()
}

func (r *Router) markStale() {
	r.table.MarkStale()
	for a := range r.nodes {
		r.nodes[a] = true
	}
	r.pods.markStale()
}

// Update makes one transaction, and un-marks what it sets. The error names the field and what was expected.
func (r *Router) Update(u Update) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.update(u)
}

func (r *Router) update(u Update) error {
	old := r.state.Load()
	next := *old
	if u.Config != nil {
		if err := u.Config.Validate(); err != nil {
			return err
		}
		next.config, next.configured, next.source = *u.Config, true, u.Config.NodeAddress.As4()
		next.address = binary.BigEndian.Uint32(next.source[:])
		if next.answers = next.source; u.Config.TunnelAddress.IsValid() {
			next.answers = u.Config.TunnelAddress.As4()
		}
	}
	for _, a := range slices.Concat(u.AddNodes, u.DelNodes) {
		if !a.IsValid() || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsMulticast() {
			return fmt.Errorf("node %q: expected a unicast address without a zone", a)
		}
	}
	// The table checks too, but only once the ports have followed, and those cannot be rolled back.
	for i, p := range u.Del {
		if err := (Route{Prefix: p}).Validate(); err != nil {
			return fmt.Errorf("del[%d]: %w", i, err)
		}
	}
	for i, route := range u.Set {
		if err := route.Validate(); err != nil {
			return fmt.Errorf("set[%d]: %w", i, err)
		}
	}
	if err := r.pods.check(u.AddPods, u.DelPods); err != nil {
		return err
	}
	if u.Config != nil && r.apply != nil && (!old.configured || old.config != next.config) {
		if err := r.apply(next.config); err != nil {
			return fmt.Errorf("%w: %w", ErrPort, err)
		}
	}
	if err := r.table.Update(u.Set, u.Del); err != nil {
		return err
	}
	r.tellRoutes(u.Set, u.Del)
	r.pods.change(u.AddPods, u.DelPods)
	for _, a := range u.DelNodes {
		delete(r.nodes, a)
	}
	for _, a := range u.AddNodes {
		r.nodes[a] = false
	}
	r.publish(&next)
	return nil
}

// publish hands next, with the present set of nodes, to the workers.
func (r *Router) publish(next *state) {
	next.nodes = slices.SortedFunc(maps.Keys(r.nodes), netip.Addr.Compare)
	next.narrow()
	r.store(next)
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// End closes a synchronisation: what is still stale is removed. It returns how many routes, nodes and pods that
// were.
func (r *Router) End() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	gone := r.table.Sweep()
	del := make([]netip.Prefix, len(gone))
	for i, route := range gone {
		del[i] = route.Prefix
	}
	r.tellRoutes(nil, del)
	swept := len(gone) + r.pods.sweep()
	for a, stale := range r.nodes {
		if stale {
			delete(r.nodes, a)
			swept++
		}
	}
	next := *r.state.Load()
	// Without a configuration nothing was forwarded, so nothing has survived that a neighbour could rely on.
	r.complete = next.configured
	r.publish(&next)
	return swept
}

// Status returns the state in numbers.
func (r *Router) Status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.state.Load()
	status := Status{
		Configured: s.configured,
		Config:     s.config,
		Restored:   r.complete,
		Routes:     r.table.Len(),
		Stale:      r.table.Stale() + r.pods.stale(),
		Nodes:      len(r.nodes),
		Pods:       len(r.pods.pods),
	}
	for _, stale := range r.nodes {
		if stale {
			status.Stale++
		}
	}
	return status
}

// Routes returns the table sorted by prefix, and the nodes sorted by address.
func (r *Router) Routes() ([]RouteEntry, []netip.Addr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	snapshot := r.table.Load()
	entries := make([]RouteEntry, 0, snapshot.Len())
	for route := range snapshot.All() {
		entries = append(entries, RouteEntry{Route: route, Stale: r.table.StaleAt(route.Prefix)})
	}
	return entries, slices.Clone(r.state.Load().nodes)
}

// errNotEmpty refuses to restore over a state that someone has already set.
var errNotEmpty = errors.New("restore: the router has a state already")

// Restore takes over the state of an earlier process. All of it is stale until a synchronisation confirms it.
func (r *Router) Restore(s Saved) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.state.Load().configured || r.table.Len() > 0 || len(r.nodes) > 0 || len(r.pods.pods) > 0 {
		return errNotEmpty
	}
	if err := r.update(Update{Config: s.Config, AddNodes: s.Nodes, Set: s.Routes, AddPods: s.Pods}); err != nil {
		return err
	}
	r.complete = s.Complete && s.Config != nil
	r.markStale()
	return nil
}

// Save returns the state, for Restore.
func (r *Router) Save() Saved {
	r.mu.Lock()
	s := r.state.Load()
	routes := r.table.Load()
	saved := Saved{Complete: r.complete, Nodes: s.nodes, Pods: r.pods.all()}
	r.mu.Unlock()
	if s.configured {
		saved.Config = &s.config
	}
	saved.Routes = slices.AppendSeq(make([]Route, 0, routes.Len()), routes.All())
	return saved
}
