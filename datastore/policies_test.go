package datastore

import (
	"context"
	"errors"
	"strings"
	"testing"
)

const (
	// As Calico 3.31's client stores a policy "web" of the default tier, and 3.32's.
	olderPolicy = `{"kind":"NetworkPolicy","apiVersion":"projectcalico.org/v3","metadata":{"name":"default.web","namespace":"a","uid":"u",` +
		`"annotations":{"projectcalico.org/metadata":"{\"name\":\"web\"}"}},"spec":{"order":10,"ingress":[{"action":"Allow","source":{},"destination":{}}],` +
		`"selector":"all()","types":["Ingress"]}}`
	newerPolicy = `{"kind":"NetworkPolicy","apiVersion":"projectcalico.org/v3","metadata":{"name":"web","namespace":"a","uid":"u"},` +
		`"spec":{"tier":"default","order":10,"ingress":[{"action":"Allow","source":{},"destination":{}}],"selector":"all()","types":["Ingress"]}}`
)

// Both layouts are read under the name that users know, shown with tier and label, written in their own layout, and
// deleted.
func TestPolicyLayouts(t *testing.T) {
	for key, stored := range map[string]string{"a/default.web": olderPolicy, "a/web": newerPolicy} {
		s, ctx := openStore(t), t.Context()
		if _, err := s.Create(ctx, NetworkPolicies.Key(key), []byte(stored)); err != nil {
			t.Fatal(err)
		}
		obj, err := GetObject(ctx, s, NetworkPolicies, "a/web")
		if err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		listed, _, err := ListNamespace(ctx, s, NetworkPolicies, "a")
		if err != nil || len(listed) != 1 || listed[0].Head().Path() != "a/web" {
			t.Fatalf("%s: listed: %v, %v", key, listed, err)
		}
		doc, err := Document(obj)
		if err != nil {
			t.Fatal(err)
		}
		shown, err := OrderedJSON(obj, doc)
		if err != nil || strings.Contains(string(shown), nameAnnotation) ||
			!strings.Contains(string(shown), `"labels":{"projectcalico.org/tier":"default"}`) || !strings.Contains(string(shown), `"spec":{"tier":"default","order":10,`) {
			t.Errorf("%s: shown: %s, %v", key, shown, err)
		}
		// What is shown comes back without a write; a change keeps the layout.
		for _, order := range []string{`"order":10,`, `"order":11,`} {
			objs, err := DecodeManifest([]byte(strings.Replace(string(shown), `"order":10,`, order, 1)))
			if err != nil {
				t.Fatal(err)
			}
			if created, err := ApplyResource(ctx, s, objs[0]); err != nil || created {
				t.Fatalf("%s: apply: %v, %v", key, created, err)
			}
			kv, err := s.Get(ctx, NetworkPolicies.Key(key))
			if want := strings.Replace(stored, `"order":10,`, order, 1); err != nil || string(kv.Value) != want {
				t.Errorf("%s: after apply of %q:\n%s\n%s, %v", key, order, kv.Value, want, err)
			}
		}
		if err := DeleteObject(ctx, s, NetworkPolicies, "a/web"); err != nil {
			t.Errorf("%s: delete: %v", key, err)
		}
		if kvs, _, err := s.Keys(ctx, NetworkPolicies.Prefix()); err != nil || len(kvs) != 0 {
			t.Errorf("%s: left: %v, %v", key, kvs, err)
		}
		if err := DeleteObject(ctx, s, NetworkPolicies, "a/web"); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: delete of nothing: %v", key, err)
		}
	}
}

// A new policy gets the layout of the Calico that the store belongs to.
func TestPolicyIsCreatedInTheStoresLayout(t *testing.T) {
	for version, key := range map[string]string{"": "default.web", "v3.31.3": "default.web", "v3.32.0": "web", "v4.0.0-beta": "web", "newest": "default.web"} {
		s, ctx := openStore(t), t.Context()
		if err := Initialize(ctx, s); err != nil {
			t.Fatal(err)
		}
		if err := ModifyResource(ctx, s, "default", func(c *ClusterInformation) error { c.Spec.CalicoVersion = version; return nil }); err != nil {
			t.Fatal(err)
		}
		if err := CreateResource(ctx, s, policyIn(t, "web", "")); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(ctx, GlobalNetworkPolicies.Key(key)); err != nil {
			t.Errorf("Calico %q: %v", version, err)
		}
		if err := CreateResource(ctx, s, policyIn(t, "web", "")); !errors.Is(err, ErrExists) {
			t.Errorf("Calico %q: created twice: %v", version, err)
		}
	}
}

func policyIn(t *testing.T, name, tier string) Object {
	t.Helper()
	spec := "{selector: all()}"
	if tier != "" {
		spec = "{selector: all(), tier: " + tier + "}"
	}
	objs, err := DecodeManifest([]byte("apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: " + name + "}\nspec: " + spec + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	return objs[0]
}

func TestTiers(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	for range 2 { // the second time there is nothing to do
		if err := Initialize(ctx, s); err != nil {
			t.Fatal(err)
		}
	}
	before := revision(t, ctx, s)
	if err := Initialize(ctx, s); err != nil || revision(t, ctx, s) != before {
		t.Errorf("initialized twice: %v", err)
	}
	for want, obj := range map[string]Object{
		`GlobalNetworkPolicy "web": spec.tier "red": expected a Tier that exists`:                                            policyIn(t, "web", "red"),
		`GlobalNetworkPolicy "web": metadata.name "web": expected it to begin with "adminnetworkpolicy.", the policy's tier`: policyIn(t, "web", adminTier),
	} {
		if err := CreateResource(ctx, s, obj); err == nil || err.Error() != want {
			t.Errorf("%v, expected %s", err, want)
		}
	}
	if err := CreateResource(ctx, s, tier("red", "5", "Pass")); err != nil {
		t.Fatal(err)
	}
	if err := CreateResource(ctx, s, policyIn(t, "red.web", "red")); err != nil {
		t.Fatal(err)
	}
	kv, err := s.Get(ctx, GlobalNetworkPolicies.Key("red.web"))
	if err != nil || !strings.Contains(string(kv.Value), `"labels":{"projectcalico.org/tier":"red"}`) {
		t.Errorf("in a tier of its own: %s, %v", kv.Value, err)
	}
	for _, name := range []string{"red", defaultTier, adminTier} {
		if err := DeleteObject(ctx, s, Tiers, name); !errors.As(err, new(UnsupportedError)) {
			t.Errorf("delete tier %s: %v", name, err)
		}
	}
	if err := DeleteObject(ctx, s, GlobalNetworkPolicies, "red.web"); err != nil {
		t.Error(err)
	}
	if err := DeleteObject(ctx, s, Tiers, "red"); err != nil {
		t.Error(err)
	}
}

func revision(t *testing.T, ctx context.Context, s *Store) int64 {
	t.Helper()
	_, rev, err := s.Keys(ctx, resourceRoot)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

// A peer may only name filters that are there, as with calicoctl.
func TestPeersFilters(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	peer := NewBGPPeer("tor")
	peer.Spec.PeerIP, peer.Spec.ASNumber, peer.Spec.Filters = "192.0.2.1", 64512, []string{"f"}
	if err := CreateResource(ctx, s, peer); err == nil || err.Error() != `BGPPeer "tor": spec.filters[0] "f": expected a BGPFilter that exists` {
		t.Errorf("without the filter: %v", err)
	}
	if err := CreateResource(ctx, s, NewBGPFilter("f")); err != nil {
		t.Fatal(err)
	}
	if err := CreateResource(ctx, s, peer); err != nil {
		t.Errorf("with the filter: %v", err)
	}
}

// What Calico's client fills in and rewrites at a write, compared with the JSON that it stored for the same manifests.
func TestStoredAsByCalico(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	if err := Initialize(ctx, s); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ kind, spec, want string }{
		{"FelixConfiguration", `{routeRefreshInterval: 90s, ipipMTU: 1400}`, `{"bpfConnectTimeLoadBalancing":"TCP","bpfHostNetworkedNATWithoutCTLB":"Enabled",` +
			`"bpfLogLevel":"","floatingIPs":"Disabled","ipipMTU":1400,"routeRefreshInterval":"1m30s"}`},
		{"KubeControllersConfiguration", `{logSeverityScreen: Info, etcdV3CompactionPeriod: 10m, controllers: {node: {reconcilerPeriod: 5m}}}`,
			`{"logSeverityScreen":"Info","etcdV3CompactionPeriod":"10m0s","prometheusMetricsPort":9094,"controllers":{"node":{"reconcilerPeriod":"5m0s",` +
				`"leakGracePeriod":"15m0s"}}},"status":{"runningConfig":{"controllers":{}}}`},
		{"Tier", `{}`, `{"order":1000000,"defaultAction":"Deny"}`},
		{"Profile", `{ingress: [{action: Allow}]}`, `{"ingress":[{"action":"Allow","source":{},"destination":{}}]}`},
		{"NetworkPolicy", `{egress: [{action: Deny, protocol: ICMP, icmp: {code: 0, type: 8}}], order: 10, selector: all()}`, `{"order":10,"egress":[{"action":"Deny",` +
			`"protocol":"ICMP","icmp":{"type":8,"code":0},"source":{},"destination":{}}],"selector":"all()","types":["Egress"]}`},
		{"Node", `{bgp: {ipv4Address: 192.0.2.1/24}}`, `{"bgp":{"ipv4Address":"192.0.2.1/24"}},"status":{}`},
		{"BGPPeer", `{peerIP: 192.0.2.9, asNumber: 64514, maxRestartTime: 90s}`, `{"peerIP":"192.0.2.9","asNumber":64514,"maxRestartTime":"1m30s"}`},
	} {
		objs, err := DecodeManifest([]byte("apiVersion: projectcalico.org/v3\nkind: " + tt.kind + "\nmetadata: {name: x}\nspec: " + tt.spec + "\n"))
		if err != nil {
			t.Fatal(err)
		}
		if err := CreateResource(ctx, s, objs[0]); err != nil {
			t.Fatal(err)
		}
		kv, err := KindOf(objs[0]).locate(ctx, s, objs[0].Head().Path())
		if _, spec, _ := strings.Cut(string(kv.Value), `"spec":`); err != nil || spec != tt.want+"}" {
			t.Errorf("%s: %v\n%s\n%s", tt.kind, err, spec, tt.want+"}")
		}
	}
}
