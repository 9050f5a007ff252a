package port

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"margay/vrouter"
	"margay/vrouter/packet"
)

// What a program's verdict is when it redirects: TC_ACT_REDIRECT.
const redirected = 7

// shortcutBox is the programs on maps that nobody but a test fills, beside a router that has been told the same.
type shortcutBox struct {
	*steering
	plan   *shortcutPlan
	router *vrouter.Router
	pods   map[uint32]shortcutPod
}

var (
	boxNode   = netip.MustParseAddr("198.18.0.1")
	boxNodes  = []netip.Addr{boxNode, netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("198.18.0.3"), netip.MustParseAddr("198.18.0.4")}
	boxMACs   = []net.HardwareAddr{{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}, {2, 0, 0, 0, 0, 3}}
	boxPods   = []netip.Addr{netip.MustParseAddr("10.244.1.1"), netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("10.244.1.3")}
	boxPrefix = netip.MustParsePrefix
)

// newShortcutBox has three pods (the programs of a test run are at the interface of the first), and routes to three other
// nodes: neighbours of two are known, the fourth node is in no list of nodes.
func newShortcutBox(t *testing.T, options vrouter.Options) *shortcutBox {
	t.Helper()
	s, err := newSteering(IOTC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	u := &Underlay{frames: &frames{resolver: &resolver{}}}
	table := hops{newHop(0xc6120002, 5, boxMACs[0], boxMACs[1], true), newHop(0xc6120003, 5, boxMACs[0], boxMACs[2], false), {to: 0xc6120004, raw: true}}
	u.frames.resolver.table.Store(&table)
	b := &shortcutBox{steering: s, router: vrouter.New(), pods: make(map[uint32]shortcutPod)}
	b.plan = newShortcutPlan(s, u, "vr0", func() {})
	b.router.OnRoutes(func(set []vrouter.Route, del []netip.Prefix) {
		var changes []routeChange
		for _, p := range del {
			changes = append(changes, routeChange{prefix: p})
		}
		for _, r := range set {
			changes = append(changes, routeChange{r.Prefix, true, r.NextHop})
		}
		for _, c := range lastChanges(changes) {
			if err := b.plan.route(c); err != nil {
				t.Error(err)
			}
		}
	})
	b.plan.follow(b.router)
	if err := b.router.SetOptions(options); err != nil {
		t.Fatal(err)
	}
	update := vrouter.Update{Config: &vrouter.Config{NodeAddress: boxNode, Underlay: "eth0", MTU: 1480}, AddNodes: boxNodes[:3]}
	tunnel := func(prefix string, to ...netip.Addr) {
		update.Set = append(update.Set, vrouter.Route{Prefix: boxPrefix(prefix), NextHop: vrouter.Multipath(vrouter.KindTunnel, to...)})
	}
	tunnel("10.244.2.0/24", boxNodes[1])
	tunnel("10.244.3.0/26", boxNodes[2])
	tunnel("10.244.4.0/26", boxNodes[3])
	tunnel("10.244.5.0/26", boxNodes[1], boxNodes[2])
	tunnel("10.244.6.0/26", boxNode)
	tunnel("10.244.2.64/26", boxNodes[2])
	tunnel("10.244.1.3/32", boxNodes[1]) // the third pod's address is another node's by its route
	for prefix, kind := range map[string]vrouter.Kind{"10.244.1.0/26": vrouter.KindLocal, "10.244.2.128/26": vrouter.KindDrop, "10.244.2.32/32": vrouter.KindLocal} {
		update.Set = append(update.Set, vrouter.Route{Prefix: boxPrefix(prefix), NextHop: vrouter.NextHop{Kind: kind}})
	}
	for i, a := range boxPods {
		update.AddPods = append(update.AddPods, vrouter.Pod{Address: a, Interface: fmt.Sprintf("cali%d", i)})
		b.addPod(t, a, i)
	}
	if err := b.router.Update(update); err != nil {
		t.Fatal(err)
	}
	if err := s.take(loopbackIndex, 0, boxPods[0], true); err != nil {
		t.Fatal(err)
	}
	b.refresh(t)
	// A Transit worker is what the router's trace takes for its ladder.
	b.router.NewSwitch(noSwitch{})
	return b
}

// addPod takes the interface of pod number i.
func (b *shortcutBox) addPod(t *testing.T, a netip.Addr, i int) {
	t.Helper()
	l := newPodLink(20+i, net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}, net.HardwareAddr{6, 0, 0, 0, 0, byte(i)})
	l.way = b.plan.newWay(time.Now())
	b.pods[l.way] = shortcutPod{address: a, link: l, mtu: 1480, peer: i == 1}
	if err := b.own(netip.PrefixFrom(a, 32), ownedPod, true, l.way); err != nil {
		t.Fatal(err)
	}
}

// noSwitch is a port that is never used.
type noSwitch struct{ vrouter.SwitchPort }

func (b *shortcutBox) refresh(t *testing.T) {
	t.Helper()
	b.plan.dirty.Store(true)
	if err := b.plan.refresh(nil, b.pods); err != nil {
		t.Fatal(err)
	}
	b.plan.rule.arrive = 1 // no program is on an interface
}

// run returns a program's verdict on a packet behind an Ethernet header for the loopback device, and the frame it made.
func (b *shortcutBox) run(t *testing.T, program *ebpf.Program, p []byte) (uint32, []byte) {
	t.Helper()
	frame := append([]byte{0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 9, 8, 0}, p...)
	verdict, out, err := program.Test(frame)
	if err != nil {
		t.Fatal(err)
	}
	return verdict, out
}

// randomPacket is a packet of a pod's: most are plain.
func randomPacket(rnd *rand.Rand, source netip.Addr) []byte {
	b := make([]byte, 32+rnd.IntN(60))
	for i := range b {
		b[i] = byte(rnd.Uint32())
	}
	copy(b, []byte{0x45, []byte{0, 0, 2, 1, 3, 0xb8, 0xba}[rnd.IntN(7)], 0, 0, byte(rnd.Uint32()), byte(rnd.Uint32()), []byte{0, 0x40}[rnd.IntN(2)], 0,
		byte(2 + rnd.IntN(254)), []byte{1, 6, 17, 17, 132, 47, 6, 17, 4, 41}[rnd.IntN(10)]})
	if b[9] == 1 {
		b[20] = byte(rnd.IntN(14))
	}
	if b[9] == 6 {
		b[33%len(b)] &^= byte(rnd.IntN(2)) << 1
	}
	from := source.As4()
	copy(b[12:], from[:])
	copy(b[16:], []byte{10, 244, byte(rnd.IntN(8)), []byte{1, 2, 3, 32, 65, 130, 200}[rnd.IntN(7)]})
	if rnd.IntN(40) == 0 {
		b[8] = byte(rnd.IntN(2))
	}
	if rnd.IntN(20) == 0 {
		b = append(b, make([]byte, 1400+rnd.IntN(30))...)
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	odd := rnd.IntN(30)
	switch odd {
	case 0:
		b[0] = 0x46
	case 1:
		b[6] |= 0x20
	case 2:
		b[7] = 1
	case 3:
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)-1-rnd.IntN(8)))
	case 4:
		b[12+rnd.IntN(4)]++
	case 5:
		b[0] = 0x65
	}
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], packet.Checksum(b[:20], 0))
	if odd == 6 {
		b[10+rnd.IntN(2)]++
	}
	return b
}

// forget takes out of an IP-in-IP packet what two that send it may do differently: the outer identification, unless DF is set.
func forget(b []byte) []byte {
	b = bytes.Clone(b)
	if len(b) >= 20 && b[9] == packet.ProtocolIPIP && b[6]&0x40 == 0 {
		clear(b[4:6])
		clear(b[10:12])
		binary.BigEndian.PutUint16(b[10:], packet.Checksum(b[:20], 0))
	}
	return b
}

// TestShortcutDeparts: what the program at a pod's interface forwards, it forwards as the vRouter's own ladder would, to the
// byte; and what is plain, and leads where the kernel can go, it does forward.
func TestShortcutDeparts(t *testing.T) {
	for name, o := range map[string]vrouter.Options{"default": {}, "pipe": {DSCP: vrouter.DSCP{Mode: vrouter.DSCPPipe, Value: 10}},
		"clamp": {ClampMSS: true}, "nested": {NestedTunnels: true}} {
		t.Run(name, func(t *testing.T) { shortcutDeparts(t, o) })
	}
}

func shortcutDeparts(t *testing.T, o vrouter.Options) {
	b := newShortcutBox(t, o)
	rnd := rand.New(rand.NewPCG(3, 4))
	byKernel := map[vrouter.Out]int{}
	plain := 0
	for range 6000 {
		p := randomPacket(rnd, boxPods[0])
		traced, err := b.router.Trace(vrouter.Transit, p) // an error: the source is no pod's
		verdict, frame := b.run(t, b.claim, p)
		// The ladder forwards it beyond the kernel, whole: the program may be expected to.
		want := err == nil && traced.Verdict == vrouter.VerdictForward && traced.Out != vrouter.OutHost && traced.Pieces <= 1 &&
			b.known(traced, p, o)
		if want {
			plain++
		}
		if (verdict == redirected) != want {
			t.Fatalf("verdict %d, %+v, %v: % x", int32(verdict), traced, err, p)
		}
		// A trace takes a packet to be at the interface of the pod whose source it has.
		if why, _ := b.plan.leavesDeparting(p); (why == "") != want && packet.IPv4(p).Src() == boxPods[0] {
			t.Fatalf("verdict %d, and why it is left alone: %q: % x", int32(verdict), why, p)
		}
		if verdict != redirected {
			if !bytes.Equal(frame[ethernetHeader:], p) {
				t.Fatalf("left alone, but not as it was:\n% x\n% x", p, frame[ethernetHeader:])
			}
			continue
		}
		byKernel[traced.Out]++
		if got := frame[ethernetHeader:]; !bytes.Equal(forget(got), forget(traced.Packet)) {
			t.Fatalf("of % x\nthe program made %x\nthe ladder     % x", p, got, traced.Packet)
		}
		b.checkFrame(t, frame, traced)
	}
	if plain < 500 || byKernel[vrouter.OutUnderlay] < 300 || byKernel[vrouter.OutPod] < 100 {
		t.Errorf("%d plain, by the kernel %v: the test decides little", plain, byKernel)
	}
}

// known reports whether what the ladder has forwarded is what the programs know of beforehand.
func (b *shortcutBox) known(traced vrouter.Traced, p []byte, o vrouter.Options) bool {
	inner := packet.IPv4(p)
	if inner.Src() != boxPods[0] || inner.TotalLen() != len(p) || inner.Protocol() == packet.ProtocolIPIP || inner.Protocol() == packet.ProtocolIPv6 {
		return false
	}
	if traced.Out == vrouter.OutPod {
		return true
	}
	if o.ClampMSS && inner.Protocol() == packet.ProtocolTCP && (len(p) < 34 || p[33]&2 != 0) {
		return false
	}
	gateway := packet.IPv4(traced.Packet).Dst()
	return !traced.Route.NextHop.IsGroup() && (gateway == boxNodes[1] || gateway == boxNodes[2])
}

// checkFrame looks at the Ethernet header.
func (b *shortcutBox) checkFrame(t *testing.T, frame []byte, traced vrouter.Traced) {
	t.Helper()
	want := append(bytes.Clone(boxMACs[1]), boxMACs[0]...)
	if traced.Out == vrouter.OutUnderlay && packet.IPv4(traced.Packet).Dst() == boxNodes[2] {
		copy(want, boxMACs[2])
	}
	if traced.Out == vrouter.OutPod {
		want = []byte{6, 0, 0, 0, 0, traced.OutInterface[4] - '0', 0xee, 0xee, 0xee, 0xee, 0xee, 0xee}
	}
	if want = append(want, 8, 0); !bytes.Equal(frame[:ethernetHeader], want) {
		t.Fatalf("Ethernet header % x, expected % x", frame[:ethernetHeader], want)
	}
}

// TestShortcutArrives: what the program at the underlay takes out of the tunnel, the ladder would, to the byte; from hostile
// sources it takes nothing; and what is plain it does take.
func TestShortcutArrives(t *testing.T) {
	for name, o := range map[string]vrouter.Options{"default": {}, "uniform": {DSCP: vrouter.DSCP{Mode: vrouter.DSCPUniform}},
		"accepting": {AcceptSources: []netip.Prefix{boxPrefix("10.244.0.0/16")}}} {
		t.Run(name, func(t *testing.T) { shortcutArrives(t, o) })
	}
}

func shortcutArrives(t *testing.T, o vrouter.Options) {
	b := newShortcutBox(t, o)
	rnd := rand.New(rand.NewPCG(5, 6))
	taken, hostile := 0, 0
	outer := packet.Outer{Dst: boxNode.As4(), TTL: 64}
	for range 12000 {
		source := netip.AddrFrom4([4]byte{10, 244, byte(2 + rnd.IntN(3)), []byte{1, 2, 65, 130}[rnd.IntN(4)]})
		inner := randomPacket(rnd, source)
		copy(inner[16:], []byte{10, 244, 1, byte(1 + rnd.IntN(4))})
		inner[10], inner[11] = 0, 0
		binary.BigEndian.PutUint16(inner[10:], packet.Checksum(inner[:20], 0))
		p := append(make([]byte, 20), inner...)
		outer.Src = boxNodes[rnd.IntN(4)].As4()
		if _, fault := packet.PushIPIP(p, 20, &outer); fault != packet.FaultNone {
			continue // one whose length is a lie
		}
		switch rnd.IntN(30) {
		case 0:
			p[1] ^= byte(1 + rnd.IntN(3))
		case 1:
			p[1] ^= 0x20
		case 2:
			p[6] |= 0x20
		case 3:
			p[16]++
		case 4:
			p[9] = 17
		case 5:
			p[0] = 0x46
		}
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], packet.Checksum(p[:20], 0))
		if rnd.IntN(30) == 0 {
			p[10+rnd.IntN(2)]++
		}
		traced, err := b.router.Trace(vrouter.Decap, p)
		if err != nil {
			t.Fatal(err)
		}
		if traced.Reason == vrouter.ReasonInnerSource || traced.Reason == vrouter.ReasonOuterSourceNode {
			hostile++
		}
		verdict, frame := b.run(t, b.plan.arrival, p)
		want := traced.Verdict == vrouter.VerdictForward && traced.Out == vrouter.OutPod && traced.Pieces <= 1 && knownArrival(traced, p, o)
		if (verdict == redirected) != want {
			t.Fatalf("verdict %d, %+v: % x", int32(verdict), traced, p)
		}
		if why, _ := b.plan.leavesArriving(p); (why == "") != want {
			t.Fatalf("verdict %d, and why it is left alone: %q: % x", int32(verdict), why, p)
		}
		if verdict != redirected {
			if !bytes.Equal(frame[ethernetHeader:], p) {
				t.Fatalf("left alone, but not as it was:\n% x\n% x", p, frame[ethernetHeader:])
			}
			continue
		}
		taken++
		if got := frame[ethernetHeader:]; !bytes.Equal(got, traced.Packet) {
			t.Fatalf("of % x\nthe program made %x\nthe ladder     % x", p, got, traced.Packet)
		}
		b.checkFrame(t, frame, traced)
	}
	if taken < 250 || hostile < 1000 {
		t.Errorf("%d taken, %d hostile: the test decides little", taken, hostile)
	}
}

// knownArrival reports whether what the ladder gives to a pod is what the program takes.
func knownArrival(traced vrouter.Traced, p []byte, o vrouter.Options) bool {
	inner := packet.IPv4(p[20:])
	back := traced.Back.NextHop
	switch {
	case len(p) != packet.IPv4(p).TotalLen() || len(inner) != inner.TotalLen():
		return false
	case back.Kind != vrouter.KindTunnel || back.IsGroup() || back.Gateway != packet.IPv4(p).Src():
		return false // an exception of the operator's
	case (p[1]^inner[1])&3 != 0 && p[1]&3 != 0:
		return false
	}
	return o.DSCP.Mode != vrouter.DSCPUniform || (p[1]^inner[1])&0xfc == 0
}

// TestShortcutFlows: a flow that the kernel is in is left to the vRouter, at a pod and from the underlay.
func TestShortcutFlows(t *testing.T) {
	b := newShortcutBox(t, vrouter.Options{})
	// A test run takes the first 14 bytes for an Ethernet header, also where the program knows none: the source's first two
	// are the type that such a packet has.
	pod := netip.MustParseAddr("8.0.1.1")
	b.addPod(t, pod, 3)
	if err := b.router.Update(vrouter.Update{Set: []vrouter.Route{{Prefix: netip.PrefixFrom(pod, 32), NextHop: vrouter.NextHop{Kind: vrouter.KindLocal}}}}); err != nil {
		t.Fatal(err)
	}
	b.refresh(t)
	p := make([]byte, 60)
	copy(p, []byte{0x45, 0, 0, 60, 0, 1, 0, 0, 64, 17, 0, 0, 8, 0, 1, 1, 10, 244, 2, 1, 0, 53, 1, 187})
	back := bytes.Clone(p)
	copy(back[12:], []byte{10, 244, 2, 1, 8, 0, 1, 1, 1, 187, 0, 53})
	binary.BigEndian.PutUint16(back[10:], packet.Checksum(back[:20], 0))
	outer := append(make([]byte, 20), back...)
	if _, fault := packet.PushIPIP(outer, 20, &packet.Outer{Src: boxNodes[1].As4(), Dst: boxNode.As4(), TTL: 64}); fault != packet.FaultNone {
		t.Fatal(fault)
	}
	for _, known := range []bool{false, true} {
		if known {
			// The kernel sends the flow's packet by vr0.
			if verdict, _, err := b.plan.note.Test(p); err != nil || int32(verdict) != tcxNext {
				t.Fatal(int32(verdict), err)
			}
		}
		if verdict, _ := b.run(t, b.plan.arrival, outer); (verdict == redirected) == known {
			t.Errorf("noted %v: arriving: verdict %d", known, int32(verdict))
		}
		if why, _ := b.plan.leavesArriving(outer); (why == "") == known {
			t.Errorf("noted %v: arriving: why it is left alone: %q", known, why)
		}
	}
}

// TestShortcutStandsAside: while a capture runs, everything comes to the vRouter; and so it does without a configuration.
func TestShortcutStandsAside(t *testing.T) {
	b := newShortcutBox(t, vrouter.Options{})
	p := make([]byte, 60)
	copy(p, []byte{0x45, 0, 0, 60, 0, 1, 0, 0, 64, 17, 0, 0, 10, 244, 1, 1, 10, 244, 2, 1, 0, 53, 1, 187})
	binary.BigEndian.PutUint16(p[10:], packet.Checksum(p[:20], 0))
	expect := func(when string, want uint32) {
		t.Helper()
		if verdict, _ := b.run(t, b.claim, p); verdict != want {
			t.Errorf("%s: verdict %d", when, verdict)
		}
		if why, _ := b.plan.leavesDeparting(p); (why == "") != (want == redirected) {
			t.Errorf("%s: why it is left alone: %q", when, why)
		}
	}
	expect("at first", redirected)
	c, err := b.router.StartCapture(vrouter.CaptureOptions{})
	if err != nil {
		t.Fatal(err)
	}
	expect("while a capture runs", tcxPass)
	c.Stop()
	expect("after it", redirected)
	// The path to the node becomes too narrow, the node no longer a neighbour, the route another.
	gone := hops{{to: 0xc6120002, raw: true}}
	b.plan.underlay.frames.resolver.table.Store(&gone)
	b.refresh(t)
	expect("without a neighbour", tcxPass)
}

// TestShortcutRoutes: after each of many random changes every address leads where the router's own table says.
func TestShortcutRoutes(t *testing.T) {
	b := newShortcutBox(t, vrouter.Options{})
	rnd := rand.New(rand.NewPCG(7, 8))
	prefix := func() netip.Prefix {
		a := netip.AddrFrom4([4]byte{10, 244, byte(2 + rnd.IntN(2)), byte(rnd.IntN(256))})
		return netip.PrefixFrom(a, []int{16, 23, 24, 25, 26, 28, 32}[rnd.IntN(7)]).Masked()
	}
	for range 400 {
		var u vrouter.Update
		for range 1 + rnd.IntN(4) {
			switch p := prefix(); rnd.IntN(5) {
			case 0, 1:
				u.Set = append(u.Set, vrouter.Route{Prefix: p, NextHop: vrouter.NextHop{Kind: vrouter.KindTunnel, Gateway: boxNodes[1+rnd.IntN(2)]}})
			case 2:
				u.Set = append(u.Set, vrouter.Route{Prefix: p, NextHop: vrouter.NextHop{Kind: []vrouter.Kind{vrouter.KindLocal, vrouter.KindDrop}[rnd.IntN(2)]}})
			case 3:
				u.Set = append(u.Set, vrouter.Route{Prefix: p, NextHop: vrouter.Multipath(vrouter.KindTunnel, boxNodes[1], boxNodes[2])})
			default:
				u.Del = append(u.Del, p)
			}
		}
		if err := b.router.Update(u); err != nil {
			t.Fatal(err)
		}
		b.refresh(t)
		for range 8 {
			p := make([]byte, 60)
			copy(p, []byte{0x45, 0, 0, 60, 0, 1, 0, 0, 64, 47, 0, 0, 10, 244, 1, 1, 10, 244, byte(2 + rnd.IntN(2)), byte(rnd.IntN(256))})
			binary.BigEndian.PutUint16(p[10:], packet.Checksum(p[:20], 0))
			traced, err := b.router.Trace(vrouter.Transit, p)
			if err != nil {
				t.Fatal(err)
			}
			verdict, frame := b.run(t, b.claim, p)
			want := traced.Out == vrouter.OutUnderlay && !traced.Route.NextHop.IsGroup()
			if (verdict == redirected) != want || want && !bytes.Equal(forget(frame[ethernetHeader:]), forget(traced.Packet)) {
				t.Fatalf("to %v: verdict %d, %+v", packet.IPv4(p).Dst(), int32(verdict), traced.Route)
			}
		}
	}
	for p := range b.prefixes {
		if err := b.plan.route(routeChange{prefix: p}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(b.plan.gateways); n != 0 {
		t.Errorf("%d gateways without a route", n)
	}
	if n := b.plan.freeWays.used(); n != len(boxPods) {
		t.Errorf("%d ways in use, with %d pods and no route", n, len(boxPods))
	}
}

// TestShortcutFull: where there is no room for more nodes, their packets are the vRouter's, and the others' the kernel's; and
// thousands of routes are no trouble.
func TestShortcutFull(t *testing.T) {
	b := newShortcutBox(t, vrouter.Options{})
	var set []vrouter.Route
	const many = 5000
	for i := range many {
		a := netip.AddrFrom4([4]byte{10, 100 + byte(i>>8), byte(i), 0})
		set = append(set, vrouter.Route{Prefix: netip.PrefixFrom(a, 26), NextHop: vrouter.NextHop{Kind: vrouter.KindTunnel, Gateway: boxNodes[1]}})
	}
	if err := b.router.Update(vrouter.Update{Set: set}); err != nil {
		t.Fatal(err)
	}
	to := func(a netip.Addr) uint32 {
		p := make([]byte, 60)
		copy(p, []byte{0x45, 0, 0, 60, 0, 1, 0, 0, 64, 47, 0, 0, 10, 244, 1, 1})
		copy(p[16:], a.AsSlice())
		binary.BigEndian.PutUint16(p[10:], packet.Checksum(p[:20], 0))
		verdict, _ := b.run(t, b.claim, p)
		return verdict
	}
	for _, r := range set {
		if verdict := to(r.Prefix.Addr().Next()); verdict != redirected {
			t.Fatalf("%v: verdict %d", r.Prefix, int32(verdict))
		}
	}
	for b.plan.newWay(time.Now()) != 0 { // somebody has them all
	}
	late := vrouter.Route{Prefix: boxPrefix("10.99.0.0/24"), NextHop: vrouter.NextHop{Kind: vrouter.KindTunnel, Gateway: netip.MustParseAddr("198.18.0.77")}}
	if err := b.router.Update(vrouter.Update{Set: []vrouter.Route{late}}); err != nil {
		t.Fatal(err)
	}
	b.refresh(t)
	if verdict := to(netip.MustParseAddr("10.99.0.1")); verdict != tcxPass {
		t.Errorf("without room: verdict %d", int32(verdict))
	}
	if verdict := to(set[0].Prefix.Addr().Next()); verdict != redirected {
		t.Errorf("what was there before: verdict %d", int32(verdict))
	}
	if err := b.router.Update(vrouter.Update{Del: []netip.Prefix{late.Prefix}}); err != nil {
		t.Fatal(err)
	}
	b.refresh(t)
	if b.plan.gateways[late.NextHop.Gateway] != nil {
		t.Error("a gateway for which there was no room is kept without a route")
	}
}

// TestNumbers: a number is not given out again before it has rested.
func TestNumbers(t *testing.T) {
	n := numbers{limit: 4}
	now := time.Unix(1000, 0)
	for want := uint32(1); want <= 3; want++ {
		if got := n.take(now); got != want {
			t.Fatalf("%d, expected %d", got, want)
		}
	}
	n.give(2, now)
	if got := n.take(now.Add(numberRest - 1)); got != 0 {
		t.Errorf("%d, which has not rested", got)
	}
	if got := n.take(now.Add(numberRest)); got != 2 {
		t.Errorf("%d, expected 2", got)
	}
	if got := n.take(now.Add(time.Hour)); got != 0 {
		t.Errorf("%d, which somebody has", got)
	}
}
