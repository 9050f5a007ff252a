package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pb "margay/vrouter/rpc/vrouterpb"
)

// maxMessage is the longest message in bytes, either way: an update is one transaction and cannot be split, and a full
// Internet table of routes takes some 30 MB.
const maxMessage = 128 << 20

// Client talks to one vRouter. Its methods are safe for concurrent use.
type Client struct {
	socket string
	conn   *grpc.ClientConn
	api    pb.VRouterClient
}

// Dial returns a client for the vRouter on the unix socket. It does not wait for one: a call made while no vRouter
// answers fails with ErrUnavailable, and the first call after it has come back succeeds.
func Dial(socket string) (*Client, error) {
	dialer := net.Dialer{}
	conn, err := grpc.NewClient("passthrough:///vrouter",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		}),
		// The socket's mode is the protection: only its owner can open it.
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, Jitter: 0.1, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
	)
	if err != nil {
		return nil, fmt.Errorf("vrouter at %s: %w", socket, err)
	}
	return &Client{socket: socket, conn: conn, api: pb.NewVRouterClient(conn)}, nil
}

// Close ends the client; calls under way fail.
func (c *Client) Close() error { return c.conn.Close() }

// Status asks what runs behind the socket.
func (c *Client) Status(ctx context.Context) (Status, error) {
	reply, err := c.api.GetStatus(ctx, &pb.StatusRequest{ApiVersion: APIVersion})
	return c.status(reply, err)
}

// Begin opens a synchronisation: all routes, nodes and pods become stale, nothing is removed, forwarding goes on. The status
// it returns is that of the moment before.
func (c *Client) Begin(ctx context.Context) (Status, error) {
	reply, err := c.api.Begin(ctx, &pb.BeginRequest{ApiVersion: APIVersion})
	return c.status(reply, err)
}

// Update makes one transaction. ErrRefused, wrapped, names the field that is wrong; nothing was changed then.
func (c *Client) Update(ctx context.Context, u Update) error {
	_, err := c.api.Update(ctx, updateToWire(u))
	return c.explain(err)
}

// End closes a synchronisation: what is still stale is removed. It returns how many routes, nodes and pods that
// were.
func (c *Client) End(ctx context.Context) (swept int, err error) {
	reply, err := c.api.End(ctx, &pb.EndRequest{})
	if err != nil {
		return 0, c.explain(err)
	}
	return int(reply.GetSwept()), nil
}

// Routes returns the table sorted by prefix, and the nodes sorted by address.
func (c *Client) Routes(ctx context.Context) ([]RouteEntry, []netip.Addr, error) {
	reply, err := c.api.ListRoutes(ctx, &pb.ListRoutesRequest{})
	if err != nil {
		return nil, nil, c.explain(err)
	}
	entries := make([]RouteEntry, len(reply.GetRoutes()))
	for i, r := range reply.GetRoutes() {
		route, err := routeFromWire(fmt.Sprintf("routes[%d]", i), r)
		if err != nil {
			return nil, nil, c.explain(err)
		}
		entries[i] = RouteEntry{Route: route, Stale: r.GetStale()}
	}
	nodes, err := addrsFromWire("nodes", reply.GetNodes())
	if err != nil {
		return nil, nil, c.explain(err)
	}
	return entries, nodes, nil
}

// Counters returns every counter: forwarded_encap and forwarded_decap, drop_ and a reason, and the kernel's own losses
// around the vRouter as kernel_….
func (c *Client) Counters(ctx context.Context) ([]Counter, error) {
	reply, err := c.api.ListCounters(ctx, &pb.ListCountersRequest{})
	if err != nil {
		return nil, c.explain(err)
	}
	counters := make([]Counter, len(reply.GetCounters()))
	for i, n := range reply.GetCounters() {
		counters[i] = Counter{Name: n.GetName(), Packets: n.GetPackets(), Bytes: n.GetBytes()}
	}
	return counters, nil
}

func (c *Client) status(reply *pb.StatusReply, err error) (Status, error) {
	if err != nil {
		return Status{}, c.explain(err)
	}
	if v := reply.GetApiVersion(); v < MinAPIVersion {
		return Status{}, c.explain(fmt.Errorf("%w: it speaks %d: expected at least %d", ErrVersion, v, MinAPIVersion))
	}
	s := Status{
		APIVersion: int(reply.GetApiVersion()),
		Version:    reply.GetVersion(),
		Instance:   reply.GetInstance(),
		Restored:   reply.GetRestored(),
		Configured: reply.GetConfigured(),
		Routes:     int(reply.GetRoutes()),
		Stale:      int(reply.GetStale()),
		Nodes:      int(reply.GetNodes()),
		Started:    time.Unix(0, reply.GetStartedUnixNano()),
		Port:       reply.GetPort(),
		IO:         ioFromWire[reply.GetIo()],
		Pods:       int(reply.GetPods()),
	}
	for i, p := range reply.GetPathMtus() {
		gateway, ok := netip.AddrFromSlice(p.GetGateway())
		if !ok {
			return Status{}, c.explain(fmt.Errorf("path_mtus[%d]: gateway of %d bytes: expected 4 or 16", i, len(p.GetGateway())))
		}
		s.PathMTUs = append(s.PathMTUs, PathMTU{Gateway: gateway, MTU: int(p.GetMtu()),
			Learned: time.Unix(0, p.GetLearnedUnixNano()), Expires: time.Unix(0, p.GetExpiresUnixNano())})
	}
	if s.Configured {
		if s.Config, err = configFromWire(reply.GetConfig()); err != nil {
			return Status{}, c.explain(err)
		}
	}
	return s, nil
}

// explain names the socket, and turns gRPC's codes into this room's errors, so that no caller needs to know gRPC.
func (c *Client) explain(err error) error {
	if err == nil {
		return nil
	}
	s, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("vrouter at %s: %w", c.socket, err)
	}
	cause := errors.New(s.Message())
	switch s.Code() {
	case codes.Unavailable:
		cause = fmt.Errorf("%w: %s", ErrUnavailable, s.Message())
	case codes.InvalidArgument:
		cause = fmt.Errorf("%w: %s", ErrRefused, s.Message())
	case codes.FailedPrecondition, codes.Unimplemented:
		cause = fmt.Errorf("%w: %s", ErrVersion, s.Message())
	case codes.Canceled:
		cause = fmt.Errorf("%w: %s", context.Canceled, s.Message())
	case codes.DeadlineExceeded:
		cause = fmt.Errorf("%w: %s", context.DeadlineExceeded, s.Message())
	}
	return fmt.Errorf("vrouter at %s: %w", c.socket, cause)
}
