package ctl

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"margay/datastore"
	"margay/ipam"
)

// A pool is disabled before it is deleted, also one that nobody can read.
func TestDeletePoolDisablesItFirst(t *testing.T) {
	s := ipamStore(t)
	pools, rev, err := datastore.ListResources[datastore.IPPool](t.Context(), s)
	if err != nil || len(pools) != 1 {
		t.Fatal(pools, err)
	}
	name := pools[0].Metadata.Name
	events := s.Watch(t.Context(), datastore.IPPools.Prefix(), rev)
	remove := func() {
		t.Helper()
		cmd := NewCommand()
		cmd.SetArgs([]string{"delete", "ippool", name})
		cmd.SetOut(&bytes.Buffer{})
		if err := cmd.ExecuteContext(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	remove()
	if ev := <-events; ev.Type != datastore.Put || !bytes.Contains(ev.KV.Value, []byte(`"disabled":true`)) {
		t.Errorf("first: %s of %s, expected that it is disabled", ev.Type, ev.KV.Value)
	}
	if ev := <-events; ev.Type != datastore.Delete {
		t.Errorf("then: %s of %s", ev.Type, ev.KV.Value)
	}
	if _, err := s.Create(t.Context(), datastore.IPPools.Key(name), []byte(`{"garbage": tru`)); err != nil {
		t.Fatal(err)
	}
	remove()
	if there, err := s.Existing(t.Context(), datastore.IPPools.Key(name)); err != nil || len(there) != 0 {
		t.Errorf("one that cannot be read is still there: %v, %v", there, err)
	}
}

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
