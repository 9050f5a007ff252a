package ctl

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"margay/datastore"
)

// everything is the whole store, parsed, without what a datastore gives a resource itself.
func everything(t *testing.T, s *datastore.Store) map[string]any {
	t.Helper()
	kvs, _, err := s.List(t.Context(), "/calico/")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]any{}
	for _, kv := range kvs {
		d := json.NewDecoder(strings.NewReader(string(kv.Value)))
		d.UseNumber()
		var v map[string]any
		if err := d.Decode(&v); err != nil {
			t.Fatal(err)
		}
		if meta, ok := v["metadata"].(map[string]any); ok {
			delete(meta, "uid")
			delete(meta, "creationTimestamp")
		}
		out[kv.Key] = v
	}
	return out
}

const resources = "/calico/resources/v3/projectcalico.org/"

var ipamKeys = map[string]string{
	"assignment/ipv4/block/10.1.40.128-26": `{"cidr":"10.1.40.128/26","sequenceNumber":1795425093042315661,"newer":[1]}`,
	"host/n1/ipv4/block/10.1.40.128-26":    `{"state":"confirmed","deleted":false}`,
	"config":                               `{"strict_affinity":true}`,
}

func fillIPAM(t *testing.T, s *datastore.Store) {
	t.Helper()
	for key, value := range ipamKeys {
		if _, err := s.Create(t.Context(), "/calico/ipam/v2/"+key, []byte(value)); err != nil {
			t.Fatal(err)
		}
	}
}

// asYAML is what YAML makes of everything: 1.50 is 1.5. Nothing else changes; not even defaults are filled in.
func asYAML(all map[string]any) map[string]any {
	pool := all["/calico/resources/v3/projectcalico.org/ippools/p"].(map[string]any)["spec"].(map[string]any)
	pool["newer"].(map[string]any)["a"].([]any)[0] = json.Number("1.5")
	return all
}

func TestExportAppliesElsewhere(t *testing.T) {
	s := openStore(t)
	fill(t, s)
	want := everything(t, s)
	out, err := run(t, "", "export")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out, "uid") || strings.Contains(out, "resourceVersion") || strings.Contains(out, "ClusterInformation") {
		t.Errorf("exported what belongs to the cluster:\n%s", out)
	}
	s = openStore(t)
	n := len(stored) - 1
	play(t, t.TempDir(), []step{
		{args: "import -f -", stdin: out, out: fmt.Sprintf("Successfully imported %d resource(s)\n", n)},
		{args: "import -f - --skip-exists", stdin: out, out: fmt.Sprintf("Successfully imported %d resource(s)\n", n)},
		{args: "apply -f -", stdin: out, out: fmt.Sprintf("Successfully applied %d resource(s)\n", n)},
	})
	// Elsewhere is a cluster of its own, with a ClusterInformation, the three tiers, and the layout of policies that the
	// store of an unknown Calico has.
	got := everything(t, s)
	for _, key := range []string{"clusterinformations/default", "tiers/default", "tiers/adminnetworkpolicy", "tiers/baselineadminnetworkpolicy"} {
		if _, there := got[resources+key]; !there {
			t.Errorf("%s is missing", key)
		}
		delete(want, resources+key)
		delete(got, resources+key)
	}
	for _, namespace := range []string{"a", "b"} {
		policy := want[resources+"networkpolicies/"+namespace+"/p"].(map[string]any)
		policy["metadata"] = map[string]any{"name": "default.p", "namespace": namespace,
			"annotations": map[string]any{"projectcalico.org/metadata": `{"name":"p"}`}}
		want[resources+"networkpolicies/"+namespace+"/default.p"] = policy
		delete(want, resources+"networkpolicies/"+namespace+"/p")
	}
	if d := cmp.Diff(asYAML(want), got); d != "" {
		t.Errorf("elsewhere:\n%s", d)
	}
	// A value that cannot be understood is no reason to print less and say nothing.
	if _, err := s.Create(t.Context(), datastore.Nodes.Key("broken"), []byte("{")); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t, "", "export"); err == nil || !strings.Contains(err.Error(), `Node "broken"`) {
		t.Errorf("export of a broken store: %v", err)
	}
}

func TestMigrate(t *testing.T) {
	s := openStore(t)
	fill(t, s)
	fillIPAM(t, s)
	const unlocked = "datastore is not locked. Run the `margayctl datastore migrate lock` command in order to begin migration"
	play(t, t.TempDir(), []step{
		{args: "datastore migrate export", err: unlocked},
		{args: "datastore migrate lock", out: "Datastore locked.\n"},
		{args: "datastore migrate lock", out: "Datastore locked.\n"},
		{args: "get clusterinfo -o custom-columns=DATASTOREREADY", out: "DATASTOREREADY   \nfalse            \n\n"},
	})
	want := asYAML(everything(t, s))
	file, err := run(t, "", "datastore", "migrate", "export")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write(t, dir, "datastore.yaml", file)
	write(t, dir, "cut.yaml", file[:len(file)/2])
	play(t, dir, []step{{args: "datastore migrate import -f {dir}/datastore.yaml",
		err: "datastore already has Calico resources: found existing Calico BGPFilter resource. Import into an empty one"}})

	s = openStore(t)
	if out, err := run(t, "", "datastore", "migrate", "import", "-f", dir+"/cut.yaml"); err == nil || out != "" || !strings.Contains(err.Error(), "improperly formatted") {
		t.Errorf("half a file: %s, %v", out, err)
	}
	play(t, dir, []step{
		{args: "datastore migrate unlock", err: "error updating ClusterInformation for unlocking: resource does not exist: ClusterInformation(default) with error: not found"},
		{args: "datastore migrate import -f {dir}/datastore.yaml", out: fmt.Sprintf("Successfully imported %d resource(s)\nSuccessfully applied %d IPAM resource(s)\n"+
			"The datastore is locked: `margayctl datastore migrate unlock` opens it.\n", len(stored)-1, len(ipamKeys))},
	})
	if d := cmp.Diff(want, everything(t, s)); d != "" {
		t.Errorf("migrated:\n%s", d)
	}
	play(t, dir, []step{
		{args: "datastore migrate unlock", out: "Datastore unlocked.\n"},
		{args: "datastore migrate export", err: unlocked},
	})
}

// A datastore that holds nothing but its lock can be moved, too.
func TestMigrateNothing(t *testing.T) {
	openStore(t)
	play(t, t.TempDir(), []step{{args: "datastore migrate lock", out: "Datastore locked.\n"}})
	file, err := run(t, "", "datastore", "migrate", "export")
	if err != nil {
		t.Fatal(err)
	}
	openStore(t)
	play(t, t.TempDir(), []step{{args: "datastore migrate import -f -", stdin: file, out: "No resources specified\nSuccessfully applied 0 IPAM resource(s)\n" +
		"The datastore is locked: `margayctl datastore migrate unlock` opens it.\n"}})
}
