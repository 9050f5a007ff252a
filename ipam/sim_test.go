package ipam

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"margay/datastore"
	"margay/datastore/embedded"
	"margay/ipam/audit"
)

// The simulation: many nodes take and give back addresses at once, agents are killed in the middle of what they do and
// come back without a memory, nodes leave for good, clocks jump, connections break, etcd stops and comes back. What every operation
// reported is kept in a model; at the end the checker, which shares no code with the allocator, goes over the store.
const (
	simNodes   = 40
	simWorkers = 2 // per node
	simTime    = 10 * time.Second
	simCuts    = 16 // of all connections
)

// simEtcd is a server that can be stopped and started again.
type simEtcd struct {
	t      *testing.T
	cfg    embedded.Config
	cancel context.CancelFunc
	ended  chan error
}

func (e *simEtcd) start() {
	e.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready := make(chan struct{})
	cfg := e.cfg
	cfg.Ready = func([]string) { close(ready) }
	e.cancel, e.ended = cancel, make(chan error, 1)
	go func() { e.ended <- embedded.Serve(ctx, cfg) }()
	select {
	case <-ready:
	case err := <-e.ended:
		e.ended <- err
		e.t.Errorf("etcd: %v", err)
	}
}

func (e *simEtcd) stop() {
	e.cancel()
	if err := <-e.ended; err != nil {
		e.t.Errorf("etcd: %v", err)
	}
}

// simulation is the model: what the operations said about who holds what.
type simulation struct {
	stores []*datastore.Store
	nodes  []*simNode

	mu      sync.Mutex
	holder  map[netip.Addr]string // as reported, by addresses that are held for certain
	unknown map[string]bool       // handles of which nobody knows: killed, or etcd did not answer

	ops, kills, away, refused, deaths, borrowed, takenOver atomic.Int64
	handles                                                atomic.Int64
}

// Enabled, Handle, WithAttrs and WithGroup make the simulation the allocators' log, which it counts.
func (sim *simulation) Enabled(context.Context, slog.Level) bool { return true }

func (sim *simulation) Handle(_ context.Context, r slog.Record) error {
	switch r.Message {
	case "address borrowed":
		sim.borrowed.Add(1)
	case "empty block taken over":
		sim.takenOver.Add(1)
	}
	return nil
}

func (sim *simulation) WithAttrs([]slog.Attr) slog.Handler { return sim }

func (sim *simulation) WithGroup(string) slog.Handler { return sim }

type simNode struct {
	name  string
	alive sync.RWMutex // held for writing while the node is taken away
	mu    sync.Mutex
	alloc *Allocator
	pods  map[string]netip.Addr // by handle

	draining atomic.Bool
}

func (sim *simulation) boot(n *simNode) {
	alloc := New(sim.stores[rand.IntN(len(sim.stores))], n.name, slog.New(sim))
	var skew time.Duration
	if rand.IntN(2) == 0 {
		skew = time.Duration(rand.IntN(600)-300) * time.Second
	}
	alloc.now = func() time.Time { return time.Now().Add(skew) }
	n.mu.Lock()
	n.alloc = alloc
	n.mu.Unlock()
}

func (n *simNode) allocator() *Allocator {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.alloc
}

// take removes one of the node's pods from the model: from now on nobody vouches for it.
func (sim *simulation) take(n *simNode) (string, netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for h, addr := range n.pods {
		delete(n.pods, h)
		sim.mu.Lock()
		delete(sim.holder, addr)
		sim.mu.Unlock()
		return h, addr
	}
	return "", netip.Addr{}
}

// uncertain says that an operation may have happened or not.
func uncertain(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, datastore.ErrUnreachable)
}

func (sim *simulation) settle(t *testing.T, what, handle string, err error) {
	switch {
	case uncertain(err):
		if errors.Is(err, datastore.ErrUnreachable) {
			sim.away.Add(1)
		}
		sim.mu.Lock()
		sim.unknown[handle] = true
		sim.mu.Unlock()
	case errors.Is(err, ErrNoAddress), errors.Is(err, ErrAddressInUse), contended(err):
		sim.refused.Add(1)
	default:
		t.Errorf("%s %s: %v", what, handle, err)
	}
}

// step is one operation of one worker.
func (sim *simulation) step(t *testing.T, n *simNode) {
	n.alive.RLock()
	defer n.alive.RUnlock()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if rand.IntN(5) == 0 { // killed in the middle
		sim.kills.Add(1)
		stop := time.AfterFunc(time.Duration(rand.IntN(8000))*time.Microsecond, cancel)
		defer stop.Stop()
		defer sim.boot(n)
	}
	sim.ops.Add(1)
	alloc := n.allocator()
	// A node that is draining only gives back, so that its blocks run empty and others take them over.
	if rand.IntN(100) < 60 && !n.draining.Load() {
		sim.add(t, ctx, n, alloc)
		return
	}
	handle, addr := sim.take(n)
	if handle == "" {
		n.draining.Store(false)
		return
	}
	if rand.IntN(100) == 0 {
		n.draining.Store(true)
	}
	if rand.IntN(2) == 0 { // another node's agent may release as well
		alloc = sim.nodes[rand.IntN(len(sim.nodes))].allocator()
	}
	var err error
	if rand.IntN(3) == 0 {
		var h Holder
		if h, err = Lookup(ctx, alloc.store, addr); err == nil {
			err = alloc.ReleaseAddress(ctx, Release{Addr: addr, Handle: handle, Sequence: &h.Sequence})
		}
	} else {
		var freed []netip.Addr
		if freed, err = alloc.ReleaseHandle(ctx, handle); err == nil && (len(freed) != 1 || freed[0] != addr) {
			t.Errorf("release of %s, which holds %s: %v", handle, addr, freed)
		}
	}
	if err == nil {
		return
	}
	sim.settle(t, "release of", handle, err)
	sim.mu.Lock()
	sim.unknown[handle] = true
	sim.mu.Unlock()
}

func (sim *simulation) add(t *testing.T, ctx context.Context, n *simNode, alloc *Allocator) {
	req := Request{Handle: fmt.Sprintf("net.%d", sim.handles.Add(1)), Attrs: map[string]string{"pod": "x"}}
	if rand.IntN(10) == 0 {
		req.IPv4.IP = netip.AddrFrom4([4]byte{10, 240, byte(rand.IntN(16)), byte(rand.IntN(256))})
	}
	got, err := alloc.Assign(ctx, req)
	if err != nil {
		sim.settle(t, "assign", req.Handle, err)
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	sim.mu.Lock()
	defer sim.mu.Unlock()
	if other := sim.holder[got.Addr]; other != "" {
		t.Errorf("%s was given to %s while %s has it", got.Addr, req.Handle, other)
	}
	sim.holder[got.Addr] = req.Handle
	n.pods[req.Handle] = got.Addr
}

// die takes a node away for good; another cleans up after it.
func (sim *simulation) die(t *testing.T, n, other *simNode) {
	n.alive.Lock()
	defer n.alive.Unlock()
	sim.deaths.Add(1)
	for {
		h, _ := sim.take(n)
		if h == "" {
			break
		}
		sim.mu.Lock()
		sim.unknown[h] = true // until somebody looks
		sim.mu.Unlock()
	}
	if _, err := other.allocator().ReleaseNode(t.Context(), n.name); err != nil && !uncertain(err) && !contended(err) {
		t.Errorf("node %s: %v", n.name, err)
	}
	sim.boot(n)
}

func TestSimulation(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + l.Addr().String()
	_ = l.Close() // only the number was wanted
	etcd := &simEtcd{t: t, cfg: embedded.Config{Dir: t.TempDir(), ClientURLs: []string{url}, NoSync: true}}
	etcd.start()
	defer func() { etcd.stop() }()

	proxy := startProxy(t, l.Addr().String())
	sim := &simulation{holder: map[netip.Addr]string{}, unknown: map[string]bool{}}
	for range 4 {
		s, err := datastore.Open(t.Context(), datastore.Config{Endpoints: []string{proxy.url()}, DialTimeout: 2 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		sim.stores = append(sim.stores, s)
	}
	// Room for 40 blocks, some of them tiny, for 40 nodes, and a reservation: claims race, blocks run out, and addresses are borrowed.
	for _, p := range []*datastore.IPPool{
		pool("a", "10.240.0.0/24", func(s *datastore.IPPoolSpec) { s.BlockSize = 28 }),
		pool("b", "10.240.8.0/26", func(s *datastore.IPPoolSpec) { s.BlockSize = 29 }),
		pool("c", "10.240.9.0/27", func(s *datastore.IPPoolSpec) { s.BlockSize = 31 }), // soon empty again
	} {
		if err := datastore.CreateResource(t.Context(), sim.stores[0], p); err != nil {
			t.Fatal(err)
		}
	}
	put(t, sim.stores[0], reservationPrefix+"r", `{"spec":{"reservedCIDRs":["10.240.0.0/29","10.240.8.9/32"]}}`)
	for i := range simNodes {
		n := &simNode{name: fmt.Sprintf("node%d", i), pods: map[string]netip.Addr{}}
		sim.boot(n)
		sim.nodes = append(sim.nodes, n)
	}
	sim.run(t, etcd, proxy)
	sim.verify(t)
	t.Logf("%d operations, %d kills, %d met an etcd that was away, %d refused, %d borrowed, %d blocks taken over, %d nodes died",
		sim.ops.Load(), sim.kills.Load(), sim.away.Load(), sim.refused.Load(), sim.borrowed.Load(), sim.takenOver.Load(), sim.deaths.Load())
}

// run lets the workers loose, cuts their connections again and again, and restarts etcd twice under them.
func (sim *simulation) run(t *testing.T, etcd *simEtcd, proxy *simProxy) {
	end := time.Now().Add(simTime)
	var workers sync.WaitGroup
	for _, n := range sim.nodes {
		for range simWorkers {
			workers.Go(func() {
				for time.Now().Before(end) && !t.Failed() {
					sim.step(t, n)
					if rand.IntN(400) == 0 {
						sim.die(t, n, sim.nodes[rand.IntN(len(sim.nodes))])
					}
				}
			})
		}
	}
	for i := range simCuts {
		<-time.After(simTime / (simCuts + 1))
		// Under strict affinity nodes in want take over what is empty, else they mostly borrow.
		if err := ChangeConfig(t.Context(), sim.stores[0], func(c *Config) { c.StrictAffinity = i%2 == 0 }); err != nil && !uncertain(err) {
			t.Error(err)
		}
		proxy.cut()
		if i%(simCuts/2) == simCuts/4 {
			etcd.stop()
			etcd.start()
		}
	}
	workers.Wait()
}

// verify compares model and store, releases everything and looks again.
func (sim *simulation) verify(t *testing.T) {
	look := func() *audit.Report {
		r, err := audit.Look(t.Context(), sim.stores[0], "")
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range r.Integrity() {
			t.Errorf("the checker: %s", p)
		}
		return r
	}
	r := look()
	for addr, handle := range sim.holder {
		if list := r.Allocations[addr.String()]; len(list) != 1 || list[0].Handle != handle {
			t.Errorf("%s was given to %s, and is lost: %v", addr, handle, list)
		}
	}
	var all []string
	for _, a := range r.Sorted() {
		addr := netip.MustParseAddr(a.IP)
		if sim.holder[addr] != a.Handle && !sim.unknown[a.Handle] {
			t.Errorf("%s is held by %s, which nobody asked for or which was released", a.IP, a.Handle)
		}
		all = append(all, a.Handle)
	}
	for i, h := range all {
		if _, err := sim.nodes[i%simNodes].allocator().ReleaseHandle(t.Context(), h); err != nil {
			t.Errorf("release of %s: %v", h, err)
		}
	}
	if r = look(); len(r.Allocations) != 0 || r.Handles != 0 {
		t.Errorf("%d addresses and %d handles are left of %d", len(r.Allocations), r.Handles, len(all))
	}
}
