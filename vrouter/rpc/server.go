package rpc

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"margay/vrouter"
	pb "margay/vrouter/rpc/vrouterpb"
)

// ErrInUse is what Listen returns, wrapped, when another vRouter answers on the socket.
var ErrInUse = errors.New("another vrouter is alive on it")

// Listen opens the unix socket for a Server, mode 0600. A socket file that nobody listens on, left by a process that
// was killed, is replaced. The directory is made, mode 0755, if it is not there.
func Listen(socket string) (net.Listener, error) {
	fail := func(err error) (net.Listener, error) { return nil, fmt.Errorf("socket %s: %w", socket, err) }
	dir := filepath.Dir(socket)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fail(err)
	}
	// Two that start at once look and rename one after the other.
	lock, err := os.Open(dir)
	if err != nil {
		return fail(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fail(fmt.Errorf("lock its directory: %w", err))
	}
	if info, err := os.Lstat(socket); err == nil {
		if info.Mode().Type() != fs.ModeSocket {
			return fail(errors.New("the file is not a socket: remove it, or choose another path"))
		}
		if conn, err := net.DialTimeout("unix", socket, time.Second); err == nil {
			return fail(errors.Join(ErrInUse, conn.Close()))
		}
	}
	// Made under another name and renamed: there is no moment in which the socket exists with a wider mode, and a
	// stale one is replaced in one step.
	scratch := filepath.Join(dir, fmt.Sprintf(".%d.sock", os.Getpid()))
	if err := os.Remove(scratch); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: scratch, Net: "unix"})
	if err != nil {
		return fail(err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(scratch, 0o600)
	if err == nil {
		err = os.Rename(scratch, socket)
	}
	if err != nil {
		return fail(errors.Join(err, l.Close(), os.Remove(scratch)))
	}
	info, err := os.Lstat(socket)
	if err != nil {
		return fail(errors.Join(err, l.Close()))
	}
	return &listener{Listener: l, path: socket, info: info}, nil
}

// listener removes its socket file when it is closed, unless the file has become another's.
type listener struct {
	net.Listener
	path string
	info os.FileInfo
}

func (l *listener) Close() error {
	if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.info) {
		if err := os.Remove(l.path); err != nil {
			return errors.Join(err, l.Listener.Close())
		}
	}
	return l.Listener.Close()
}

// Server answers for one router.
type Server struct {
	pb.UnimplementedVRouterServer
	router   *vrouter.Router
	version  string
	instance string
	started  time.Time
	port     func() string
	io       IO
	grpc     *grpc.Server
}

// NewServer returns a server for router. version is the binary's, port describes the ports in words, and io is how they
// read and write Ethernet interfaces; all three are for Status.
func NewServer(router *vrouter.Router, version string, port func() string, io IO) *Server {
	s := &Server{
		router:   router,
		version:  version,
		instance: rand.Text(),
		started:  time.Now(),
		port:     port,
		io:       io,
		grpc:     grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage)),
	}
	pb.RegisterVRouterServer(s.grpc, s)
	return s
}

// Serve answers on l until ctx is done, and returns nil then; calls under way are finished, for at most a second. It
// closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		hard := time.AfterFunc(time.Second, s.grpc.Stop)
		defer hard.Stop()
		s.grpc.GracefulStop()
	})
	err := s.grpc.Serve(l)
	if !stop() {
		<-done
		return nil
	}
	return err
}

// GetStatus implements the contract.
func (s *Server) GetStatus(_ context.Context, req *pb.StatusRequest) (*pb.StatusReply, error) {
	if err := checkVersion(req.GetApiVersion()); err != nil {
		return nil, err
	}
	return s.reply(), nil
}

// Begin implements the contract.
func (s *Server) Begin(_ context.Context, req *pb.BeginRequest) (*pb.StatusReply, error) {
	if err := checkVersion(req.GetApiVersion()); err != nil {
		return nil, err
	}
	before := s.reply()
	s.router.Begin()
	return before, nil
}

// Update implements the contract.
func (s *Server) Update(_ context.Context, req *pb.UpdateRequest) (*pb.UpdateReply, error) {
	u, err := updateFromWire(req)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err := s.router.Update(u); err != nil {
		// A port that cannot follow is not the caller's mistake: the same update may pass later.
		if errors.Is(err, vrouter.ErrPort) {
			return nil, status.Error(codes.Internal, err.Error())
		}
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &pb.UpdateReply{}, nil
}

// End implements the contract.
func (s *Server) End(context.Context, *pb.EndRequest) (*pb.EndReply, error) {
	return &pb.EndReply{Swept: uint32(s.router.End())}, nil
}

// ListRoutes implements the contract.
func (s *Server) ListRoutes(context.Context, *pb.ListRoutesRequest) (*pb.ListRoutesReply, error) {
	entries, nodes := s.router.Routes()
	reply := &pb.ListRoutesReply{Routes: make([]*pb.Route, len(entries)), Nodes: addrsToWire(nodes)}
	for i, e := range entries {
		reply.Routes[i] = routeToWire(e.Route, e.Stale)
	}
	return reply, nil
}

// ListCounters implements the contract.
func (s *Server) ListCounters(context.Context, *pb.ListCountersRequest) (*pb.ListCountersReply, error) {
	counters := s.router.Counters()
	reply := &pb.ListCountersReply{Counters: make([]*pb.Counter, len(counters))}
	for i, c := range counters {
		reply.Counters[i] = &pb.Counter{Name: c.Name, Packets: c.Packets, Bytes: c.Bytes}
	}
	return reply, nil
}

func (s *Server) reply() *pb.StatusReply {
	now := s.router.Status()
	reply := &pb.StatusReply{
		ApiVersion:      APIVersion,
		Version:         s.version,
		Instance:        s.instance,
		Restored:        now.Restored,
		Configured:      now.Configured,
		Routes:          uint32(now.Routes),
		Stale:           uint32(now.Stale),
		Nodes:           uint32(now.Nodes),
		StartedUnixNano: s.started.UnixNano(),
		Port:            s.port(),
		Io:              ioToWire[s.io],
		Pods:            uint32(now.Pods),
	}
	for _, p := range s.router.PathMTUs() {
		reply.PathMtus = append(reply.PathMtus, &pb.PathMTU{Gateway: p.Gateway.AsSlice(), Mtu: uint32(p.MTU),
			LearnedUnixNano: p.Learned.UnixNano(), ExpiresUnixNano: p.Expires.UnixNano()})
	}
	if now.Configured {
		reply.Config = configToWire(now.Config)
	}
	return reply
}

func checkVersion(caller uint32) error {
	if caller < MinAPIVersion {
		return status.Errorf(codes.FailedPrecondition, "the caller speaks %d: expected at least %d", caller, MinAPIVersion)
	}
	return nil
}
