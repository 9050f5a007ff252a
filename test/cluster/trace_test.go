package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"margay/datastore"
)

// trace runs margayctl trace on the third node, which has no part in what is traced, and returns the first line and the exit
// status.
func trace(t *testing.T, args ...string) (line string, code int) {
	t.Helper()
	out, err := tryIn(node(t, 3).Netns, append([]string{"margayctl", "trace"}, args...)...)
	line, _, _ = strings.Cut(out, "\n")
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return line, exit.ExitCode()
	}
	if err != nil {
		t.Fatalf("trace: %v", err)
	}
	return line, 0
}

// free returns an address of a node's block that no pod has.
func free(t *testing.T, n labNode) string {
	t.Helper()
	block, err := ip(t, n.Pods[0].Address).Prefix(26)
	if err != nil {
		t.Fatal(err)
	}
	return netip.AddrFrom4([4]byte(append(block.Addr().AsSlice()[:3], block.Addr().AsSlice()[3]+61))).String()
}

// forgetNode takes a Node out of the datastore as somebody with etcdctl would: margayctl delete releases its addresses, too.
func forgetNode(t *testing.T, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := datastore.Open(ctx, datastore.Config{Endpoints: status(t).Etcd})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	kvs, _, err := s.List(ctx, datastore.Nodes.Prefix())
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range kvs {
		if strings.HasSuffix(kv.Key, "/"+name) {
			if err := s.Delete(ctx, kv.Key, kv.Revision); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("no Node %s in the datastore", name)
}

// TestTraceAgreesWithPackets traces and pings between all pods, and around the MTU.
func TestTraceAgreesWithPackets(t *testing.T) {
	all := pods(t)
	n1 := node(t, 1)
	for _, to := range all {
		if line, code := trace(t, n1.Name, to.Name); code != 0 || !strings.HasPrefix(line, "arrives: ") {
			t.Errorf("from the node %s to %s: %d, %s", n1.Name, to.Name, code, line)
		}
		if to.Name == all[0].Name {
			continue
		}
		line, code := trace(t, all[0].Name, to.Name, "--proto", "tcp")
		if code != 0 || !strings.HasPrefix(line, "arrives: ") || !strings.HasSuffix(line, "and the answer comes back") {
			t.Errorf("%s to %s: %d, %s", all[0].Name, to.Name, code, line)
		}
	}
	from, to := n1.Pods[0], node(t, 2).Pods[0]
	for _, size := range []int{1400, 1479, 1480, 1481, 1500, 3000} {
		for _, df := range []bool{true, false} {
			args := []string{from.Name, to.Name, "--size", strconv.Itoa(size)}
			ping := []string{"ping", "-n", "-c", "1", "-W", "5", "-s", strconv.Itoa(size - 28), "-M"}
			if df {
				args, ping = append(args, "--df"), append(ping, "do")
			} else {
				ping = append(ping, "dont")
			}
			_, err := tryIn(from.Netns, append(ping, ip(t, to.Address).String())...)
			line, code := trace(t, args...)
			if (err == nil) != (code == 0) {
				t.Errorf("%d bytes, DF %v: the ping says %v, the trace %d: %s", size, df, err, code, line)
			}
			if code != 0 && !strings.Contains(line, "do not fit the MTU 1480") {
				t.Errorf("%d bytes, DF %v: %s", size, df, line)
			}
		}
	}
}

// TestTraceSaysWhatIsBroken breaks one thing at a time, and expects the first line to name place, cause and cure, and real
// packets to fare as it says.
func TestTraceSaysWhatIsBroken(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	from, to := n1.Pods[0], n2.Pods[0]
	src, dst := ip(t, from.Address), ip(t, to.Address)
	pool := "default-ipv4-ippool"
	patch := func(kind, name, p string) { store(t, "", "patch", kind, name, "-p", p) }
	for _, c := range []broken{
		{name: "no pod has the destination", args: []string{from.Name, free(t, n2)}, code: 1,
			want: []string{"at " + n2.Name, "IPAM has not given " + free(t, n2) + " out", "To mend it: no pod has this address"}},
		{name: "no pod has the source", args: []string{free(t, n1), to.Name}, code: 1, notPingable: true,
			want: []string{"at " + n1.Name, "no pod of this node has the address"}},
		{name: "outside every pool", args: []string{from.Name, "10.245.0.1"}, code: 3, notPingable: true,
			want: []string{"leaves the cluster", "at " + n1.Name + " by eth0"}},
		{name: "TTL", args: []string{from.Name, to.Name, "--ttl", "1"}, code: 1, notPingable: true,
			want: []string{"at " + n1.Name, ", time to live: the TTL is 1"}},
		{name: "no BGP", code: 1,
			break_: func() {
				store(t, `{"apiVersion":"projectcalico.org/v3","kind":"BGPConfiguration","metadata":{"name":"default"},"spec":{"nodeToNodeMeshEnabled":false}}`,
					"apply", "-f", "-")
			},
			mend: func() { store(t, "", "delete", "bgpconfiguration", "default") },
			want: []string{"at " + n1.Name, "vrouter, route to the destination", "no route to " + dst.String(), to.Name + " on " + n2.Name,
				"To mend it: this node has no BGP peers: switch the mesh on"}},
		{name: "pool not exported", code: 1,
			break_: func() { patch("ippool", pool, `{"spec":{"disableBGPExport":true}}`) },
			mend:   func() { patch("ippool", pool, `{"spec":{"disableBGPExport":false}}`) },
			want:   []string{"at " + n1.Name, "no route to", "has disableBGPExport", "To mend it: set spec.disableBGPExport"}},
		{name: "vrouter of the source dead", code: 1,
			break_: func() { kill(t, n1.PIDs["vrouter"]) },
			mend:   func() { mustCtl(t, "lab", "restart", "--name", labName, n1.Name, "vrouter") },
			want:   []string{"at " + n1.Name, "vRouter", "To mend it: start the vRouter"}},
		{name: "vrouter of the destination dead", code: 1,
			break_: func() { kill(t, n2.PIDs["vrouter"]) },
			mend:   func() { mustCtl(t, "lab", "restart", "--name", labName, n2.Name, "vrouter") },
			want:   []string{"at " + n2.Name, "vRouter", "To mend it: start the vRouter"}},
		{name: "agent of the destination dead", code: 3, passes: true,
			break_: func() { kill(t, n2.PIDs["agent"]) },
			mend:   func() { mustCtl(t, "lab", "restart", "--name", labName, n2.Name, "agent") },
			want:   []string{"unknown whether it arrives", "at " + n2.Name, "does not answer", "To mend it: start the agent of " + n2.Name}},
		{name: "reverse path filter", code: 1, kernel: true,
			break_: func() {
				in(t, n2.Netns, "ip", "route", "add", src.String()+"/32", "dev", "eth0")
				in(t, n2.Netns, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1")
			},
			mend: func() {
				in(t, n2.Netns, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
				in(t, n2.Netns, "ip", "route", "del", src.String()+"/32", "dev", "eth0")
			},
			want: []string{"at " + n2.Name, "kernel, routing and reverse path", "reverse path filter refuses it", "dev eth0", "To mend it: take away the route"}},
		{name: "blackhole", code: 1, kernel: true,
			break_: func() { in(t, n1.Netns, "ip", "route", "add", "blackhole", dst.String()+"/32") },
			mend:   func() { in(t, n1.Netns, "ip", "route", "del", "blackhole", dst.String()+"/32") },
			want:   []string{"at " + n1.Name, "is a blackhole: blackhole " + dst.String() + "/32", "To mend it: ip route del blackhole " + dst.String()}},
		{name: "kernel does not forward", code: 1, kernel: true,
			break_: func() { in(t, n1.Netns, "sysctl", "-qw", "net.ipv4.ip_forward=0") },
			mend:   func() { in(t, n1.Netns, "sysctl", "-qw", "net.ipv4.ip_forward=1") },
			want:   []string{"at " + n1.Name, "does not forward", "To mend it: sysctl -w net.ipv4.ip_forward=1"}},
		{name: "the answer is blackholed", code: 1, kernel: true,
			break_: func() { in(t, n2.Netns, "ip", "route", "add", "blackhole", src.String()+"/32") },
			mend:   func() { in(t, n2.Netns, "ip", "route", "del", "blackhole", src.String()+"/32") },
			want:   []string{"the answer does not come back", "at " + n2.Name}, passes: false},
		{name: "disabled pool", code: 0, passes: true,
			break_: func() { patch("ippool", pool, `{"spec":{"disabled":true}}`) },
			mend:   func() { patch("ippool", pool, `{"spec":{"disabled":false}}`) },
			want:   []string{"arrives: "}},
		{name: "node not in the datastore", code: 1,
			// Its agent would make it anew.
			break_: func() { kill(t, n2.PIDs["agent"]); forgetNode(t, n2.Name) },
			mend:   func() { mustCtl(t, "lab", "restart", "--name", labName, n2.Name, "agent") },
			want: []string{"at " + n1.Name, to.Name + " on " + n2.Name + ", which is not in the datastore",
				"To mend it: restart the agent of " + n2.Name}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n1, n2 = node(t, 1), node(t, 2) // process ids change
			c.check(t, from, to)
		})
	}
}

func TestTraceJSON(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	out := in(t, n1.Netns, "margayctl", "trace", n1.Pods[0].Name, n2.Pods[0].Name, "-o", "json")
	var v struct {
		Verdict string
		There   struct {
			Nodes []struct {
				Node, Outcome string
				Rungs         []struct {
					By, Name, Detail string
					Passed           bool
				}
			}
		}
		Back *struct{ Outcome string }
	}
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if v.Verdict != "arrives" || len(v.There.Nodes) != 2 || v.There.Nodes[0].Node != n1.Name || v.There.Nodes[1].Outcome != "delivered" ||
		v.Back == nil || v.Back.Outcome != "delivered" {
		t.Errorf("%s", out)
	}
	route := ""
	for _, r := range v.There.Nodes[0].Rungs {
		if r.By == "vrouter" && r.Name == "route to the destination" {
			route = r.Detail
		}
	}
	if !strings.Contains(route, "tunnel "+ip(t, n2.Address).String()) || !strings.Contains(route, "by BGP from "+ip(t, n2.Address).String()) {
		t.Errorf("the route is %q: expected the tunnel and the peer", route)
	}
}

// TestTraceNamesTheCarrier: where programs at tc may forward, each node on the way says whether they do, and why not.
func TestTraceNamesTheCarrier(t *testing.T) {
	from, to := node(t, 1).Pods[0], node(t, 2).Pods[0]
	count := func(out, rung string) int { return strings.Count(out, rung) }
	const programs, worker, kernel = "forwarded by BPF at tc", "left alone by BPF at tc", "left to the kernel at the pod's interface"
	ask := func(args ...string) string {
		return in(t, node(t, 3).Netns, append([]string{"margayctl", "trace", from.Name, to.Name}, args...)...)
	}
	if os.Getenv("MARGAY_TEST_IO") != "tc" {
		if out := ask(); count(out, programs)+count(out, worker) > 0 {
			t.Errorf("there are no programs at tc:\n%s", out)
		}
		return
	}
	// Before the first packet the programs know no hardware address of the other node's.
	until(t, "the programs at tc carry it there and back", func() bool {
		pings(from.Netns, ip(t, to.Address))
		return count(ask(), programs) == 4
	})
	if out := ask("--size", "3000", "--one-way"); count(out, kernel) != 1 || count(out, worker) != 1 || count(out, "it is a fragment") != 2 || count(out, programs) > 0 {
		t.Errorf("a fragment:\n%s", out)
	}
}

// TestTraceMasquerade: a packet of a pod's to another node has that of its own node as source when it gets there, and so its answer
// goes to the node.
func TestTraceMasquerade(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	from := n1.Pods[0]
	line, code := trace(t, from.Name, n2.Name)
	if passes := answers(from.Netns, ip(t, n2.Address)); !passes || code != 0 || !strings.HasPrefix(line, "arrives: ") {
		t.Errorf("%d, %s; a ping passes: %v", code, line, passes)
	}
	if out := in(t, n1.Netns, "margayctl", "trace", from.Name, n2.Name); !strings.Contains(out, "becomes the node's own address on eth0, "+ip(t, n1.Address).String()) {
		t.Error(out)
	}
}

// TestTraceRefuses what it cannot understand, without asking anybody.
func TestTraceRefuses(t *testing.T) {
	n1 := node(t, 1)
	for want, args := range map[string][]string{
		"is no address, no node, and no pod": {"nobody", n1.Pods[0].Name},
		"expected an IPv4 address":           {n1.Pods[0].Name, "fd00::1"},
		"--size 19":                          {n1.Pods[0].Name, n1.Pods[1].Name, "--size", "19"},
		"belongs to no pod and no node":      {"192.0.2.1", n1.Pods[0].Name},
		"accepts 2 arg(s)":                   {n1.Pods[0].Name},
		"unknown flag":                       {n1.Pods[0].Name, n1.Pods[1].Name, "--nothing"},
	} {
		out, err := tryIn(n1.Netns, append([]string{"margayctl", "trace"}, args...)...)
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(out, want) {
			t.Errorf("%v: %v, %s: expected status 2, and %q", args, err, out, want)
		}
	}
}

// TestDiagnosticsAreGuarded: without the token, and by plain text, nothing is told, and the agent lives on.
func TestDiagnosticsAreGuarded(t *testing.T) {
	n1 := node(t, 1)
	url := ip(t, n1.Address).String() + ":9179/v1/status"
	for want, args := range map[string][]string{
		"401": {"https://" + url}, // no token
		"400": {"http://" + url},  // no TLS
	} {
		curl := append([]string{"curl", "-sk", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}"}, args...)
		for range 3 {
			if out, _ := tryIn(n1.Netns, curl...); strings.TrimSpace(out) != want {
				t.Errorf("%v: %s: expected %s", args, out, want)
			}
		}
		wrong := append(curl[:len(curl):len(curl)], "-H", "Authorization: Bearer nothing")
		if out, _ := tryIn(n1.Netns, wrong...); strings.TrimSpace(out) != want {
			t.Errorf("%v with a wrong token: %s: expected %s", args, out, want)
		}
	}
	if _, code := trace(t, n1.Pods[0].Name, n1.Pods[1].Name); code != 0 {
		t.Error("the agent does not answer who may ask")
	}
}
