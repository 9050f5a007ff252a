package bgp

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"
)

// A speaker that is to be killed, or to live in a namespace, is a process of its own: this test binary, started again
// with childEnv set. It takes one JSON request a line on stdin and answers each with one JSON line on stdout.

const childEnv = "MARGAY_BGP_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		childMain()
		return
	}
	// These tests wait more than they work, so more of them may wait together than there are processors.
	flag.Parse()
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

type childConfig struct {
	AS          uint32
	Listen      netip.Addr
	Restarting  bool
	RestartTime time.Duration
	HoldTime    time.Duration
	Keepalive   time.Duration
	Deferral    time.Duration
}

type request struct {
	Op       string
	Config   childConfig
	Peers    []Peer
	Prefixes []netip.Prefix
}

type response struct {
	Err       string
	Best      map[netip.Prefix]Path
	Changes   map[netip.Prefix][]Path
	Peers     []PeerStatus
	Synced    bool
	Withdrawn []netip.Prefix // every withdrawal GoBGP ever reported, not only those that lasted
}

func childMain() {
	var (
		s         *Speaker
		mu        sync.Mutex
		withdrawn []netip.Prefix
	)
	handle := func(r request) (a response, err error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		switch r.Op {
		case "start":
			c := r.Config
			s, err = Start(ctx, Config{
				AS: c.AS, Listen: c.Listen, Restarting: c.Restarting, RestartTime: c.RestartTime, HoldTime: c.HoldTime,
				Keepalive: c.Keepalive, Deferral: c.Deferral,
				Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})),
			})
			if err != nil {
				return a, err
			}
			err = s.srv.WatchEvent(context.Background(), server.WatchEventMessageCallbacks{
				OnBestPath: func(paths []*apiutil.Path, _ time.Time) {
					mu.Lock()
					defer mu.Unlock()
					for _, p := range paths {
						if p.Withdrawal {
							withdrawn = append(withdrawn, p.Nlri.(*bgp.IPAddrPrefix).Prefix)
						}
					}
				},
			}, server.WatchBestPath(true))
		case "peers":
			err = s.SetPeers(ctx, r.Peers)
		case "announce":
			err = s.SetAnnounced(ctx, r.Prefixes)
		case "state":
			a.Best, a.Peers = s.Best(), s.Peers()
			select {
			case <-s.Synced():
				a.Synced = true
			default:
			}
			mu.Lock()
			a.Withdrawn = slices.Clone(withdrawn)
			mu.Unlock()
		case "changes":
			select {
			case <-s.Updates():
				a.Changes = s.Changes()
			case <-ctx.Done():
				err = ctx.Err()
			}
		case "stop":
			err = s.Stop(ctx)
		}
		return a, err
	}
	in, out := bufio.NewScanner(os.Stdin), json.NewEncoder(os.Stdout)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var r request
		if err := json.Unmarshal(in.Bytes(), &r); err != nil {
			fmt.Fprintln(os.Stderr, "request:", err)
			os.Exit(2)
		}
		a, err := handle(r)
		if err != nil {
			a.Err = err.Error()
		}
		if err := out.Encode(a); err != nil {
			os.Exit(2)
		}
	}
}

// child is a speaker process in a node's namespace, seen from the test.
type child struct {
	t   *testing.T
	cmd *exec.Cmd
	in  *json.Encoder
	out *json.Decoder
}

// startSpeaker starts a process with a running speaker in n's namespace; the test's end kills it.
func (n *node) startSpeaker(t *testing.T, cfg childConfig) *child {
	t.Helper()
	cfg.Listen = n.addr
	if cfg.AS == 0 {
		cfg.AS = 64512
	}
	cmd := exec.Command("ip", "netns", "exec", n.ns, os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"=1", "GORACE=halt_on_error=1")
	log, err := os.Create(fmt.Sprintf("%s/speaker-%s-%d.log", t.TempDir(), n.ns, time.Now().UnixNano()))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{t: t, cmd: cmd, in: json.NewEncoder(stdin), out: json.NewDecoder(stdout)}
	t.Cleanup(func() {
		c.kill()
		if t.Failed() {
			if b, err := os.ReadFile(log.Name()); err == nil {
				t.Logf("log of the speaker in %s:\n%s", n.ns, tail(b, 6000))
			}
		}
		log.Close()
	})
	c.do(request{Op: "start", Config: cfg})
	return c
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }

func (c *child) do(r request) response {
	c.t.Helper()
	if err := c.in.Encode(r); err != nil {
		c.t.Fatalf("%s: %v", r.Op, err)
	}
	var a response
	if err := c.out.Decode(&a); err != nil {
		c.t.Fatalf("%s: %v", r.Op, err)
	}
	if a.Err != "" {
		c.t.Fatalf("%s: %s", r.Op, a.Err)
	}
	return a
}

func (c *child) state() response    { c.t.Helper(); return c.do(request{Op: "state"}) }
func (c *child) setPeers(p ...Peer) { c.t.Helper(); c.do(request{Op: "peers", Peers: p}) }
func (c *child) announce(prefix ...string) {
	c.t.Helper()
	r := request{Op: "announce", Prefixes: []netip.Prefix{}}
	for _, p := range prefix {
		r.Prefixes = append(r.Prefixes, netip.MustParsePrefix(p))
	}
	c.do(r)
}

// stop ends the speaker cleanly, and then its process.
func (c *child) stop() {
	c.t.Helper()
	c.do(request{Op: "stop"})
	c.kill()
}

// kill is kill -9.
func (c *child) kill() {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
}

// patience bounds every wait for something that is to happen: only a failure takes that long, however busy the machine is.
// It is well below DefaultRestartTime, so that what is to be withdrawn at once is not taken for what graceful restart ends.
const patience = 60 * time.Second

// await polls c's state until ok accepts it and returns how long that took.
func (c *child) await(what string, ok func(response) bool) time.Duration {
	c.t.Helper()
	start := time.Now()
	for {
		st := c.state()
		if ok(st) {
			return time.Since(start)
		}
		if time.Since(start) > patience {
			c.t.Fatalf("not within %v: %s; state %+v", patience, what, st)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// awaitRoutes waits until exactly these prefixes are known, each by its node.
func (c *child) awaitRoutes(want map[string]*node) time.Duration {
	c.t.Helper()
	return c.await(fmt.Sprintf("routes %v", want), func(st response) bool {
		if len(st.Best) != len(want) {
			return false
		}
		for p, n := range want {
			path, ok := st.Best[netip.MustParsePrefix(p)]
			if !ok || n != nil && (path.NextHop != n.addr || path.Peer != n.addr) {
				return false
			}
		}
		return true
	})
}
