package cluster

import (
	"bufio"
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// dropsOf is `margayctl drops -o json`.
type dropsOf struct {
	Drops []struct {
		Node, By, Reason string
		Packets          uint64
		Flows            []struct {
			SourcePod, Source, Destination, SentBy string
			Packets                                uint64
		}
		Sample *struct{ Decoded string }
	}
	Errors map[string]string
}

func drops(t *testing.T, args ...string) (d dropsOf) {
	t.Helper()
	out := in(t, node(t, 3).Netns, append([]string{"margayctl", "drops", "-o", "json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &d); err != nil {
		t.Fatalf("drops: %v\n%s", err, out)
	}
	return d
}

// TestDropsNamePodAndPacket has a pod send where no route leads, and the kernel refuse a spoofed source.
func TestDropsNamePodAndPacket(t *testing.T) {
	n1 := node(t, 1)
	pod := n1.Pods[0]
	const nowhere = "10.244.255.254" // in the pool, in no block
	var by uint64                    // the pod, of the spoofed ones
	count := func() (packets uint64, flows uint64, sample string, spoofed uint64) {
		by = 0
		for _, d := range drops(t, "--node", n1.Name).Drops {
			switch {
			case d.By == "vrouter" && d.Reason == "no_route":
				packets = d.Packets
				if d.Sample != nil {
					sample = d.Sample.Decoded
				}
				for _, f := range d.Flows {
					if f.SourcePod == pod.Name && f.Destination == nowhere {
						flows += f.Packets
					}
				}
			case d.By == "kernel" && d.Reason == "spoofed":
				spoofed = d.Packets
				for _, f := range d.Flows {
					if f.Source == "10.99.0.1" && strings.HasPrefix(f.SentBy, pod.Name+" (") {
						by += f.Packets
					}
				}
			}
		}
		return packets, flows, sample, spoofed
	}
	direct := strings.HasPrefix(os.Getenv("MARGAY_TEST_ATTACH"), "direct")
	before, flowsBefore, _, spoofedBefore := count()
	byBefore := by
	_, _ = tryIn(pod.Netns, "ping", "-n", "-c", "5", "-i", "0.2", "-W", "1", nowhere)
	in(t, pod.Netns, "ip", "address", "add", "10.99.0.1/32", "dev", "lo")
	_, _ = tryIn(pod.Netns, "ping", "-n", "-c", "3", "-i", "0.2", "-W", "1", "-I", "10.99.0.1", ip(t, node(t, 2).Pods[0].Address).String())
	in(t, pod.Netns, "ip", "address", "del", "10.99.0.1/32", "dev", "lo")
	var after, flowsAfter, spoofed uint64
	var sample string
	until(t, "the drops to be counted", func() bool {
		after, flowsAfter, sample, spoofed = count()
		return flowsAfter >= flowsBefore+5 && (direct || spoofed >= spoofedBefore+3)
	})
	if after-before < 5 || flowsAfter-flowsBefore != 5 {
		t.Errorf("5 packets to %s: %d drops for no_route, %d of them from the pod", nowhere, after-before, flowsAfter-flowsBefore)
	}
	if !strings.Contains(sample, "> "+nowhere+": ICMP echo request") {
		t.Errorf("sample %q", sample)
	}
	if !direct && spoofed-spoofedBefore != 3 {
		t.Errorf("3 packets with another's address: the kernel counts %d", spoofed-spoofedBefore)
	}
	if !direct && by-byBefore != 3 {
		t.Errorf("3 packets with another's address: %d are the pod's", by-byBefore)
	}
	for _, d := range drops(t, "--pod", node(t, 2).Pods[1].Name).Drops {
		t.Errorf("of a pod that lost nothing: %+v", d)
	}
	if text := in(t, node(t, 3).Netns, "margayctl", "drops", "--node", n1.Name); !strings.Contains(text, "from "+pod.Name+" (") {
		t.Errorf("%s", text)
	}
	if byCounter := drops(t, "--node", n1.Name, "--reason", "drop_no_route").Drops; len(byCounter) != 1 || byCounter[0].Reason != "no_route" {
		t.Errorf("a reason named as its counter: %+v", byCounter)
	}
	if text := in(t, node(t, 3).Netns, "margayctl", "drops", "--reason", "no_rout"); !strings.Contains(text, `for the reason "no_rout"; there are drops for `) || !strings.Contains(text, "no_route") {
		t.Errorf("a reason that is none: %s", text)
	}
}

// TestAddressOfNoPod: what goes to an address of a node's block that no pod has, from this node and from another, is counted, and
// its sender is told: that, and no more.
func TestAddressOfNoPod(t *testing.T) {
	n1 := node(t, 1)
	redirects := func() string { return in(t, n1.Netns, "nstat", "-asz", "IcmpOutRedirects") }
	redirected := redirects()
	last := ip(t, n1.Pods[0].Address).As4()
	last[3] |= 62 // of a block of 64, far behind those that were given out
	nobody := netip.AddrFrom4(last).String()
	for _, pod := range []labPod{n1.Pods[0], node(t, 2).Pods[0]} {
		counted := func() (packets uint64, sample string) {
			for _, d := range drops(t, "--node", n1.Name).Drops {
				if d.By != "vrouter" || d.Reason != "no_pod" {
					continue
				}
				for _, f := range d.Flows {
					if f.SourcePod == pod.Name && f.Destination == nobody {
						packets += f.Packets
					}
				}
				if d.Sample != nil {
					sample = d.Sample.Decoded
				}
			}
			return packets, sample
		}
		before, _ := counted()
		if out, err := tryIn(pod.Netns, "ping", "-n", "-c", "3", "-i", "0.2", "-W", "5", nobody); err == nil || !strings.Contains(out, "Destination Host Unreachable") {
			t.Errorf("%s is told nothing: %v\n%s", pod.Name, err, out)
		}
		var packets uint64
		var sample string
		until(t, "the drops of "+pod.Name+"'s packets to be counted", func() bool {
			packets, sample = counted()
			return packets >= before+3
		})
		if packets != before+3 || !strings.Contains(sample, "> "+nobody+": ICMP echo request") {
			t.Errorf("%s sent 3 packets to %s: %d drops for no_pod, a sample of which is %q", pod.Name, nobody, packets-before, sample)
		}
		trace, err := tryIn(node(t, 3).Netns, "margayctl", "trace", pod.Name, nobody)
		if first, _, _ := strings.Cut(trace, "\n"); err == nil || !strings.Contains(first, "at "+n1.Name+", vrouter, ") || !strings.Contains(first, "no pod has it") {
			t.Errorf("trace: %v\n%s", err, trace)
		}
	}
	if now := redirects(); now != redirected {
		t.Errorf("the kernel has sent ICMP redirects: %s, and before %s", now, redirected)
	}
}

// TestDropsWithoutAVRouter: the node is named, and the kernel's losses are there all the same.
func TestDropsWithoutAVRouter(t *testing.T) {
	n2 := node(t, 2)
	kill(t, n2.PIDs["vrouter"])
	t.Cleanup(func() { settled(t, n2) })
	t.Cleanup(func() { mustCtl(t, "lab", "restart", "--name", labName, n2.Name, "vrouter") })
	out, err := tryIn(node(t, 3).Netns, "margayctl", "drops")
	if err == nil || !strings.Contains(out, n2.Name+": vrouter at ") || !strings.Contains(out, "not reachable") {
		t.Errorf("%v\n%s", err, out)
	}
}

// started is a margayctl that runs until it is told to end.
type started struct {
	cmd   *exec.Cmd
	lines chan string // of standard output
	ready chan struct{}
}

// start runs margayctl on the third node and waits until it says on standard error that it is under way.
func start(t *testing.T, sign string, args ...string) *started {
	t.Helper()
	s := &started{lines: make(chan string, 1000), ready: make(chan struct{})}
	s.cmd = exec.Command("ip", append([]string{"netns", "exec", node(t, 3).Netns, filepath.Join(bin, "margayctl")}, args...)...)
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := s.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill() // no more than a process that a failed test has left
		_ = s.cmd.Wait()
	})
	go func() {
		defer close(s.lines)
		for sc := bufio.NewScanner(stdout); sc.Scan(); {
			s.lines <- sc.Text()
		}
	}()
	go func() {
		open := true
		for sc := bufio.NewScanner(stderr); sc.Scan(); {
			if open && strings.Contains(sc.Text(), sign) {
				open = false
				close(s.ready)
			}
		}
	}()
	select {
	case <-s.ready:
	case <-time.After(patience):
		t.Fatalf("margayctl %s: it never said %q", strings.Join(args, " "), sign)
	}
	return s
}

// line waits for a line with text.
func (s *started) line(t *testing.T, text string) string {
	t.Helper()
	for limit := time.After(patience); ; {
		select {
		case l, ok := <-s.lines:
			if !ok {
				t.Fatalf("the output ended without %q", text)
			}
			if strings.Contains(l, text) {
				return l
			}
		case <-limit:
			t.Fatalf("no line with %q", text)
		}
	}
}

// interrupt is Ctrl-C.
func (s *started) interrupt(t *testing.T) {
	t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	for range s.lines {
	}
	if err := s.cmd.Wait(); err != nil {
		t.Errorf("after SIGINT: %v", err)
	}
}

func TestDropsWatch(t *testing.T) {
	pod := node(t, 1).Pods[0]
	w := start(t, "watching", "drops", "--watch", "--interval", "200ms")
	stop := pinging(pod.Netns, netip.MustParseAddr("10.244.255.253"))
	l := w.line(t, "> 10.244.255.253")
	stop()
	if !strings.Contains(l, node(t, 1).Name+" no_route: "+ip(t, pod.Address).String()+" > ") {
		t.Errorf("%s", l)
	}
	w.interrupt(t)
}

// TestDropsWatchJSON has the kernel's counters in its lines, too.
func TestDropsWatchJSON(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	pod := n1.Pods[0]
	w := start(t, "watching", "drops", "--watch", "-o", "json", "--interval", "200ms", "--reason", "spoofed")
	in(t, pod.Netns, "ip", "address", "add", "10.99.0.2/32", "dev", "lo")
	t.Cleanup(func() { in(t, pod.Netns, "ip", "address", "del", "10.99.0.2/32", "dev", "lo") })
	_, _ = tryIn(pod.Netns, "ping", "-n", "-c", "2", "-i", "0.2", "-W", "1", "-I", "10.99.0.2", ip(t, n2.Pods[0].Address).String())
	by := `"by":"kernel","reason":"spoofed","packets":`
	if strings.HasPrefix(os.Getenv("MARGAY_TEST_ATTACH"), "direct") {
		by = `"reason":"spoofed"` // the vRouter refuses it there, and gives a sample
	}
	if l := w.line(t, by); !strings.Contains(l, `"node":"`+n1.Name+`"`) || !json.Valid([]byte(l)) {
		t.Errorf("%s", l)
	}
	w.interrupt(t)
}

// TestCapture captures one pod's packets into a file, live, and reads what tshark makes of it.
func TestCapture(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	from, to := n1.Pods[0], n2.Pods[0]
	file := filepath.Join(t.TempDir(), "pod.pcapng")
	toFile := start(t, "capturing", "capture", from.Name, "icmp", "-w", file)
	live := start(t, "capturing", "capture", "any", "icmp and host", ip(t, to.Address).String())
	other := start(t, "capturing", "capture", n2.Pods[1].Name)

	if !answers(from.Netns, ip(t, to.Address)) {
		t.Fatal("the pods do not reach each other")
	}
	_, _ = tryIn(from.Netns, "ping", "-n", "-c", "1", "-W", "1", "10.244.255.252")
	live.line(t, "ICMP echo request")
	live.line(t, "ICMP echo reply")
	live.interrupt(t)

	var out string
	until(t, "the packets to be in the file", func() bool {
		b, err := exec.Command("tshark", "-r", file, "-T", "fields", "-e", "frame.interface_name", "-e", "icmp.type", "-e", "ip.dst", "-e", "frame.comment").Output()
		out = string(b)
		return err == nil && strings.Contains(out, "10.244.255.252")
	})
	toFile.interrupt(t)
	rows := strings.Split(strings.TrimSpace(out), "\n")
	if len(rows) != 3 {
		t.Fatalf("expected request, reply, and the packet that got lost:\n%s", out)
	}
	gateway := ip(t, n2.Address).String()
	for i, want := range []string{"\t8\t" + ip(t, to.Address).String() + "\tforwarded in IP-in-IP to " + gateway,
		"\t0\t" + ip(t, n1.Address).String() + "," + ip(t, from.Address).String() + "\tforwarded",
		"\t8\t10.244.255.252\tdropped: no_route"} {
		if !strings.Contains(rows[i], want) || !strings.HasPrefix(rows[i], n1.Name+"/") {
			t.Errorf("row %d: %q: expected %q", i, rows[i], want)
		}
	}
	if info, err := exec.Command("capinfos", file).CombinedOutput(); err != nil || !strings.Contains(string(info), "Number of packets = 3") && !strings.Contains(string(info), "Number of packets:   3") {
		t.Errorf("capinfos: %v\n%s", err, info)
	}
	other.interrupt(t)
	if l, ok := <-other.lines; ok {
		t.Errorf("another pod's capture has %q", l)
	}
}

// TestCaptureToAPipe: "-w -" is a stream that tshark reads, and -c ends it.
func TestCaptureToAPipe(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	defer pinging(n1.Pods[0].Netns, ip(t, n2.Pods[0].Address))()
	words := filepath.Join(t.TempDir(), "words")
	out := in(t, node(t, 3).Netns, "sh", "-c", "{ margayctl capture "+n2.Name+" icmp -c 3 -w - | tshark -r - -T fields -e frame.comment; } 2>"+words)
	if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != 3 || !strings.HasPrefix(lines[0], "forwarded") {
		said, _ := os.ReadFile(words) // the shell has made it
		t.Errorf("%q; on standard error: %s", out, said)
	}
}

// TestCaptureGoesOnAfterARestart: another node's agent is restarted, and with it its certificate is another.
func TestCaptureGoesOnAfterARestart(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	live := start(t, "capturing", "capture", n1.Name, "icmp")
	mustCtl(t, "lab", "restart", "--name", labName, "node1", "agent")
	settled(t, n1)
	// Nobody has pinged this pod before.
	to := ip(t, n2.Pods[1].Address)
	defer pinging(n1.Pods[1].Netns, to)()
	live.line(t, ip(t, n1.Pods[1].Address).String()+" > "+to.String()+": ICMP echo request")
}

func TestCaptureRefuses(t *testing.T) {
	n1 := node(t, 1)
	for want, args := range map[string][]string{
		`"prot" at character 5`:              {"any", "tcp prot 80"},
		"is no address, no node, and no pod": {"nobody"},
		"with --socket expected any":         {n1.Name, "--socket", "/nowhere"},
		"not reachable":                      {"any", "--socket", "/nowhere"},
	} {
		if out, err := tryIn(n1.Netns, append([]string{"margayctl", "capture"}, args...)...); err == nil || !strings.Contains(out, want) {
			t.Errorf("%v: %v, %s: expected %q", args, err, out, want)
		}
	}
}
