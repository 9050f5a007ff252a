package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"margay/vrouter"
	"margay/vrouter/filter"
	pb "margay/vrouter/rpc/vrouterpb"
)

// The types of what explains the data plane. Reasons are strings here, as counters name them: a client may be older than
// its vRouter.
type (
	// Direction says which ladder: see the constants.
	Direction = vrouter.Direction
	// Rung is one step of a ladder.
	Rung = vrouter.Rung
	// CaptureOptions say what to capture.
	CaptureOptions = vrouter.CaptureOptions
)

// The directions.
const (
	Encap   = vrouter.Encap
	Decap   = vrouter.Decap
	Transit = vrouter.Transit
)

// CheckFilter returns what is wrong with the text of a capture's filter.
func CheckFilter(text string) error {
	_, err := filter.Parse(text)
	return err
}

// Traced is what a ladder does with a packet.
type Traced struct {
	Forwarded    bool
	Reason       string // of the drop
	Rungs        []Rung // as far as the packet came
	Packet       []byte // as it would be sent
	Route, Back  Route  // longest match for the inner destination and source; the zero Route: none
	Out          string // host, underlay or pod
	OutInterface string // of the pod: the host's side
	Pieces       int    // more than 1 when it has to be split; Packet is the first then
	Answer       []byte // the ICMP error that its sender is told by
	// ByTC says that BPF programs at tc carry it out, before the kernel's stack sees the packet; LeftAlone why they do not,
	// where there are such programs.
	ByTC      bool
	LeftAlone string
	// LeftToKernel says why the kernel has a pod's packet from the pod's interface on, and no ladder was walked.
	LeftToKernel string
	// Steers says that the vRouter tells of LeftToKernel, which an older one does not.
	Steers bool
	// Handover says where programs at tc put a packet for a pod.
	Handover Handover
}

// Handover is where programs at tc put a packet for a pod.
type Handover uint8

// What Handover may be.
const (
	HandoverUnknown Handover = iota // an older vRouter does not tell
	HandoverOutside                 // the host's side of the pod's interface, which sends it
	HandoverInside                  // the pod's side
)

// ErrNoSwitch is what Trace returns, wrapped, for Transit where the vRouter does not have the pods' own interfaces.
var ErrNoSwitch = vrouter.ErrNoSwitch

// DropFlow counts the drops of one pair of addresses. Reason is empty for the flows that had to make room for others.
type DropFlow struct {
	Direction      string     `json:"direction"`
	Reason         string     `json:"reason,omitempty"`
	Source         netip.Addr `json:"source"`
	Destination    netip.Addr `json:"destination"`
	Packets, Bytes uint64
}

// DropSample is a packet that was dropped.
type DropSample struct {
	Number    uint64
	Time      time.Time
	Direction string
	Reason    string
	Length    int    // of the packet, in bytes
	Packet    []byte // its first bytes, from the IP header on
}

// CapturedPacket is a packet as the vRouter received it, and what became of it.
type CapturedPacket struct {
	Time        time.Time
	Port        string
	Direction   string
	Forwarded   bool
	Reason      string     // of the drop
	Gateway     netip.Addr // the node it was encapsulated for
	Sent        int        // packets that were sent for it
	Length      int        // in bytes
	Packet      []byte     // its first bytes
	SegmentSize int        // of a superpacket, payload in bytes
	PartialSum  bool       // the transport's checksum was not complete yet
}

// Trace walks a ladder with a packet, which begins with its IP header. Nothing is sent and nothing counted.
func (c *Client) Trace(ctx context.Context, d Direction, packet []byte) (Traced, error) {
	reply, err := c.api.Trace(ctx, &pb.TraceRequest{Direction: directionToWire[d], Packet: packet})
	if status.Code(err) == codes.NotFound {
		return Traced{}, fmt.Errorf("vrouter at %s: %w", c.socket, ErrNoSwitch)
	}
	if err != nil {
		return Traced{}, c.explain(err)
	}
	t := Traced{Forwarded: reply.GetForwarded(), Reason: reply.GetReason(), Packet: reply.GetPacket(), Out: reply.GetOut(),
		OutInterface: reply.GetOutInterface(),
		Pieces:       int(reply.GetPieces()), Answer: reply.GetAnswer(),
		ByTC: reply.GetCarrier() == pb.Carrier_CARRIER_TC, LeftAlone: reply.GetLeftAlone(), LeftToKernel: reply.GetLeftToKernel(),
		Steers: reply.GetSteering() != pb.Steering_STEERING_UNSPECIFIED, Handover: handoverFromWire[reply.GetHandover()]}
	for _, r := range reply.GetRungs() {
		t.Rungs = append(t.Rungs, Rung{Name: r.GetName(), Detail: r.GetDetail(), Passed: r.GetPassed()})
	}
	for _, r := range []struct {
		field string
		from  *pb.Route
		to    *Route
	}{{"route", reply.GetRoute(), &t.Route}, {"back", reply.GetBack(), &t.Back}} {
		if r.from == nil {
			continue
		}
		if *r.to, err = routeFromWire(r.field, r.from); err != nil {
			return Traced{}, c.explain(err)
		}
	}
	return t, nil
}

// Drops returns what was dropped by flow, and the samples whose Number is greater than since.
func (c *Client) Drops(ctx context.Context, since uint64) ([]DropFlow, []DropSample, error) {
	reply, err := c.api.ListDrops(ctx, &pb.ListDropsRequest{Since: since})
	if err != nil {
		return nil, nil, c.explain(err)
	}
	flows := make([]DropFlow, len(reply.GetFlows()))
	for i, f := range reply.GetFlows() {
		flows[i] = DropFlow{Direction: directionName(f.GetDirection()), Reason: f.GetReason(), Packets: f.GetPackets(), Bytes: f.GetBytes()}
		if flows[i].Source, err = addrFromWire("flows.source", f.GetSource()); err == nil {
			flows[i].Destination, err = addrFromWire("flows.destination", f.GetDestination())
		}
		if err != nil {
			return nil, nil, c.explain(err)
		}
	}
	samples := make([]DropSample, len(reply.GetSamples()))
	for i, s := range reply.GetSamples() {
		samples[i] = DropSample{Number: s.GetNumber(), Time: time.Unix(0, s.GetUnixNano()), Direction: directionName(s.GetDirection()),
			Reason: s.GetReason(), Length: int(s.GetLength()), Packet: s.GetPacket()}
	}
	return flows, samples, nil
}

// Capture calls got with what is captured, and with the number of packets lost so far, until ctx is done or got returns an
// error, which Capture returns then. The first call, without packets, says that the capture runs.
func (c *Client) Capture(ctx context.Context, o CaptureOptions, got func(packets []CapturedPacket, lost uint64) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.api.Capture(ctx, &pb.CaptureRequest{Filter: o.Filter, Outer: o.Outer, SnapLen: uint32(max(o.SnapLen, 0))})
	if err != nil {
		return c.explain(err)
	}
	for {
		reply, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return c.explain(err)
		}
		packets := make([]CapturedPacket, len(reply.GetPackets()))
		for i, p := range reply.GetPackets() {
			packets[i] = CapturedPacket{Time: time.Unix(0, p.GetUnixNano()), Port: p.GetPort(), Direction: directionName(p.GetDirection()),
				Forwarded: p.GetForwarded(), Reason: p.GetReason(), Sent: int(p.GetSent()), Length: int(p.GetLength()), Packet: p.GetPacket(),
				SegmentSize: int(p.GetSegmentSize()), PartialSum: p.GetPartialChecksum()}
			if packets[i].Gateway, err = addrFromWire("packets.gateway", p.GetGateway()); err != nil {
				return c.explain(err)
			}
		}
		if err := got(packets, reply.GetLost()); err != nil {
			return err
		}
	}
}

// Trace implements the contract.
func (s *Server) Trace(_ context.Context, req *pb.TraceRequest) (*pb.TraceReply, error) {
	d, ok := directionFromWire[req.GetDirection()]
	if !ok {
		return nil, status.Errorf(codes.InvalidArgument, "direction: %s: expected encap, decap or transit", req.GetDirection())
	}
	t, err := s.router.Trace(d, req.GetPacket())
	if errors.Is(err, vrouter.ErrNoSwitch) {
		return nil, status.Error(codes.NotFound, err.Error())
	}
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	reply := &pb.TraceReply{Forwarded: t.Verdict == vrouter.VerdictForward, Packet: t.Packet, Out: string(t.Out), OutInterface: t.OutInterface,
		Pieces: uint32(t.Pieces), Answer: t.Answer, Carrier: pb.Carrier_CARRIER_WORKER}
	if d == vrouter.Transit {
		reply.Steering = pb.Steering_STEERING_VROUTER
	}
	switch {
	case t.Carrier == vrouter.CarrierKernel:
		reply.Carrier, reply.Steering, reply.LeftToKernel = pb.Carrier_CARRIER_UNSPECIFIED, pb.Steering_STEERING_KERNEL, t.LeftAlone
	case t.Carrier == vrouter.CarrierTC && t.Inside:
		reply.Carrier, reply.Handover = pb.Carrier_CARRIER_TC, pb.Handover_HANDOVER_INSIDE
	case t.Carrier == vrouter.CarrierTC:
		reply.Carrier, reply.Handover = pb.Carrier_CARRIER_TC, pb.Handover_HANDOVER_OUTSIDE
	default:
		reply.LeftAlone = t.LeftAlone
	}
	if !reply.Forwarded {
		reply.Reason = t.Reason.String()
	}
	for _, r := range t.Rungs {
		reply.Rungs = append(reply.Rungs, &pb.Rung{Name: r.Name, Detail: r.Detail, Passed: r.Passed})
	}
	if t.Route.Prefix.IsValid() {
		reply.Route = routeToWire(t.Route, false)
	}
	if t.Back.Prefix.IsValid() {
		reply.Back = routeToWire(t.Back, false)
	}
	return reply, nil
}

// ListDrops implements the contract.
func (s *Server) ListDrops(_ context.Context, req *pb.ListDropsRequest) (*pb.ListDropsReply, error) {
	flows, samples := s.router.Drops(req.GetSince())
	reply := &pb.ListDropsReply{}
	for _, f := range flows {
		w := &pb.DropFlow{Direction: directionToWire[f.Direction], Source: addrToWire(f.Src), Destination: addrToWire(f.Dst),
			Packets: f.Packets, Bytes: f.Bytes}
		if f.Reason != vrouter.ReasonNotSet {
			w.Reason = f.Reason.String()
		}
		reply.Flows = append(reply.Flows, w)
	}
	for _, d := range samples {
		reply.Samples = append(reply.Samples, &pb.DropSample{Number: d.Seq, UnixNano: d.Time.UnixNano(), Direction: directionToWire[d.Direction],
			Reason: d.Reason.String(), Length: uint32(d.Length), Packet: d.Bytes})
	}
	return reply, nil
}

// Packets and bytes that one message of a capture carries at most.
const (
	captureBatch = 1024
	captureBytes = 1 << 20
)

// Capture implements the contract.
func (s *Server) Capture(req *pb.CaptureRequest, stream pb.VRouter_CaptureServer) error {
	c, err := s.router.StartCapture(CaptureOptions{Filter: req.GetFilter(), Outer: req.GetOuter(), SnapLen: int(req.GetSnapLen())})
	if errors.Is(err, vrouter.ErrCaptures) {
		return status.Error(codes.ResourceExhausted, err.Error())
	}
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	defer c.Stop()
	if err := stream.Send(&pb.CaptureReply{}); err != nil {
		return err
	}
	for {
		got, err := c.Read(stream.Context())
		if err != nil {
			return nil // the caller has enough
		}
		for len(got) > 0 {
			n, size := 0, 0
			for n < len(got) && n < captureBatch && size < captureBytes {
				size += len(got[n].Bytes)
				n++
			}
			reply := &pb.CaptureReply{Lost: c.Lost()}
			for _, p := range got[:n] {
				reply.Packets = append(reply.Packets, capturedToWire(p))
			}
			if err := stream.Send(reply); err != nil {
				return err
			}
			got = slices.Delete(got, 0, n)
		}
	}
}

func capturedToWire(p vrouter.Captured) *pb.CapturedPacket {
	w := &pb.CapturedPacket{UnixNano: p.Time.UnixNano(), Port: p.Port, Direction: directionToWire[p.Direction],
		Forwarded: p.Verdict == vrouter.VerdictForward, Gateway: addrToWire(p.Gateway), Sent: uint32(p.Sent), Length: uint32(p.Length),
		Packet: p.Bytes, PartialChecksum: p.PartialSum}
	if p.Segmentation != vrouter.SegmentNone {
		w.SegmentSize = uint32(p.SegmentSize)
	}
	if !w.Forwarded {
		w.Reason = p.Reason.String()
	}
	return w
}

// The tables between the wire and the types here; inverse makes the second of two.
var (
	ioToWire = map[IO]pb.IO{
		IOPacket: pb.IO_IO_PACKET,
		IOXDP:    pb.IO_IO_XDP,
		IOTC:     pb.IO_IO_TC,
	}
	ioFromWire       = inverse(ioToWire)
	handoverFromWire = map[pb.Handover]Handover{
		pb.Handover_HANDOVER_OUTSIDE: HandoverOutside,
		pb.Handover_HANDOVER_INSIDE:  HandoverInside,
	}
	directionToWire = map[vrouter.Direction]pb.Direction{
		vrouter.Encap:   pb.Direction_DIRECTION_ENCAP,
		vrouter.Decap:   pb.Direction_DIRECTION_DECAP,
		vrouter.Transit: pb.Direction_DIRECTION_TRANSIT,
	}
	directionFromWire = inverse(directionToWire)
)

func inverse[K, V comparable](m map[K]V) map[V]K {
	out := make(map[V]K, len(m))
	for k, v := range m {
		out[v] = k
	}
	return out
}

// directionName is for people, and knows that a vRouter may be newer.
func directionName(w pb.Direction) string {
	if d, ok := directionFromWire[w]; ok {
		return d.String()
	}
	return "unknown"
}
