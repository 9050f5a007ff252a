package datastore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// samples are specs as Calico's client stores them, with a field that no version of ours knows.
var samples = map[*Kind]string{
	IPPools:             `{"cidr":"10.244.0.0/16","ipipMode":"Always","newer":{"a":[1]}}`,
	Nodes:               `{"bgp":{"ipv4Address":"192.0.2.1/24","newer":9007199254740993}}`,
	BGPPeers:            `{"peerIP":"192.0.2.9","asNumber":"64513","newer":null}`,
	BGPConfigurations:   `{"nodeToNodeMeshEnabled":false,"newer":true}`,
	BGPFilters:          `{"exportV4":[{"cidr":"10.0.0.0/8","matchOperator":"In","action":"Accept","newer":1}]}`,
	ClusterInformations: `{"clusterGUID":"x","datastoreReady":true,"newer":1}`,
	IPReservations:      `{"reservedCIDRs":["10.244.0.0/28"],"newer":1}`,
	IPAMConfigurations:  `{"strictAffinity":true,"autoAllocateBlocks":true,"newer":1}`,
	FelixConfigurations: `{"bpfLogLevel":"","ipipMTU":1440,"newer":1.50,"natOutgoingAddress":"192.0.2.1","natPortRange":"32768:65535","interfacePrefix":"cali,tap",` +
		`"mtuIfacePattern":"^eth.*","routeTableRanges":[{"min":1,"max":250},{"min":256,"max":4096}],"deviceRouteSourceAddress":"",` +
		`"deviceRouteSourceAddressIPv6":"fd00::1","deviceRouteProtocol":80,"prometheusMetricsHost":"::1","prometheusMetricsPort":9091,` +
		`"healthPort":9099,"logSeverityScreen":"Info","floatingIPs":"Enabled","externalNodesList":["192.0.2.0/24"]}`,
	NetworkPolicies: `{"order":10,"selector":"all()","ingress":[{"action":"Allow","protocol":"TCP","destination":{"ports":[80,"8000:8080","http"]}}],"newer":1}`,
	WorkloadEndpoints: `{"orchestrator":"k8s","node":"node-1","containerID":"3fA-9","pod":"web-0.x","endpoint":"eth0","serviceAccountName":"web",` +
		`"interfaceName":"cali123","ipNetworks":["10.244.0.1/32","fd00::1/128","10.244.0.2"],"ipNATs":[{"internalIP":"10.244.0.1","externalIP":"192.0.2.1"}],` +
		`"ipv4Gateway":"169.254.1.1","ipv6Gateway":"","profiles":["kns.default"],"mac":"ee:ee:ee:ee:ee:ee","newer":1,` +
		`"ports":[{"name":"http-2","protocol":"TCP","port":80},{"protocol":"UDP","port":53,"hostPort":5353,"hostIP":"0.0.0.0"}]}`,
}

func sampleName(k *Kind) string {
	if k == WorkloadEndpoints {
		return "team-a/node--1-k8s-web--0.x-eth0"
	}
	if k.Namespaced {
		return "team-a/default"
	}
	return "default"
}

// Every kind: what is stored is listed, watched, and written back, and not a byte of it changes.
func TestEveryKindRoundTrips(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	if n := len(Kinds()); n != 22 {
		t.Errorf("%d kinds", n)
	}
	for _, k := range Kinds() {
		spec := samples[k]
		if spec == "" {
			spec = `{"newer":{"deep":[9007199254740993]}}`
		}
		name, namespace := sampleName(k), ""
		if k.Namespaced {
			namespace = `"namespace":"team-a",`
		}
		value := fmt.Appendf(nil, `{"kind":%q,"apiVersion":"projectcalico.org/v3","metadata":{"name":%q,%s"uid":"u","creationTimestamp":"2026-11-23T09:11:33Z",`+
			`"newer":[{}]},"spec":%s,"newer":{"x":null}}`, k.Kind, name[strings.LastIndexByte(name, '/')+1:], namespace, spec)
		_, before, err := s.List(ctx, k.Prefix())
		if err != nil {
			t.Fatal(err)
		}
		events := s.Watch(ctx, k.Prefix(), before)
		if _, err := s.Create(ctx, k.Key(name), value); err != nil {
			t.Fatal(err)
		}
		ev := next(t, events)
		if seen, err := DecodeObject(k, ev.KV); err != nil || seen.Head().Path() != name {
			t.Errorf("%s, watched: %v", k.Kind, err)
		}
		objs, _, err := ListObjects(ctx, s, k)
		if err != nil || len(objs) != 1 || KindOf(objs[0]) != k || objs[0].Head().Path() != name {
			t.Fatalf("%s: list: %d, %v", k.Kind, len(objs), err)
		}
		// What is shown, read as a manifest and applied, by update and by replace: the key is not even written.
		doc, err := Document(objs[0])
		if err != nil {
			t.Fatal(err)
		}
		manifest, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		again, err := DecodeManifestFor(manifest, ManifestOptions{StoredFields: true})
		if err != nil {
			t.Fatalf("%s: shown, and not readable: %v", k.Kind, err)
		}
		if created, err := ApplyResource(ctx, s, again[0]); err != nil || created {
			t.Errorf("%s: apply of what was shown: %v, %v", k.Kind, created, err)
		}
		if err := ReplaceResource(ctx, s, again[0]); err != nil {
			t.Errorf("%s: replace: %v", k.Kind, err)
		}
		kv, err := s.Get(ctx, k.Key(name))
		if err != nil || !bytes.Equal(kv.Value, value) || kv.Revision != ev.KV.Revision {
			t.Errorf("%s: changed from revision %d to %d:\n%s\n%s, %v", k.Kind, ev.KV.Revision, kv.Revision, value, kv.Value, err)
		}
		// A change of what is known leaves the rest.
		objs[0].Head().Metadata.Labels = map[string]string{"l": "v"}
		if err := UpdateResource(ctx, s, objs[0]); err != nil {
			t.Errorf("%s: update: %v", k.Kind, err)
		}
		kv, err = s.Get(ctx, k.Key(name))
		want, got := map[string]any{}, map[string]any{}
		if err != nil || json.Unmarshal(value, &want) != nil || json.Unmarshal(kv.Value, &got) != nil {
			t.Fatal(err)
		}
		want["metadata"].(map[string]any)["labels"] = map[string]any{"l": "v"}
		if a, b := mustJSON(t, want), mustJSON(t, got); !bytes.Equal(a, b) {
			t.Errorf("%s: after an update:\n%s\n%s", k.Kind, a, b)
		}
		// The tier that every cluster has is the one thing that cannot be deleted.
		if err := DeleteObject(ctx, s, k, name); err != nil && (k != Tiers || !errors.As(err, new(UnsupportedError))) {
			t.Errorf("%s: delete: %v", k.Kind, err)
		}
	}
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// A misspelt field is refused also where unknown ones are let through to be compared with the store.
func TestUnknownFieldsMustBeStored(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	stored := `{"kind":"Node","apiVersion":"projectcalico.org/v3","metadata":{"name":"node1"},"spec":{"newer":1}}`
	if _, err := s.Create(ctx, Nodes.Key("node1"), []byte(stored)); err != nil {
		t.Fatal(err)
	}
	for spec, want := range map[string]string{
		`{"newer":1,"addresses":[{"address":"192.0.2.1"}]}`: "",
		`{"newer":2}`:     `Node "node1": spec.newer: unknown field: expected one of addresses, bgp, interfaces, ipv4VXLANTunnelAddr, ipv6VXLANTunnelAddr, orchRefs, vxlanTunnelMACAddr, vxlanTunnelMACAddrV6, wireguard`,
		`{"newest":null}`: `Node "node1": spec.newest: unknown field: expected one of addresses, bgp, interfaces, ipv4VXLANTunnelAddr, ipv6VXLANTunnelAddr, orchRefs, vxlanTunnelMACAddr, vxlanTunnelMACAddrV6, wireguard`,
	} {
		manifest := []byte(`{"kind":"Node","apiVersion":"projectcalico.org/v3","metadata":{"name":"node1"},"spec":` + spec + `}`)
		objs, err := DecodeManifestFor(manifest, ManifestOptions{StoredFields: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ApplyResource(ctx, s, objs[0]); fmt.Sprint(err) != want && (err != nil || want != "") {
			t.Errorf("%s: %v", spec, err)
		}
		if _, err := DecodeManifest(manifest); err == nil {
			t.Errorf("%s: accepted without a store to compare with", spec)
		}
		objs[0].Head().Metadata.Name = "node2"
		if _, err := ApplyResource(ctx, s, objs[0]); err == nil {
			t.Errorf("%s: created", spec)
		}
	}
}

func TestNamespacedKinds(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	if err := Initialize(ctx, s); err != nil {
		t.Fatal(err)
	}
	for _, namespace := range []string{"a", "b"} {
		p := NetworkPolicies.New()
		p.Head().Metadata.Name, p.Head().Metadata.Namespace = "web", namespace
		if err := CreateResource(ctx, s, p); err != nil {
			t.Fatal(err)
		}
	}
	kv, err := s.Get(ctx, "/calico/resources/v3/projectcalico.org/networkpolicies/a/default.web")
	if err != nil || !bytes.Contains(kv.Value, []byte(`"spec":{"types":["Ingress"]}`)) {
		t.Errorf("%s, %v", kv.Value, err)
	}
	if objs, _, err := ListNamespace(ctx, s, NetworkPolicies, "a"); err != nil || len(objs) != 1 {
		t.Errorf("one namespace: %d, %v", len(objs), err)
	}
	if objs, _, err := ListObjects(ctx, s, NetworkPolicies); err != nil || len(objs) != 2 {
		t.Errorf("all namespaces: %d, %v", len(objs), err)
	}
	for _, name := range []string{"web", "/web", "A/web", "a/web/x", "a/"} {
		if _, err := GetObject(ctx, s, NetworkPolicies, name); err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("%q: %v", name, err)
		}
	}
	p := NetworkPolicies.New()
	p.Head().Metadata.Name = "web"
	if err := CreateResource(ctx, s, p); err == nil {
		t.Error("created without a namespace")
	}
}
