package cluster

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// agreement is one packet that is traced, and sent for real.
type agreement struct {
	sent
	source, destination string // as a trace is told
	oneWay              bool   // nobody answers, or it is not looked at
	unsure              bool   // nobody can be asked about what is broken: a trace may say that it cannot tell
}

// args are margayctl trace's.
func (a agreement) args() []string {
	args := a.sent.args(a.source, a.destination)
	if a.oneWay {
		args = append(args, "--one-way")
	}
	return args
}

// agree compares a trace with real packets until they agree, and returns its first line and exit status: a trace reads what the kernel
// has now, and who forwards is told of it a moment later.
func (a agreement) agree(t *testing.T, e *ears) (line string, code int) {
	t.Helper()
	var fared string
	for limit := time.Now().Add(patience); time.Now().Before(limit); {
		line, code = trace(t, a.args()...)
		wait := 3 * time.Second // a busy machine is late
		if code != 0 {
			wait = 100 * time.Millisecond
		}
		arrived, answered := e.send(t, a.sent, !a.oneWay, wait)
		if code == 0 && !arrived { // one packet may be lost, to ARP for one
			arrived, answered = e.send(t, a.sent, !a.oneWay, wait)
		}
		fared = fmt.Sprintf("arrived: %t, answered: %t", arrived, answered)
		switch {
		case code == 0 && arrived && (answered || a.oneWay),
			code == 1 && strings.HasPrefix(line, "arrives, but") && arrived && !answered,
			code == 1 && strings.HasPrefix(line, "does not") && !arrived,
			code == 1 && strings.HasPrefix(line, "may arrive, but") && !answered && a.unsure,
			code == 3 && a.unsure:
			return line, code
		}
	}
	t.Errorf("margayctl trace %s\nsays: %s\nbut a real packet of %+v: %s", strings.Join(a.args(), " "), line, a.sent, fared)
	return line, code
}

// TestTraceAgreesWhereItOnceDidNot: verdicts that were wrong before, beside the packets that showed it.
func TestTraceAgreesWhereItOnceDidNot(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	from, to := n1.Pods[0], n2.Pods[0]
	src, dst, far := ip(t, from.Address), ip(t, to.Address), ip(t, n2.Address)
	device := hostSide(t, n2, dst.String())
	e := listenIn(t, n2.Netns, from.Netns, n1.Pods[1].Netns, to.Netns)
	direct := strings.HasPrefix(os.Getenv("MARGAY_TEST_ATTACH"), "direct")
	between := sent{from: from.Netns, to: to.Netns, src: src, dst: dst, protocol: 17, size: 84, ttl: 64}
	with := func(s sent, change func(*sent)) sent {
		change(&s)
		return s
	}
	forward := func(ns, family, hook, rule string) (break_, mend func()) {
		return func() {
				in(t, ns, "nft", fmt.Sprintf("table %s foreign { chain c { type filter hook %s priority 0; %s; }; }", family, hook, rule))
			},
			func() { in(t, ns, "nft", "delete table "+family+" foreign") }
	}
	mtu := func(ns, device, mtu string) func() {
		return func() { in(t, ns, "ip", "link", "set", device, "mtu", mtu) }
	}
	lose, find := forward(n1.Netns, "inet", "forward", `oifname "cali*" ip saddr `+far.String()+" drop")
	mute, unmute := forward(to.Netns, "inet", "output", "udp sport "+fmt.Sprint(echoPlain)+" drop")
	cut, join := forward(labName+"-underlay", "bridge", "forward", "ip protocol 4 drop")
	type wrong struct {
		name         string
		break_, mend func()
		agreement
		code int
		want []string // in the first line
	}
	lost := func(words ...string) (code int, want []string) {
		return 1, append([]string{"arrives, but the answer does not come back"}, words...)
	}
	narrow := wrong{name: "the node's side of the receiving pod's interface has a smaller MTU", break_: mtu(n2.Netns, device, "1300"), mend: mtu(n2.Netns, device, "1480"),
		agreement: agreement{sent: with(between, func(s *sent) { s.size = 1400 }), oneWay: true}, want: []string{"arrives: "}}
	// Of what a pod cuts into fragments, and of its answer, the kernel's connection tracker has other parts in direct.
	ask, hush := mtu(from.Netns, "eth0", "1300"), mtu(from.Netns, "eth0", "1480")
	established, without := forward(n1.Netns, "inet", "forward", "ct state established drop")
	cutQuestion := wrong{name: "the kernel has had a question in fragments, and so its answer whole", break_: func() { ask(); established() }, mend: func() { without(); hush() },
		agreement: agreement{sent: with(between, func(s *sent) { s.to, s.dst, s.size = n1.Pods[1].Netns, ip(t, n1.Pods[1].Address), 1302 }), destination: n1.Pods[1].Name}}
	cutQuestion.code, cutQuestion.want = lost("at "+n1.Name, "packet filter, forward")
	answer, short := mtu(to.Netns, "eth0", "1300"), mtu(to.Netns, "eth0", "1480")
	fresh, stale := forward(n2.Netns, "inet", "forward", `iifname "cali*" ct state new,invalid drop`)
	cutAnswer := wrong{name: "an answer in fragments to a question that came whole", break_: func() { answer(); fresh() }, mend: func() { stale(); short() },
		agreement: agreement{sent: with(between, func(s *sent) { s.size = 1302 })}, want: []string{"arrives: "}}
	if direct {
		cutAnswer.code, cutAnswer.want = lost("at "+n2.Name, "packet filter, forward")
	}
	cutReply := cutAnswer
	cutReply.name, cutReply.protocol = "an echo reply in fragments to a request that came whole", 1
	shorter := wrong{name: "a pod's MTU that its question is cut for, and its answer is not", break_: ask, mend: hush,
		agreement: agreement{sent: with(between, func(s *sent) { s.size = 1305 })}}
	shorter.code, shorter.want = lost("at "+n1.Name, "1305 bytes do not fit the MTU 1300 of eth0 in the pod")
	for _, c := range []wrong{narrow, cutQuestion, cutAnswer, cutReply, shorter,
		{name: "a masqueraded packet's answer is lost behind its node", break_: lose, mend: find,
			agreement: agreement{sent: with(between, func(s *sent) { s.to, s.dst = n2.Netns, far }), destination: n2.Name}, code: 1,
			want: []string{"arrives, but the answer does not come back", "at " + n1.Name, "packet filter, forward"}},
		{name: "the network is silent, and the answer is dropped", break_: func() { mute(); cut() }, mend: func() { join(); unmute() },
			agreement: agreement{sent: between, unsure: true}, code: 1,
			want: []string{"may arrive, but the answer does not come back", "at " + n2.Name, "packet filter, output in the pod"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.source = from.Name
			if c.destination == "" {
				c.destination = to.Name
			}
			whole := c.agreement
			whole.size, whole.unsure = 84, false
			t.Cleanup(func() {
				c.mend()
				until(t, "it works again", func() bool {
					_, code := trace(t, whole.args()...)
					return code == 0
				})
			})
			c.break_()
			line, code := c.agree(t, e)
			if code != c.code || slices.ContainsFunc(c.want, func(w string) bool { return !strings.Contains(line, w) }) {
				t.Errorf("exit status %d: %s\nexpected %d, and in it %q", code, line, c.code, c.want)
			}
		})
	}
}
