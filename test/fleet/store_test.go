package fleet

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"margay/agent/api"
)

// storeLimit is how long a command may take to find that the datastore does not answer: the time of one operation, several times over.
const storeLimit = 30 * time.Second

// commands are those that read the datastore, with their exit status when it is not there.
var commands = map[string]int{
	"drops": 1, "drops --watch": 1, "capture any": 1, "capture node0001": 1, "trace node0001 node0002": 2, "get nodes": 1, "node status node0001": 1,
}

// ends checks how a command without a datastore ends: soon, with one line that says what is missing.
func (c *command) ends(t *testing.T, what string, status int) {
	t.Helper()
	code, errs := c.end(t), c.errs.String()
	if code != status || c.took > storeLimit || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "etcd at http://127.0.0.1:") {
		t.Errorf("%s: status %d after %s: %s%s", what, code, c.took, c.out.String(), errs)
	}
	t.Logf("%s: %s %s", what, c.took, errs)
}

// TestNoStore: every command ends when the datastore is gone, or does not answer.
func TestNoStore(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	startAgents(t, e, 3, func(int) character { return good })
	e.signal(t, syscall.SIGSTOP)
	all := map[string]*command{}
	for line := range commands {
		all[line] = e.margayctl(t, strings.Fields(line)...)
	}
	for line, c := range all {
		c.ends(t, "frozen, "+line, commands[line])
	}
	e.kill()
	for line, status := range commands {
		e.margayctl(t, strings.Fields(line)...).ends(t, "killed, "+line, status)
	}
}

// TestStoreFreezes has the datastore stand still while commands read it, one after the other begun: each of them ends with what was
// asked for, or says in one line what is missing.
func TestStoreFreezes(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	startAgents(t, e, 2000, func(int) character { return good })
	var all []*command
	for range 10 {
		all = append(all, e.margayctl(t, "drops", "--node", name(1)))
		time.Sleep(30 * time.Millisecond)
	}
	e.signal(t, syscall.SIGSTOP)
	for i, c := range all {
		if code := c.end(t); code == 0 {
			t.Logf("%d: %s", i, c.took)
			continue
		}
		c.ends(t, fmt.Sprint(i), 1)
	}
}

// TestStoreGoesAndComesBack: what runs goes on without a datastore, and finds an agent that was restarted once it is back.
func TestStoreGoesAndComesBack(t *testing.T) {
	t.Parallel()
	e := startEtcd(t)
	a := startAgents(t, e, 2, func(int) character { return good })
	watch := e.margayctl(t, "drops", "--watch", "--interval", "100ms")
	capture := e.margayctl(t, "capture", "any")
	until(t, "both to run", func() bool {
		return strings.Contains(watch.errs.String(), "watching") && strings.Contains(capture.errs.String(), "capturing")
	})
	e.kill()
	seen := strings.Count(watch.out.String(), "no_route")
	until(t, "drops to be seen without a datastore", func() bool { return strings.Count(watch.out.String(), "no_route") > seen+10 })

	a.restart(t)
	for what, c := range map[string]*command{"drops --watch": watch, "capture": capture} {
		until(t, what+" to say that it cannot find the agents", func() bool {
			errs := c.errs.String()
			return strings.Contains(errs, "margay-agent of "+name(0)) && strings.Contains(errs, "margay-agent of "+name(1)) && strings.Contains(errs, "etcd at http")
		})
	}
	e.start(t)
	s := e.open(t)
	for i := range a.n {
		kv, err := s.Get(t.Context(), api.DiagNodes+name(i))
		if err == nil {
			_, err = s.Update(t.Context(), kv.Key, a.endpoint(t, i), kv.Revision)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	until(t, "the agents to be found again", func() bool {
		return strings.Contains(watch.errs.String(), "again") && strings.Count(capture.errs.String(), "captures again") == a.n
	})
	t.Logf("watch: %s\ncapture: %s", watch.errs.String(), capture.errs.String())
	for what, c := range map[string]*command{"drops --watch": watch, "capture": capture} {
		c.signal(t, syscall.SIGINT)
		if code := c.end(t); code != map[string]int{"capture": 1}[what] { // something is missing in it
			t.Errorf("%s: status %d after SIGINT: %s", what, code, c.errs.String())
		}
	}
}
