package cluster

import (
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestHostChangesAreMended: what somebody takes away from under the daemons comes back by itself.
func TestHostChangesAreMended(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	from, to := n1.Pods[0].Netns, ip(t, n2.Pods[0].Address)
	for _, tc := range []struct {
		name string
		argv [][]string
	}{
		{"vr0 deleted", [][]string{{"link", "del", "vr0"}}},
		{"vr0 down", [][]string{{"link", "set", "vr0", "down"}}},
		{"the pool's route removed", [][]string{{"route", "del", "10.244.0.0/16", "dev", "vr0"}}},
		{"vr0's address removed", [][]string{{"addr", "flush", "dev", "vr0"}}},
		{"underlay down and up", [][]string{{"link", "set", "eth0", "down"}, {"link", "set", "eth0", "up"},
			{"route", "add", "default", "via", strings.TrimSuffix(n1.Address, ".1") + ".254"}}},
		{"all of the agent's routes flushed", [][]string{{"route", "flush", "proto", "81"}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, argv := range tc.argv {
				if out, err := exec.Command("ip", append([]string{"-n", n1.Netns}, argv...)...).CombinedOutput(); err != nil {
					t.Fatalf("ip %s: %v\n%s", strings.Join(argv, " "), err, out)
				}
			}
			// The agent looks at the kernel every 30 s anyway; here it is to hear of the change.
			took := within(t, 15*time.Second, "pods and hosts to reach each other again", func() bool {
				return pings(from, to) && pings(n1.Netns, to)
			})
			until(t, "the blackhole under the pool", func() bool {
				return strings.Contains(in(t, n1.Netns, "ip", "route"), "blackhole 10.244.0.0/16")
			})
			t.Logf("mended after %s", took.Round(time.Millisecond))
		})
	}
	settled(t, n1)
}

// TestEtcdRestarts: with the datastore away packets flow, and when it is back pods are attached again.
func TestEtcdRestarts(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	s := startStream(t, n1.Pods[0], n2.Pods[0], 5*time.Millisecond)
	mustCtl(t, "lab", "restart", "--name", labName, "--hard", "etcd")
	id := labName + "-etcd"
	ns := newNetns(t, id)
	until(t, "a pod to be attached after etcd's restart", func() bool {
		_, err := plugin(n1, "ADD", id, ns)
		return err == nil
	})
	if out, err := plugin(n1, "DEL", id, ns); err != nil {
		t.Errorf("DEL: %v: %s", err, out)
	}
	if lost, total := s.finish(t); len(lost) != 0 || total < 10 {
		t.Errorf("%d of %d datagrams were lost while etcd was restarted", len(lost), total)
	}
}
