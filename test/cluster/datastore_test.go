package cluster

import (
	"bytes"
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"margay/datastore"
)

// openStore connects to the lab's etcd.
func openStore(t *testing.T) *datastore.Store {
	t.Helper()
	s, err := datastore.Open(t.Context(), datastore.Config{Endpoints: status(t).Etcd})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// inClear ends a capture and returns how many packets between pods it has seen outside the tunnel.
func inClear(tap *tap) (n int) {
	tap.close()
	pool := netip.MustParsePrefix("10.244.0.0/16")
	return tap.count(func(s seen) bool { return s.proto != 4 && (pool.Contains(s.src) || pool.Contains(s.dst)) })
}

// TestUnreadablePool: a value that nobody can read costs no packet and lets none out in clear, also over a restart of the
// agent, which then says what is wrong.
func TestUnreadablePool(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	s := openStore(t)
	key := datastore.IPPools.Key("default-ipv4-ippool")
	good, err := s.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	rev, err := s.Update(t.Context(), key, []byte(`{"garbage": tru`), good.Revision)
	if err != nil {
		t.Fatal(err)
	}
	mend := func(ctx context.Context) error { _, err := s.Update(ctx, key, good.Value, rev); return err }
	mended := false
	defer func() {
		if !mended {
			if err := mend(context.Background()); err != nil {
				t.Error(err)
			}
		}
	}()
	tap := onWire(t, 1)
	kill(t, n1.PIDs["agent"])
	restarted := make(chan error, 1)
	// It returns when the agent is ready, which it cannot be before the value is mended.
	go func() { _, err := ctl("lab", "restart", "--name", labName, "node1", "agent"); restarted <- err }()
	until(t, "the agent to name the key", func() bool {
		st, err := agentStatus(t, n1)
		return err == nil && !st.Ready && strings.Contains(st.Reason, key)
	})
	for _, p := range n2.Pods {
		if !answers(n1.Pods[0].Netns, ip(t, p.Address)) {
			t.Errorf("%s is not reached any more", p.Name)
		}
	}
	if n := inClear(tap); n != 0 {
		t.Errorf("%d packets left in clear", n)
	}
	mended = true
	if err := mend(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-restarted; err != nil {
		t.Errorf("lab restart: %v", err)
	}
	settled(t, node(t, 1))
}

// TestDeletedPool: a pool that is deleted under its pods takes none of their routes away, nor does a restart of the agent
// that has not seen the pool.
func TestDeletedPool(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	s := openStore(t)
	key := datastore.IPPools.Key("default-ipv4-ippool")
	good, err := s.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	said := func(t *testing.T) (times [3]int) {
		for i := range times {
			log, err := os.ReadFile(filepath.Join(runDir(node(t, i+1)), "../logs/agent.log"))
			if err != nil {
				t.Fatal(err)
			}
			times[i] = strings.Count(string(log), "IPPool was deleted")
		}
		return times
	}
	mend := sync.OnceFunc(func() {
		if _, err := s.Create(context.Background(), key, good.Value); err != nil {
			t.Error(err)
		}
	})
	defer mend()
	before := said(t)
	tap := onWire(t, 1)
	stream := startStream(t, n1.Pods[0], n2.Pods[0], 5*time.Millisecond)
	if err := s.Delete(t.Context(), key, 0); err != nil {
		t.Fatal(err)
	}
	until(t, "the agents to say so", func() bool {
		for i, n := range said(t) {
			if n == before[i] {
				return false
			}
		}
		return true
	})
	mustCtl(t, "lab", "restart", "--name", labName, "--hard", "node1", "agent") // a clean stop would end its routes
	mend()
	for i := range 3 {
		settled(t, node(t, i+1))
	}
	if lost, total := stream.finish(t); len(lost) != 0 || total < 10 {
		t.Errorf("%d of %d datagrams were lost", len(lost), total)
	}
	if n := inClear(tap); n != 0 {
		t.Errorf("%d packets left in clear", n)
	}
}

// TestPoolOfAnotherBlockSize: a pool that is made again with another block size while pods live in blocks of the old one,
// and is deleted again, takes none of their routes away.
func TestPoolOfAnotherBlockSize(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	s := openStore(t)
	key := datastore.IPPools.Key("default-ipv4-ippool")
	good, err := s.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	other := bytes.ReplaceAll(good.Value, []byte(`"blockSize":26`), []byte(`"blockSize":28`))
	// No masquerade is what shows that the agents have acted on the new pool: they change its rules last.
	other = bytes.ReplaceAll(other, []byte(`"natOutgoing":true`), []byte(`"natOutgoing":false`))
	if len(bytes.TrimSpace(other)) != len(good.Value)+1 {
		t.Fatalf("the pool is not what the test expects: %s", good.Value)
	}
	swap := func(value []byte) {
		if err := s.Delete(t.Context(), key, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Create(t.Context(), key, value); err != nil {
			t.Fatal(err)
		}
	}
	masqueraded := func(want bool) {
		t.Helper()
		for i := range 3 {
			n := node(t, i+1)
			until(t, n.Name+" to act on the pool", func() bool {
				return strings.Contains(in(t, n.Netns, "nft", "list", "set", "inet", "margay", "nat_pools"), "10.244.0.0/16") == want
			})
		}
	}
	tap := onWire(t, 1)
	there := startStream(t, n1.Pods[0], n2.Pods[0], 5*time.Millisecond)
	back := startStream(t, n2.Pods[0], n1.Pods[0], 5*time.Millisecond)
	swap(other)
	masqueraded(false)
	swap(good.Value)
	masqueraded(true)
	for i := range 3 {
		settled(t, node(t, i+1))
	}
	for name, s := range map[string]*stream{"node1 to node2": there, "node2 to node1": back} {
		if lost, total := s.finish(t); len(lost) != 0 || total < 10 {
			t.Errorf("%s: %d of %d datagrams were lost", name, len(lost), total)
		}
	}
	if n := inClear(tap); n != 0 {
		t.Errorf("%d packets left in clear", n)
	}
}
