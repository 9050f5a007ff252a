package agent

import (
	"net/netip"
	"testing"

	"margay/bgp"
)

// TestTraceNamesTheTakenPath: of several equally good paths a trace names the peer of the one whose gateway the packet has got.
func TestTraceNamesTheTakenPath(t *testing.T) {
	path := func(peer, gateway string) bgp.Path {
		return bgp.Path{Peer: netip.MustParseAddr(peer), NextHop: netip.MustParseAddr(gateway)}
	}
	best := path("192.0.2.1", "198.51.100.1")
	best.Equal = []bgp.Path{path("192.0.2.2", "198.51.100.2"), path("192.0.2.3", "198.51.100.3")}
	for gateway, peer := range map[string]string{"198.51.100.1": "192.0.2.1", "198.51.100.2": "192.0.2.2", "198.51.100.3": "192.0.2.3", "198.51.100.9": "192.0.2.1"} {
		if got := taken(best, netip.MustParseAddr(gateway)); got.Peer.String() != peer {
			t.Errorf("by %s: from %s, expected %s", gateway, got.Peer, peer)
		}
	}
	if got := taken(best, netip.Addr{}); got.Peer != best.Peer {
		t.Errorf("a packet that went nowhere: from %s", got.Peer)
	}
	outer := outerOf(around(4, "192.0.2.7", "192.0.2.8", probeOf(1, "10.0.0.1", "10.0.0.2")...))
	if outer.Src.String() != "192.0.2.7" || outer.Dst.String() != "192.0.2.8" {
		t.Errorf("%+v", outer)
	}
}
