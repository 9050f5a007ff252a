package ctl

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"margay/ipam"
)

// A node that is deleted keeps its addresses, as its pods may live on, until it is said that it is gone for good; then no
// address, block, affinity or handle is left of it, and another node's addresses in its blocks stay.
func TestDeleteNodeThenRelease(t *testing.T) {
	s := ipamStore(t) // n1 owns the block and has web in it, n2 has borrowed an address for job
	run := func(want string, args ...string) {
		t.Helper()
		var out bytes.Buffer
		cmd := NewCommand()
		cmd.SetArgs(args)
		cmd.SetOut(&out)
		err := cmd.ExecuteContext(t.Context())
		wantText(t, strings.Join(args, " "), want, out.String(), err)
	}
	run("Successfully deleted 1 'Node' resource(s)\n", "delete", "node", "n1")
	if h, err := ipam.Lookup(t.Context(), s, netip.MustParseAddr("10.244.0.1")); err != nil || h.Handle == "" {
		t.Errorf("the address of a pod that may live on is free: %+v, %v", h, err)
	}
	run("Successfully released 1 IP addresses of node n1\n", "ipam", "release", "--node", "n1")
	kvs, _, err := s.Keys(t.Context(), "/calico/ipam/v2/host/n1/")
	if err != nil || len(kvs) != 0 {
		t.Errorf("affinities left: %v, %v", kvs, err)
	}
	for ip, want := range map[string]string{"10.244.0.1": "", "10.244.0.2": "net.job"} {
		if h, err := ipam.Lookup(t.Context(), s, netip.MustParseAddr(ip)); h.Handle != want || (err == nil) != (want != "") {
			t.Errorf("%s: %+v, %v, expected %q", ip, h, err, want)
		}
	}
	if text, err := runIPAM(t, "check"); err != nil {
		t.Errorf("afterwards: %v\n%s", err, text)
	}
}
