package cluster

import (
	"encoding/json"
	"strings"
	"testing"
)

// Three nodes share a pool of four blocks of four: one gets more pods than fit into two blocks, and borrows the addresses
// of the last ones. All pods reach each other, also after the borrower's agent was killed; what is given back is no route any more.
func TestBorrowedAddressesAreReachable(t *testing.T) {
	lab := labName + "b"
	t.Cleanup(func() {
		if out, err := ctl("lab", "down", "--name", lab); err != nil {
			t.Errorf("lab down: %v\n%s", err, out)
		}
	})
	mustCtl(t, "lab", "up", "--name", lab, "--nodes", "3", "--pods", "1", "--pool", "10.245.0.0/28", "--block-size", "30")
	mustCtl(t, "lab", "add-pod", lab+"-node1", "--count", "8", "--name", lab)
	inside := func(args ...string) string {
		t.Helper()
		return in(t, lab+"-node1", append([]string{"margayctl"}, args...)...)
	}
	var borrowed []struct{ IP, BorrowingNode, BlockOwner, Type, AllocatedTo string }
	if out := inside("ipam", "show", "--show-borrowed", "-o", "json"); json.Unmarshal([]byte(out), &borrowed) != nil || len(borrowed) != 2 {
		t.Fatalf("expected two borrowed addresses: %s", out)
	}
	ip, borrower, lender := borrowed[0].IP, borrowed[0].BorrowingNode, borrowed[0].BlockOwner
	_, pod, ok := strings.Cut(borrowed[0].AllocatedTo, "/")
	if !ok || borrower != lab+"-node1" {
		t.Fatalf("expected a pod of node1: %+v", borrowed)
	}
	lent := func() bool {
		return strings.Contains(in(t, lender, "margayctl", "node", "routes"), ip+"/32")
	}
	until(t, "the lender's route inside its own block, which BGP brings after the pod was attached", lent)
	inside("ipam", "check")
	mustCtl(t, "lab", "restart", borrower, "agent", "--hard", "--name", lab)
	mustCtl(t, "lab", "ping", "--name", lab)
	mustCtl(t, "lab", "del-pod", pod, "--name", lab)
	until(t, "the route of an address that was given back", func() bool { return !lent() })
	inside("ipam", "check")
}
