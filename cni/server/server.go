package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/cni"
)

// The words of AssignRequest's families.
const (
	AssignNone     = cni.AssignNone
	AssignIfPool   = cni.AssignIfPool
	AssignRequired = cni.AssignRequired
)

// AssignRequest asks for a pod's addresses.
type AssignRequest struct {
	Handle      string
	Namespace   string // of the pod; empty when the runtime told none
	Pod         string
	ContainerID string
	Node        string
	IPv4, IPv6  cni.Family
}

// IPAM is what the server needs of address management. Its methods are called concurrently.
type IPAM interface {
	// Assign gives a handle that has none what is asked for, at most one address of a family; when it fails it gives
	// nothing. For a handle that holds an address it fails and changes nothing.
	Assign(ctx context.Context, r AssignRequest) ([]netip.Addr, error)
	// Release frees what the handle holds; nothing held is no error.
	Release(ctx context.Context, handle string) error
	// Addresses lists what the handle holds.
	Addresses(ctx context.Context, handle string) ([]netip.Addr, error)
}

// Config of a Server.
type Config struct {
	// Node is this node's name, recorded with each address.
	Node string
	// Socket is the unix socket to serve; "" means cni.DefaultSocket.
	Socket string
	// QueueDir is where the plugin leaves DELs while nobody listens; "" means cni.DefaultQueueDir.
	QueueDir string
	// IPAM gives and takes addresses.
	IPAM IPAM
	// MTU tells the pods' MTU in bytes at the time of an ADD; nil means 1480.
	MTU func() int
	// Ready returns nil while ADDs can be served, else why not; nil means always.
	Ready func() error
	// Log takes the server's messages; nil means slog.Default().
	Log *slog.Logger
	// OnVerb, when set, is told of each request that was understood: its verb, how long it took, and its error. It is called
	// from several goroutines.
	OnVerb func(verb string, took time.Duration, err error)
	// OnPod, when set, is told of each attachment's IPv4 address: added after ADD and once per attachment that Reconcile finds,
	// removed after DEL. It is called from several goroutines and must not call the server.
	OnPod func(added bool, addr netip.Addr, hostName string)
}

const (
	defaultMTU  = 1480
	readTimeout = 10 * time.Second
	// verbTimeout is less than the plugin's own patience, so that the plugin hears our error.
	verbTimeout = cni.DefaultTimeout - 10*time.Second
	// undoTimeout bounds the clean-up after a failed ADD, which goes on when the plugin is gone.
	undoTimeout = 10 * time.Second
	// maxRequests served at a time; the others wait in the socket's backlog.
	maxRequests = 64
	// maxPlumbing at a time: rtnl is one lock in the kernel, and each takes a thread.
	maxPlumbing = 8
)

// Server serves the plugin. Its methods may be called concurrently.
type Server struct {
	cfg   Config
	log   *slog.Logger
	queue cni.Queue
	nl    *netlink.Handle
	fw    *firewall
	locks keyedLocks
	plumb chan struct{}

	world sync.RWMutex // read: a verb is under way; write: Reconcile

	mu          sync.Mutex
	reconciled  bool
	attachments map[string]Attachment // by handle
}

// New checks the configuration and opens netlink in the current network namespace. It changes nothing yet.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.IPAM == nil:
		return nil, errors.New("cni server: IPAM: missing")
	case cfg.Node == "":
		return nil, errors.New("cni server: node: missing, expected this node's name")
	}
	if cfg.Socket == "" {
		cfg.Socket = cni.DefaultSocket
	}
	if cfg.QueueDir == "" {
		cfg.QueueDir = cni.DefaultQueueDir
	}
	if cfg.MTU == nil {
		cfg.MTU = func() int { return defaultMTU }
	}
	if cfg.Ready == nil {
		cfg.Ready = func() error { return nil }
	}
	if cfg.OnPod == nil {
		cfg.OnPod = func(bool, netip.Addr, string) {}
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("cni server: open netlink: %w", err)
	}
	fw, err := newFirewall()
	if err != nil {
		nl.Close()
		return nil, fmt.Errorf("cni server: %w", err)
	}
	return &Server{cfg: cfg, log: cfg.Log, queue: cni.Queue{Dir: cfg.QueueDir}, nl: nl, fw: fw,
		plumb: make(chan struct{}, maxPlumbing), attachments: map[string]Attachment{}}, nil
}

// Run serves until ctx is done and returns nil then. It reconciles first, unless Reconcile was called already, and
// carries out the DELs that waited before it takes an ADD. Interfaces, routes and rules stay when it ends.
func (s *Server) Run(ctx context.Context) error {
	defer s.nl.Close()
	s.mu.Lock()
	reconciled := s.reconciled
	s.mu.Unlock()
	if !reconciled {
		if err := s.Reconcile(ctx); err != nil {
			return err
		}
	}
	s.drain(ctx)
	ln, err := Listen(s.cfg.Socket)
	if err != nil {
		return fmt.Errorf("cni server: %w", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { s.housekeeping(ctx) })
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	slots := make(chan struct{}, maxRequests)
	for {
		conn, err := ln.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				break
			}
			s.log.Warn("accept CNI request", "error", err)
			select { // out of descriptors, most likely: give others time to end
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			s.serve(ctx, conn)
		})
	}
	wg.Wait()
	return nil
}

// Listen serves a unix socket of the agent's that only root may use. It takes over a socket file that nobody listens on, and
// refuses one that somebody does.
func Listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		conn.Close()
		return nil, fmt.Errorf("socket %s: another margay-agent is serving it", path)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSocket == 0 {
		return nil, fmt.Errorf("socket %s: exists and is no socket", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// serve handles one connection: one request, one response.
func (s *Server) serve(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	resp := &cni.Response{Protocol: cni.Protocol}
	req, ns, err := receive(conn)
	if ns != nil {
		defer ns.Close()
	}
	if err != nil {
		resp.Error = cni.AsError(err, types.ErrDecodingFailure)
	} else {
		// A verb that has begun is finished even if the agent is told to stop.
		vctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), verbTimeout)
		began := time.Now()
		resp.Attachment, err = s.handle(vctx, req, ns)
		cancel()
		if s.cfg.OnVerb != nil {
			s.cfg.OnVerb(req.Verb, time.Since(began), err)
		}
		resp.Error = cni.AsError(err, types.ErrInternal)
	}
	data, err := json.Marshal(resp)
	if err != nil {
		s.log.Error("encode CNI response", "error", err)
		return
	}
	conn.SetWriteDeadline(time.Now().Add(readTimeout))
	if _, err := conn.Write(data); err != nil {
		s.log.Debug("write CNI response", "error", err)
	}
}

// receive reads a request and the namespace that came with it, if any. The caller closes the file, also on error.
func receive(conn *net.UnixConn) (*cni.Request, *os.File, error) {
	conn.SetReadDeadline(time.Now().Add(readTimeout))
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*8))
	n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, nil, err
	}
	ns := takeFile(oob[:oobn])
	req, err := cni.ReadRequest(io.MultiReader(bytes.NewReader(buf[:n]), conn))
	return req, ns, err
}

// takeFile keeps the first descriptor of the ancillary data and closes any others.
func takeFile(oob []byte) *os.File {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var file *os.File
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if file == nil {
				file = os.NewFile(uintptr(fd), "netns")
			} else {
				unix.Close(fd)
			}
		}
	}
	return file
}

// SetPools tells which pools are masqueraded when they leave the cluster (nat), and which addresses are inside the
// cluster (all), of both families.
func (s *Server) SetPools(nat, all []netip.Prefix) error {
	for _, list := range [][]netip.Prefix{nat, all} {
		for _, p := range list {
			if !p.IsValid() {
				return fmt.Errorf("pool: %s, expected a prefix", p)
			}
		}
	}
	return s.fw.setPools(nat, all)
}

// Counters returns the packets and bytes that the anti-spoofing rules dropped: "spoofed", "pod_ipv6", and
// "pod_ipv6_discovery", which nobody misses.
func (s *Server) Counters() ([]Counter, error) { return s.fw.counters() }

// Attachments lists what is attached, in no order.
func (s *Server) Attachments() []Attachment {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Attachment, 0, len(s.attachments))
	for _, a := range s.attachments {
		out = append(out, a)
	}
	return out
}

// keyedLocks is one lock per handle: verbs about one attachment come one after the other, all else in parallel.
type keyedLocks struct {
	mu sync.Mutex
	m  map[string]*keyedLock
}

type keyedLock struct {
	sync.Mutex
	users int
}

func (l *keyedLocks) lock(key string) (unlock func()) {
	l.mu.Lock()
	if l.m == nil {
		l.m = map[string]*keyedLock{}
	}
	k := l.m[key]
	if k == nil {
		k = &keyedLock{}
		l.m[key] = k
	}
	k.users++
	l.mu.Unlock()
	k.Lock()
	return func() {
		k.Unlock()
		l.mu.Lock()
		if k.users--; k.users == 0 {
			delete(l.m, key)
		}
		l.mu.Unlock()
	}
}
