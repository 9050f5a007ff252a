package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// maxCaptures is how many captures a vRouter runs at once.
const maxCaptures = 8

// TestCapturesEnd: one capture too many is refused, and those that end in whatever way, with their margayctl or with the agent, make
// room for others.
func TestCapturesEnd(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	defer pinging(n1.Pods[0].Netns, ip(t, n2.Pods[0].Address))()
	var running []*started
	for range maxCaptures {
		running = append(running, start(t, "capturing", "capture", n1.Name, "udp port 9")) // which nobody sends
	}
	one := func() (string, error) {
		return tryIn(node(t, 3).Netns, "margayctl", "capture", n1.Name, "icmp", "-c", "1")
	}
	if out, err := one(); err == nil || !strings.Contains(out, fmt.Sprintf("too many captures are running: %d: stop one", maxCaptures)) {
		t.Errorf("with %d captures one more: %v\n%s", maxCaptures, err, out)
	}
	if err := running[0].cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	until(t, "room for another capture after one was killed", func() bool { _, err := one(); return err == nil })

	running = append(running, start(t, "capturing", "capture", n1.Name, "udp port 9"))
	local := func() (string, error) {
		return tryIn(n1.Netns, "margayctl", "capture", "any", "icmp", "-c", "1", "--socket", filepath.Join(runDir(n1), "vrouter.sock"))
	}
	if out, err := local(); err == nil || !strings.Contains(out, "too many captures") {
		t.Errorf("of the vRouter itself, with %d captures by the agent: %v\n%s", maxCaptures, err, out)
	}
	kill(t, n1.PIDs["agent"])
	t.Cleanup(func() { settled(t, n1) })
	t.Cleanup(func() { mustCtl(t, "lab", "restart", "--name", labName, n1.Name, "agent") })
	until(t, "room for another capture after the agent was killed", func() bool { _, err := local(); return err == nil })
	for _, s := range running[1:] { // which ask for the agent: none is to find it
		if err := s.cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = s.cmd.Wait()
	}
}

// TestCaptureHoldsUpNobody: a margayctl that stands still while packets pass holds up none of them, and says when it goes on how many
// it has not got: every packet is shown or counted.
func TestCaptureHoldsUpNobody(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	pod, to := n1.Pods[0], ip(t, n2.Pods[0].Address)
	// Packets that find room are many megabytes in sockets and pipes on the way.
	const flood, size = 15_000, 1300
	dir := t.TempDir()
	words, shown := filepath.Join(dir, "words"), filepath.Join(dir, "shown")
	var files [2]*os.File
	for i, name := range []string{shown, words} {
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[i] = f
	}
	text := func(name string) string {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	c := exec.Command("ip", "netns", "exec", n1.Netns, filepath.Join(bin, "margayctl"), "capture", pod.Name, "icmp and host "+to.String())
	c.Stdout, c.Stderr = files[0], files[1]
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Process.Kill(); _ = c.Wait() }()
	until(t, "the capture to run", func() bool { return strings.Contains(text(words), "capturing") })
	if err := c.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ping := func(args ...string) (sent, received int) {
		t.Helper()
		out, err := tryIn(pod.Netns, append([]string{"ping", "-n"}, append(args, to.String())...)...)
		m := regexp.MustCompile(`(\d+) packets transmitted, (\d+) received`).FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("ping: %v\n%s", err, out)
		}
		sent, _ = strconv.Atoi(m[1])
		received, _ = strconv.Atoi(m[2])
		return sent, received
	}
	sent, received := ping("-q", "-f", "-c", strconv.Itoa(flood), "-s", strconv.Itoa(size))
	if sent < flood || received < sent*9/10 {
		t.Errorf("while nobody read the capture, %d of %d packets were answered", received, sent)
	}
	if err := c.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	until(t, "what passes now to be shown", func() bool {
		s, r := ping("-c", "1", "-s", "99", "-W", "1")
		sent, received = sent+s, received+r
		return strings.Contains(text(shown), "length 127")
	})
	if err := c.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait() // the status is looked at
	said := text(words)
	lost := 0
	if m := regexp.MustCompile(`(\d+) packets were lost for want of room`).FindStringSubmatch(said); m != nil {
		lost, _ = strconv.Atoi(m[1])
	}
	lines := strings.Count(text(shown), "\n")
	if lost == 0 || lines == 0 || !strings.Contains(said, fmt.Sprintf("%d packets captured", lines)) || c.ProcessState.ExitCode() != 0 {
		t.Errorf("status %d, %d lines: %s", c.ProcessState.ExitCode(), lines, said)
	}
	// Of what was not answered it is not known whether, and how often, the vRouter had it. The last ones may be on their way at the end.
	const late = 10
	unanswered := sent - received
	if all := lines + lost; all < sent+received-unanswered-late || all > sent+received+unanswered {
		t.Errorf("%d shown and %d lost of %d packets and %d answers", lines, lost, sent, received)
	}
	t.Logf("%d sent, %d answered, %d shown, %d lost", sent, received, lines, lost)
}
