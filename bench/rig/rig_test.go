package rig

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParsePath(t *testing.T) {
	for text, want := range map[string]Path{
		"wire":            {Kind: KindWire},
		"vxlan":           {Kind: KindVXLAN},
		"vxlan+rps":       {Kind: KindVXLAN, RPS: true},
		"direct+xdp":      {Kind: KindVRouter, Attach: "direct", IO: "xdp"},
		"direct+tc":       {Kind: KindVRouter, Attach: "direct", IO: "tc"},
		"veth+packet":     {Kind: KindVRouter, Attach: "veth", IO: "packet"},
		"tun+nobpf":       {Kind: KindVRouter, Attach: "tun", NoBPF: true},
		"tun@/tmp/a@b":    {Kind: KindVRouter, Attach: "tun", Binary: "/tmp/a@b"},
		"tun+nobpf@/a/vr": {Kind: KindVRouter, Attach: "tun", NoBPF: true, Binary: "/a/vr"},
	} {
		want.Name = text
		got, err := ParsePath(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", text, diff)
		}
	}
	for _, text := range []string{"", "flannel", "vxlan+xdp", "tun+rps", "tun+", "tun+xdp+packet", "vxlan@/a", "tun@", "+rps"} {
		if p, err := ParsePath(text); err == nil || !strings.Contains(err.Error(), "expected") {
			t.Errorf("%q: %+v, %v: expected an error that says what was expected", text, p, err)
		}
	}
}

func TestCPUMask(t *testing.T) {
	for list, want := range map[string]string{"0": "1", "0-1": "3", "0-3,6": "4f", "0-31": "ffffffff", "0-32": "1,ffffffff", "0-127": "ffffffff,ffffffff"} {
		if got, err := cpuMask(list); got != want || err != nil {
			t.Errorf("%s: %q, %v: expected %q", list, got, err, want)
		}
	}
	if _, err := cpuMask("all"); err == nil {
		t.Error("all: expected an error")
	}
}

func TestParseMachine(t *testing.T) {
	got, err := parseMachine([]byte("cpu  100 10 30 1000 50 0 7 3 0 0\ncpu0 1 2 3\n"))
	if want := (machine{idle: 10530 * time.Millisecond, user: 1100 * time.Millisecond}); got != want || err != nil {
		t.Errorf("%+v, %v: expected %+v", got, err, want)
	}
	for _, text := range []string{"", "cpu 1 2 3\n", "intr 1 2 3 4 5 6 7 8\n", "cpu a b c d e f g h\n"} {
		if _, err := parseMachine([]byte(text)); err == nil {
			t.Errorf("%q: expected an error", text)
		}
	}
}

func TestParseStat(t *testing.T) {
	tail := "S %d 1 1 0 -1 0 0 0 0 0 150 25 0 0 20 0 1 0"
	for text, want := range map[string]process{
		"42 (a) b) " + fmt.Sprintf(tail, 1):     {42, 1500 * time.Millisecond, 250 * time.Millisecond, false},
		"9 (ksoftirqd) " + fmt.Sprintf(tail, 2): {9, 1500 * time.Millisecond, 250 * time.Millisecond, true},
		"2 (kthreadd) " + fmt.Sprintf(tail, 0):  {2, 1500 * time.Millisecond, 250 * time.Millisecond, true},
	} {
		if got, err := parseStat([]byte(text)); got != want || err != nil {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "42 S 1", "42 (a) S 1", "x (a) " + fmt.Sprintf(tail, 1)} {
		if _, err := parseStat([]byte(text)); err == nil {
			t.Errorf("%q: expected an error", text)
		}
	}
	text, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	if p, err := parseStat(text); err != nil || p.pid != os.Getpid() || p.kernel {
		t.Errorf("this process: %+v, %v", p, err)
	}
}

// TestMeter: a window in which this process works counts for it, and not as somebody else's.
func TestMeter(t *testing.T) {
	m, err := StartMeter(os.Getpid(), os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	before, err := processTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for used := before; used-before < 50*time.Millisecond; {
		if used, err = processTime(os.Getpid()); err != nil {
			t.Fatal(err)
		}
	}
	c, err := m.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if c.Source < 50*time.Millisecond || c.Wall < 50*time.Millisecond/time.Duration(mustProcessors(t)) || c.Machine < 0 {
		t.Errorf("%+v", c)
	}
}

func mustProcessors(t *testing.T) int {
	n, err := processors()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestPerPacket(t *testing.T) {
	c := CPU{Machine: time.Second, Foreign: 100 * time.Millisecond, Sent: 1000, Received: 500}
	if got := c.PerPacket(100_000); got != 1_600_000 {
		t.Errorf("%v: expected (0.9 s - 1000 × 100 µs) / 500", got)
	}
	if got := (CPU{}).PerPacket(1); got != 0 {
		t.Errorf("of nothing: %v", got)
	}
}

// TestSweep: what belongs to processes that are no more goes, and nothing else. A benchmark that another package's test runs at
// the same time may sweep it first, so only what is left tells.
func TestSweep(t *testing.T) {
	run := runName(os.Getpid())
	dead := "mgb4194304" // above the highest process id there can be
	s, err := newSpace(dead + "-wire1-pod1")
	if err != nil {
		t.Fatal(err)
	}
	own, err := newSpace(run + "-test")
	if err != nil {
		t.Fatal(err)
	}
	defer own.close()
	close(s.run) // as a killed process does
	dir := filepath.Join(runDirs, dead)
	if err := os.MkdirAll(filepath.Join(dir, "node1"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Sweep(); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/run/netns/" + s.Name, dir} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s: %v: expected to be swept", path, err)
		}
	}
	if _, err := os.Stat("/run/netns/" + own.Name); err != nil {
		t.Errorf("a namespace of a living process: %v", err)
	}
}
