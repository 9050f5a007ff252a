package datastore

import (
	"encoding/json"
	"maps"
	"strings"
	"testing"
)

const goodManifest = `# two documents, the second a list
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: p1}
spec:
  cidr: 10.244.0.0/16
  ipipMode: Always
---
---
apiVersion: v1
kind: List
items:
- apiVersion: projectcalico.org/v3
  kind: BGPPeer
  metadata:
    name: tor
  spec:
    peerIP: 192.0.2.1
    asNumber: "1.10"
- {"apiVersion":"projectcalico.org/v3","kind":"BGPConfiguration","metadata":{"name":"default"},"spec":{"nodeToNodeMeshEnabled":false}}
`

func TestDecodeManifest(t *testing.T) {
	objs, err := DecodeManifest([]byte(goodManifest))
	if err != nil || len(objs) != 3 {
		t.Fatalf("%d objects, %v", len(objs), err)
	}
	if p := objs[0].(*IPPool); p.Spec.BlockSize != 26 || p.Spec.VXLANMode != Never || p.Metadata.Name != "p1" {
		t.Errorf("pool without its defaults: %+v", p)
	}
	if p := objs[1].(*BGPPeer); p.Spec.ASNumber != 65546 {
		t.Errorf("asNumber 1.10 became %d", p.Spec.ASNumber)
	}
	if c := objs[2].(*BGPConfiguration); c.Spec.NodeToNodeMeshEnabled == nil || *c.Spec.NodeToNodeMeshEnabled {
		t.Errorf("configuration: %+v", c)
	}
}

// YAML reads some words as other than text; calicoctl takes them for what they are meant to be.
func TestDecodeManifestMakesText(t *testing.T) {
	objs, err := DecodeManifest([]byte("apiVersion: projectcalico.org/v3\nkind: Node\nmetadata: {name: n, labels: {rr: true, rack: 1, size: 1.5}, annotations: {why: off}}\n" +
		"spec: {orchRefs: [{orchestrator: 5}]}\n---\napiVersion: projectcalico.org/v3\nkind: NetworkSet\nmetadata: {name: s, labels: {size: 7}}\nspec: {nets: []}\n"))
	if err != nil {
		t.Fatal(err)
	}
	n := objs[0].(*Node)
	want := map[string]string{"rr": "true", "rack": "1", "size": "1.5"}
	if !maps.Equal(n.Metadata.Labels, want) || n.Metadata.Annotations["why"] != "false" || n.Spec.OrchRefs[0].Orchestrator != "5" {
		t.Errorf("%+v", n)
	}
	if labels := objs[1].Head().Metadata.Labels; labels["size"] != "7" {
		t.Errorf("%v", labels)
	}
}

func TestDecodeManifestRefuses(t *testing.T) {
	pool := func(rest string) string {
		return "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata:\n  name: p\nspec:\n  cidr: 10.244.0.0/16\n" + rest
	}
	for _, tt := range []struct{ text, want string }{
		{"", "expected at least one resource"},
		{"# nothing\n---\n", "expected at least one resource"},
		{"kind: [", "document 1"},
		{"just text", "document 1: expected a resource"},
		{"kind: IPPool", "apiVersion"},
		{"apiVersion: v1\nkind: Pod", `apiVersion "v1"`},
		{"apiVersion: projectcalico.org/v3\nkind: Gadget", `kind "Gadget"`},
		{"apiVersion: projectcalico.org/v3\nkind: ippool", "wrong case"},
		{pool("  ipipmod: Always\n"), `spec.ipipmod: unknown field: expected one of allowedUses, `},
		{pool("  blockSize: many\n"), "blockSize"},
		{pool("  cidr: 10.0.0.0/8\n"), `key "cidr" already set`},
		{pool("  blockSize: 8\n"), "spec.blockSize 8"},
		{goodManifest + "---\n" + pool("  ipipMode: Sometimes\n"), "document 3"},
		{"apiVersion: v1\nkind: List\nitems:\n- {kind: IPPool}\n", "items[0]"},
		{"apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: List}\n", "items[0]"},
	} {
		objs, err := DecodeManifest([]byte(tt.text))
		if err == nil || !strings.Contains(err.Error(), tt.want) || objs != nil {
			t.Errorf("%q: %v, expected %q", tt.text, err, tt.want)
		}
	}
}

// Whatever a manifest or a stored value holds, it ends in objects that can be stored, or in an error.
func FuzzDecodeManifest(f *testing.F) {
	f.Add([]byte(goodManifest))
	f.Add([]byte(`{"apiVersion":"projectcalico.org/v3","kind":"Node","metadata":{"name":"n"},"spec":{"bgp":null},"status":null}`))
	f.Add([]byte("apiVersion: projectcalico.org/v3\nkind: NodeList\nitems: [null]"))
	f.Add([]byte(`[{"apiVersion":"projectcalico.org/v3","kind":"NetworkPolicy","metadata":{"name":"n","namespace":"a"},"spec":{"ingress":[{"action":"Allow"}]}}]`))
	f.Add([]byte(`{"apiVersion":"projectcalico.org/v3","kind":"BGPFilter","metadata":{"name":"f"},"spec":{"exportV4":[{"action":"Accept","newer":[1.5]}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := DecodeManifestFor(data, ManifestOptions{Namespace: "a", StoredFields: true}); err != nil && len(err.Error()) == 0 {
			t.Fatal("an error without words")
		}
		objs, err := DecodeManifest(data)
		if err != nil {
			return
		}
		for _, obj := range objs {
			if _, err := encode(obj); err != nil {
				t.Fatalf("decoded, and cannot be stored: %v", err)
			}
		}
	})
}

func FuzzStoredResource(f *testing.F) {
	f.Add([]byte(`{"kind":"Node","metadata":{"name":"n"},"spec":{"bgp":{"asNumber":"1.1","x":1}},"y":[]}`))
	f.Add([]byte(`{"kind":"Node","metadata":{"name":"n"},"Spec":{"BGP":null},"spec":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		n, err := Decode[Node](KV{Key: Nodes.Key("n"), Value: data, Revision: 7})
		if err != nil {
			return
		}
		n.Metadata.Labels = map[string]string{"touched": "yes"}
		value, err := encode(n)
		if err != nil {
			t.Fatalf("read, and cannot be written: %v", err)
		}
		if !json.Valid(value) {
			t.Fatalf("not JSON: %s", value)
		}
		again, err := Decode[Node](KV{Key: Nodes.Key("n"), Value: value, Revision: 8})
		if err != nil || again.Metadata.Labels["touched"] != "yes" {
			t.Fatalf("written, and cannot be read: %v: %s", err, value)
		}
	})
}

func FuzzConvertV1(f *testing.F) {
	f.Add([]byte("apiVersion: v1\nkind: ipPool\nmetadata: {cidr: 10.1.0.0/16}\nspec: {ipip: {enabled: true}}\n"))
	f.Add([]byte(`[{"apiVersion":"v1","kind":"bgpPeer","metadata":{"scope":"node","node":"N","peerIP":"::1"},"spec":{"asNumber":"1.1"}}]`))
	f.Add([]byte(`{"apiVersion":"v1","kind":"nodeList","items":[{"apiVersion":"v1","kind":"node","metadata":{"name":"n"}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		objs, err := ConvertV1(data)
		for _, obj := range objs {
			value, encodeErr := encode(obj)
			if encodeErr != nil {
				t.Fatal(encodeErr)
			}
			if _, again := DecodeManifest(value); err != nil || again != nil {
				t.Fatalf("converted, and cannot be applied: %v: %s", again, value)
			}
		}
	})
}
