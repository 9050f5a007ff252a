package cluster

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// broken is one thing that is broken for real, what trace has to say about it, and how real packets fare.
type broken struct {
	name        string
	args        []string // from.Name, to.Name where empty
	break_      func()
	mend        func()
	code        int
	want        []string // in the first line
	passes      bool     // real packets pass nevertheless
	notPingable bool     // there is no pod to send from
	kernel      bool     // what is broken is the kernel's, which packets between pods do not meet in the attachment direct
	anyMAC      bool     // the vRouter, where it reads the pods' interfaces, does not look at hardware addresses
	earlyPasses bool     // with AF_XDP, and programs at tc, packets do not meet it
	tcPasses    bool     // with programs at tc packets do not meet it
	podByXDP    bool     // with AF_XDP at the pods' interfaces packets do not meet it, and a trace is not sure
	size        int      // of the ping, in bytes, with DF set; 0: any, and with DF clear
	cut         int      // of the ping, in bytes, with DF clear; 0: any
}

// check breaks it, compares trace and ping, and mends it.
func (c broken) check(t *testing.T, from, to labPod) {
	direct := strings.HasPrefix(os.Getenv("MARGAY_TEST_ATTACH"), "direct")
	io := os.Getenv("MARGAY_TEST_IO")
	switch {
	case direct && (c.kernel || c.anyMAC), c.earlyPasses && (io == "xdp" || io == "tc"), c.tcPasses && io == "tc":
		c.code, c.passes, c.want = 0, true, []string{"arrives: "}
	case direct && io == "xdp" && c.podByXDP:
		c.code, c.passes, c.want = 3, true, []string{"unknown whether it arrives", "unless the vRouter has"}
	}
	asks := []string{from.Name, to.Name}
	if slices.Contains(c.args, "--probe") {
		asks = append(asks, "--probe")
	}
	arrives := func() bool { _, code := trace(t, asks...); return code == 0 }
	if !arrives() {
		line, _ := trace(t, asks...)
		t.Fatalf("before anything was broken: %s", line)
	}
	args := c.args
	if args == nil {
		args = []string{from.Name, to.Name}
	}
	if c.break_ != nil {
		t.Cleanup(func() {
			c.mend()
			until(t, "it works again", arrives)
		})
		c.break_()
	}
	var line string
	var code int
	wrong := func() bool {
		return code != c.code || slices.ContainsFunc(c.want, func(w string) bool { return !strings.Contains(line, w) })
	}
	for limit := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		if line, code = trace(t, args...); !wrong() {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("exit status %d: %s\nexpected %d, and in it %q", code, line, c.code, c.want)
		}
	}
	if c.notPingable {
		return
	}
	target := ip(t, to.Address)
	if a, err := netip.ParseAddr(args[1]); err == nil {
		target = a
	}
	ping := []string{"ping", "-n", "-c", "1", "-W", "1"}
	if c.passes {
		ping[5] = "5" // a busy machine answers late
	}
	if c.size > 0 {
		ping = append(ping, "-M", "do", "-s", strconv.Itoa(c.size-28))
	}
	if c.cut > 0 {
		ping = append(ping, "-M", "dont", "-s", strconv.Itoa(c.cut-28))
	}
	// The trace reads what the kernel has now; who forwards is told of it a moment later.
	until(t, fmt.Sprintf("a ping passes, as the trace says in %q: %v", line, c.passes), func() bool {
		_, err := tryIn(from.Netns, append(ping, target.String())...)
		return (err == nil) == c.passes
	})
}

// TestTraceKnowsPodsAndFilters breaks what is inside the pods, in the node's packet filters, and between the nodes.
func TestTraceKnowsPodsAndFilters(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	from, to := n1.Pods[0], n2.Pods[0]
	src, dst := ip(t, from.Address).String(), ip(t, to.Address).String()
	const wrongMAC = "02:00:00:00:00:77"
	device := hostSide(t, n2, dst)
	gateway := func(pod labPod, mac string) {
		in(t, pod.Netns, "ip", "neigh", "replace", "169.254.1.1", "lladdr", mac, "dev", "eth0", "nud", "permanent")
	}
	nft := func(ns, text string) func() {
		return func() { in(t, ns, "nft", text) }
	}
	flush := func(ns, family string) func() { return nft(ns, "delete table "+family+" foreign") }
	netdev := func(n labNode, pod labPod, hook, rule string) func() {
		return nft(n.Netns, fmt.Sprintf("table netdev foreign { chain c { type filter hook %s device %q priority 0; %s; }; }", hook,
			hostSide(t, n, ip(t, pod.Address).String()), rule))
	}
	filter := func(ns, hook, rule string) func() {
		return nft(ns, "table inet foreign { chain c { type filter hook "+hook+" priority 0; "+rule+"; }; }")
	}

	for _, c := range []broken{
		{name: "the pod has no default route", code: 1,
			break_: func() { in(t, from.Netns, "ip", "route", "del", "default") },
			mend:   func() { in(t, from.Netns, "ip", "route", "add", "default", "via", "169.254.1.1", "dev", "eth0") },
			want:   []string{"at " + n1.Name, "pod, routing in the pod", "no route to " + dst, "To mend it: ip route add default via 169.254.1.1"}},
		{name: "the other pod has no default route", code: 1,
			break_: func() { in(t, to.Netns, "ip", "route", "del", "default") },
			mend:   func() { in(t, to.Netns, "ip", "route", "add", "default", "via", "169.254.1.1", "dev", "eth0") },
			want:   []string{"the answer does not come back", "at " + n2.Name, "no route to " + src}},
		{name: "the pod has lost its address", code: 1, notPingable: true,
			break_: func() {
				in(t, from.Netns, "ip", "address", "add", "192.0.2.9/32", "dev", "eth0")
				in(t, from.Netns, "ip", "address", "del", src+"/32", "dev", "eth0")
			},
			mend: func() {
				in(t, from.Netns, "ip", "address", "add", src+"/32", "dev", "eth0")
				in(t, from.Netns, "ip", "address", "del", "192.0.2.9/32", "dev", "eth0")
			},
			want: []string{"at " + n1.Name, "does not have the address " + src}},
		{name: "the pod's gateway has a wrong hardware address", code: 1, anyMAC: true,
			break_: func() { gateway(from, wrongMAC) },
			mend:   func() { gateway(from, "ee:ee:ee:ee:ee:ee") },
			want:   []string{"at " + n1.Name, "kernel, the frame's hardware address", "the pod has " + wrongMAC + " for 169.254.1.1", "To mend it: ip neigh replace 169.254.1.1"}},
		{name: "the pod has no entry for its gateway", code: 1,
			break_: func() { in(t, from.Netns, "ip", "neigh", "del", "169.254.1.1", "dev", "eth0") },
			mend:   func() { gateway(from, "ee:ee:ee:ee:ee:ee") },
			want:   []string{"at " + n1.Name, "nobody on this node answers ARP for it"}},
		{name: "the node has a wrong hardware address for the pod", code: 1, tcPasses: true,
			break_: func() {
				in(t, n2.Netns, "ip", "neigh", "replace", dst, "lladdr", wrongMAC, "dev", device, "nud", "permanent")
			},
			mend: func() { in(t, n2.Netns, "ip", "neigh", "del", dst, "dev", device) },
			want: []string{"at " + n2.Name, "the node has " + wrongMAC + " for " + dst, "To mend it: ip neigh del " + dst}},
		{name: "the receiving pod's MTU is smaller", code: 1, size: 1400, tcPasses: true, args: []string{from.Name, to.Name, "--size", "1400", "--df"},
			break_: func() { in(t, to.Netns, "ip", "link", "set", "eth0", "mtu", "1300") },
			mend:   func() { in(t, to.Netns, "ip", "link", "set", "eth0", "mtu", "1480") },
			want:   []string{"at " + n2.Name, "1400 bytes do not fit the MTU 1300 of eth0 in the pod"}},
		{name: "the reverse path filter of the pod", code: 1,
			break_: func() {
				in(t, to.Netns, "ip", "link", "add", "other", "type", "veth", "peer", "name", "other2")
				in(t, to.Netns, "ip", "link", "set", "other2", "up")
				in(t, to.Netns, "ip", "link", "set", "other", "up")
				in(t, to.Netns, "ip", "route", "add", src, "dev", "other")
				in(t, to.Netns, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1")
			},
			mend: func() {
				in(t, to.Netns, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
				in(t, to.Netns, "ip", "link", "del", "other")
			},
			want: []string{"at " + n2.Name, "the reverse path filter in the pod refuses it"}},
		{name: "a filter in the sending pod", code: 1,
			break_: filter(from.Netns, "output", "ip daddr "+dst+" drop"), mend: flush(from.Netns, "inet"),
			want: []string{"at " + n1.Name, "pod, packet filter, output in the pod", "table inet foreign", "To mend it: nft delete rule inet foreign c handle"}},
		{name: "a filter in the receiving pod", code: 1,
			break_: filter(to.Netns, "input", "policy drop; tcp dport 80 accept"), mend: flush(to.Netns, "inet"),
			want: []string{"at " + n2.Name, "packet filter, input in the pod", "whose policy is to drop"}},
		{name: "a filter in the receiving pod that lets it pass", code: 0, passes: true,
			break_: filter(to.Netns, "input", "policy drop; icmp type echo-request accept"), mend: flush(to.Netns, "inet"),
			want: []string{"arrives: "}},
		{name: "a filter on the sending node", code: 1, kernel: true,
			break_: filter(n1.Netns, "forward", "ip saddr "+src+" ip daddr "+dst+" reject"), mend: flush(n1.Netns, "inet"),
			want: []string{"at " + n1.Name, "kernel, packet filter, forward", "chain c of nftables' table inet foreign, rule with handle"}},
		{name: "a filter on the receiving node", code: 1, kernel: true,
			break_: filter(n2.Netns, "prerouting", "iifname vr0 ip daddr "+dst+" ip protocol icmp drop"), mend: flush(n2.Netns, "inet"),
			want: []string{"at " + n2.Name, "kernel, packet filter, prerouting"}},
		// Fragments go by the kernel from the pod's interface on, in every attachment.
		{name: "a filter of what the kernel has from pods", code: 1, cut: 3000, args: []string{from.Name, to.Name, "--size", "3000"},
			break_: filter(n1.Netns, "forward", "iifname \"cali*\" ip daddr "+dst+" drop"), mend: flush(n1.Netns, "inet"),
			want: []string{"at " + n1.Name, "kernel, packet filter, forward"}},
		{name: "a filter of what comes by the tunnel device", code: 0, cut: 3000, passes: true, args: []string{from.Name, to.Name, "--size", "3000"},
			break_: filter(n1.Netns, "forward", "iifname vr0 ip saddr "+src+" drop"), mend: flush(n1.Netns, "inet"),
			want: []string{"arrives: "}},
		{name: "a filter at the ingress of the pod's interface", code: 1, tcPasses: true, podByXDP: true,
			break_: netdev(n1, from, "ingress", "ip daddr "+dst+" drop"), mend: flush(n1.Netns, "netdev"),
			want: []string{"at " + n1.Name, "kernel, packet filter, ingress"}},
		{name: "a filter at the egress of the pod's interface", code: 1, tcPasses: true, podByXDP: true,
			break_: netdev(n2, to, "egress", "ip daddr "+dst+" drop"), mend: flush(n2.Netns, "netdev"),
			want: []string{"at " + n2.Name, "kernel, packet filter, egress"}},
		{name: "a filter for other packets", code: 0, passes: true,
			break_: filter(n1.Netns, "forward", "tcp dport 443 drop"), mend: flush(n1.Netns, "inet"),
			want: []string{"arrives: "}},
		{name: "a firewall that knows connections", code: 0, passes: true,
			break_: filter(n1.Netns, "forward", "policy drop; ct state established,related accept; iifname \"cali*\" icmp type echo-request accept"),
			mend:   flush(n1.Netns, "inet"), want: []string{"arrives: "}},
		{name: "a firewall that refuses the answer", code: 1, kernel: true,
			break_: filter(n1.Netns, "forward", "policy drop; iifname \"cali*\" accept"), mend: flush(n1.Netns, "inet"),
			want: []string{"the answer does not come back", "at " + n1.Name, "whose policy is to drop"}},
		{name: "a filter that depends on what nobody knows", code: 3, passes: true, kernel: true,
			break_: filter(n1.Netns, "forward", "ip protocol icmp limit rate over 1000/second drop"), mend: flush(n1.Netns, "inet"),
			want: []string{"unknown whether it arrives", "at " + n1.Name, "it may be dropped by", "limit", "To find out: "}},
		{name: "a filter of the underlay's interface", code: 1,
			break_: nft(n2.Netns, `table netdev foreign { chain c { type filter hook ingress device "eth0" priority 0; ip protocol 4 drop; }; }`),
			mend:   flush(n2.Netns, "netdev"), earlyPasses: true,
			want: []string{"at " + n2.Name, "kernel, packet filter, ingress"}},
		{name: "the node has a wrong hardware address for the other node", code: 1,
			break_: func() {
				in(t, n1.Netns, "ip", "neigh", "replace", ip(t, n2.Address).String(), "lladdr", wrongMAC, "dev", "eth0", "nud", "permanent")
			},
			mend: func() { in(t, n1.Netns, "ip", "neigh", "del", ip(t, n2.Address).String(), "dev", "eth0") },
			want: []string{"at " + n1.Name, "the permanent entry " + wrongMAC, "To mend it: ip neigh del " + ip(t, n2.Address).String()}},
		{name: "the receiving node's MTU is smaller", code: 1, size: 1470, args: []string{from.Name, to.Name, "--size", "1470", "--df", "--one-way"},
			break_: func() { in(t, n2.Netns, "ip", "link", "set", "eth0", "mtu", "1400") },
			mend:   func() { in(t, n2.Netns, "ip", "link", "set", "eth0", "mtu", "1500") },
			want:   []string{"at " + n2.Name, "MTU of the receiving interface", "1490 bytes come from the other node, and the MTU of eth0 is 1400"}},
	} {
		t.Run(c.name, func(t *testing.T) { c.check(t, from, to) })
	}
}

// TestTraceProbe sends real packets where nobody can be asked: into the network between the nodes, to filters that decide by
// what only a packet shows, to programs.
func TestTraceProbe(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	from, to := n1.Pods[0], n2.Pods[0]
	underlay := labName + "-underlay"
	for _, args := range [][]string{
		{from.Name, to.Name}, {from.Name, n1.Pods[1].Name}, {n1.Name, to.Name}, {from.Name, n2.Name},
		{from.Name, to.Name, "--proto", "tcp"}, {from.Name, to.Name, "--proto", "udp"}, {from.Name, to.Name, "--proto", "253"},
		{from.Name, to.Name, "--size", "1480", "--df"}, {from.Name, to.Name, "--size", "3000"}, {from.Name, to.Name, "--one-way"},
	} {
		if line, code := trace(t, append(args, "--probe")...); code != 0 || !strings.Contains(line, "real packet") {
			t.Errorf("%v: %d, %s", args, code, line)
		}
	}
	for _, c := range []broken{
		{name: "a filter between the nodes", code: 1, args: []string{from.Name, to.Name, "--probe"},
			break_: func() {
				in(t, underlay, "nft", "table bridge foreign { chain c { type filter hook forward priority 0; ip protocol 4 drop; }; }")
			},
			mend: func() { in(t, underlay, "nft", "delete table bridge foreign") },
			want: []string{"does not arrive", "none did: the last was seen at " + n1.Name}},
		{name: "an MTU between the nodes", code: 1, size: 1470, args: []string{from.Name, to.Name, "--size", "1470", "--df", "--probe"},
			break_: func() { in(t, underlay, "ip", "link", "set", "n2", "mtu", "1400") },
			mend:   func() { in(t, underlay, "ip", "link", "set", "n2", "mtu", "1500") },
			want:   []string{"does not arrive", "none did: the last was seen at " + n1.Name}},
		{name: "a filter that depends on what nobody knows", code: 0, passes: true, args: []string{from.Name, to.Name, "--probe"},
			break_: func() {
				in(t, n1.Netns, "nft", "table inet foreign { chain c { type filter hook forward priority 0; limit rate over 1000/second drop; }; }")
			},
			mend: func() { in(t, n1.Netns, "nft", "delete table inet foreign") },
			want: []string{"arrives: ", "a real packet was answered"}},
		{name: "what the trace explains", code: 1, args: []string{from.Name, to.Name, "--probe"},
			break_: func() {
				in(t, to.Netns, "nft", "table inet foreign { chain c { type filter hook input priority 0; ip protocol icmp drop; }; }")
			},
			mend: func() { in(t, to.Netns, "nft", "delete table inet foreign") },
			want: []string{"does not arrive", "at " + n2.Name, "packet filter, input in the pod"}},
	} {
		t.Run(c.name, func(t *testing.T) { c.check(t, from, to) })
	}
	var v struct {
		Verdict string
		Probe   struct {
			Sent              int
			Arrived, Answered bool
			Sightings         []struct{ Node, What, Pod, Interface string }
		}
	}
	out := in(t, n1.Netns, "margayctl", "trace", from.Name, to.Name, "--probe", "-o", "json")
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	answered := false
	for _, s := range v.Probe.Sightings {
		answered = answered || s.Node == n1.Name && s.What == "answer" && s.Pod == ip(t, from.Address).String()
	}
	if v.Verdict != "arrives" || v.Probe.Sent < 1 || !v.Probe.Arrived || !v.Probe.Answered || !answered {
		t.Errorf("%s", out)
	}
}

// hostSide returns the host's side of the interface of the pod that has an address.
func hostSide(t *testing.T, n labNode, addr string) string {
	t.Helper()
	words := strings.Fields(in(t, n.Netns, "ip", "-o", "route", "show", addr))
	at := slices.Index(words, "dev")
	if at < 0 || at+1 == len(words) {
		t.Fatalf("%s has no route to %s: %v", n.Name, addr, words)
	}
	return words[at+1]
}

// TestTraceAsksTheNetwork: without sending the packet itself, a trace has the nodes ping each other the way that the packet goes, and
// is not certain where nothing comes back.
func TestTraceAsksTheNetwork(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	from, to := n1.Pods[0], n2.Pods[0]
	underlay := labName + "-underlay"
	filter := func(rule string) (break_, mend func()) {
		return func() {
				in(t, underlay, "nft", "table bridge foreign { chain c { type filter hook forward priority 0; "+rule+" drop; }; }")
			},
			func() { in(t, underlay, "nft", "delete table bridge foreign") }
	}
	tunnels, mendTunnels := filter("ip protocol 4")
	echoes, mendEchoes := filter("ip protocol { 1, 4 }")
	for _, c := range []broken{
		{name: "a filter of IP-in-IP between the nodes", code: 3, break_: tunnels, mend: mendTunnels,
			want: []string{"unknown whether it arrives", "at " + n1.Name, "echo to the next node", "of 84 bytes by IP-in-IP", "a plain one did", "let IP protocol 4 pass"}},
		{name: "a filter of all that is asked", code: 3, break_: echoes, mend: mendEchoes,
			want: []string{"unknown whether it arrives", "nor did a plain one", "whether " + n2.Name + " is up"}},
		{name: "an MTU between the nodes", code: 3, size: 1470, args: []string{from.Name, to.Name, "--size", "1470", "--df"},
			break_: func() { in(t, underlay, "ip", "link", "set", "n2", "mtu", "1400") },
			mend:   func() { in(t, underlay, "ip", "link", "set", "n2", "mtu", "1500") },
			want:   []string{"unknown whether it arrives", "echoes of 1470 bytes", "one of 28 bytes did", "lose long packets"}},
		{name: "nobody is asked", code: 0, args: []string{from.Name, to.Name, "--no-echo"}, break_: tunnels, mend: mendTunnels, notPingable: true,
			want: []string{"arrives: "}},
	} {
		t.Run(c.name, func(t *testing.T) { c.check(t, from, to) })
	}
	tunnel := func(n labNode) string {
		words := strings.Fields(in(t, n.Netns, "ip", "-o", "-4", "address", "show", "dev", "vr0"))
		address, _, _ := strings.Cut(words[slices.Index(words, "inet")+1], "/")
		return address
	}
	for range 8 { // the nodes are listed in another order each time
		out := in(t, n1.Netns, "margayctl", "trace", from.Name, to.Name, "--size", "1480", "--df")
		if strings.Count(out, "echo to the next node") != 2 || !strings.Contains(out, "1480 bytes by IP-in-IP to "+tunnel(n2)+" and back in ") ||
			!strings.Contains(out, "1480 bytes by IP-in-IP to "+tunnel(n1)+" and back in ") {
			t.Errorf("%s\nexpected an echo of each node's to the other", out)
		}
	}
	t.Run("without encapsulation", func(t *testing.T) {
		setMode(t, "CrossSubnet", "eth0")
		t.Cleanup(func() { setMode(t, "Always", "vr0") })
		until(t, "the echo goes unencapsulated, with addresses of pods", func() bool {
			out, err := tryIn(n1.Netns, "margayctl", "trace", from.Name, to.Name)
			return err == nil && strings.Contains(out, "84 bytes plain to "+tunnel(n2)+" and back in ")
		})
		break_, mend := filter("ip saddr != " + ip(t, n1.Address).String() + "/24 ip protocol icmp")
		broken{code: 3, break_: break_, mend: mend,
			want: []string{"unknown whether it arrives", "84 bytes plain", "seems not to carry pods' addresses"}}.check(t, from, to)
	})
}

// TestTraceToADeadNode: a trace to a node whose daemons are gone, and which the network does not reach any more, never says that the
// packet arrives, and names the node; it does not wait for BGP to notice.
func TestTraceToADeadNode(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	from, to := n1.Pods[0], n2.Pods[0]
	underlay := labName + "-underlay"
	arrives := func() bool { _, code := trace(t, from.Name, to.Name); return code == 0 }
	until(t, "it works before", arrives)
	t.Cleanup(func() {
		in(t, underlay, "ip", "link", "set", "n2", "up")
		mustCtl(t, "lab", "restart", "--name", labName, n2.Name, "vrouter")
		mustCtl(t, "lab", "restart", "--name", labName, n2.Name, "agent")
		until(t, "it works again", arrives)
	})
	in(t, underlay, "ip", "link", "set", "n2", "down")
	kill(t, n2.PIDs["agent"])
	kill(t, n2.PIDs["vrouter"])
	// While the kernel still believes its neighbour entry the echoes tell, and afterwards the neighbour.
	for _, args := range [][]string{{from.Name, to.Name}, {from.Name, to.Name, "--probe"}} {
		if line, code := trace(t, args...); code != 1 && code != 3 || !strings.Contains(line, " is up") {
			t.Errorf("%v: exit status %d: %s\nexpected 1 or 3, and what to look at", args, code, line)
		}
	}
	if line, code := trace(t, to.Name, from.Name); code != 3 || !strings.Contains(line, "start the agent of "+n2.Name) {
		t.Errorf("from it: exit status %d: %s\nexpected 3, and whom to start", code, line)
	}
}
