package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"margay/bench/report"
	"margay/bench/rig"
	"margay/bench/suite"
)

// wireguardModule is built as a tool, in a version that stays the same until someone raises it here.
const (
	wireguardModule  = "golang.zx2c4.com/wireguard"
	wireguardVersion = "v0.0.0-20260522210424-ecfc5a8d5446"
)

// tools are the programs that a run needs.
type tools struct {
	rig.Options
	dir string
}

func (t *tools) remove() error { return os.RemoveAll(t.dir) }

// build builds what the paths need and is not named by a flag; nothing where no scenario has a network.
func (o *options) build(ctx context.Context, stderr io.Writer, paths []rig.Path, scenarios []suite.Scenario) (_ *tools, err error) {
	t := &tools{Options: rig.Options{VRouter: o.vrouter, WireGuard: o.wireguard}}
	if t.Self, err = os.Executable(); err != nil {
		return nil, err
	}
	if t.dir, err = os.MkdirTemp("", "margay-bench-"); err != nil {
		return nil, err
	}
	network := slices.ContainsFunc(scenarios, func(s suite.Scenario) bool { return s.Measure != nil })
	needs := func(kind string) bool {
		return network && slices.ContainsFunc(paths, func(p rig.Path) bool { return p.Kind == kind })
	}
	if t.VRouter == "" && needs(rig.KindVRouter) {
		fmt.Fprintln(stderr, "building vrouter")
		t.VRouter = filepath.Join(t.dir, "vrouter")
		err = run(ctx, nil, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", t.VRouter, "margay/cmd/vrouter")
		if err != nil {
			err = fmt.Errorf("build vrouter (name one by --vrouter, or stand in the checkout): %w", err)
		}
	}
	if err == nil && t.WireGuard == "" && needs(rig.KindWireGuard) {
		fmt.Fprintln(stderr, "building wireguard-go")
		t.WireGuard = filepath.Join(t.dir, "wireguard")
		err = run(ctx, []string{"GOBIN=" + t.dir}, "go", "install", wireguardModule+"@"+wireguardVersion)
		if err != nil {
			err = fmt.Errorf("build wireguard-go (name one by --wireguard, or leave the path out by --only): %w", err)
		}
	}
	if err != nil {
		return nil, errors.Join(err, t.remove())
	}
	return t, nil
}

// run runs a command with more in its environment; its output becomes part of the error.
func run(ctx context.Context, env []string, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// thisMachine describes the machine.
func thisMachine() (report.Machine, error) {
	m := report.Machine{Processor: "unknown processor", Processors: runtime.NumCPU(), Go: runtime.Version()}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, fmt.Errorf("uname: %w", err)
	}
	m.Kernel = unix.ByteSliceToString(u.Release[:])
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			m.Processor = strings.TrimSpace(value)
			break
		}
	}
	return m, nil
}
