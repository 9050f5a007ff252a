package cluster

import (
	"testing"

	"github.com/vishvananda/netns"
)

// TestPodThatGoesWithoutADel: a namespace that is gone, without a DEL, leaves an address that the agent gives back after
// the grace period; those of the node's other pods, and its tunnel's, stay.
func TestPodThatGoesWithoutADel(t *testing.T) {
	n := node(t, 3)
	t.Setenv("IPAM_GRACE_PERIOD", "3s") // the lab's daemons inherit it
	mustCtl(t, "lab", "restart", "--name", labName, "node3", "agent")
	settled(t, node(t, 3))
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
	t.Setenv("IPAM_GRACE_PERIOD", "")
	mustCtl(t, "lab", "restart", "--name", labName, "node3", "agent")
	settled(t, node(t, 3))
}
