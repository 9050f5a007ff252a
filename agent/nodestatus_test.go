package agent

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"margay/agent/api"
	"margay/bgp"
	"margay/datastore"
)

func statusRequest(t *testing.T, name, node string, period uint32) *datastore.Resource {
	t.Helper()
	r, err := datastore.NewStatusRequest(name, datastore.StatusRequest{Node: node, Classes: []string{"BGP"}, UpdatePeriodSeconds: period})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A request is answered when it comes, when its spec changes and when its period is over; not when only our answer did.
func TestStatusRequestsAreDue(t *testing.T) {
	k, now := reports{}, time.Now()
	once, often, other := statusRequest(t, "once", "n1", 0), statusRequest(t, "often", "n1", 10), statusRequest(t, "other", "n2", 10)
	all := []*datastore.Resource{once, often, other}
	for _, tt := range []struct {
		at    time.Duration
		all   []*datastore.Resource
		due   string
		pause time.Duration
	}{
		{0, all, "once often", 10 * time.Second},
		{4 * time.Second, all, "", 6 * time.Second},
		{10 * time.Second, all, "often", 10 * time.Second},
		{11 * time.Second, []*datastore.Resource{statusRequest(t, "once", "n1", 3), often}, "once", 3 * time.Second},
		{12 * time.Second, []*datastore.Resource{often}, "", 8 * time.Second},
		{13 * time.Second, []*datastore.Resource{once, often}, "once", 7 * time.Second}, // deleted, and made again
		{14 * time.Second, nil, "", time.Hour},
	} {
		due, pause := k.due(tt.all, "n1", now.Add(tt.at))
		names := ""
		for i, r := range due {
			if i > 0 {
				names += " "
			}
			names += r.Metadata.Name
		}
		if names != tt.due || pause != tt.pause {
			t.Errorf("after %s: due %q, pause %s; expected %q, %s", tt.at, names, pause, tt.due, tt.pause)
		}
	}
}

func TestNodeReport(t *testing.T) {
	peer := func(a, kind, state string) api.Peer {
		return api.Peer{Address: netip.MustParseAddr(a), Kind: kind, State: state}
	}
	st := api.Status{Ready: true, Version: "v1", Address: netip.MustParseAddr("192.0.2.1"), BGP: []api.Peer{
		peer("192.0.2.2", "node-to-node mesh", "Established"), peer("192.0.2.3", "global", "Active"), peer("2001:db8::9", "node specific", "Established")}}
	routes := map[netip.Prefix]bgp.Path{}
	for i := range reportedRoutes + 10 {
		routes[netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)] = bgp.Path{NextHop: st.Address, Peer: netip.MustParseAddr("192.0.2.2")}
	}
	r := nodeReport(st, routes, []string{"Agent", "BGP", "Routes"}, time.Now())
	got := fmt.Sprintf("%s %d/%d v4 %d/%d v6 %s %s %s %d routes %s", r.Agent.BIRDV4.State, r.BGP.EstablishedV4, r.BGP.NotEstablishedV4, r.BGP.EstablishedV6,
		r.BGP.NotEstablishedV6, r.BGP.PeersV4[0].Type, r.BGP.PeersV4[1].Type, r.BGP.PeersV6[0].Type, len(r.Routes.RoutesV4), r.Routes.RoutesV4[0].LearnedFrom.SourceType)
	if want := "Ready 1/1 v4 1/0 v6 NodeMesh GlobalPeer NodePeer 2000 routes NodeMesh"; got != want {
		t.Errorf("%s, expected %s", got, want)
	}
	if r := nodeReport(st, routes, []string{"BGP"}, time.Now()); len(r.Routes.RoutesV4) != 0 || r.Agent.BIRDV4.State != "" || r.BGP.EstablishedV4 != 1 {
		t.Errorf("not asked for: %+v", r.Agent)
	}
}
