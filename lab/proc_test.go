package lab

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// sleeper starts a process that ends only when it is told to, and reaps it.
func sleeper(t *testing.T, argv ...string) Process {
	t.Helper()
	if len(argv) == 0 {
		argv = []string{"sleep", "600"}
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{})
	go func() { _ = cmd.Wait(); close(gone) }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-gone })
	p, err := identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestStopEndsAProcess(t *testing.T) {
	for _, grace := range []time.Duration{0, 5 * time.Second} {
		p := sleeper(t)
		if !p.Alive() {
			t.Fatal("a running process is not alive")
		}
		if err := p.stop(t.Context(), grace); err != nil {
			t.Fatal(err)
		}
		if p.Alive() {
			t.Errorf("grace %v: alive after stop", grace)
		}
		if err := p.stop(t.Context(), grace); err != nil {
			t.Errorf("a second stop: %v", err)
		}
	}
}

func TestStopKillsWhoIgnoresTheSignal(t *testing.T) {
	trapped := t.TempDir() + "/trapped"
	p := sleeper(t, "sh", "-c", "trap '' TERM; touch "+trapped+"; while :; do sleep 0.05; done")
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if _, err := os.Stat(trapped); err == nil {
			break
		}
	}
	if err := p.stop(t.Context(), 200*time.Millisecond); err != nil || p.Alive() {
		t.Errorf("stop: %v, alive: %v", err, p.Alive())
	}
}

// A recycled process id is another process: it is neither alive nor ever signalled.
func TestRecycledPIDIsNeverKilled(t *testing.T) {
	p := sleeper(t)
	stale := Process{PID: p.PID, Started: p.Started - 1}
	if stale.Alive() {
		t.Error("a process of another start time passes for alive")
	}
	if _, err := stale.open(); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("open: %v", err)
	}
	if err := stale.stop(context.Background(), 0); err != nil {
		t.Error(err)
	}
	if !p.Alive() {
		t.Error("the innocent process is dead")
	}
}

func TestAliveOfNoProcess(t *testing.T) {
	for _, p := range []Process{{}, {PID: -1}, {PID: 1 << 30}} {
		if p.Alive() || p.stop(t.Context(), 0) != nil {
			t.Errorf("%+v", p)
		}
	}
	if !self().Alive() {
		t.Error("we are not alive")
	}
}

func TestZombieIsDead(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	p, err := identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.stop(t.Context(), 5*time.Second); err != nil { // pidfd says so without anybody reaping it
		t.Fatal(err)
	}
	if p.Alive() {
		t.Error("a zombie passes for alive")
	}
}

func TestCommandNameMayHoldAnything(t *testing.T) {
	dir := t.TempDir()
	path := dir + "/a) Z 1 (b"
	b, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if p := sleeper(t, path, "600"); !p.Alive() || p.Started == 0 {
		t.Errorf("%+v is not alive", p)
	}
}

func TestDaemonThatEndsIsReportedWithItsLastWords(t *testing.T) {
	log := t.TempDir() + "/logs/d.log"
	c, err := daemon{netns: ownNetNS, argv: []string{"/bin/sh", "-c", "echo one; echo the reason >&2; exit 3"}, log: log}.start()
	if err != nil {
		t.Fatal(err)
	}
	err = await(t.Context(), c, "d", func(context.Context) error { return errors.New("not yet") })
	if want := "d: sh ended (exit status 3): the reason; its log: " + log; err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestCleanEnv(t *testing.T) {
	t.Setenv("ETCD_ENDPOINTS", "http://elsewhere:2379")
	t.Setenv("NODENAME", "x")
	for _, kv := range cleanEnv() {
		if kv == "NODENAME=x" || kv == "ETCD_ENDPOINTS=http://elsewhere:2379" {
			t.Errorf("%s is handed on", kv)
		}
	}
}

func TestAncestorsAreSpared(t *testing.T) {
	a := ancestors()
	if !a[os.Getpid()] || !a[syscall.Getppid()] {
		t.Errorf("%v lacks us or our parent", a)
	}
}
