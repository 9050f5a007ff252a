package fleet

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// everyFiftieth is bad, in all ways in turn.
func everyFiftieth(i int) character {
	if i%50 != 7 {
		return good
	}
	return character(i/50)%(other) + 1
}

// those returns the names of the first n agents that are like something.
func (a *agents) those(n int, like ...character) (names []string) {
	for i := 0; i < a.n && len(names) < n; i++ {
		for _, c := range like {
			if a.like(i) == c {
				names = append(names, name(i))
			}
		}
	}
	return names
}

// says is what has to be said about an agent that is like that.
var says = map[character]string{
	dead: "connection refused", silent: "does not answer", mute: "does not answer within", liar: "not what this version expects",
	flood: "longer than", other: "another certificate",
}

// TestThousands asks 5,000 nodes, 100 of which are bad, by a margayctl that may open no more files than most may.
func TestThousands(t *testing.T) {
	t.Parallel()
	const n = 5000
	e := startEtcd(t)
	a := startAgents(t, e, n, everyFiftieth)
	t.Run("commands", func(t *testing.T) {
		t.Run("drops", func(t *testing.T) { t.Parallel(); dropsOfAll(t, e, a) })
		t.Run("errors", func(t *testing.T) { t.Parallel(); fewErrors(t, e, a) })
		t.Run("watch", func(t *testing.T) { t.Parallel(); nobodyWaits(t, e, a) })
		t.Run("capture any", func(t *testing.T) {
			t.Parallel()
			c := e.margayctl(t, "capture", "any")
			if code, errs := c.end(t), c.errs.String(); code != 1 || !strings.Contains(errs, "ulimit -n") || strings.Count(errs, "\n") != 1 {
				t.Errorf("status %d: %s", code, errs)
			}
		})
		t.Run("capture pod", func(t *testing.T) {
			t.Parallel()
			c := e.margayctl(t, "capture", "pod-"+name(n-1), "-c", "1")
			if code, out := c.end(t), c.out.String(); code != 0 || !strings.Contains(out, pod(n-1).String()) || strings.Count(out, "\n") != 1 {
				t.Errorf("status %d: %s, %s", code, out, c.errs.String())
			}
		})
		t.Run("trace", func(t *testing.T) {
			t.Parallel()
			c := e.margayctl(t, "trace", "pod-"+name(1), "pod-"+name(n-1))
			if code, out := c.end(t), c.out.String(); code != 0 || !strings.HasPrefix(out, "arrives: ") {
				t.Errorf("status %d: %s, %s", code, out, c.errs.String())
			}
		})
		t.Run("a wrong name", func(t *testing.T) {
			t.Parallel()
			c := e.margayctl(t, "trace", "nobody", name(0))
			if code, errs := c.end(t), c.errs.String(); code != 2 || !strings.Contains(errs, `"nobody" is no address`) || len(errs) > 1000 {
				t.Errorf("status %d, %d bytes: %.1000s", code, len(errs), errs)
			}
		})
	})
}

// stalls counts agents for whom the machine had no time: where it stands still for seconds, those that are being asked then are said
// not to answer, as they are to be.
type stalls int

// note reports whether an agent's failure is one of these, and not the one that is wanted.
func (s *stalls) note(want, failure string) bool {
	if want != "" && strings.Contains(failure, want) || !strings.Contains(failure, "does not answer within") && !strings.Contains(failure, "i/o timeout") {
		return false
	}
	*s++
	return true
}

// check allows for two moments: 128 nodes are asked at a time.
func (s stalls) check(t *testing.T) {
	t.Helper()
	if s > 2*128 {
		t.Errorf("%d agents that are well, or have something else wrong, are said to be silent", s)
	}
}

// dropsOfAll: every node that can be asked has its row, and of every other one it is said what is wrong with it.
func dropsOfAll(t *testing.T, e *etcd, a *agents) {
	c := e.margayctl(t, "drops", "-o", "json")
	code := c.end(t)
	var got struct {
		Drops  []struct{ Node, Reason string }
		Errors map[string]string
	}
	if err := json.Unmarshal([]byte(c.out.String()), &got); err != nil || code != 1 {
		t.Fatalf("status %d, %v: %.1000s, %.1000s", code, err, c.out.String(), c.errs.String())
	}
	rows := map[string]string{}
	for _, d := range got.Drops {
		rows[d.Node] += d.Reason
	}
	var stalled stalls
	for i := range a.n {
		want, failure := says[a.like(i)], got.Errors[name(i)]
		switch {
		case rows[name(i)] == "" && stalled.note(want, failure):
		case want == "" && (rows[name(i)] != "no_route" || failure != ""), want != "" && (rows[name(i)] != "" || !strings.Contains(failure, want)):
			t.Errorf("%s: rows for %q, error %q: expected %q", name(i), rows[name(i)], failure, want)
		}
	}
	stalled.check(t)
	if m := c.memory() >> 20; m > 1024 {
		t.Errorf("it took %d MiB of memory", m)
	}
	t.Logf("%.1f s, %v of a processor, %d MiB", c.took.Seconds(), c.ProcessState.UserTime()+c.ProcessState.SystemTime(), c.memory()>>20)
}

// fewErrors: of many nodes with something wrong the first ones are named.
func fewErrors(t *testing.T, e *etcd, a *agents) {
	bad := a.those(30, dead, liar, other)
	c := e.margayctl(t, "drops", "--node", strings.Join(bad, ","))
	code, errs := c.end(t), c.errs.String()
	if code != 1 || !strings.Contains(errs, bad[11]+": ") || strings.Contains(errs, bad[12]+": ") || !strings.Contains(errs, "and 18 more nodes could not be asked") {
		t.Errorf("status %d: %s", code, errs)
	}
	if out := c.out.String(); out != "" {
		t.Errorf("nobody has answered, and it says %q", out)
	}
}

// nobodyWaits: a node that says nothing holds up no other's lines.
func nobodyWaits(t *testing.T, e *etcd, a *agents) {
	m, g := a.those(1, mute)[0], a.those(1, good)[0]
	var muteAt, goodAt int
	if _, err := fmt.Sscanf(m+g, "node%04dnode%04d", &muteAt, &goodAt); err != nil {
		t.Fatal(err)
	}
	before := a.asked[muteAt].Load()
	c := e.margayctl(t, "drops", "--watch", "-o", "json", "--interval", "100ms", "--node", m+","+g)
	// Each question to the one lasts six seconds.
	until(t, "lines of the node that answers", func() bool { return strings.Count(c.out.String(), "no_route") >= 20 })
	if n := a.asked[muteAt].Load() - before; n > 10 {
		t.Errorf("the node that says nothing was asked %d times", n)
	}
	until(t, "the other's to be said", func() bool {
		return strings.Contains(c.errs.String(), m+": margay-agent of "+m+" does not answer within")
	})
	c.signal(t, syscall.SIGINT)
	if code := c.end(t); code != 0 {
		t.Errorf("after SIGINT the status is %d: %s", code, c.errs.String())
	}
}

// TestCaptureOfManyNodes: the packets of all nodes that capture, and what is wrong with the others, the first of them.
func TestCaptureOfManyNodes(t *testing.T) {
	t.Parallel()
	const n = 350
	e := startEtcd(t)
	a := startAgents(t, e, n, everyFiftieth)
	c := e.margayctl(t, "capture", "any")
	until(t, "all nodes to be asked", func() bool {
		errs := c.errs.String()
		return strings.Contains(errs, "capturing; stop") && strings.Count(c.out.String(), "\n")+strings.Count(errs, "margay-agent of")+unnamed(errs) == n
	})
	c.signal(t, syscall.SIGINT)
	if code := c.end(t); code != 1 {
		t.Errorf("some nodes are missing, and the status is %d", code)
	}
	out, errs := c.out.String(), c.errs.String()
	failures := map[string]string{}
	for line := range strings.Lines(errs) {
		if _, rest, ok := strings.Cut(line, "margay-agent of "); ok {
			failures[rest[:len(name(0))]] += line
		}
	}
	var stalled stalls
	for i := range n {
		want, failure := says[a.like(i)], failures[name(i)]
		shown := strings.Count(out, name(i)+"/vr0 "+pod(i).String())
		switch a.like(i) {
		case liar:
			want = "the capture has ended" // what it sends is no line
		case flood:
			want = "lines of more than"
		}
		switch {
		case shown == 0 && failure == "" && unnamed(errs) > 0:
			stalled++
		case shown == 0 && stalled.note(want, failure):
		case want == "" && (shown != 1 || failure != ""), want != "" && (shown != 0 || !strings.Contains(failure, want)):
			t.Errorf("%s: shown %d times, error %q: expected %q", name(i), shown, failure, want)
		}
	}
	stalled.check(t)
	until(t, "the captures to end", func() bool { return a.captures.Load() == 0 })
}

// unnamed is how many nodes with something wrong are not named.
func unnamed(errs string) (n int) {
	for _, m := range regexp.MustCompile(`and (\d+) more nodes do not capture`).FindAllStringSubmatch(errs, -1) {
		more, _ := strconv.Atoi(m[1])
		n += more
	}
	return n
}

// TestCaptureWithoutAReader: who has stopped reading does not keep Ctrl-C from ending a capture, and it is said what is missing.
func TestCaptureWithoutAReader(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	a := startAgents(t, e, 2, func(int) character { return chatty })
	r, w, err := os.Pipe() // nobody reads
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	cmd := exec.Command("margayctl", "capture", "any")
	cmd.Stdout = w
	c := e.run(t, cmd)
	until(t, "the pipe to be full", func() bool {
		n, err := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ)
		if err != nil {
			t.Fatal(err)
		}
		return n > 60_000 // of 64 KiB
	})
	until(t, "margayctl to take no more", a.stalled)
	c.signal(t, syscall.SIGINT)
	if code, errs := c.end(t), c.errs.String(); code != 1 || !strings.Contains(errs, "nobody has read") || !strings.Contains(errs, "packets are not shown") {
		t.Errorf("status %d: %s", code, errs)
	}
	until(t, "the captures to end", func() bool { return a.captures.Load() == 0 })
}
