package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"margay/agent/api"
	"margay/vrouter/packet"
	"margay/vrouter/rpc"
)

type captureOptions struct {
	file    string
	count   int
	snaplen int
	outer   bool
	local   string // a vRouter's socket
}

func newCaptureCommand() *cobra.Command {
	var o captureOptions
	cmd := &cobra.Command{
		Use:   "capture POD|NODE|any [FILTER]",
		Short: "Packets as the vRouters see them, and what became of each: live, or as pcapng",
		Long: `capture shows the packets that the vRouters receive, of one pod (by NAME, NAMESPACE/NAME or address), of one node, or of
all (any), each with the vRouter's verdict: where it was sent, or why it was dropped. -w writes them as pcapng, which
Wireshark and tshark open, with the verdict as a comment on each packet; "-w -" writes to standard output.

FILTER is in the pcap filter language, as tcpdump has it, without names to be looked up: host, net, port, portrange, proto,
tcp, udp, icmp, ip[…], and, or, not; docs/trace.md lists it. It is asked about the pods' packets: of IP-in-IP about the
inner one, with --outer about the outer.

Forwarding never waits for a capture. What finds no room is lost, and counted; Ctrl-C ends a capture, and closes the file
properly. A vRouter or an agent that is restarted meanwhile is asked again, for half a minute. With --socket the vRouter of
this node is asked directly, when neither etcd nor an agent is there.

The exit status is 1 when something is missing: a node did not answer, or not all the time, or FILE cannot be written, which
ends the capture; what was written until then can be read.`,
		Example: `  margayctl capture lab-node1-pod1
  margayctl capture any 'tcp port 80 and tcp[tcpflags] & tcp-syn != 0' -c 10
  margayctl capture lab-node2 not icmp -w - | tshark -r -
  margayctl capture any -w drops.pcapng --socket /run/margay/vrouter.sock`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.count < 0 || o.snaplen < 0 || o.snaplen > packet.MaxTotalLen {
				return fmt.Errorf("--count %d, --snaplen %d: expected 0 or more, and at most %d bytes", o.count, o.snaplen, packet.MaxTotalLen)
			}
			filter := strings.Join(args[1:], " ")
			if err := rpc.CheckFilter(filter); err != nil {
				return err
			}
			return o.run(cmd, args[0], filter)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.file, "write", "w", "", "write pcapng to this `file`; - for standard output")
	// In its place, without the short form: here -c is what tcpdump's is.
	f.String("config", "", "the file that says where the datastore is")
	f.IntVarP(&o.count, "count", "c", 0, "end after so many packets; 0: never")
	f.IntVarP(&o.snaplen, "snaplen", "s", 0, "keep so many bytes of each packet; 0: all")
	f.BoolVar(&o.outer, "outer", false, "FILTER is about the packets on the wire, not about the ones inside IP-in-IP")
	f.StringVar(&o.local, "socket", "", "ask the vRouter on this unix socket, and nobody else")
	return cmd
}

// captureSource is one vRouter to capture from.
type captureSource struct {
	name    string
	capture func(context.Context, api.CaptureRequest, func(api.Captured) error) error
}

func (o *captureOptions) run(cmd *cobra.Command, target, filter string) error {
	// The file has to be closed properly, however it ends.
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	sources, filter, err := o.sources(ctx, cmd, target, filter)
	if err != nil {
		return err
	}
	w, err := o.open(cmd)
	if err != nil {
		return err
	}
	s := &captureSink{o: o, out: w, errs: cmd.ErrOrStderr(), many: len(sources) > 1, lost: map[string]lostPackets{}}
	if o.file != "" {
		if s.pcap, err = newPcapng(w); err != nil {
			return errors.Join(err, w.Close())
		}
	}
	req := api.CaptureRequest{Filter: filter, Outer: o.outer, SnapLen: o.snaplen}
	err = s.collect(ctx, sources, req)
	err = errors.Join(err, s.finish())
	if errors.Is(err, errWrite) {
		s.cut()
	}
	return errors.Join(err, w.Close())
}

// sources finds whom to ask, and makes a filter of a pod.
func (o *captureOptions) sources(ctx context.Context, cmd *cobra.Command, target, filter string) ([]captureSource, string, error) {
	if o.local != "" {
		if target != "any" {
			return nil, "", fmt.Errorf("%q: with --socket expected any: who has which address is in the datastore", target)
		}
		return []captureSource{{o.local, func(ctx context.Context, r api.CaptureRequest, got func(api.Captured) error) error {
			return captureLocal(ctx, o.local, r, got)
		}}}, filter, nil
	}
	open, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	f, err := openFleet(open, cmd)
	if err != nil {
		return nil, "", err
	}
	names := f.names()
	if target != "any" {
		p, err := f.find(target)
		if err != nil {
			return nil, "", err
		}
		if p.Node == "" || !slices.Contains(names, p.Node) {
			return nil, "", fmt.Errorf("%s is on no node of the cluster", target)
		}
		names = []string{p.Node}
		if p.Entry == api.EntryPod {
			host := "host " + p.Address.String()
			if filter != "" {
				host += " and (" + filter + ")"
			}
			filter = host
			if err := rpc.CheckFilter(filter); err != nil {
				return nil, "", err
			}
		}
	}
	var out []captureSource
	for _, n := range names {
		c, err := f.client(n)
		if err != nil {
			out = append(out, captureSource{n, func(context.Context, api.CaptureRequest, func(api.Captured) error) error { return err }})
			continue
		}
		out = append(out, captureSource{n, c.Capture})
	}
	return out, filter, nil
}

// captureLocal is a capture without an agent.
func captureLocal(ctx context.Context, socket string, r api.CaptureRequest, got func(api.Captured) error) error {
	c, err := rpc.Dial(socket)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Capture(ctx, rpc.CaptureOptions{Filter: r.Filter, Outer: r.Outer, SnapLen: r.SnapLen},
		func(packets []rpc.CapturedPacket, lost uint64) error {
			if err := got(api.Captured{Lost: lost}); err != nil {
				return err
			}
			for _, p := range packets {
				if err := got(api.Captured{Time: p.Time, Port: p.Port, Direction: p.Direction, Forwarded: p.Forwarded, Reason: p.Reason,
					Gateway: p.Gateway, Sent: p.Sent, Length: p.Length, Packet: p.Packet, SegmentSize: p.SegmentSize, PartialSum: p.PartialSum}); err != nil {
					return err
				}
			}
			return nil
		})
}

// open opens what is written to.
func (o *captureOptions) open(cmd *cobra.Command) (io.WriteCloser, error) {
	switch o.file {
	case "", "-":
		return nopCloser{cmd.OutOrStdout()}, nil
	}
	f, err := os.Create(o.file)
	if err != nil {
		return nil, fmt.Errorf("--write: %w", err)
	}
	return f, nil
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// captureSink writes what all sources give.
type captureSink struct {
	o    *captureOptions
	out  io.Writer
	errs io.Writer
	many bool

	mu    sync.Mutex
	pcap  *pcapng // nil: text
	count int
	lost  map[string]lostPackets
	// The sources that run, and those of which nothing is known yet.
	began, waiting int
	failed         bool
}

// errEnough ends a capture that has what was asked for.
var errEnough = errors.New("enough")

// collect captures from all sources at once, until ctx is done, there is enough, or what is captured cannot be written. A source
// that fails is said, and the others go on; the error then is that something is missing.
func (s *captureSink) collect(ctx context.Context, sources []captureSource, req api.CaptureRequest) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.waiting = len(sources)
	var all sync.WaitGroup
	for _, src := range sources {
		all.Go(func() {
			switch err := s.follow(ctx, src, req); {
			case errors.Is(err, errEnough), errors.Is(err, errWrite):
				cancel(err)
			case err != nil:
				s.fail(err)
			}
		})
	}
	all.Wait()
	if err := context.Cause(ctx); errors.Is(err, errWrite) {
		return err
	}
	if s.failed {
		return ExitError{1}
	}
	return nil
}

// begin notes a source that runs, and refused one that does not. Once nothing is waited for, it is said that the capture runs.
func (s *captureSink) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.began++
	s.answered()
}

func (s *captureSink) refused() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answered()
}

// fail says that something is missing.
func (s *captureSink) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = true
	fmt.Fprintln(s.errs, err)
}

func (s *captureSink) answered() {
	if s.waiting--; s.waiting == 0 && s.began > 0 {
		fmt.Fprintln(s.errs, "capturing; stop with Ctrl-C")
	}
}

// take writes one packet.
func (s *captureSink) take(name string, c api.Captured) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.Packet == nil && c.Length == 0 {
		l := s.lost[name]
		l.now = max(l.now, c.Lost)
		s.lost[name] = l
		return nil
	}
	if s.o.count > 0 && s.count >= s.o.count {
		return errEnough
	}
	s.count++
	port := name + "/" + c.Port
	var err error
	if s.pcap != nil {
		err = s.pcap.packet(port, c.Time, c.Packet, c.Length, verdictText(c))
	} else {
		prefix := c.Port
		if s.many {
			prefix = port
		}
		_, err = fmt.Fprintf(s.out, "%s %s %s [%s]\n", c.Time.Local().Format("15:04:05.000000"), prefix, describe(c.Packet, c.Length), verdictText(c))
	}
	switch {
	case err != nil:
		s.count--
		return fmt.Errorf("%w: %w", errWrite, err)
	case s.count == s.o.count:
		return errEnough
	}
	return nil
}

// verdictText says what became of a packet.
func verdictText(c api.Captured) string {
	var text string
	switch {
	case !c.Forwarded:
		text = "dropped: " + c.Reason
	case c.Gateway.IsValid():
		text = "forwarded in IP-in-IP to " + c.Gateway.String()
	case c.Direction == "decap":
		text = "forwarded, the outer header taken off"
	default:
		text = "forwarded"
	}
	if c.Sent > 1 {
		text += fmt.Sprintf(", as %d packets", c.Sent)
	}
	if c.SegmentSize > 0 {
		text += fmt.Sprintf("; a superpacket of segments of %d bytes", c.SegmentSize)
	}
	if c.PartialSum {
		text += "; checksum to be completed"
	}
	return text
}

// finish says what was lost, and writes it.
func (s *captureSink) finish() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, name := range sortedKeys(s.lost) {
		n := s.lost[name].all()
		if n > 0 {
			fmt.Fprintf(s.errs, "%s: %d packets were lost for want of room\n", name, n)
		}
		if s.pcap == nil || s.pcap.failed != nil {
			continue
		}
		for port := range s.pcap.interfaces {
			if strings.HasPrefix(port, name+"/") { // the loss is the node's: it stands with one of its ports
				if err := s.pcap.lost(port, time.Now(), n); err != nil {
					errs = append(errs, fmt.Errorf("%w: %w", errWrite, err))
				}
				break
			}
		}
	}
	fmt.Fprintf(s.errs, "%d packets captured\n", s.count)
	return errors.Join(errs...)
}
