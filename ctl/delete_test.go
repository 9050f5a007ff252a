package ctl

import (
	"bytes"
	"net/netip"
	"testing"

	"margay/ipam"
)

// A node that is deleted leaves no address, block, affinity or handle; another node's addresses in its blocks stay.
func TestDeleteNodeReleasesItsAddresses(t *testing.T) {
	s := ipamStore(t) // n1 owns the block and has web in it, n2 has borrowed an address for job
	var out bytes.Buffer
	cmd := NewCommand()
	cmd.SetArgs([]string{"delete", "node", "n1"})
	cmd.SetOut(&out)
	err := cmd.ExecuteContext(t.Context())
	wantText(t, "delete", "Successfully deleted 1 'Node' resource(s)\n", out.String(), err)
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
