package cluster

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// breakage is one thing that can be broken, and mended at once.
type breakage struct {
	what         string
	break_, mend func()
	unsure       bool // nobody can be asked about it: a trace may say that it cannot tell

	thing string // that is broken, where others break it in other ways; "" says that what does
}

// same reports whether two break the same thing, which can be mended only once.
func (b breakage) same(other breakage) bool {
	return b.what == other.what || b.thing != "" && b.thing == other.thing
}

// damage is what may be broken while random packets are traced and sent: n1 and n2 are the nodes, with two pods each.
type damage struct {
	t      *testing.T
	rnd    *rand.Rand
	n1, n2 labNode
	tables int // that filters have been put into
}

func (d *damage) node() (n, other labNode) {
	if d.rnd.IntN(2) == 0 {
		return d.n1, d.n2
	}
	return d.n2, d.n1
}

func (d *damage) pod(n labNode) labPod { return n.Pods[d.rnd.IntN(len(n.Pods))] }

func (d *damage) address(p labPod) string { return ip(d.t, p.Address).String() }

// run is a command in a namespace.
func (d *damage) run(ns string, words ...string) func() {
	return func() { in(d.t, ns, words...) }
}

// change sets a value with one command, and with another sets it back.
func (d *damage) change(ns, to, back string) breakage {
	return breakage{what: fmt.Sprintf("in %s: %s", ns, to), break_: d.run(ns, strings.Fields(to)...), mend: d.run(ns, strings.Fields(back)...)}
}

// filter is an nftables chain of one rule in a namespace, in a table of its own.
func (d *damage) filter(ns, family, hook, rule string) breakage {
	d.tables++
	table := fmt.Sprintf("%s mishap%d", family, d.tables)
	return breakage{what: fmt.Sprintf("in %s: %s %s: %s", ns, family, hook, rule),
		break_: d.run(ns, "nft", fmt.Sprintf("table %s { chain c { type filter hook %s priority 0; %s; }; }", table, hook, rule)),
		mend:   d.run(ns, "nft", "delete table "+table)}
}

// rule makes one up.
func (d *damage) rule(n, other labNode) string {
	pick := func(words ...string) string { return words[d.rnd.IntN(len(words))] }
	match := pick("", "ip protocol icmp", "ip protocol udp", "ip protocol tcp", "icmp type echo-reply", "icmp type echo-request",
		"udp dport "+strconv.Itoa(echoDF), "ip saddr "+d.address(d.pod(n)), "ip daddr "+d.address(d.pod(other)), "ip daddr "+d.address(d.pod(n)),
		"ip ttl < 4", "ip length > 1400", "ct state new", "ct state established", "ct state established,related accept; ip protocol icmp", "iifname \"cali*\"", "iifname vr0", "oifname vr0", "oifname \"cali*\"",
		"ip dscp 46", "ip frag-off & 0x4000 == 0x4000")
	return strings.TrimSpace(match + " drop")
}

// any breaks something at random.
func (d *damage) any() breakage {
	n, other := d.node()
	pod := d.pod(n)
	address, far := d.address(pod), d.address(d.pod(other))
	cali := hostSide(d.t, n, address)
	const wrongMAC = "02:00:00:00:00:77"
	switch d.rnd.IntN(17) {
	case 0, 1, 2:
		hook := []string{"prerouting", "input", "forward", "output", "postrouting"}[d.rnd.IntN(5)]
		rule := d.rule(n, other)
		if strings.Contains(rule, "iifname") && (hook == "output" || hook == "postrouting") || strings.Contains(rule, "oifname") && (hook == "prerouting" || hook == "input") {
			rule = "drop" // nft refuses what the hook does not have
		}
		if hook != "forward" { // the daemons, by which the trace is made, need theirs
			rule = "meta l4proto tcp accept; " + rule
		}
		b := d.filter(n.Netns, []string{"inet", "ip"}[d.rnd.IntN(2)], hook, rule)
		b.unsure = hook != "forward" // it may keep the echoes between the nodes, and not the packet
		return b
	case 3:
		return d.filter(pod.Netns, "inet", []string{"input", "output", "prerouting", "postrouting"}[d.rnd.IntN(4)],
			[]string{"ip protocol icmp drop", "udp dport " + strconv.Itoa(echoPlain) + " drop", "ip saddr " + far + " drop", "ip daddr " + far + " drop", "ip protocol 253 drop",
				"icmp type echo-reply drop", "ct state new drop", "drop"}[d.rnd.IntN(8)])
	case 4:
		return d.filter(n.Netns, "netdev", fmt.Sprintf("ingress device %q", cali), "ip daddr "+far+" drop")
	case 5:
		return d.filter(n.Netns, "netdev", fmt.Sprintf("egress device %q", cali), "ip saddr "+far+" drop")
	case 6:
		b := d.filter(n.Netns, "netdev", `ingress device "eth0"`, "ip protocol 4 drop")
		b.unsure = true // it keeps from the node what answers its echoes, and of packets those for its own pods, or not even them
		return b
	case 7:
		b := d.change(n.Netns, "ip route add "+far+"/32 dev eth0", "ip route del "+far+"/32 dev eth0")
		b.what, b.thing = b.what+", with rp_filter", "route to "+far+" in "+n.Netns
		route, back := b.break_, b.mend
		b.break_ = func() { route(); in(d.t, n.Netns, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1") }
		b.mend = func() { in(d.t, n.Netns, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0"); back() }
		return b
	case 8:
		b := d.change(n.Netns, "ip route add blackhole "+far+"/32", "ip route del blackhole "+far+"/32")
		b.thing = "route to " + far + " in " + n.Netns
		return b
	case 9:
		return d.change(n.Netns, "ip rule add pref 90 from "+address+" blackhole", "ip rule del pref 90 from "+address+" blackhole")
	case 10:
		return d.change(n.Netns, "sysctl -qw net.ipv4.ip_forward=0", "sysctl -qw net.ipv4.ip_forward=1")
	case 11:
		return d.change(pod.Netns, "ip route del default", "ip route add default via 169.254.1.1 dev eth0")
	case 12:
		return d.change(pod.Netns, "ip link set eth0 mtu 1300", "ip link set eth0 mtu 1480")
	case 13:
		return d.change(n.Netns, "ip link set "+cali+" mtu 1300", "ip link set "+cali+" mtu 1480")
	case 14:
		return d.change(n.Netns, fmt.Sprintf("ip neigh replace %s lladdr %s dev %s nud permanent", address, wrongMAC, cali), "ip neigh del "+address+" dev "+cali)
	case 15:
		return d.change(pod.Netns, fmt.Sprintf("ip neigh replace 169.254.1.1 lladdr %s dev eth0 nud permanent", wrongMAC),
			"ip neigh replace 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent")
	default:
		b := d.filter(labName+"-underlay", "bridge", "forward", []string{"ip protocol 4 drop", "ip protocol 4 ip length > 1450 drop", "ip protocol 4 ip saddr " + ip(d.t, n.Address).String() + " drop"}[d.rnd.IntN(3)])
		b.unsure = true
		return b
	}
}

// packet makes one up.
func (d *damage) packet() agreement {
	pick := func(values ...int) int { return values[d.rnd.IntN(len(values))] }
	n, other := d.node()
	source := d.pod(n)
	s := sent{from: source.Netns, src: ip(d.t, source.Address), ttl: pick(64, 64, 64, 64, 64, 4, 3, 2, 1), tos: pick(0, 0, 0, 0xb8, 0x28, 2, 1), df: d.rnd.IntN(2) == 0,
		protocol: byte(pick(1, 1, 1, 6, 17, 17, protoTest))}
	from := source.Name
	if s.protocol == 1 && d.rnd.IntN(4) == 0 { // a node, whose kernel chooses the source, of which the others have it in a checksum
		s.from, from = n.Netns, n.Name
	}
	var to string
	switch d.rnd.IntN(8) {
	case 0: // a node
		s.to, s.dst, to = other.Netns, ip(d.t, other.Address), other.Name
		if s.protocol == protoTest { // the connection tracker knows one pod at a time that a node masquerades
			s.protocol = 17
		}
	case 1: // nobody
		s.dst = ip(d.t, free(d.t, other))
		to = s.dst.String()
	case 2: // of the same node
		for _, p := range n.Pods {
			if p.Name != source.Name {
				s.to, s.dst, to = p.Netns, ip(d.t, p.Address), p.Name
			}
		}
	default:
		p := d.pod(other)
		s.to, s.dst, to = p.Netns, ip(d.t, p.Address), p.Name
	}
	s.size = pick(60, 84, 84, 500, 1300, 1301, 1304, 1305, 1400, 1470, 1479, 1480, 1481, 1500, 3000, 9000)
	switch s.protocol { // what a trace does not know of answers
	case 6: // to a SYN a short one
		s.size = pick(40, 60, 84)
	case 17: // a program's have a TOS of their own
		s.tos = 0
	}
	return agreement{sent: s, source: from, destination: to, oneWay: s.protocol == protoTest}
}

// TestTraceAgreesWithRandomPackets: what a trace says of a packet is what becomes of a real one, whatever kind of packet it is and
// whatever is broken. MARGAY_TEST_SEED and MARGAY_TEST_ROUNDS make others, and more.
func TestTraceAgreesWithRandomPackets(t *testing.T) {
	number := func(name string, otherwise int) int {
		if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
			return n
		}
		return otherwise
	}
	seed, rounds := number("MARGAY_TEST_SEED", 1), number("MARGAY_TEST_ROUNDS", 40)
	d := &damage{t: t, rnd: rand.New(rand.NewPCG(uint64(seed), 0)), n1: node(t, 1), n2: node(t, 2)}
	var namespaces []string
	for _, n := range []labNode{d.n1, d.n2} {
		namespaces = append(namespaces, n.Netns)
		for _, p := range n.Pods {
			namespaces = append(namespaces, p.Netns)
		}
	}
	e := listenIn(t, namespaces...)
	verdicts := map[int]int{}
	for round := range rounds {
		t.Run(strconv.Itoa(round), func(t *testing.T) {
			d.t = t
			var broken []breakage
			for range []int{0, 1, 1, 1, 2}[d.rnd.IntN(5)] {
				b := d.any()
				if !slices.ContainsFunc(broken, b.same) {
					broken = append(broken, b)
				}
			}
			a := d.packet()
			var what []string
			for _, b := range broken {
				what, a.unsure = append(what, b.what), a.unsure || b.unsure
				b.break_()
				t.Cleanup(b.mend)
			}
			_, code := a.agree(t, e)
			if t.Failed() {
				t.Logf("seed %d; broken: %s", seed, strings.Join(what, "; "))
			}
			verdicts[code]++
		})
		if t.Failed() {
			break
		}
	}
	t.Logf("seed %d, exit statuses: %v", seed, verdicts)
	if verdicts[0] < rounds/8 || verdicts[1] < rounds/8 || verdicts[3] > rounds/6 {
		t.Errorf("of %d traces exit statuses %v: the test decides little", rounds, verdicts)
	}
}
