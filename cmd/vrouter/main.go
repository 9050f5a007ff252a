// Command vrouter is the data plane of a Margay node: it takes pod packets from the device vr0, puts them into
// IP-in-IP to the right node, and does the reverse for what arrives.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"margay/internal/monitor"
	"margay/internal/version"
	"margay/vrouter"
	"margay/vrouter/metrics"
	"margay/vrouter/port"
	"margay/vrouter/rpc"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "vrouter: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

type options struct {
	ports    port.Options
	cpus     string
	socket   string
	stateDir string
	logLevel string
	router   routerFlags
	monitor  monitor.Config
}

func newCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "vrouter",
		Short: "Margay's data plane: forwards pod packets between nodes by IP-in-IP",
		Long: `vrouter is the data plane of a Margay node.

It makes the device vr0, to which the kernel routes the pods' packets for other
nodes, puts each into an IP-in-IP header for the node that the longest matching
prefix names, and sends it; what arrives from other nodes it checks, unpacks and
hands to the kernel. What it cannot forward it drops, and counts by reason.

It has no configuration of its own. margay-agent programs it over the unix socket;
without the agent it goes on forwarding by what it was told last, also after a
restart, from the snapshot in the state directory. vr0 stays when vrouter ends.

--attach says how packets come and go. tun is a TUN device that carries superpackets
(TSO, USO) whole, from vr0 to the other nodes and back; tun-plain hands over finished
packets one by one; veth is a pair of devices, one end of which the kernel routes to
and the other the vRouter reads, with superpackets as with tun. direct is tun, and the
vRouter reads the pods' own interfaces besides: what one pod sends to another, here or
on another node, passes by the kernel's stack, and all else is the kernel's as with
tun. auto is veth where the kernel has what it needs, else tun, else tun-plain. A
device of the other kind that an earlier vrouter has left under the name is replaced.

--io says how Ethernet interfaces are read and written, the underlay first of all:
packet is AF_PACKET; xdp is AF_XDP, which takes the least time for small packets, and
keeps the kernel from merging segments to superpackets. tc, for direct alone, is packet
with programs in the kernel that forward themselves the plain packets whose way the
vRouter knows: those never come to it.

--queues says how many queues vr0 and the underlay have, so that a direction can use as
many processors. All packets of a flow come by the same queue, in order. Each has a
thread for each direction, or one for both: --threads-per-queue (direct: one for both).

It needs the capabilities NET_ADMIN and NET_RAW; tun, tun-plain and direct /dev/net/tun.
With BPF as well, and Linux 6.6, superpackets leave whole; without, the vRouter splits
them, and neither direct nor xdp nor tc can be had.`,
		Example:       "  vrouter\n  vrouter --socket /run/margay/vrouter.sock --log-level debug",
		Args:          cobra.NoArgs,
		Version:       version.String(),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.run(cmd.Context())
		},
	}
	cmd.SetVersionTemplate(version.Line("vrouter") + "\n")
	f := cmd.Flags()
	f.StringVar(&o.ports.Attach, "attach", port.AttachAuto, "how packets come and go: tun, tun-plain, veth, direct or auto")
	f.StringVar(&o.ports.IO, "io", port.IOPacket, "how Ethernet interfaces are read and written: packet, xdp or, with direct, tc")
	f.StringVar(&o.ports.Name, "tun", "vr0", "name of the `device`; made if it is not there")
	f.IntVar(&o.ports.Queues, "queues", 0, "how `many` queues vr0 and the underlay have, among which flows are shared out (default: 1 up to 7 CPUs, then a quarter of them, 8 at most)")
	f.IntVar(&o.ports.Threads, "threads-per-queue", 0, "`1` for both directions together, or 2, one for each (default: 1 up to 2 CPUs)")
	f.IntVar(&o.ports.BusyPoll, "busy-poll", 0, "how many `microseconds` AF_XDP sockets look for packets at the device; 0: interrupts bring them")
	f.IntVar(&o.ports.Frames, "xdp-frames", port.DefaultFrames, "how many `packets` each AF_XDP socket holds that wait for the vRouter, a power of two; each takes 2 KiB of locked memory, or 4")
	f.IntVar(&o.ports.Spin, "spin", port.DefaultSpin, "how many `microseconds` a worker looks for packets before it sleeps, while they come that often; 0: it sleeps at once")
	f.StringVar(&o.cpus, "cpus", "", "the CPUs to forward on, one for each worker in turn, as a `list`: 2,3 or 4-7 (default: the kernel chooses)")
	f.StringVar(&o.socket, "socket", "/run/margay/vrouter.sock", "unix socket `path` on which the agent programs the vRouter")
	f.StringVar(&o.stateDir, "state-dir", "/var/lib/margay", "`directory` of the snapshot file, fib.snapshot")
	f.StringVar(&o.logLevel, "log-level", "info", "least `level` of log lines: debug, info, warn or error")
	o.router.add(f)
	o.monitor.Add(f)
	return cmd
}

// run opens what can be refused without a trace first, and the device, which stays behind, last.
func (o *options) run(ctx context.Context) (err error) {
	log, err := o.logger()
	if err != nil {
		return err
	}
	if err := o.ports.Check(); err != nil {
		return err
	}
	if o.ports.Queues == 0 {
		o.ports.Queues = port.DefaultQueues()
	}
	cpus, err := port.ParseCPUs(o.cpus)
	if err != nil {
		return fmt.Errorf("--cpus %q: %w", o.cpus, err)
	}
	routing, err := o.router.options()
	if err != nil {
		return err
	}
	var listener net.Listener
	var side *sideways
	defer func() { err = errors.Join(err, side.close()) }()
	ports, err := port.OpenPorts(o.ports, func() (err error) {
		if err := os.MkdirAll(o.stateDir, 0o755); err != nil {
			return fmt.Errorf("--state-dir: %w", err)
		}
		if side, err = openSideways(o.ports.Queues); err != nil {
			return err
		}
		listener, err = rpc.Listen(o.socket)
		return err
	})
	if err != nil {
		if listener != nil {
			err = errors.Join(err, listener.Close())
		}
		return err
	}
	defer func() { err = errors.Join(err, ports.Close()) }()
	log.Info("attached", "attach", ports.Attach, "io", ports.IO, "why", ports.Why, "device offloads", ports.Device.Offloads(),
		"underlay", ports.Underlay.Sending(), "queues", ports.Queues)

	router := vrouter.New()
	routing.ICMPRate = (routing.ICMPRate + ports.Queues - 1) / ports.Queues // each worker has its share
	if err := router.SetOptions(routing); err != nil {
		return err
	}
	registry := monitor.NewRegistry("vrouter")
	registry.MustRegister(metrics.New(router))
	watched, err := monitor.Listen(o.monitor, registry, log)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	router.OnConfig(func(c vrouter.Config) error {
		log.Info("configured", "address", c.NodeAddress, "underlay", c.Underlay, "mtu", c.MTU)
		return ports.Configure(c)
	})
	workers := ports.Workers(router)
	keeper := vrouter.NewKeeper(router, filepath.Join(o.stateDir, "fib.snapshot"), log)
	keeper.Load()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { keeper.Run(ctx) })
	wg.Go(func() { watched.Serve(ctx) })
	wg.Go(func() { router.CollectDrops(ctx) })
	answering := 0
	for _, w := range workers {
		if w.Direction() != vrouter.Decap {
			w.SetReply(side.replies[answering])
			answering++
		}
	}
	var sideErr error
	wg.Go(func() {
		sideErr = side.listen(router, log)
		cancel()
	})
	threads := ports.Threads(workers)
	threadErrs := make([]error, len(threads))
	for i, run := range threads {
		wg.Go(func() {
			defer cancel()
			if threadErrs[i] = port.WorkerThread(cpus, i); threadErrs[i] == nil {
				threadErrs[i] = run()
			}
		})
	}
	log.Info("vrouter is up", "version", version.String(), "device", ports.Device.Name(), "socket", o.socket)

	server := rpc.NewServer(router, version.String(), ports.String, rpc.IO(ports.IO))
	serveErr := server.Serve(ctx, listener)
	cancel()
	ports.Stop()
	side.stop()
	wg.Wait()
	log.Info("vrouter stops", "device left in place", ports.Device.Name())
	return errors.Join(append(threadErrs, serveErr, sideErr)...)
}

func (o *options) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.logLevel)); err != nil {
		return nil, fmt.Errorf("--log-level %q: expected debug, info, warn or error", o.logLevel)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})), nil
}
