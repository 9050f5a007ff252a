package datastore

import (
	"strings"
	"testing"
)

// Without a name in the manifest a WorkloadEndpoint has the one that its fields give.
func TestWorkloadEndpointName(t *testing.T) {
	for spec, want := range map[string]string{
		`orchestrator: k8s, node: node-1, pod: web-0.a, endpoint: eth0`:                 "default/node--1-k8s-web--0.a-eth0",
		`orchestrator: cni, node: n1, containerID: a-b, endpoint: eth0`:                 "default/n1-cni-a--b-eth0",
		`orchestrator: libnetwork, node: n1, endpoint: eth0`:                            "default/n1-libnetwork-libnetwork-eth0",
		`orchestrator: other-one, node: n1, workload: w.x, pod: not-me, endpoint: eth0`: "default/n1-other--one-w.x-eth0",
	} {
		manifest := "apiVersion: projectcalico.org/v3\nkind: WorkloadEndpoint\nmetadata: {}\nspec: {interfaceName: cali1, " + spec + "}\n"
		objs, err := DecodeManifest([]byte(manifest))
		if err != nil {
			t.Errorf("%s: %v", spec, err)
			continue
		}
		if got := objs[0].Head().Path(); got != want {
			t.Errorf("%s: %q, expected %q", spec, got, want)
		}
	}
	_, err := DecodeManifest([]byte("apiVersion: projectcalico.org/v3\nkind: WorkloadEndpoint\nmetadata: {}\nspec: {interfaceName: cali1, node: n1}\n"))
	if err == nil || !strings.Contains(err.Error(), "spec.orchestrator: expected one") {
		t.Errorf("nothing to make a name of: %v", err)
	}
}

// What is wrong with a stored value is said in JSON's words, not in Go's.
func TestStoredValueOfAnotherType(t *testing.T) {
	for value, want := range map[string]string{
		`"x"`:                        `IPPool "p": stored value: got text instead of an object`,
		`{"spec":{"blockSize":"x"}}`: `IPPool "p": stored value: spec.blockSize: expected a whole number, got text`,
	} {
		if _, err := DecodeObject(IPPools, KV{Key: IPPools.Key("p"), Value: []byte(value)}); err == nil || err.Error() != want {
			t.Errorf("%s: %v, expected %s", value, err, want)
		}
	}
}
