package datastore

import (
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func testPool(name, cidr string) *IPPool {
	p := NewIPPool(name)
	p.Spec.CIDR, p.Spec.IPIPMode, p.Spec.NATOutgoing = cidr, Always, true
	return p
}

// The stored form is Calico's, field for field (facts/datastore.md).
func TestStoredFormIsCalicos(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	if err := CreateResource(ctx, s, testPool("default-ipv4-ippool", "10.244.0.0/16")); err != nil {
		t.Fatal(err)
	}
	kv, err := s.Get(ctx, "/calico/resources/v3/projectcalico.org/ippools/default-ipv4-ippool")
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(kv.Value, &got); err != nil {
		t.Fatal(err)
	}
	meta := got["metadata"].(map[string]any)
	if uid, _ := meta["uid"].(string); len(uid) != 36 || meta["creationTimestamp"] == nil || meta["resourceVersion"] != nil {
		t.Errorf("metadata: %v", meta)
	}
	delete(got, "metadata")
	want := map[string]any{"kind": "IPPool", "apiVersion": "projectcalico.org/v3", "spec": map[string]any{
		"cidr": "10.244.0.0/16", "vxlanMode": "Never", "ipipMode": "Always", "natOutgoing": true, "blockSize": 26.0,
		"nodeSelector": "all()", "allowedUses": []any{"Workload", "Tunnel"}, "assignmentMode": "Automatic"}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestUnknownFieldsSurvive(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	stored := `{"kind":"Node","apiVersion":"projectcalico.org/v3","metadata":{"name":"n1","uid":"u","managedBy":{"x":[1]}},
		"spec":{"bgp":{"ipv4Address":"192.0.2.1/24","asNumber":"64513","newBGP":9007199254740993},"newSpec":[{"a":null}]},
		"status":{"newStatus":true},"newTop":{"deep":{"er":1}}}`
	if _, err := s.Create(ctx, Nodes.Key("n1"), []byte(stored)); err != nil {
		t.Fatal(err)
	}
	err := ModifyResource(ctx, s, "n1", func(n *Node) error {
		if n.Spec.BGP.ASNumber == nil || *n.Spec.BGP.ASNumber != 64513 {
			t.Errorf("asNumber: %v", n.Spec.BGP.ASNumber)
		}
		n.Spec.BGP.IPv4IPIPTunnelAddr = "10.244.1.0"
		n.Spec.BGP.IPv4Address = ""
		n.Metadata.Labels = map[string]string{"l": "v"}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	kv, err := s.Get(ctx, Nodes.Key("n1"))
	if err != nil {
		t.Fatal(err)
	}
	// The order of the fields stays, too.
	want := `{"kind":"Node","apiVersion":"projectcalico.org/v3","metadata":{"name":"n1","uid":"u","labels":{"l":"v"},"managedBy":{"x":[1]}},` +
		`"spec":{"bgp":{"asNumber":"64513","newBGP":9007199254740993,"ipv4IPIPTunnelAddr":"10.244.1.0"},` +
		`"newSpec":[{"a":null}]},"status":{"newStatus":true},"newTop":{"deep":{"er":1}}}`
	if d := cmp.Diff(want, string(kv.Value)); d != "" {
		t.Error(d)
	}
	// Nothing altered: nothing written.
	if err := ModifyResource(ctx, s, "n1", func(*Node) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if again, err := s.Get(ctx, Nodes.Key("n1")); err != nil || again.Revision != kv.Revision {
		t.Errorf("an empty change was written: %v", err)
	}
	// Applying a manifest replaces what is known and keeps what is not.
	n := NewNode("n1")
	n.Spec.BGP = &NodeBGP{IPv4Address: "192.0.2.7/24"}
	if created, err := ApplyResource(ctx, s, n); err != nil || created {
		t.Fatalf("apply: %v, %v", created, err)
	}
	kv, err = s.Get(ctx, Nodes.Key("n1"))
	if err != nil || !strings.Contains(string(kv.Value), `"bgp":{"newBGP":9007199254740993,"ipv4Address":"192.0.2.7/24"}`) ||
		!strings.Contains(string(kv.Value), `"uid":"u"`) {
		t.Errorf("after apply: %s, %v", kv.Value, err)
	}
}

func TestUpdateIsCompareAndSwap(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	if err := CreateResource(ctx, s, NewNode("n1")); err != nil {
		t.Fatal(err)
	}
	if err := CreateResource(ctx, s, NewNode("n1")); !errors.Is(err, ErrExists) {
		t.Errorf("second create: %v", err)
	}
	a, err := GetResource[Node](ctx, s, "n1")
	if err != nil {
		t.Fatal(err)
	}
	b, err := GetResource[Node](ctx, s, "n1")
	if err != nil {
		t.Fatal(err)
	}
	a.Spec.Addresses = []NodeAddress{{Address: "192.0.2.1"}}
	if err := UpdateResource(ctx, s, a); err != nil {
		t.Fatal(err)
	}
	a.Spec.Addresses = nil
	if err := UpdateResource(ctx, s, a); err != nil {
		t.Errorf("second update of the same object: %v", err)
	}
	if err := UpdateResource(ctx, s, b); !errors.Is(err, ErrConflict) || err.Error() != `Node "n1": changed since it was read` {
		t.Errorf("update of what was read earlier: %v", err)
	}
	if err := UpdateResource(ctx, s, NewNode("n1")); err == nil || !strings.Contains(err.Error(), "resourceVersion") {
		t.Errorf("update without a version: %v", err)
	}
	if _, err := GetResource[Node](ctx, s, "n2"); !errors.Is(err, ErrNotFound) || err.Error() != `Node "n2": not found` {
		t.Errorf("get of nothing: %v", err)
	}
	if err := DeleteResource[Node](ctx, s, "n1"); err != nil {
		t.Error(err)
	}
	if err := DeleteResource[Node](ctx, s, "n1"); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete of nothing: %v", err)
	}
	if _, err := GetResource[Node](ctx, s, "../nodes/n1"); err == nil || errors.Is(err, ErrNotFound) {
		t.Errorf("a name that is a path: %v", err)
	}
}

// Many writers of one resource all get through, and none overwrites another.
func TestModifyUnderContention(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	if err := CreateResource(ctx, s, NewNode("n1")); err != nil {
		t.Fatal(err)
	}
	const writers = 8
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			err := ModifyResource(ctx, s, "n1", func(n *Node) error {
				n.Spec.Addresses = append(n.Spec.Addresses, NodeAddress{Address: "192.0.2.1"})
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	n, err := GetResource[Node](ctx, s, "n1")
	if err != nil || len(n.Spec.Addresses) != writers {
		t.Errorf("%d of %d changes are there, %v", len(n.Spec.Addresses), writers, err)
	}
}

func TestPoolsDoNotOverlap(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	if err := CreateResource(ctx, s, testPool("a", "10.244.0.0/16")); err != nil {
		t.Fatal(err)
	}
	for _, cidr := range []string{"10.244.0.0/16", "10.244.128.0/24", "10.0.0.0/8"} {
		err := CreateResource(ctx, s, testPool("b", cidr))
		if err == nil || !strings.Contains(err.Error(), `overlaps pool "a"`) {
			t.Errorf("%s: %v", cidr, err)
		}
	}
	// Of pools that overlap and are created at the same moment, one wins.
	var (
		wg  sync.WaitGroup
		mu  sync.Mutex
		won int
	)
	for _, name := range []string{"p", "q", "r", "s"} {
		wg.Go(func() {
			if err := CreateResource(ctx, s, testPool(name, "10.9.0.0/16")); err == nil {
				mu.Lock()
				won++
				mu.Unlock()
			} else if !strings.Contains(err.Error(), "overlaps") {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("%d overlapping pools were created", won)
	}
	p, err := GetResource[IPPool](ctx, s, "a")
	if err != nil {
		t.Fatal(err)
	}
	p.Spec.BlockSize = 27
	if err := UpdateResource(ctx, s, p); err == nil || !strings.Contains(err.Error(), "spec.blockSize") {
		t.Errorf("change of blockSize: %v", err)
	}
	if _, err := ApplyResource(ctx, s, testPool("a", "10.245.0.0/16")); err == nil || !strings.Contains(err.Error(), "spec.cidr") {
		t.Errorf("change of cidr: %v", err)
	}
}

func TestListToleratesOneBrokenValue(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	if err := CreateResource(ctx, s, NewNode("n1")); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"broken": "{", "null": "null", "other": `{"kind":"IPPool","metadata":{"name":"other"}}`,
		"renamed": `{"kind":"Node","metadata":{"name":"n9"}}`} {
		if _, err := s.Create(ctx, Nodes.Key(name), []byte(value)); err != nil {
			t.Fatal(err)
		}
	}
	nodes, rev, err := ListResources[Node](ctx, s)
	if len(nodes) != 1 || nodes[0].Metadata.Name != "n1" || rev == 0 {
		t.Errorf("%d nodes at %d", len(nodes), rev)
	}
	for _, name := range []string{"broken", "null", "other", "renamed"} {
		if err == nil || !strings.Contains(err.Error(), `Node "`+name+`": stored value`) {
			t.Errorf("%s is not named in %v", name, err)
		}
	}
}

func TestValidate(t *testing.T) {
	pool := func(change func(*IPPoolSpec)) Object {
		p := testPool("p", "10.244.0.0/16")
		change(&p.Spec)
		return p
	}
	peer := func(spec BGPPeerSpec) Object {
		p := NewBGPPeer("p")
		p.Spec = spec
		return p
	}
	node := func(b NodeBGP) Object {
		n := NewNode("n")
		n.Spec.BGP = &b
		return n
	}
	for _, tt := range []struct {
		obj  Object
		want string // empty: valid
	}{
		{pool(func(*IPPoolSpec) {}), ""},
		{pool(func(s *IPPoolSpec) { s.CIDR, s.IPIPMode = "fd00::/64", Never }), ""},
		{pool(func(s *IPPoolSpec) { s.CIDR = "10.244.0.0/26" }), ""},
		{pool(func(s *IPPoolSpec) { s.CIDR = "" }), "spec.cidr"},
		{pool(func(s *IPPoolSpec) { s.CIDR = "10.244.0.0" }), "spec.cidr"},
		{pool(func(s *IPPoolSpec) { s.CIDR = "10.244.0.1/16" }), "expected no bits set behind the prefix length: 10.244.0.0/16"},
		{pool(func(s *IPPoolSpec) { s.CIDR = "::ffff:10.0.0.0/112" }), "spec.cidr"},
		{pool(func(s *IPPoolSpec) { s.CIDR = "169.254.0.0/16" }), "expected a range outside"},
		{pool(func(s *IPPoolSpec) { s.CIDR = "0.0.0.0/0" }), "expected a range outside"},
		{pool(func(s *IPPoolSpec) { s.CIDR = "10.244.0.0/28" }), "spec.blockSize 26: expected at least the prefix length"},
		{pool(func(s *IPPoolSpec) { s.BlockSize = 19 }), "spec.blockSize 19: expected 20 to 32"},
		{pool(func(s *IPPoolSpec) { s.BlockSize = 33 }), "spec.blockSize 33"},
		{pool(func(s *IPPoolSpec) { s.BlockSize = -1 }), "spec.blockSize -1"},
		{pool(func(s *IPPoolSpec) { s.CIDR, s.IPIPMode, s.BlockSize = "fd00::/64", Never, 26 }), "spec.blockSize 26: expected 116 to 128"},
		{pool(func(s *IPPoolSpec) { s.CIDR = "fd00::/64" }), "spec.ipipMode"},
		{pool(func(s *IPPoolSpec) { s.IPIPMode = "always" }), `spec.ipipMode "always": expected Always, CrossSubnet, Never`},
		{pool(func(s *IPPoolSpec) { s.VXLANMode = Always }), "spec.ipipMode and spec.vxlanMode"},
		{pool(func(s *IPPoolSpec) { s.AllowedUses = []string{"x"} }), "spec.allowedUses"},
		{pool(func(s *IPPoolSpec) { s.AssignmentMode = "x" }), "spec.assignmentMode"},
		{peer(BGPPeerSpec{PeerIP: "192.0.2.1", ASNumber: 1}), ""},
		{peer(BGPPeerSpec{PeerIP: "[2001:db8::1]:1790", ASNumber: 1}), ""},
		{peer(BGPPeerSpec{PeerSelector: "all()"}), ""},
		{peer(BGPPeerSpec{PeerIP: "x", ASNumber: 1}), "spec.peerIP"},
		{peer(BGPPeerSpec{PeerIP: "192.0.2.1"}), "spec.asNumber"},
		{peer(BGPPeerSpec{PeerIP: "192.0.2.1", ASNumber: 1, Node: "a", NodeSelector: "b"}), "spec.node and spec.nodeSelector"},
		{node(NodeBGP{IPv4Address: "192.0.2.1/24", IPv6Address: "2001:db8::1/64", IPv4IPIPTunnelAddr: "10.0.0.1"}), ""},
		{node(NodeBGP{IPv4Address: "192.0.2.1"}), ""},
		{node(NodeBGP{IPv4Address: "2001:db8::1/64"}), "spec.bgp.ipv4Address"},
		{node(NodeBGP{IPv6Address: "192.0.2.1/24"}), "spec.bgp.ipv6Address"},
		{node(NodeBGP{IPv4IPIPTunnelAddr: "10.0.0.1/24"}), "spec.bgp.ipv4IPIPTunnelAddr"},
		{NewNode("N1"), "metadata.name"},
		{NewNode("a/b"), "metadata.name"},
		{NewNode(""), "metadata.name"},
		{NewClusterInformation("x"), "metadata.name"},
		{NewClusterInformation("default"), ""},
	} {
		err := prepare(tt.obj)
		if (err == nil) != (tt.want == "") || (err != nil && !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%+v: %v, expected %q", tt.obj, err, tt.want)
		}
	}
}

func TestLookupKind(t *testing.T) {
	for _, word := range []string{"ippool", "ippools", "ipPool", "IPPool", "pool", "ip-pool"} {
		if k, err := LookupKind(word); err != nil || k != IPPools {
			t.Errorf("%s: %v, %v", word, k, err)
		}
	}
	for word, want := range map[string]*Kind{"node": Nodes, "nodes": Nodes, "bgppeer": BGPPeers, "bgpPeers": BGPPeers,
		"bgpconfig": BGPConfigurations, "clusterinformation": ClusterInformations} {
		if k, err := LookupKind(word); err != nil || k != want {
			t.Errorf("%s: %v, %v", word, k, err)
		}
	}
	if _, err := LookupKind("pod"); err == nil || !strings.Contains(err.Error(), "expected one of") {
		t.Errorf("pod: %v", err)
	}
}
