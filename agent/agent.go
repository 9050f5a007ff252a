package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"

	"margay/agent/api"
	"margay/bgp"
	"margay/cni/server"
	"margay/datastore"
	"margay/ipam"
	"margay/vrouter/rpc"
)

// Config is what margay-agent is started with.
type Config struct {
	Node          string
	RunDir        string // sockets
	StateDir      string // what must survive a reboot of the daemons
	Datastore     datastore.Config
	Autodetection string // see DetectUnderlay
	BGPPort       int
	HoldTime      time.Duration
	RestartTime   time.Duration // how long peers keep our routes while we are dead (RFC 4724)
	IPAMGrace     time.Duration // how long an address must be nobody's before it is given back; 0: it never is
	SyncTimeout   time.Duration // how long stale routes wait for the peers' End-of-RIB
	GoBGPSocket   string        // GoBGP's own gRPC API, for its gobgp command; empty: none
	DiagPort      int           // TCP port of trace, drops and capture, on the node's address; 0: none
	Log           *slog.Logger
	Metrics       prometheus.Registerer // where the agent's metrics go; nil: nowhere
}

// retryPause is the wait before a reconciliation that failed is tried again.
const retryPause = time.Second

// incomplete is the state of an agent that has done its own part and lacks something of the others': the node is not
// ready, but pods can be attached.
type incomplete struct{ error }

var errSyncing = incomplete{errors.New("waiting for the BGP peers' first tables")}

// Agent is the control plane of one node. Run's goroutine owns all state that has no lock.
type Agent struct {
	cfg      Config
	log      *slog.Logger
	store    *datastore.Store
	alloc    *ipam.Allocator
	underlay Underlay
	plane    *dataplane
	kernel   *kernelTable
	cni      *server.Server
	cluster  *cluster
	retain   *retainer
	speaker  *bgp.Speaker
	as       uint32
	pods     pods

	reconciled reconciliations

	kick   chan struct{}
	host   *hostWatch
	synced bool // the first BGP tables are in, or late: stale state may go

	// mu guards what the status and the CNI server read, and the writes to underlay, plane, speaker and as above.
	mu      sync.Mutex
	tunnel  netip.Addr
	absent  time.Time // since when the node's address is gone; zero: it is there
	desired Desired   // of the last reconciliation
	failure error     // of the last reconciliation
	ready   bool
	opened  bool         // open has succeeded: what it sets is there for everybody
	answers api.Endpoint // where diagnostics are served; the zero Endpoint: nowhere

	watches    turns       // for probes
	echoes     turns       // of traces that ask the network between nodes
	tunnelLost atomic.Bool // IPAM does not have the tunnel address as this node's any more
}

// Run is the agent's life: it returns nil after ctx is done and every session has been closed cleanly, and an error
// for what the operator has to mend.
func Run(ctx context.Context, cfg Config) error {
	a := &Agent{cfg: cfg, log: cfg.Log, kick: make(chan struct{}, 1), failure: errors.New("starting")}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopStatus, err := a.serveStatus(ctx)
	if err != nil {
		return err
	}
	defer stopStatus()
	if err := a.open(ctx); err != nil {
		return err
	}
	defer a.store.Close()
	defer a.plane.client.Close()
	defer a.kernel.nl.Close()
	a.locked(func() { a.opened = true })
	a.serveDiagnostics(ctx)
	if err := a.waitForVRouter(ctx); err != nil {
		return nil // asked to stop before there was anything to stop
	}
	if err := a.startBGP(ctx); err != nil {
		return err
	}
	go a.logChecks()
	failed := make(chan error, 1)
	if a.host, err = watchHost(ctx, a.underlay.Interface, a.wake); err != nil {
		return err
	}
	var done sync.WaitGroup
	done.Go(func() {
		if err := a.cni.Run(ctx); err != nil && ctx.Err() == nil {
			failed <- fmt.Errorf("cni server: %w", err)
		}
	})
	done.Go(func() { a.collect(ctx) })
	done.Go(func() { a.stayRegistered(ctx) })
	err = a.loop(ctx, failed)
	cancel()
	a.log.Info("stopping: telling the peers")
	stopCtx, stopped := context.WithTimeout(context.Background(), 5*time.Second)
	defer stopped()
	if stopErr := a.speaker.Stop(stopCtx); stopErr != nil {
		a.log.Warn("stopping BGP", "err", stopErr)
	}
	done.Wait()
	return err
}

// open finds the node's address, connects to the datastore and registers the node.
func (a *Agent) open(ctx context.Context) error {
	underlay, err := DetectUnderlay(a.cfg.Autodetection)
	if err != nil {
		return err
	}
	a.locked(func() { a.underlay = underlay })
	a.log.Info("underlay found", "interface", a.underlay.Interface, "address", a.underlay.Prefix, "mtu", a.underlay.MTU)
	if a.store, err = datastore.Open(ctx, a.cfg.Datastore); err != nil {
		return err
	}
	nl, err := netlink.NewHandle()
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	a.kernel = &kernelTable{nl: nl}
	client, err := rpc.Dial(filepath.Join(a.cfg.RunDir, "vrouter.sock"))
	if err != nil {
		return err
	}
	a.locked(func() { a.plane = &dataplane{client: client, log: a.log} })
	if err := prepareHost(); err != nil {
		return err
	}
	if err := registerNode(ctx, a.store, a.cfg.Node, a.underlay); err != nil {
		return err
	}
	a.alloc = ipam.New(a.store, a.cfg.Node, a.log)
	a.cluster = newCluster(a.store, a.cfg.Node, a.log)
	a.retain = newRetainer(filepath.Join(a.cfg.StateDir, "pools.json"), a.log)
	if err := a.cluster.start(ctx, a.wake); err != nil {
		return err
	}
	if err := a.startReports(ctx); err != nil {
		return err
	}
	a.locked(func() { a.as = a.cluster.asNumber() })
	a.cni, err = server.New(server.Config{
		Node:     a.cfg.Node,
		Socket:   filepath.Join(a.cfg.RunDir, "cni.sock"),
		QueueDir: filepath.Join(a.cfg.StateDir, "cni", "deleted"),
		IPAM:     podIPAM{alloc: a.alloc, node: a.cfg.Node},
		MTU:      a.podMTU,
		Ready:    a.attachError,
		Log:      a.log,
		OnPod:    a.podChanged,
		OnVerb:   a.register(),
	})
	return err
}

// waitForVRouter returns when the vRouter has answered: whether forwarding state was preserved is known only then,
// and BGP says it in its first message.
func (a *Agent) waitForVRouter(ctx context.Context) error {
	found := make(chan struct{}, 1)
	go a.plane.watch(ctx, func() {
		select {
		case found <- struct{}{}:
		default:
		}
		a.wake()
	})
	for {
		if _, ok := a.plane.status(); ok {
			return nil
		}
		a.fail(errors.New("waiting for the vRouter to answer on " + filepath.Join(a.cfg.RunDir, "vrouter.sock")))
		select {
		case <-found:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *Agent) startBGP(ctx context.Context) error {
	st, _ := a.plane.status()
	self := a.underlay.Prefix.Addr()
	speaker, err := bgp.Start(ctx, bgp.Config{
		AS: a.as, RouterID: self, Listen: self, Port: a.cfg.BGPPort,
		Restarting:  st.Restored,
		RestartTime: a.cfg.RestartTime,
		HoldTime:    a.cfg.HoldTime,
		Deferral:    a.cfg.SyncTimeout,
		Log:         a.log,
		APISocket:   a.cfg.GoBGPSocket,
	})
	if err != nil {
		return fmt.Errorf("start BGP: %w", err)
	}
	a.locked(func() { a.speaker = speaker })
	a.log.Info("BGP started", "as", a.as, "address", self, "forwarding_preserved", st.Restored)
	return a.speaker.SetPeers(ctx, a.cluster.peers(a.inputs()))
}

// locked runs f with what the status reads held still.
func (a *Agent) locked(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

// wake asks for a reconciliation; requests that come while one runs become one.
func (a *Agent) wake() {
	select {
	case a.kick <- struct{}{}:
	default:
	}
}

// loop reconciles whenever something changed, until ctx is done or a part of the agent has failed for good.
func (a *Agent) loop(ctx context.Context, failed <-chan error) error {
	if err := a.cni.Reconcile(ctx); err != nil {
		a.log.Error("restoring the pods' host side", "err", err)
	}
	syncedCh := a.speaker.Synced()
	var (
		retry    <-chan time.Time
		reported string // the last error that was logged: a state that lasts is said once
	)
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-syncedCh:
			syncedCh, a.synced = nil, true
		case <-a.speaker.Updates():
		case <-a.kick:
		case <-a.host.underlay:
			if err := a.redetect(); err != nil {
				return err
			}
		case <-retry:
		}
		retry = nil
		err := a.reconcile(ctx)
		if ctx.Err() != nil {
			return nil
		}
		a.reconciled.count(err)
		if err != nil {
			retry = time.After(retryPause)
		}
		if text := fmt.Sprint(err); text != reported {
			if reported = text; err != nil {
				a.log.Error("not in the desired state; trying on", "err", strings.ReplaceAll(text, "\n", "; "))
			}
		}
		a.settle(err)
	}
}

// settle records how a reconciliation ended, for the status.
func (a *Agent) settle(err error) {
	was := a.readyError() == nil
	_, connected := a.plane.status()
	switch {
	case err != nil:
		a.fail(err)
	case !connected:
		a.fail(errors.New("the vRouter does not answer"))
	case !a.synced:
		a.fail(errSyncing)
	case a.cluster.blind() != nil:
		a.fail(incomplete{a.cluster.blind()})
	default:
		a.locked(func() { a.ready, a.failure = true, nil })
		if !was {
			a.log.Info("ready")
		}
	}
}

func (a *Agent) fail(err error) {
	a.locked(func() { a.ready, a.failure = false, err })
}

// isOpen tells whether what open sets may be used from any goroutine.
func (a *Agent) isOpen() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.opened
}

// readyError says why the node is not ready; nil when it is.
func (a *Agent) readyError() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failure
}

// attachError says why CNI ADD cannot be served now; nil when it can. A pod need not wait for what the peers still
// have to say: this node's side of its network is complete.
func (a *Agent) attachError() error {
	err := a.readyError()
	if errors.As(err, new(incomplete)) {
		return nil
	}
	return err
}

func (a *Agent) podMTU() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return PodMTU(a.underlay.MTU, a.desired.Encap)
}

func (a *Agent) inputs() Inputs {
	in := a.cluster.inputs()
	in.Node, in.Underlay, in.Tunnel, in.Pods = a.cfg.Node, a.underlay, a.tunnel, a.pods.all()
	in.PodLinks = a.pods.links()
	if a.speaker != nil {
		in.Paths = a.speaker.Best()
	}
	return in
}

// reconcile drives everything to the state that follows from what is known now. What attracts traffic comes after
// what can carry it: first the vRouter, then the kernel's routes, then the announcements.
func (a *Agent) reconcile(ctx context.Context) error {
	a.speaker.Changes() // drained: the table itself is read below
	in := a.inputs()
	var errs []error
	if err := a.ensureTunnel(ctx, in); err != nil {
		errs = append(errs, err)
	}
	in.Blind = a.cluster.blind() != nil
	in.Pools = a.retain.look(in.Pools, in.Pods, in.Blind)
	if err := a.keepTunnel(ctx, in.Pools); err != nil {
		errs = append(errs, err)
	}
	in.Tunnel, in.Blocks = a.tunnel, a.cluster.blocks()
	want := Compute(in)
	// What cannot be read may be what a route stands on: nothing is taken away until it can.
	sweep := a.synced && !in.Blind
	a.locked(func() { a.desired = want })
	cfg := rpc.Config{NodeAddress: a.underlay.Prefix.Addr(), Underlay: a.underlay.Interface, MTU: a.underlay.MTU - ipipOverhead, TunnelAddress: a.tunnel}
	if err := a.plane.apply(ctx, cfg, want, sweep); err != nil {
		errs = append(errs, fmt.Errorf("program the vRouter: %w", err))
	}
	if err := a.applyTunnel(); err != nil {
		errs = append(errs, err)
	}
	if err := a.kernel.Apply(want.Kernel, sweep); err != nil {
		errs = append(errs, err)
	} else if a.tunnel.IsValid() || !in.Blind {
		// An agent that is blind, and so has found no address, leaves the one of the agent before it.
		if err := a.trimTunnel(); err != nil {
			errs = append(errs, err)
		}
	}
	if !in.Blind {
		if err := a.cni.SetPools(want.NAT, want.All); err != nil {
			errs = append(errs, fmt.Errorf("masquerade: %w", err))
		}
	}
	if err := a.speaker.SetPeers(ctx, a.cluster.peers(in)); err != nil {
		errs = append(errs, fmt.Errorf("bgp peers: %w", err))
	}
	if err := a.speaker.SetAnnounced(ctx, want.Announce); err != nil {
		errs = append(errs, fmt.Errorf("bgp announcements: %w", err))
	}
	return errors.Join(errs...)
}
