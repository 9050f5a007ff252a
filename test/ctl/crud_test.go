package ctl

import (
	"strings"
	"testing"

	"margay/datastore"
)

const (
	reservation = "apiVersion: projectcalico.org/v3\nkind: IPReservation\nmetadata: {name: r}\nspec: {reservedCIDRs: [10.1.0.0/28]}\n---\n"
	clash       = `IPPool "c": spec.cidr "10.1.0.0/24": overlaps pool "a" (10.1.0.0/16)`
)

func TestCreateApplyReplaceDelete(t *testing.T) {
	s, dir := openStore(t), t.TempDir()
	ab := pool("a", "10.1.0.0/16", "") + pool("b", "10.2.0.0/16", "")
	write(t, dir, "ab.yaml", ab)
	write(t, dir, "d/one.yml", pool("a", "10.1.0.0/16", "  natOutgoing: true\n"))
	write(t, dir, "d/notes.txt", "not a manifest")
	write(t, dir, "d/sub/two.json", `{"apiVersion":"projectcalico.org/v3","kind":"IPPool","metadata":{"name":"d"},"spec":{"cidr":"10.4.0.0/16"}}`)
	write(t, dir, "none.yaml", "# nothing\n---\n")
	write(t, dir, "none/readme", "nothing here")
	play(t, dir, []step{
		{args: "create -f {dir}/ab.yaml", out: "Successfully created 2 'IPPool' resource(s)\n"},
		{args: "create -f {dir}/ab.yaml", err: "failed to create any 'IPPool' resources: [resource already exists: IPPool(a) resource already exists: IPPool(b)]"},
		{args: "create -f {dir}/ab.yaml --skip-exists", out: "Successfully created 2 'IPPool' resource(s)\n"},
		{args: "create -f -", stdin: pool("c", "10.1.0.0/24", ""), err: "failed to create 'IPPool' resource: [" + clash + "]"},
		{args: "apply -f -", stdin: ab + pool("c", "10.1.0.0/24", ""), out: "Partial success: applied the first 2 out of 3 'IPPool' resources:\n", err: "hit error(s): [" + clash + "]"},
		{args: "apply -f -", stdin: reservation + ab, out: "Successfully applied 3 resource(s)\n"},
		{args: "apply -f -", stdin: reservation + pool("c", "10.1.0.0/24", ""), out: "Partial success: applied the first 1 out of 2 resources:\n", err: "hit error(s): [" + clash + "]"},
		{args: "replace -f -", stdin: pool("x", "10.9.0.0/16", ""), err: "failed to replace 'IPPool' resource: [resource does not exist: IPPool(x) with error: not found]"},
		{args: "replace -f -", stdin: pool("a", "10.1.0.0/16", "  blockSize: 27\n"), err: `failed to replace 'IPPool' resource: [IPPool "a": spec.blockSize 27: expected it unchanged, 26: make a new pool instead]`},
		{args: "replace -f {dir}/ab.yaml", out: "Successfully replaced 2 'IPPool' resource(s)\n"},
		{args: "apply -f {dir}/d", out: "Successfully applied 1 'IPPool' resource(s)\n"},
		{args: "apply -f {dir}/d --recursive", out: "Successfully applied 2 'IPPool' resource(s)\n"},
		{args: "apply -f {dir}/d/one.yml -f {dir}/ab.yaml", out: "Successfully applied 3 'IPPool' resource(s)\n"},
		{args: "apply -f {dir}/none.yaml", err: "no resources specified in file {dir}/none.yaml"},
		{args: "apply -f {dir}/none", err: "no resources specified in directory {dir}/none"},
		{args: "apply -f {dir}/none.yaml --skip-empty", out: "No resources specified\n"},
		{args: "apply -f {dir}/none --skip-empty", out: "No resources specified\n"},
		{args: "apply -f {dir}/missing.yaml", err: "failed to execute command: stat {dir}/missing.yaml: no such file or directory"},
		{args: "apply", err: `required flag(s) "filename" not set`},
		{args: "delete ippool a x b", out: "Successfully deleted 2 'IPPool' resource(s)\n", err: "Failed to delete 'IPPool' resource: resource does not exist: IPPool(x) with error: not found"},
		{args: "delete -f {dir}/ab.yaml --skip-not-exists", out: "Successfully deleted 2 'IPPool' resource(s)\n"},
		{args: "delete -f -", stdin: reservation + ab, out: "Successfully deleted 1 resource(s)\n", err: "Failed to delete resource: resource does not exist: IPPool(a) with error: not found\nFailed to delete resource: resource does not exist: IPPool(b) with error: not found"},
		{args: "delete ippool", err: "arguments: expected KIND and at least one NAME, or --filename"},
		{args: "delete ippool a -f {dir}/ab.yaml", err: "arguments: expected KIND and NAME, or --filename, not both"},
		{args: "delete pod a", err: "resource type 'pod' is not supported: expected one of " + plurals()},
		{args: "get ippools -o name", out: "ippool/d\n"},
	})
	// A file that is wrong anywhere changes nothing, and every mistake in it is named.
	play(t, dir, []step{
		{args: "apply -f -", stdin: pool("e", "10.5.0.0/16", "") + pool("f", "10.6.0.0/16", "  ipipMod: Always\n") + pool("g", "10.7.0.1/16", ""),
			err: "failed to execute command: -: document 3: IPPool \"g\": spec.cidr \"10.7.0.1/16\": expected no bits set behind the prefix length: 10.7.0.0/16"},
		{args: "apply -f -", stdin: pool("e", "10.5.0.0/16", "") + pool("f", "10.6.0.0/16", "  ipipMod: Always\n"),
			err: "failed to execute command: IPPool \"f\": spec.ipipMod: unknown field: expected one of allowedUses, assignmentMode, blockSize, cidr, disableBGPExport, disabled, ipipMode, namespaceSelector, natOutgoing, nodeSelector, vxlanMode"},
		{args: "get ippools -o name", out: "ippool/d\n"},
	})
	if _, err := s.Get(t.Context(), datastore.IPPools.Key("d")); err != nil {
		t.Error(err)
	}
}

func plurals() string {
	var out []string
	for _, k := range datastore.Kinds() {
		out = append(out, k.Plural)
	}
	return strings.Join(out, ", ")
}

// validate needs no datastore.
func TestValidate(t *testing.T) {
	t.Setenv("ETCD_ENDPOINTS", "http://127.0.0.1:1")
	play(t, t.TempDir(), []step{
		{args: "validate -f -", stdin: pool("a", "10.1.0.0/16", "") + policy("", "p"), out: "Successfully validated 2 resource(s)\n"},
		{args: "validate -f -", stdin: policy("x", "p"), out: "Successfully validated 1 'NetworkPolicy' resource(s)\n"},
		{args: "validate -f -", stdin: pool("a", "10.1.0.0", "") + pool("b", "10.2.0.0/16", "") + pool("c", "x", ""),
			err: "failed to execute command: -: document 1: IPPool \"a\": spec.cidr \"10.1.0.0\": expected an IPv4 or IPv6 prefix such as 10.244.0.0/16\n" +
				"document 3: IPPool \"c\": spec.cidr \"x\": expected an IPv4 or IPv6 prefix such as 10.244.0.0/16"},
		{args: "validate -f -", stdin: "root:x:0:0", err: "failed to execute command: -: document 1: expected a resource with kind, apiVersion, metadata and spec: got text instead of an object"},
		{args: "convert -f -", stdin: "[1]", err: "failed to execute command: -: document 1: [0]: expected a resource with kind, apiVersion, metadata and spec: got a number instead of an object"},
		{args: "validate -f - -n y", stdin: policy("x", "p"), err: `failed to execute command: -: document 1: NetworkPolicy "p": resource namespace does not match client namespace. x != y`},
		{args: "validate -f - -n y", stdin: pool("a", "10.1.0.0/16", ""), err: "failed to execute command: -: document 1: IPPool is not namespaced"},
	})
}

// stored is what Calico's client, a newer one, may have written.
var stored = map[string]string{
	"ippools/p":                   `{"kind":"IPPool","apiVersion":"projectcalico.org/v3","metadata":{"name":"p","uid":"u"},"spec":{"cidr":"10.1.0.0/16","newer":{"a":[1.50,9007199254740993,null]}}}`,
	"nodes/n1":                    `{"kind":"Node","apiVersion":"projectcalico.org/v3","metadata":{"name":"n1","creationTimestamp":"2026-11-23T09:11:33Z"},"spec":{"bgp":{"ipv4Address":"192.0.2.1/24","asNumber":"1.10"}},"status":{"newer":true}}`,
	"networkpolicies/a/p":         `{"kind":"NetworkPolicy","apiVersion":"projectcalico.org/v3","metadata":{"name":"p","namespace":"a"},"spec":{"ingress":[{"action":"Allow","source":{"nets":["10.0.0.0/8"]}}]}}`,
	"networkpolicies/b/p":         `{"kind":"NetworkPolicy","apiVersion":"projectcalico.org/v3","metadata":{"name":"p","namespace":"b"},"spec":{"types":["Egress"]}}`,
	"felixconfigurations/x":       `{"kind":"FelixConfiguration","apiVersion":"projectcalico.org/v3","metadata":{"name":"x"},"spec":{"bpfLogLevel":""},"newer":1}`,
	"workloadendpoints/a/n-o-w-e": `{"kind":"WorkloadEndpoint","apiVersion":"projectcalico.org/v3","metadata":{"name":"n-o-w-e","namespace":"a"},"spec":{"orchestrator":"o","workload":"w","node":"n","endpoint":"e","interfaceName":"cali1"}}`,
	"bgpfilters/f":                `{"kind":"BGPFilter","apiVersion":"projectcalico.org/v3","metadata":{"name":"f"},"spec":{"exportV4":[{"action":"Accept","newer":1}]}}`,
	"clusterinformations/default": `{"kind":"ClusterInformation","apiVersion":"projectcalico.org/v3","metadata":{"name":"default"},"spec":{"calicoVersion":"v3.32.1","datastoreReady":true}}`,
}

func fill(t *testing.T, s *datastore.Store) {
	t.Helper()
	for key, value := range stored {
		if _, err := s.Create(t.Context(), "/calico/resources/v3/projectcalico.org/"+key, []byte(value)); err != nil {
			t.Fatal(err)
		}
	}
}

// What is got and applied again is not even written; the datastore's revision stays.
func TestRoundTripChangesNothing(t *testing.T) {
	s := openStore(t)
	fill(t, s)
	if err := datastore.Initialize(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	_, before, err := s.Keys(t.Context(), "/calico/")
	if err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"ippools", "ippool p", "nodes", "networkpolicies -A", "networkpolicy p -n a", "felixconfigs", "weps -A", "bgpfilters", "clusterinfo default"} {
		for _, format := range []string{"yaml", "json"} {
			out, err := run(t, "", append(append([]string{"get"}, strings.Fields(what)...), "-o", format)...)
			if err != nil {
				t.Fatalf("get %s: %v", what, err)
			}
			for _, verb := range []string{"apply", "replace"} {
				if said, err := run(t, out, verb, "-f", "-"); err != nil || !strings.HasPrefix(said, "Successfully") {
					t.Errorf("get %s -o %s | %s: %s, %v\n%s", what, format, verb, said, err, out)
				}
			}
		}
	}
	if _, after, err := s.Keys(t.Context(), "/calico/"); err != nil || after != before {
		t.Errorf("the datastore went from revision %d to %d, %v", before, after, err)
	}
}

// Two have the same resource in their editors: the first to apply wins, the other is told and nothing is lost.
func TestTwoEditors(t *testing.T) {
	openStore(t)
	play(t, t.TempDir(), []step{{args: "create -f -", stdin: pool("p", "10.1.0.0/16", ""), out: "Successfully created 1 'IPPool' resource(s)\n"}})
	one, err := run(t, "", "get", "ippool", "p", "-o", "yaml")
	if err != nil {
		t.Fatal(err)
	}
	two := one
	play(t, t.TempDir(), []step{
		{args: "apply -f -", stdin: strings.Replace(one, "ipipMode: Never", "ipipMode: Always", 1), out: "Successfully applied 1 'IPPool' resource(s)\n"},
		{args: "apply -f -", stdin: strings.Replace(two, "ipipMode: Never", "ipipMode: CrossSubnet", 1), err: "failed to apply 'IPPool' resource: [update conflict: IPPool(p): changed since it was read]"},
		{args: "replace -f -", stdin: two, err: "failed to replace 'IPPool' resource: [update conflict: IPPool(p): changed since it was read]"},
		{args: `patch ippool p -p {"metadata":{"resourceVersion":"1"},"spec":{"natOutgoing":true}}`, err: "hit error: update conflict: IPPool(p): changed since it was read"},
		{args: "get ippool p -o custom-columns=NAME,IPIPMODE,NAT", out: "NAME   IPIPMODE   NAT     \np      Always     false   \n\n"},
		// Elsewhere, or once it is deleted, the version means nothing.
		{args: "delete ippool p", out: "Successfully deleted 1 'IPPool' resource(s)\n"},
		{args: "apply -f -", stdin: two, out: "Successfully applied 1 'IPPool' resource(s)\n"},
	})
}
