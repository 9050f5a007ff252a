package addr

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"margay/datastore"
	"margay/ipam"
)

// Simulation says what cluster to simulate. Many nodes take and give back addresses at once; agents are killed in the
// middle of what they do and come back without a memory; nodes leave for good; clocks jump; connections break; etcd stops
// and comes back. What every operation reported is kept in a model, and at the end the checker, which shares no code with
// the allocator, goes over the store.
type Simulation struct {
	Nodes   int
	Workers int                 // operations at the same time
	Pools   []*datastore.IPPool // none: one /12 and one IPv6 pool
	Ops     int64               // ends after so many operations, or after Time, whichever comes first
	Time    time.Duration
	Cuts    int // of all connections, spread over the operations; etcd restarts at each fourth
	// Fixed is the range out of which pods now and then ask for a given address; the zero value for none.
	Fixed netip.Prefix
	// Reserved are ranges held back by an IPReservation.
	Reserved []string
	Progress func(SimResult)
}

// SimResult is what happened, and what was found wrong.
type SimResult struct {
	Nodes      int           `json:"nodes"`
	Ops        int64         `json:"operations"`
	Kills      int64         `json:"kills"`
	Away       int64         `json:"etcdAway"` // operations that met an etcd that was away
	Refused    int64         `json:"refused"`  // for want of addresses, or after losing too often
	Borrowed   int64         `json:"borrowed"`
	TakenOver  int64         `json:"blocksTakenOver"`
	Deaths     int64         `json:"nodesDied"`
	Restarts   int64         `json:"etcdRestarts"`
	Held       int           `json:"addressesHeldAtTheEnd"`
	Blocks     int           `json:"blocksAtTheEnd"`
	Collected  int           `json:"collected"` // addresses of killed operations that the garbage collector found
	Duplicates int           `json:"duplicates"`
	Leaks      int           `json:"leaks"`
	Lost       int           `json:"lost"` // addresses given out that the store does not know
	Problems   []string      `json:"problems"`
	Took       time.Duration `json:"took_ns"`
}

// sim is a simulation that runs.
type sim struct {
	Simulation
	etcd   *etcd
	proxy  *proxy
	stores []*datastore.Store
	nodes  []*simNode

	mu      sync.Mutex
	holder  map[netip.Addr]string // as reported, by addresses that are held for certain
	unknown map[string]bool       // handles of which nobody knows: killed, or etcd did not answer
	res     SimResult             // but for the counters

	ops, kills, away, refused, deaths, borrowed, takenOver, restarts, handles atomic.Int64
}

type simNode struct {
	name     string
	alive    sync.RWMutex // held for writing while the node is taken away
	mu       sync.Mutex
	alloc    *ipam.Allocator
	pods     map[string][]netip.Addr // by handle
	skew     atomic.Int64            // of its clock, ns
	draining atomic.Bool
}

// Enabled, Handle, WithAttrs and WithGroup make the simulation the allocators' log, which it counts.
func (s *sim) Enabled(context.Context, slog.Level) bool { return true }

func (s *sim) Handle(_ context.Context, r slog.Record) error {
	switch r.Message {
	case "address borrowed":
		s.borrowed.Add(1)
	case "empty block taken over":
		s.takenOver.Add(1)
	}
	return nil
}

func (s *sim) WithAttrs([]slog.Attr) slog.Handler { return s }

func (s *sim) WithGroup(string) slog.Handler { return s }

// Run simulates, and checks. The error says that the simulation itself could not be carried out; what it found is in the
// result's Problems.
func (c Simulation) Run(ctx context.Context) (res SimResult, err error) {
	began := time.Now()
	if len(c.Pools) == 0 {
		c.Pools = []*datastore.IPPool{newPool("four", "10.16.0.0/12", 26), newPool("six", "fd00:10::/32", 122)}
	}
	s := &sim{Simulation: c, holder: map[netip.Addr]string{}, unknown: map[string]bool{}}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.open(ctx); err != nil {
		return res, err
	}
	for i := range c.Nodes {
		n := &simNode{name: fmt.Sprintf("node%d", i), pods: map[string][]netip.Addr{}}
		s.boot(n)
		s.nodes = append(s.nodes, n)
	}
	if err := s.register(ctx); err != nil {
		return res, err
	}
	if err := s.run(ctx); err != nil {
		return s.result(), err
	}
	if err := s.verify(ctx); err != nil {
		return s.result(), err
	}
	res = s.result()
	res.Took = time.Since(began)
	return res, nil
}

func (s *sim) open(ctx context.Context) (err error) {
	if s.etcd, err = startEtcd(false); err != nil {
		return err
	}
	if s.proxy, err = startProxy(s.etcd.addr); err != nil {
		return err
	}
	for range 8 {
		st, err := datastore.Open(ctx, datastore.Config{Endpoints: []string{s.proxy.url()}, DialTimeout: 2 * time.Second})
		if err != nil {
			return err
		}
		s.stores = append(s.stores, st)
	}
	for _, p := range s.Pools {
		if err := datastore.CreateResource(ctx, s.stores[0], p); err != nil {
			return err
		}
	}
	if len(s.Reserved) > 0 {
		r := datastore.NewIPReservation("r")
		r.Spec.ReservedCIDRs = s.Reserved
		return datastore.CreateResource(ctx, s.stores[0], r)
	}
	return nil
}

// register puts the nodes into the datastore.
func (s *sim) register(ctx context.Context) error {
	for batch := range slices.Chunk(s.nodes, 100) {
		ops := make([]datastore.Op, len(batch))
		for i, n := range batch {
			ops[i] = datastore.OpCreate(datastore.Nodes.Key(n.name),
				fmt.Appendf(nil, `{"kind":"Node","apiVersion":"projectcalico.org/v3","metadata":{"name":%q},"spec":{}}`, n.name))
		}
		if _, err := s.stores[0].Txn(ctx, ops...); err != nil {
			return err
		}
	}
	return nil
}

func (s *sim) close() error {
	var errs []error
	for _, st := range s.stores {
		errs = append(errs, st.Close())
	}
	if s.proxy != nil {
		s.proxy.close()
	}
	if s.etcd != nil {
		errs = append(errs, s.etcd.close())
	}
	return errors.Join(errs...)
}

// result is what has happened up to now.
func (s *sim) result() SimResult {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.res
	r.Nodes, r.Ops, r.Kills, r.Away, r.Refused, r.Deaths = s.Nodes, s.ops.Load(), s.kills.Load(), s.away.Load(), s.refused.Load(), s.deaths.Load()
	r.Borrowed, r.TakenOver, r.Restarts = s.borrowed.Load(), s.takenOver.Load(), s.restarts.Load()
	return r
}

// problem notes what is wrong; of many the first few are enough.
func (s *sim) problem(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.res.Problems) < 100 {
		s.res.Problems = append(s.res.Problems, fmt.Sprintf(format, args...))
	}
}

// run lets the workers loose, cuts their connections again and again, and restarts etcd under them.
func (s *sim) run(ctx context.Context) error {
	end := time.Now().Add(s.Time)
	going := func() bool { return ctx.Err() == nil && time.Now().Before(end) && s.ops.Load() < s.Ops }
	var next atomic.Int64
	var workers sync.WaitGroup
	for range s.Workers {
		workers.Go(func() {
			// First every node gets a pod, and with it a block; then it is chance whose turn it is.
			for i := next.Add(1) - 1; int(i) < len(s.nodes) && going(); i = next.Add(1) - 1 {
				s.add(ctx, s.nodes[i], s.nodes[i].allocator())
				s.ops.Add(1)
			}
			for going() {
				n := s.nodes[rand.IntN(len(s.nodes))]
				s.step(ctx, n)
				if rand.IntN(max(400, 4*s.Nodes)) == 0 {
					s.die(ctx, n, s.nodes[rand.IntN(len(s.nodes))])
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { workers.Wait(); close(done) }()
	err := s.disturb(ctx, done)
	<-done
	return errors.Join(err, ctx.Err())
}

// disturb cuts connections, restarts etcd and changes the configuration until the workers are done.
func (s *sim) disturb(ctx context.Context, done <-chan struct{}) error {
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for i := 0; ; {
		select {
		case <-done:
			return nil
		case <-look.C:
		}
		if s.ops.Load() < s.Ops*int64(i+1)/int64(s.Cuts+1) {
			continue
		}
		i++
		if s.Progress != nil {
			s.Progress(s.result())
		}
		// Under strict affinity nodes in want take over what is empty, else they mostly borrow.
		err := ipam.ChangeConfig(ctx, s.stores[0], func(c *ipam.Config) { c.StrictAffinity = i%2 == 1 })
		if err != nil && !uncertain(err) && !contended(err) {
			return err
		}
		s.proxy.cut()
		if i%4 == 3 {
			if err := errors.Join(s.etcd.stop(), s.etcd.start()); err != nil {
				return err
			}
			s.restarts.Add(1)
		}
	}
}
