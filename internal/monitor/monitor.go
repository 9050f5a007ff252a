// Package monitor serves what a daemon tells about itself over HTTP: metrics for Prometheus, and profiles for pprof.
// Both are off unless asked for.
package monitor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"margay/internal/version"
)

// Config says what is served, and where.
type Config struct {
	Metrics string // the address of GET /metrics: see Help
	Pprof   string // the address of /debug/pprof/: a unix socket, or one of this machine alone
}

// Flags is what Add needs of a flag set.
type Flags interface {
	StringVar(p *string, name, value, usage string)
}

// Add defines the flags --metrics and --pprof.
func (c *Config) Add(f Flags) {
	f.StringVar(&c.Metrics, "metrics", "", "serve metrics for Prometheus on this `address`, HOST:PORT, :PORT or the path of a unix socket, under /metrics; empty: no")
	f.StringVar(&c.Pprof, "pprof", "", "serve profiles for `go tool pprof` on this `address`, the path of a unix socket or a loopback address and port, under /debug/pprof/; empty: no")
}

// NewRegistry returns a registry that holds the process' own metrics and margay_build_info, for component, "vrouter" or
// "agent".
func NewRegistry(component string) *prometheus.Registry {
	r := prometheus.NewRegistry()
	info := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name:        "margay_build_info",
		Help:        "What runs: always 1.",
		ConstLabels: prometheus.Labels{"component": component, "version": version.String(), "goversion": runtime.Version()},
	}, func() float64 { return 1 })
	r.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Server is what Listen has opened.
type Server struct {
	log     *slog.Logger
	servers []*http.Server
	on      []net.Listener
}

// Listen opens what c asks for; an address that cannot be listened on, or that is not allowed, is an error that names
// its flag. Nothing is answered before Serve.
func Listen(c Config, registry prometheus.Gatherer, log *slog.Logger) (_ *Server, err error) {
	s := &Server{log: log}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if c.Metrics != "" {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorLog: errorLog{log}}))
		if err := s.add("--metrics", c.Metrics, mux); err != nil {
			return nil, err
		}
	}
	if c.Pprof != "" {
		if err := checkPrivate(c.Pprof); err != nil {
			return nil, err
		}
		mux := http.NewServeMux()
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
		if err := s.add("--pprof", c.Pprof, mux); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// checkPrivate refuses an address that others than this machine can reach: a profile shows what the process does, and
// costs it time.
func checkPrivate(address string) error {
	if isPath(address) {
		return nil
	}
	ap, err := netip.ParseAddrPort(address)
	if err != nil || !ap.Addr().IsLoopback() {
		return fmt.Errorf("--pprof %q: expected the path of a unix socket, or a loopback address and port like 127.0.0.1:6060", address)
	}
	return nil
}

func isPath(address string) bool { return strings.HasPrefix(address, "/") }

func (s *Server) add(flag, address string, h http.Handler) error {
	l, err := listen(address)
	if err != nil {
		return fmt.Errorf("%s %q: %w", flag, address, err)
	}
	s.on = append(s.on, l)
	s.servers = append(s.servers, &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)})
	s.log.Info("serving", "what", strings.TrimPrefix(flag, "--"), "address", l.Addr().String())
	return nil
}

func listen(address string) (net.Listener, error) {
	if !isPath(address) {
		if _, _, err := net.SplitHostPort(address); err != nil {
			return nil, errors.New("expected HOST:PORT, :PORT or the path of a unix socket")
		}
		return net.Listen("tcp", address)
	}
	if err := os.MkdirAll(filepath.Dir(address), 0o755); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(address); err == nil {
		if info.Mode().Type() != os.ModeSocket {
			return nil, errors.New("the file is not a socket: remove it, or choose another path")
		}
		if conn, err := net.DialTimeout("unix", address, time.Second); err == nil {
			return nil, errors.Join(errors.New("another process serves it"), conn.Close())
		}
		if err := os.Remove(address); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", address)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(address, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Serve answers until ctx is done, and closes what Listen has opened. A profile under way ends early.
func (s *Server) Serve(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = s.Close() }) // nothing is left to be told
	defer stop()
	done := make(chan struct{})
	for i, srv := range s.servers {
		go func() {
			if err := srv.Serve(s.on[i]); !errors.Is(err, http.ErrServerClosed) && ctx.Err() == nil {
				s.log.Error("metrics or profiles are no longer served", "address", s.on[i].Addr().String(), "error", err)
			}
			done <- struct{}{}
		}()
	}
	for range s.servers {
		<-done
	}
}

// Close ends everything, also what was never served.
func (s *Server) Close() error {
	var errs []error
	for i, srv := range s.servers {
		err := errors.Join(srv.Close(), s.on[i].Close())
		if !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// errorLog takes promhttp's complaints.
type errorLog struct{ log *slog.Logger }

func (l errorLog) Println(v ...any) { l.log.Warn("metrics", "error", fmt.Sprint(v...)) }
