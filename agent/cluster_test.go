package agent

import (
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"margay/bgp"
	"margay/datastore"
)

func TestDecodeAffinity(t *testing.T) {
	const prefix = "/calico/ipam/v2/host/n1/ipv4/block/"
	for _, tc := range []struct {
		name, value string
		confirmed   bool
		err         string
	}{
		{"10.244.40.128-26", `{"state":"confirmed","deleted":false}`, true, ""},
		{"10.244.40.128-26", `{"state":"pending","deleted":false}`, false, ""},
		{"10.244.40.128-26", `{"state":"pendingDeletion"}`, false, ""},
		{"10.244.40.128-26", `{"state":"confirmed","deleted":true}`, false, ""},
		{"10.244.40.129-26", `{"state":"confirmed"}`, false, "ADDRESS-LENGTH"},
		{"nonsense", `{"state":"confirmed"}`, false, "ADDRESS-LENGTH"},
		{"10.244.40.128-26", `garbage`, false, "affinity of block"},
	} {
		got, err := decodeAffinity(datastore.KV{Key: prefix + tc.name, Value: []byte(tc.value)})
		switch {
		case tc.err != "":
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%s %s: expected an error that says %q, got %v", tc.name, tc.value, tc.err, err)
			}
		case err != nil || got.confirmed != tc.confirmed || got.block != pfx("10.244.40.128/26"):
			t.Errorf("%s %s: got %+v, %v", tc.name, tc.value, got, err)
		}
	}
}

// FuzzDecodeAffinity: nothing that lies in etcd may crash the agent, and a block that is accepted is a whole one.
func FuzzDecodeAffinity(f *testing.F) {
	f.Add("/calico/ipam/v2/host/n1/ipv4/block/10.244.40.128-26", []byte(`{"state":"confirmed"}`))
	f.Add("x", []byte(`{`))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		if got, err := decodeAffinity(datastore.KV{Key: key, Value: value}); err == nil && got.block != got.block.Masked() {
			t.Errorf("%q: accepted %s", key, got.block)
		}
	})
}

// newTestCluster is a cluster whose views are filled by hand.
func newTestCluster(node string) *cluster {
	c := newCluster(nil, node, slog.New(slog.DiscardHandler))
	c.bgpPeers.items = map[string]*datastore.BGPPeer{}
	c.configs.items = map[string]*datastore.BGPConfiguration{}
	return c
}

func TestPeersOfMeshAndResources(t *testing.T) {
	in := threeNodes("Always")
	c := newTestCluster("node1")
	if got := c.peers(in); len(got) != 2 || got[0].Kind != "node-to-node mesh" || got[0].AS != 64512 || got[1].AS != 64600 {
		t.Fatalf("the mesh alone: %+v", got)
	}
	add := func(name string, s datastore.BGPPeerSpec) {
		p := datastore.NewBGPPeer(name)
		p.Spec = s
		c.bgpPeers.items[name] = p
	}
	add("global", datastore.BGPPeerSpec{PeerIP: "198.18.0.200", ASNumber: 64999})
	add("mine", datastore.BGPPeerSpec{Node: "node1", PeerIP: "198.18.0.201", ASNumber: 64999})
	add("others", datastore.BGPPeerSpec{Node: "node2", PeerIP: "198.18.0.202", ASNumber: 64999})
	add("myself", datastore.BGPPeerSpec{PeerIP: "198.18.0.1", ASNumber: 64512})
	add("selector", datastore.BGPPeerSpec{NodeSelector: "rack == '1'", PeerIP: "198.18.0.203", ASNumber: 64999})
	add("port", datastore.BGPPeerSpec{PeerIP: "198.18.0.204:1790", ASNumber: 64999})
	add("explicit", datastore.BGPPeerSpec{PeerIP: "198.18.0.2", ASNumber: 64777})
	kinds := map[netip.Addr]bgp.Peer{}
	for _, p := range c.peers(in) {
		kinds[p.Addr] = p
	}
	if len(kinds) != 4 || kinds[addr("198.18.0.200")].Kind != "global" || kinds[addr("198.18.0.201")].Kind != "node specific" ||
		kinds[addr("198.18.0.2")].AS != 64777 || kinds[addr("198.18.9.3")].Kind != "node-to-node mesh" {
		t.Errorf("mesh and resources: %+v", kinds)
	}
	off := datastore.NewBGPConfiguration("default")
	off.Spec.NodeToNodeMeshEnabled = new(bool)
	c.configs.items["default"] = off
	if got := c.peers(in); len(got) != 3 {
		t.Errorf("without the mesh: %+v", got)
	}
}
