package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"margay/agent/api"
	"margay/vrouter/packet"
	"margay/vrouter/rpc"
)

type captureOptions struct {
	file    string
	output  string // text or json, without file
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
Wireshark and tshark open, with the verdict as a comment on each packet; "-w -" writes to standard output. -o json prints
a line for each.

FILTER is in the pcap filter language, as tcpdump has it, without names to be looked up: host, net, port, portrange, proto,
tcp, udp, icmp, ip[…], and, or, not; docs/trace.md lists it. It is asked about the pods' packets: of IP-in-IP about the
inner one, with --outer about the outer.

Forwarding never waits for a capture. What finds no room is lost, and counted; Ctrl-C ends a capture, and closes the file
properly. A vRouter or an agent that is restarted meanwhile is asked again, for two minutes. With --socket the vRouter of
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
			if err := checkOutput(o.output, "text", "json"); err != nil {
				return err
			}
			if o.file != "" && cmd.Flags().Changed("output") {
				return errors.New("--write writes pcapng: expected it without --output")
			}
			filter := strings.Join(args[1:], " ")
			if err := rpc.CheckFilter(filter); err != nil {
				return err
			}
			return o.run(cmd, args[0], filter)
		},
	}
	addOutput(cmd, &o.output, "text", "text, or json: a line for each packet")
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

// finishTimeout is how long a capture that is told to end may write.
const finishTimeout = 3 * time.Second

// captureSource is one vRouter to capture from.
type captureSource struct {
	name    string
	capture func(context.Context, api.CaptureRequest, func(api.Captured) error) error
}

func (o *captureOptions) run(cmd *cobra.Command, target, filter string) error {
	ctx := cmd.Context()
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
	ended := make(chan error, 1)
	go func() {
		err := s.collect(ctx, sources, api.CaptureRequest{Filter: filter, Outer: o.outer, SnapLen: o.snaplen})
		err = errors.Join(err, s.finish())
		if errors.Is(err, errWrite) {
			s.cut()
		}
		ended <- errors.Join(err, w.Close()) // the file has to be closed properly, however it ends
	}()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	// Who reads the other end of a pipe may have stopped, and a write into it does not end then.
	select {
	case err := <-ended:
		return err
	case <-time.After(finishTimeout):
		return fmt.Errorf("%w: for %s nobody has read what it writes: %d packets are not shown", errWrite, finishTimeout, s.got.Load()-s.shown.Load())
	}
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
	if len(names) == 0 {
		return nil, "", errors.New("there is no node in the datastore")
	}
	if err := roomFor(len(names)); err != nil {
		return nil, "", err
	}
	var out []captureSource
	starts := make(chan struct{}, atOnce)
	for _, n := range names {
		out = append(out, f.capturing(n, starts))
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
