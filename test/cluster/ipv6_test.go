package cluster

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
)

// TestIPv6Pods: where there is an IPv6 pool, pods get an address of it; they reach the pods of their node and the node, and
// hear at once that another node's are unreachable. IPv4 goes on as ever, and with the pool goes its route.
func TestIPv6Pods(t *testing.T) {
	store(t, `{"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "six"}, "spec": {"cidr": "fd00:10:244::/64", "natOutgoing": true}}`,
		"apply", "-f", "-")
	before := inUse(t)
	first, second := node(t, 1), node(t, 2)
	type pod struct {
		labNode
		id        string
		four, six netip.Addr
	}
	pods := []*pod{{labNode: first, id: labName + "-six-a"}, {labNode: first, id: labName + "-six-b"}, {labNode: second, id: labName + "-six-c"}}
	for _, p := range pods {
		out, err := plugin(p.labNode, "ADD", p.id, newNetns(t, p.id))
		if err != nil {
			t.Fatalf("ADD: %v: %s", err, out)
		}
		var result struct {
			IPs []struct{ Address netip.Prefix }
		}
		if err := json.Unmarshal(out, &result); err != nil || len(result.IPs) != 2 || !netip.MustParsePrefix("fd00:10:244::/64").Contains(result.IPs[1].Address.Addr()) {
			t.Fatalf("ADD: %v: %s", err, out)
		}
		p.four, p.six = result.IPs[0].Address.Addr(), result.IPs[1].Address.Addr()
	}
	a, b, c := pods[0], pods[1], pods[2]
	if !reached(a.id, b.six) || !reached(first.Netns, a.six) {
		t.Error("IPv6 does not work on the node")
	}
	until(t, "the pods to reach each other by IPv4", func() bool { return pings(a.id, c.four) && pings(c.id, b.four) })
	until(t, "the route that says unreachable", func() bool {
		out, err := tryIn(first.Netns, "ip", "-6", "route", "show", "fd00:10:244::/64")
		return err == nil && strings.Contains(out, "unreachable")
	})
	until(t, "the pod to hear that another node's is unreachable", func() bool {
		out, err := tryIn(a.id, "ping", "-n", "-c", "1", "-W", "5", c.six.String())
		if err == nil {
			t.Fatalf("another node's pod is reached: %s", out)
		}
		return strings.Contains(strings.ToLower(out), "unreachable") || strings.Contains(out, "No route")
	})
	for _, p := range pods {
		if out, err := plugin(p.labNode, "DEL", p.id, "/run/netns/"+p.id); err != nil {
			t.Errorf("DEL: %v: %s", err, out)
		}
	}
	if got := inUse(t); got != before {
		t.Errorf("%d addresses in use, expected %d as before", got, before)
	}
	store(t, "", "delete", "ippool", "six")
	until(t, "the route to go with its pool", func() bool {
		out, err := tryIn(first.Netns, "ip", "-6", "route", "show", "fd00:10:244::/64")
		return err == nil && len(strings.TrimSpace(out)) == 0
	})
}
