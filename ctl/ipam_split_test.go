package ctl

import (
	"testing"

	"margay/datastore"
	"margay/ipam/audit"
)

func TestIPAMSplit(t *testing.T) {
	s := ipamStore(t)
	roomy := datastore.NewIPPool("roomy")
	roomy.Spec.CIDR = "10.245.0.0/24"
	if err := datastore.CreateResource(t.Context(), s, roomy); err != nil {
		t.Fatal(err)
	}
	assign(t, s, "n1", "far", "10.245.0.130")
	for want, args := range map[string][]string{
		"no name or CIDR provided. Provide a name or CIDR to denote the IP pool to split":                            {"split", "2"},
		`NUMBER "two": expected a power of two`:                                                                      {"split", "two", "--name=roomy"},
		"unable to find IP pool  covering the specified CIDR 10.1.0.0/16":                                            {"split", "2", "--cidr=10.1.0.0/16"},
		"datastore is not locked. Run the `margayctl datastore migrate lock` command in order to split the IP pools": {"split", "2", "--name=roomy"},
		"accepts 1 arg(s), received 0":                                                                               {"split", "--name=roomy"},
	} {
		if _, err := runIPAM(t, args...); err == nil || err.Error() != want {
			t.Errorf("%v: %v, expected %q", args, err, want)
		}
	}
	if err := datastore.ModifyResource(t.Context(), s, "default", func(c *datastore.ClusterInformation) error {
		no := false
		c.Spec.DatastoreReady = &no
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := runIPAM(t, "split", "2", "--name=p"); err == nil || err.Error() != `IPPool "p": spec.cidr "10.244.0.0/29": too small for 2 parts: expected each to hold a block of /29` {
		t.Errorf("too small: %v", err)
	}
	out, err := runIPAM(t, "split", "4", "--cidr=10.245.0.0/24")
	wantText(t, "split", `IP Pool roomy was successfully split into 4 smaller pools.
Created split-roomy-0 with CIDR 10.245.0.0/26.
Created split-roomy-1 with CIDR 10.245.0.64/26.
Created split-roomy-2 with CIDR 10.245.0.128/26.
Created split-roomy-3 with CIDR 10.245.0.192/26.
The datastore is locked: `+"`margayctl datastore migrate unlock` opens it.\n", out, err)
	r, err := audit.Look(t.Context(), s, "")
	if err != nil || len(r.Integrity()) != 0 {
		t.Errorf("the checker: %v, %v", r.Integrity(), err)
	}
}
