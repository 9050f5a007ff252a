package cni

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestAddresses(t *testing.T) {
	const req, pool, none = AssignRequired, AssignIfPool, AssignNone
	addr := netip.MustParseAddr
	notes := func(kv ...string) string {
		var parts []string
		for i := 0; i < len(kv); i += 2 {
			parts = append(parts, fmt.Sprintf("%q:%q", "cni.projectcalico.org/"+kv[i], kv[i+1]))
		}
		return `,"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{` + strings.Join(parts, ",") + `}}`
	}
	for _, tt := range []struct {
		name, conf, args string
		four, six        Family
		mac, fail        string
	}{
		{name: "nothing said", four: Family{Assign: req}, six: Family{Assign: pool}},
		{name: "Calico's way to say both", conf: `,"ipam":{"assign_ipv4":"true","assign_ipv6":"true"}`, four: Family{Assign: req}, six: Family{Assign: req}},
		{name: "IPv6 only", conf: `,"ipam":{"assign_ipv4":false,"assign_ipv6":true}`, four: Family{Assign: none}, six: Family{Assign: req}},
		{name: "pools", conf: `,"ipam":{"ipv4_pools":["a"],"ipv6_pools":["fd00::/64"]}`, four: Family{Assign: req, Pools: []string{"a"}}, six: Family{Assign: pool, Pools: []string{"fd00::/64"}}},
		{name: "annotated pools", conf: `,"ipam":{"ipv4_pools":["a"]}` + notes("ipv4pools", `["b","10.0.0.0/24"]`, "ipv6pools", `["s"]`),
			four: Family{Assign: req, Pools: []string{"b", "10.0.0.0/24"}}, six: Family{Assign: pool, Pools: []string{"s"}}},
		{name: "annotated addresses", conf: notes("ipAddrs", `["10.0.0.9","fd00::9"]`, "hwAddr", "1c:0c:0a:c0:ff:ee"), args: "IP=10.0.0.1",
			four: Family{Assign: req, IP: addr("10.0.0.9")}, six: Family{Assign: pool, IP: addr("fd00::9")}, mac: "1c:0c:0a:c0:ff:ee"},
		{name: "an IPv6 address alone", conf: notes("ipAddrs", `["fd00::9"]`), four: Family{Assign: pool}, six: Family{Assign: pool, IP: addr("fd00::9")}},
		{name: "annotated families", conf: `,"ipam":{"assign_ipv4":"true"}` + notes("ipFamilies", `["ipv6"]`), four: Family{Assign: none}, six: Family{Assign: req}},
		{name: "capability ips", conf: `,"runtimeConfig":{"ips":["10.0.0.5/24"],"mac":"02:00:00:00:00:01"}`, args: "IP=10.0.0.1",
			four: Family{Assign: req, IP: addr("10.0.0.5")}, six: Family{Assign: pool}, mac: "02:00:00:00:00:01"},
		{name: "args.cni.ips", conf: `,"args":{"cni":{"ips":["10.0.0.6"]}}`, args: "IP=10.0.0.1", four: Family{Assign: req, IP: addr("10.0.0.6")}, six: Family{Assign: pool}},
		{name: "CNI_ARGS", args: "IP=10.0.0.1/32", four: Family{Assign: req, IP: addr("10.0.0.1")}, six: Family{Assign: pool}},
		{name: "no list", conf: notes("ipv4pools", "default"), fail: `annotation cni.projectcalico.org/ipv4pools: "default", expected a JSON list`},
		{name: "an empty list", conf: notes("ipAddrs", "[]"), fail: "ipAddrs"},
		{name: "no address", conf: notes("ipAddrs", `["ten"]`), fail: `annotation cni.projectcalico.org/ipAddrs: "ten", expected an IP address`},
		{name: "two of a family", conf: notes("ipAddrs", `["10.0.0.1","10.0.0.2"]`), fail: "10.0.0.1 and 10.0.0.2, expected one address of a family"},
		{name: "no family", conf: notes("ipFamilies", `["ipx"]`), fail: `"ipx", expected ipv4 or ipv6`},
		{name: "multicast MAC", conf: notes("hwAddr", "01:00:5e:00:00:01"), fail: "hwAddr: \"01:00:5e:00:00:01\", expected a unicast hardware address"},
	} {
		c, err := ParseConf([]byte(`{"cniVersion":"1.0.0","name":"n","type":"margay"` + tt.conf + `}`))
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		pod, err := ParseArgs(tt.args)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		four, six, mac, err := c.addresses(pod)
		if tt.fail != "" {
			if err == nil || !strings.Contains(err.Error(), tt.fail) {
				t.Errorf("%s: %v, expected %q", tt.name, err, tt.fail)
			}
			continue
		}
		same := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
		if d := cmp.Diff([]Family{tt.four, tt.six}, []Family{four, six}, same); d != "" || err != nil || mac != tt.mac {
			t.Errorf("%s: %v, mac %q (-want +got):\n%s", tt.name, err, mac, d)
		}
	}
}
