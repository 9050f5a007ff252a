// Package fleet tests the commands of margayctl that ask many nodes against thousands of agents, some of them bad, and against a
// datastore that goes away meanwhile. The agents are a server of this package's; the datastore is an etcd in a process of its own.
package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"margay/ctl"
	"margay/datastore"
	"margay/datastore/embedded"
)

// inside is set in the environment of the process that runs the tests: it is in a network namespace of its own.
const inside = "MARGAY_FLEET_INSIDE"

// TestMain has the tests run in a network namespace of their own, which ends with them, and lets them execute margayctl and an
// etcd: this binary, under those names.
func TestMain(m *testing.M) {
	testscript.Main(tests{m}, map[string]func(){
		"margayctl": func() {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM) // as cmd/margayctl has it
			context.AfterFunc(ctx, stop)                                                           // a second signal ends at once what the first one does not
			code := ctl.Main(ctx, os.Args[1:], os.Stderr)
			stop()
			os.Exit(code)
		},
		"etcd": func() { os.Exit(serveEtcd(os.Args[1], os.Args[2])) },
	})
}

type tests struct{ m *testing.M }

func (t tests) Run() int {
	if os.Getenv(inside) != "" {
		return t.m.Run()
	}
	runtime.LockOSThread() // the process below lives as long as this thread
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	cmd := exec.Command(self, append(os.Args[1:], "-test.parallel=4")...) // they wait most of their time
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() > 0 {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// serveEtcd serves on a URL, and says on standard output that it does, until its standard input ends, as it does with the tests.
func serveEtcd(dir, url string) int {
	ctx, cancel := context.WithCancel(context.Background())
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); cancel() }()
	err := embedded.Serve(ctx, embedded.Config{Dir: dir, ClientURLs: []string{url}, NoSync: true, Ready: func(urls []string) { fmt.Println(urls[0]) }})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// etcd is a server that can be killed, frozen and started again.
type etcd struct {
	dir, url string
	process  *exec.Cmd
	stdin    io.Closer
}

func startEtcd(t *testing.T) *etcd {
	t.Helper()
	e := &etcd{dir: t.TempDir(), url: "http://127.0.0.1:0"}
	e.start(t)
	t.Cleanup(func() { e.kill() })
	return e
}

// start returns when the server answers.
func (e *etcd) start(t *testing.T) {
	t.Helper()
	e.process = exec.Command("etcd", e.dir, e.url)
	e.process.Stderr = os.Stderr
	in, err := e.process.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := e.process.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.process.Start(); err != nil {
		t.Fatal(err)
	}
	e.stdin = in
	var line [256]byte
	n, err := out.Read(line[:])
	if err != nil {
		t.Fatalf("etcd: %v", err)
	}
	e.url = strings.TrimSpace(string(line[:n]))
}

func (e *etcd) kill() {
	_ = e.process.Process.Kill()
	_ = e.process.Wait()
	_ = e.stdin.Close()
}

func (e *etcd) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := e.process.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

func (e *etcd) open(t *testing.T) *datastore.Store {
	t.Helper()
	s, err := datastore.Open(t.Context(), datastore.Config{Endpoints: []string{e.url}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// buffer collects what a command prints, while it runs.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// command is a margayctl that runs.
type command struct {
	*exec.Cmd
	began     time.Time
	out, errs buffer
	ended     chan struct{} // closed when it has
	took      time.Duration
}

// files is how many files a margayctl of these tests may open.
const files = 1024

// margayctl starts one.
func (e *etcd) margayctl(t *testing.T, args ...string) *command {
	t.Helper()
	// A shell lowers the limit, hard and soft: Go raises the soft one by itself.
	return e.run(t, exec.Command("sh", append([]string{"-c", fmt.Sprintf(`ulimit -n %d && exec margayctl "$@"`, files), "margayctl"}, args...)...))
}

func (e *etcd) run(t *testing.T, process *exec.Cmd) *command {
	t.Helper()
	c := &command{Cmd: process, began: time.Now(), ended: make(chan struct{})}
	c.Env = append(os.Environ(), "DATASTORE_TYPE=etcdv3", "ETCD_ENDPOINTS="+e.url, "MARGAY_RUN_DIR="+t.TempDir())
	if c.Stdout == nil {
		c.Stdout = &c.out
	}
	c.Stderr = &c.errs
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = c.Wait(); c.took = time.Since(c.began); close(c.ended) }()
	t.Cleanup(func() {
		_ = c.Process.Kill()
		<-c.ended
	})
	return c
}

// patience is how long anything is awaited: far longer than it takes.
const patience = 2 * time.Minute

// end waits for the end, and returns the exit status.
func (c *command) end(t *testing.T) int {
	t.Helper()
	select {
	case <-c.ended:
	case <-time.After(patience):
		t.Fatalf("%v has not ended; it has printed %q and %q", c.Args, c.out.String(), c.errs.String())
	}
	return c.ProcessState.ExitCode()
}

// memory is the most that it had, in bytes.
func (c *command) memory() int64 { return c.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10 }

func (c *command) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := c.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// until waits for a condition.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %s in vain for %s", patience, what)
		}
	}
}
