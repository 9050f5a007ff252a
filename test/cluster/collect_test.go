package cluster

import (
	"strings"
	"testing"

	"github.com/vishvananda/netns"
)

// TestPodThatGoesWithoutADel: a namespace that is gone, without a DEL, leaves an address that the agent gives back after
// the grace period; those of the node's other pods, and its tunnel's, stay.
func TestPodThatGoesWithoutADel(t *testing.T) {
	n := node(t, 3)
	restartWithGrace(t, "3s")
	before := inUse(t)
	gone, stays := labName+"-gone", labName+"-stays"
	for _, id := range []string{gone, stays} {
		if out, err := plugin(n, "ADD", id, newNetns(t, id)); err != nil {
			t.Fatalf("ADD: %v: %s", err, out)
		}
	}
	if err := netns.DeleteNamed(gone); err != nil {
		t.Fatal(err)
	}
	until(t, "the address of the pod that is gone to be given back", func() bool { return inUse(t) == before+1 })
	if !reached(stays, ip(t, node(t, 1).Pods[0].Address)) || !reached(node(t, 3).Pods[0].Netns, ip(t, node(t, 1).Pods[0].Address)) {
		t.Error("a pod that is still there reaches nobody")
	}
	// A late DEL of the pod that is gone does no harm; and the name can be used again.
	if out, err := plugin(n, "DEL", gone, "/run/netns/"+gone); err != nil {
		t.Errorf("DEL: %v: %s", err, out)
	}
	if out, err := plugin(n, "ADD", gone, newNetns(t, gone)); err != nil {
		t.Errorf("ADD again: %v: %s", err, out)
	}
	for _, id := range []string{gone, stays} {
		if out, err := plugin(n, "DEL", id, "/run/netns/"+id); err != nil {
			t.Errorf("DEL: %v: %s", err, out)
		}
	}
	if got := inUse(t); got != before {
		t.Errorf("%d addresses in use, expected %d", got, before)
	}
}

// TestNodeDeletedWhileItLives: a node that is deleted, and whose tunnel address is released, while its agent runs is there
// again with its address within the collector's grace period: its pods would lose theirs.
func TestNodeDeletedWhileItLives(t *testing.T) {
	restartWithGrace(t, "3s")
	n1, n3 := node(t, 1), node(t, 3)
	before, tunnel, pods := inUse(t), tunnelAddress(t, n3), n3.Pods
	store(t, "", "ipam", "release", "--ip="+tunnel.String())
	store(t, "", "delete", "node", n3.Name)
	until(t, "the node to be registered again", func() bool {
		out, err := tryIn(n1.Netns, "margayctl", "get", "node", n3.Name)
		return err == nil && strings.Contains(out, n3.Name)
	})
	until(t, "the tunnel's address to be the node's again", func() bool {
		out := store(t, "", "ipam", "show", "--ip="+tunnel.String())
		return strings.Contains(out, "IP "+tunnel.String()+" is in use") && strings.Contains(out, n3.Name)
	})
	settled(t, n3)
	settled(t, n1)
	if got := tunnelAddress(t, n3); got != tunnel || inUse(t) != before {
		t.Errorf("tunnel address %s, was %s; %d addresses in use, were %d", got, tunnel, inUse(t), before)
	}
	if !reached(n1.Pods[0].Netns, tunnel) || !reached(n3.Netns, ip(t, n1.Pods[0].Address)) || !reached(n1.Pods[0].Netns, ip(t, pods[0].Address)) {
		t.Error("the node or its pod is not reached any more")
	}
	store(t, "", "ipam", "check")
	// Deleting a Node takes away where its agent answers; this one has said it anew.
	until(t, "the node to be asked for its drops", func() bool {
		_, err := tryIn(n1.Netns, "margayctl", "drops", "--node", n3.Name)
		return err == nil
	})
}

// restartWithGrace has node3's agent collect garbage by another grace period until the test's end.
func restartWithGrace(t *testing.T, grace string) {
	t.Helper()
	restart := func() {
		mustCtl(t, "lab", "restart", "--name", labName, "node3", "agent")
		settled(t, node(t, 3))
	}
	t.Cleanup(restart)                   // after the environment is as it was
	t.Setenv("IPAM_GRACE_PERIOD", grace) // the lab's daemons inherit it
	restart()
}
