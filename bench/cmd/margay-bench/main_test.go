package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"margay/bench/report"
	"margay/bench/rig"
	"margay/bench/suite"
)

// TestMain makes the test binary the benchmark itself when asked to; the benchmark starts itself as generator and sink.
func TestMain(m *testing.M) {
	if os.Getenv("MARGAY_TEST_BENCH") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func command(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "MARGAY_TEST_BENCH=1")
	return cmd
}

// left lists what is still there of the run of process pid: namespaces, directories, and processes in its namespaces.
func left(t *testing.T, pid int) []string {
	t.Helper()
	var found []string
	for _, pattern := range []string{"/run/netns/mgb%d-*", "/run/margay/bench/mgb%d"} {
		names, err := filepath.Glob(fmt.Sprintf(pattern, pid))
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, names...)
	}
	return append(found, processes(t, pid)...)
}

// processes lists the vrouters of the run, by the sockets in their command lines.
func processes(t *testing.T, pid int) (found []string) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range lines {
		if text, err := os.ReadFile(file); err == nil && bytes.Contains(text, fmt.Appendf(nil, "/mgb%d/", pid)) {
			found = append(found, string(bytes.ReplaceAll(text, []byte{0}, []byte{' '})))
		}
	}
	return found
}

func until(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// TestSmoke measures a little of every kind, ours and a peer's, and looks at what was written.
func TestSmoke(t *testing.T) {
	dir := t.TempDir()
	const window = "250ms" // on a busy machine some process of the path may not run at all in less
	cmd := command("--only", "vxlan+rps,tun", "--scenario", "tcp1,tcp1-off,rr,udp,udp-xdp,udp-lossless", "--rounds", "1",
		"--window", window, "--results", dir, "-o", "json")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	var r report.Report
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if len(r.Failures) > 0 {
		t.Errorf("failures: %+v", r.Failures)
	}
	for _, want := range []string{"tcp1", "tcp1-off", "rr", "udp", "udp-xdp", "udp-lossless"} {
		for _, path := range []string{"vxlan+rps", "tun"} {
			found := slices.ContainsFunc(r.Series, func(s suite.Series) bool {
				return s.Scenario == want && s.Path == path && s.Name != "loss" && s.Summary.N == 1 && s.Summary.Median > 0
			})
			if !found {
				t.Errorf("%s over %s was not measured", want, path)
			}
		}
	}
	if r.Alone["small"].Rate <= 0 || r.Alone["small"].Plain || r.Machine.Kernel == "" || !strings.HasPrefix(r.Ports["tun"], "vr0 by tun, packet ") {
		t.Errorf("alone %v, machine %+v, ports %v", r.Alone, r.Machine, r.Ports)
	}
	for _, name := range []string{"report.md", "report.json", "tcp1.svg", "tcp1.png"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	if lines := strings.Count(stderr.String(), "\n"); lines < 20 {
		t.Errorf("progress has %d lines: %s", lines, stderr.String())
	}
	if found := left(t, cmd.Process.Pid); len(found) > 0 {
		t.Errorf("left behind: %v", found)
	}
}

// TestInterrupted: after SIGINT nothing is left; after SIGKILL the processes are gone, and the next run sweeps the rest.
func TestInterrupted(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		cmd := command("--only", "tun", "--scenario", "tcp1", "--window", "1h")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		pid := cmd.Process.Pid
		until(t, "vrouters", func() bool { return len(processes(t, pid)) == 2 })
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		err := cmd.Wait()
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Errorf("%v: %v, %s", signal, err, stderr.String())
		}
		until(t, "processes end", func() bool { return len(processes(t, pid)) == 0 })
		if signal == syscall.SIGKILL {
			// The SIGKILL has left namespaces, which another package's test may have swept already.
			if _, err := rig.Sweep(); err != nil {
				t.Error(err)
			}
		}
		if found := left(t, pid); len(found) > 0 {
			t.Errorf("%v left behind: %v", signal, found)
		}
	}
}

// TestInterruptedKeeps: what was measured before SIGINT is printed, and in the files. A path that cannot be set up is a row with
// the reason and keeps nobody else from being measured.
func TestInterruptedKeeps(t *testing.T) {
	dir := t.TempDir()
	cmd := command("--only", "route,tun@/bin/false", "--scenario", "tcp1", "--rounds", "100000", "--window", "50ms", "--results", dir, "-o", "json")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := func() (r report.Report) {
		if text, err := os.ReadFile(filepath.Join(dir, "report.json")); err == nil {
			if err := json.Unmarshal(text, &r); err != nil {
				t.Fatalf("%v: %s", err, text)
			}
		}
		return r
	}
	until(t, "a report of what is measured so far", func() bool {
		r := read()
		return r.Outcome != nil && len(r.Series) > 0 && r.Partial != ""
	})
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(stderr.String(), "interrupted") {
		t.Errorf("%v, %s", err, stderr.String())
	}
	var printed report.Report
	if err := json.Unmarshal(stdout.Bytes(), &printed); err != nil {
		t.Fatalf("%v: %s", err, stdout.String())
	}
	for _, r := range []report.Report{printed, read()} {
		if !strings.Contains(r.Partial, "interrupted") || len(r.Series) == 0 || r.Series[0].Path != "route" {
			t.Errorf("%q, %+v", r.Partial, r.Series)
		}
		if len(r.Failures) != 2 || r.Failures[0].Path != "tun@/bin/false" || !strings.Contains(r.Failures[0].Error, "vrouter ended") && !strings.Contains(r.Failures[0].Error, "false ended") {
			t.Errorf("failures: %+v", r.Failures)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "tcp1.svg")); err != nil {
		t.Error(err)
	}
	if found := left(t, cmd.Process.Pid); len(found) > 0 {
		t.Errorf("left behind: %v", found)
	}
}

func TestCommandLine(t *testing.T) {
	for _, arg := range []string{"--version", "--help"} {
		out, err := command(arg).CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("margay-bench")) {
			t.Errorf("%s: %v, %s", arg, err, out)
		}
	}
	for _, c := range [][]string{
		{"--bogus", "unknown flag"},
		{"extra", "extra"},
		{"--only", "flannel", "expected wire, route"},
		{"--scenario", "tcp", "expected some of tcp1"},
		{"--output", "yaml", "expected table, markdown or json"},
		{"--within", "-1s", "expected a duration"},
		{"--rounds", "0", "expected at least 1"},
		{"--window", "1ms", "expected at least"},
		{"generator", "for the benchmark's own use"},
	} {
		cmd := command(c[:len(c)-1]...)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if want := c[len(c)-1]; !errors.As(err, &exit) || exit.ExitCode() != 1 || strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), want) {
			t.Errorf("%v: %v, %q: expected exit code 1 and one line with %q", cmd.Args[1:], err, out, want)
		}
	}
}
