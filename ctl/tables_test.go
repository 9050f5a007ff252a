package ctl

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"margay/agent/api"
	"margay/datastore"
	"margay/ipam"
)

// The texts below are calicoctl's, read off the real program: people's scripts know them to the byte.

func TestIPAMShowTable(t *testing.T) {
	pools := []ipam.PoolUsage{{Name: "default", CIDR: netip.MustParsePrefix("10.65.0.0/16"), Total: 65536, InUse: 5, Free: 65531,
		Blocks: []ipam.BlockUsage{{CIDR: netip.MustParsePrefix("10.65.79.0/26"), Total: 64, InUse: 5}}}}
	const want = `+----------+---------------+-----------+------------+--------------+
| GROUPING |     CIDR      | IPS TOTAL | IPS IN USE |   IPS FREE   |
+----------+---------------+-----------+------------+--------------+
| IP Pool  | 10.65.0.0/16  |     65536 | 5 (0%)     | 65531 (100%) |
| Block    | 10.65.79.0/26 |        64 | 5 (8%)     | 59 (92%)     |
+----------+---------------+-----------+------------+--------------+
`
	var out bytes.Buffer
	printUsage(&out, pools, true)
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("with --show-blocks (-want +got):\n%s", diff)
	}
	out.Reset()
	printUsage(&out, []ipam.PoolUsage{{CIDR: netip.MustParsePrefix("10.0.0.0/12"), Total: 1 << 20, Free: 1 << 20}}, false)
	const wide = `+----------+-------------+------------+------------+-------------------+
| GROUPING |    CIDR     | IPS TOTAL  | IPS IN USE |     IPS FREE      |
+----------+-------------+------------+------------+-------------------+
| IP Pool  | 10.0.0.0/12 | 1.0486e+06 | 0 (0%)     | 1.0486e+06 (100%) |
+----------+-------------+------------+------------+-------------------+
`
	if diff := cmp.Diff(wide, out.String()); diff != "" {
		t.Errorf("a /12 (-want +got):\n%s", diff)
	}
}

func TestGetPoolsWide(t *testing.T) {
	p := datastore.NewIPPool("default-ipv4-ippool")
	p.Spec = datastore.IPPoolSpec{CIDR: "10.244.0.0/16", IPIPMode: "Always", NATOutgoing: true}
	p.Default()
	const want = `NAME                  CIDR            NAT    IPIPMODE   VXLANMODE   DISABLED   DISABLEBGPEXPORT   SELECTOR   ASSIGNMENTMODE   
default-ipv4-ippool   10.244.0.0/16   true   Always     Never       false      false              all()      Automatic        
`
	var out bytes.Buffer
	wide, err := newPrinter("wide")
	if err != nil {
		t.Fatal(err)
	}
	if err := wide.print(&out, []found{{kind: datastore.IPPools, objs: []datastore.Object{p}, list: true}}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want+"\n", out.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestNodeStatusTable(t *testing.T) {
	at := time.Date(2026, 11, 23, 13, 16, 56, 0, time.Local)
	if got := since(at, at.Add(time.Hour)); got != "13:16:56" {
		t.Errorf("since, today: %s", got)
	}
	if got := since(at, at.Add(48*time.Hour)); got != "2026-11-23" {
		t.Errorf("since, days ago: %s", got)
	}
	const want = `+--------------+-------------------+-------+------------+---------------------------------------+
| PEER ADDRESS |     PEER TYPE     | STATE |   SINCE    |                 INFO                  |
+--------------+-------------------+-------+------------+---------------------------------------+
| 198.18.0.2   | node-to-node mesh | up    | 2025-01-02 | Established                           |
| 198.18.0.3   | global            | start | 2025-01-02 | Active: the hold timer of 90s expired |
+--------------+-------------------+-------+------------+---------------------------------------+
`
	var out bytes.Buffer
	old := time.Date(2025, 1, 2, 3, 4, 5, 0, time.Local)
	printPeers(&out, []api.Peer{
		{Address: netip.MustParseAddr("198.18.0.2"), Kind: "node-to-node mesh", State: "Established", Since: old},
		{Address: netip.MustParseAddr("198.18.0.3"), Kind: "global", State: "Active", Since: old, LastError: "the hold timer of 90s expired"},
		{Address: netip.MustParseAddr("2001:db8::1"), Kind: "global", State: "Idle", Since: old},
	}, netip.Addr.Is4, "No IPv4 peers found.")
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	out.Reset()
	printPeers(&out, nil, netip.Addr.Is6, "No IPv6 peers found.")
	if out.String() != "No IPv6 peers found.\n" {
		t.Errorf("no peers: %q", out.String())
	}
}
