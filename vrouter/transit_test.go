package vrouter

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"margay/vrouter/packet"
)

// switched is a queue with interfaces: every packet of a turn has come in by the same one.
type switched struct {
	queue
	from Interface
	to   []Interface
	pods *Pods
}

func (s *switched) Recv(batch []*Packet) (int, error) {
	n, err := s.queue.Recv(batch)
	for _, p := range batch[:n] {
		p.In = s.from
	}
	return n, err
}

func (s *switched) Send(batch []*Packet) {
	s.queue.Send(batch)
	for _, p := range batch {
		if s.out != nil {
			s.to = append(s.to, p.Out)
		}
	}
}

func (s *switched) Pods() *Pods { return s.pods }

var neighbourPod = netip.MustParseAddr("10.244.1.9")

const (
	ownPodAt       = FirstPodInterface
	neighbourPodAt = FirstPodInterface + 2
)

func testPods() *Pods { return NewPods([]netip.Addr{ownPod, {}, neighbourPod}, []int{1480, 0, 1400}) }

// ports makes the first bytes of a transport header.
func ports(from, to uint16, rest ...byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	return append(binary.BigEndian.AppendUint16(b, to), append([]byte{0, 8, 0, 0}, rest...)...)
}

func ttl(n byte) func([]byte) { return func(b []byte) { b[8] = n } }

// TestTransit: who gets what, from every kind of interface.
func TestTransit(t *testing.T) {
	host := netip.MustParseAddr("10.244.1.1")   // a local address without a pod's interface
	outside := netip.MustParseAddr("192.0.2.1") // no route
	options := append([]byte{1, 1, 1, 1}, ports(1, 2)...)
	withOptions := func(b []byte) { b[0] = 0x46 }
	for name, c := range map[string]struct {
		from Interface
		b    []byte
		to   Interface
		drop Reason
		same bool // it leaves as it came
	}{
		"pod to pod":           {from: ownPodAt, b: ip(ownPod, neighbourPod, 17, ports(1, 2)), to: neighbourPodAt},
		"pod to other node":    {from: ownPodAt, b: ip(ownPod, pod2, 17, ports(1, 2)), to: UnderlayInterface},
		"pod to host":          {from: ownPodAt, b: ip(ownPod, host, 17, ports(1, 2)), to: HostInterface, same: true},
		"pod to the world":     {from: ownPodAt, b: ip(ownPod, outside, 17, ports(1, 2)), to: HostInterface, same: true},
		"pod, direct route":    {from: ownPodAt, b: ip(ownPod, pod3, 17, ports(1, 2)), to: HostInterface, same: true},
		"pod, last hop":        {from: ownPodAt, b: ip(ownPod, pod2, 17, ports(1, 2), ttl(1)), drop: ReasonTTLExpired},
		"pod, no hop":          {from: ownPodAt, b: ip(ownPod, pod2, 17, ports(1, 2), ttl(0)), drop: ReasonTTLExpired},
		"pod, last hop, world": {from: ownPodAt, b: ip(ownPod, outside, 17, ports(1, 2), ttl(1)), to: HostInterface, same: true},
		"pod, too big, DF":     {from: ownPodAt, b: ip(ownPod, pod2, 17, make([]byte, 1461), func(b []byte) { b[6] = 0x40 }), drop: ReasonPacketTooBig},
		"pod, too big for pod": {from: ownPodAt, b: ip(ownPod, neighbourPod, 17, make([]byte, 1461)), to: HostInterface, same: true},
		"pod, fits that pod":   {from: ownPodAt, b: ip(ownPod, neighbourPod, 17, make([]byte, 1380)), to: neighbourPodAt},
		"pod, not that pod":    {from: ownPodAt, b: ip(ownPod, neighbourPod, 17, make([]byte, 1381)), to: HostInterface, same: true},
		"node, fits that pod":  {from: UnderlayInterface, b: ip(node2, self, 4, ip(pod2, neighbourPod, 17, make([]byte, 1380))), to: neighbourPodAt},
		"node, not that pod":   {from: UnderlayInterface, b: ip(node2, self, 4, ip(pod2, neighbourPod, 17, make([]byte, 1381))), to: HostInterface, same: true},
		"node, fits this pod":  {from: UnderlayInterface, b: ip(node2, self, 4, ip(pod2, ownPod, 17, make([]byte, 1381))), to: ownPodAt},
		"pod, fragment":        {from: ownPodAt, b: ip(ownPod, pod2, 17, ports(1, 2), func(b []byte) { b[6] = 0x20 }), to: HostInterface, same: true},
		"pod, options":         {from: ownPodAt, b: fixSum(ip(ownPod, pod2, 17, options, withOptions)), to: HostInterface, same: true},
		"pod, unreachable":     {from: ownPodAt, b: ip(ownPod, pod2, 1, []byte{3, 1, 0, 0, 0, 0, 0, 0}), to: HostInterface, same: true},
		"pod, echo":            {from: ownPodAt, b: ip(ownPod, pod2, 1, []byte{8, 0, 0, 0, 0, 0, 0, 0}), to: UnderlayInterface},
		"pod, padded":          {from: ownPodAt, b: append(ip(ownPod, neighbourPod, 17, ports(1, 2)), 0, 0, 0), to: neighbourPodAt},
		"pod, another's":       {from: ownPodAt, b: ip(neighbourPod, pod2, 17, ports(1, 2)), drop: ReasonSpoofed},
		"pod, number of none":  {from: FirstPodInterface + 1, b: ip(ownPod, pod2, 17, ports(1, 2)), drop: ReasonSpoofed},
		"pod, number past all": {from: FirstPodInterface + 9, b: ip(ownPod, pod2, 17, ports(1, 2)), drop: ReasonSpoofed},
		"pod, IPv6":            {from: ownPodAt, b: append([]byte{0x60}, make([]byte, 47)...), drop: ReasonNotIPv4},
		"host to other node":   {from: HostInterface, b: ip(host, pod2, 17, ports(1, 2)), to: UnderlayInterface},
		"host, no route":       {from: HostInterface, b: ip(host, outside, 17, ports(1, 2)), drop: ReasonNoRoute},
		"node to pod":          {from: UnderlayInterface, b: ip(node2, self, 4, ip(pod2, ownPod, 17, ports(1, 2))), to: ownPodAt},
		"node to host":         {from: UnderlayInterface, b: ip(node2, self, 4, ip(pod2, host, 17, ports(1, 2))), to: HostInterface, same: true},
		"node, last hop":       {from: UnderlayInterface, b: ip(node2, self, 4, ip(pod2, ownPod, 17, ports(1, 2), ttl(1))), to: HostInterface, same: true},
		"node, spoofed":        {from: UnderlayInterface, b: ip(node2, self, 4, ip(pod3, ownPod, 17, ports(1, 2))), drop: ReasonInnerSource},
	} {
		t.Run(name, func(t *testing.T) {
			in := &switched{queue: queue{in: [][]byte{c.b}, out: [][]byte{}}, from: c.from, pods: testPods()}
			w := testRouter(t).NewSwitch(in)
			if err := w.turn(); err != nil {
				t.Fatal(err)
			}
			if c.drop != ReasonNotSet {
				told := 0
				if answers[c.drop] != (packet.ICMPError{}) && c.from >= FirstPodInterface {
					told = 1
				}
				if len(in.out) != told || told > 0 && in.to[0] != c.from || w.tallies.dropped[c.drop].packets.Load() != 1 {
					t.Errorf("sent %d, %v counts %d", len(in.out), c.drop, w.tallies.dropped[c.drop].packets.Load())
				}
				return
			}
			if len(in.out) != 1 || in.to[0] != c.to {
				t.Fatalf("sent to %v, expected %v", in.to, c.to)
			}
			got, was := in.out[0], c.b
			if c.from == UnderlayInterface {
				was = was[20:]
			}
			if c.to == UnderlayInterface {
				got = got[20:]
			}
			want := slices.Clone(was[:packet.IPv4(was).TotalLen()])
			if !c.same && c.from != HostInterface { // where the kernel has sent it, it has taken its one
				packet.DecrementTTL(want)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func fixSum(b []byte) []byte {
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], packet.Checksum(b[:int(b[0]&15)*4], 0))
	return b
}

// TestTransitKernelFlows: what the kernel sends to another node for a pod, which is a flow that it may have rewritten,
// comes back by the kernel; all else comes back by the pod's interface.
func TestTransitKernelFlows(t *testing.T) {
	in := &switched{queue: queue{out: [][]byte{}}, pods: testPods()}
	w := testRouter(t).NewSwitch(in, Flow{Source: netip.AddrPortFrom(pod2, 80), Destination: netip.AddrPortFrom(ownPod, 999), Protocol: 6})
	send := func(from Interface, b []byte) Interface {
		t.Helper()
		in.in, in.from, in.to = [][]byte{b}, from, nil
		if err := w.turn(); err != nil {
			t.Fatal(err)
		}
		if len(in.to) != 1 {
			t.Fatal("dropped")
		}
		return in.to[0]
	}
	back := func(protocol byte, from, to uint16) Interface {
		t.Helper()
		return send(UnderlayInterface, ip(node2, self, 4, ip(pod2, ownPod, protocol, ports(from, to))))
	}
	if got := back(17, 53, 4000); got != ownPodAt {
		t.Errorf("before: %v", got)
	}
	if got := send(HostInterface, ip(ownPod, pod2, 17, ports(4000, 53))); got != UnderlayInterface {
		t.Errorf("out: %v", got)
	}
	for _, c := range []struct {
		protocol byte
		from, to uint16
		want     Interface
	}{{17, 53, 4000, HostInterface}, {17, 53, 4001, ownPodAt}, {17, 54, 4000, ownPodAt}, {6, 53, 4000, ownPodAt}, {6, 80, 999, HostInterface}, {17, 80, 999, ownPodAt}} {
		if got := back(c.protocol, c.from, c.to); got != c.want {
			t.Errorf("back %+v: %v", c, got)
		}
	}
	// The host's own flows are not the pod's.
	send(HostInterface, ip(netip.MustParseAddr("10.244.1.1"), pod2, 17, ports(7, 53)))
	if got := back(17, 53, 7); got != ownPodAt {
		t.Errorf("after the host's: %v", got)
	}
}

// TestFlowSetsTogether: while one worker moves flows about, another misses none that is there all the time.
func TestFlowSetsTogether(t *testing.T) {
	s := new(flowSet)
	kept := flow{1, 1}
	same := []flow{kept}
	for i := uint64(2); len(same) < flowWays; i++ {
		if f := (flow{i, 1}); f.line() == kept.line() {
			same = append(same, f)
		}
	}
	for _, f := range same {
		s.add(f)
	}
	other := &flowSets{own: new(flowSet), others: []*flowSet{s}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 20000 {
			s.add(same[i%len(same)])
		}
	}()
	for looks := 0; ; looks++ {
		if !other.has(kept) {
			t.Fatalf("look %d: a flow that stays was not seen", looks)
		}
		select {
		case <-done:
			if other.has(flow{7, 7}) {
				t.Error("a flow that was never there was seen")
			}
			return
		default:
		}
	}
}

// TestFlowSet: what is in it stays while at most four share a line, and the one that was not seen for longest goes first.
func TestFlowSet(t *testing.T) {
	s := new(flowSet)
	line := flow{1, 1}.line()
	var same []flow
	for i := uint64(1); len(same) < flowWays+1; i++ {
		if f := (flow{i, 1}); f.line() == line {
			same = append(same, f)
		}
	}
	for _, f := range same[:flowWays] {
		s.add(f)
	}
	s.add(same[0])
	s.add(same[flowWays])
	for i, f := range same {
		if got, want := s.has(f), i != 1; got != want {
			t.Errorf("flow %d: in the set %v, expected %v", i, got, want)
		}
	}
}

// TestPodsTable: the table says what a map says.
func TestPodsTable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		numbers := rapid.SliceOfNDistinct(rapid.Uint32Range(1, 300), 0, 200, rapid.ID).Draw(t, "addresses")
		addresses := make([]netip.Addr, 0, len(numbers))
		want := map[uint32]Interface{}
		for i, n := range numbers {
			if n%7 == 0 {
				addresses = append(addresses, netip.Addr{})
				continue
			}
			n |= 10 << 24
			addresses = append(addresses, netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, n))))
			want[n] = FirstPodInterface + Interface(i)
		}
		pods := NewPods(addresses, nil)
		for n := range uint32(310) {
			n |= 10 << 24
			at := pods.find(n)
			if at != want[n] || at != noInterface && pods.address(at) != n {
				t.Fatalf("%x: at %v, expected %v; back %x", n, at, want[n], pods.address(at))
			}
		}
		if pods.find(0) != noInterface {
			t.Fatal("found 0.0.0.0")
		}
	})
}

// TestTransitNoAllocations: between Recv and Send nothing is allocated, from every kind of interface.
func TestTransitNoAllocations(t *testing.T) {
	r := testRouter(t)
	for from, b := range map[Interface][]byte{
		HostInterface:     ip(ownPod, pod2, 17, ports(1, 2)),
		UnderlayInterface: ip(node2, self, 4, ip(pod2, ownPod, 17, ports(2, 1))),
		ownPodAt:          ip(ownPod, neighbourPod, 17, ports(1, 2)),
	} {
		batch := slices.Repeat([][]byte{b, corrupt(slices.Clone(b))}, 16)
		in := &switched{from: from, pods: testPods()}
		w := r.NewSwitch(in)
		if n := testing.AllocsPerRun(100, func() {
			in.in = batch
			if err := w.turn(); err != nil {
				t.Error(err)
			}
		}); n != 0 {
			t.Errorf("from %v: %v allocations a turn", from, n)
		}
	}
}

// TestPodsOfRouter: pods are told of, confirmed, swept and kept like routes.
func TestPodsOfRouter(t *testing.T) {
	r := testRouter(t)
	var told [][]Pod
	r.OnPods(func(pods []Pod) { told = append(told, pods) })
	a, b := Pod{ownPod, "cali1"}, Pod{neighbourPod, "cali2"}
	update := func(u Update) {
		t.Helper()
		if err := r.Update(u); err != nil {
			t.Fatal(err)
		}
	}
	update(Update{AddPods: []Pod{b, a}})
	update(Update{AddPods: []Pod{a}}) // nothing new
	moved := Pod{ownPod, "cali3"}
	update(Update{AddPods: []Pod{moved}})
	r.Begin()
	if s := r.Status(); s.Pods != 2 || s.Stale != s.Routes+s.Nodes+2 {
		t.Errorf("after Begin: %+v", s)
	}
	update(Update{Config: testUpdate().Config, AddPods: []Pod{b}})
	r.End()
	if d := cmp.Diff([][]Pod{{a, b}, {moved, b}, {b}}, told, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Error(d)
	}
	saved := r.Save()
	if len(saved.Pods) != 1 || saved.Pods[0] != b {
		t.Errorf("saved %v", saved.Pods)
	}
	for _, bad := range []Update{{AddPods: []Pod{{ownPod, "a/b"}}}, {AddPods: []Pod{{Interface: "cali1"}}}, {DelPods: []netip.Addr{{}}}} {
		if err := r.Update(bad); err == nil {
			t.Errorf("%+v: no error", bad)
		}
	}
}

// TestRoutesTold: who asks is told of every change of the routes, sweeps included.
func TestRoutesTold(t *testing.T) {
	r := New()
	have := map[netip.Prefix]NextHop{}
	r.OnRoutes(func(set []Route, del []netip.Prefix) {
		for _, p := range del {
			delete(have, p)
		}
		for _, route := range set {
			have[route.Prefix] = route.NextHop
		}
	})
	same := func(step string) {
		t.Helper()
		entries, _ := r.Routes()
		if len(entries) != len(have) {
			t.Errorf("%s: told of %d routes of %d", step, len(have), len(entries))
		}
		for _, e := range entries {
			if have[e.Prefix] != e.NextHop {
				t.Errorf("%s: %v: told %v, is %v", step, e.Prefix, have[e.Prefix], e.NextHop)
			}
		}
	}
	u := testUpdate()
	if err := r.Update(u); err != nil {
		t.Fatal(err)
	}
	same("update")
	r.Begin()
	if err := r.Update(Update{Set: u.Set[:2], Del: []netip.Prefix{u.Set[3].Prefix}}); err != nil {
		t.Fatal(err)
	}
	same("second update")
	r.End()
	same("sweep")
	if len(have) != 2 {
		t.Errorf("%d routes left", len(have))
	}
}

// FuzzTransit: whatever a pod or another node sends, the ladder ends in a verdict, and a packet leaves only where one
// may.
func FuzzTransit(f *testing.F) {
	f.Add(ip(ownPod, pod2, 17, ports(1, 2)), uint32(ownPodAt), uint16(0))
	f.Add(ip(node2, self, 4, ip(pod2, ownPod, 17, ports(1, 2))), uint32(UnderlayInterface), uint16(0))
	f.Add(ip(ownPod, pod2, 6, ports(1, 2)), uint32(HostInterface), uint16(20))
	f.Add(ip(ownPod, pod2, 17, ports(1, 2), ttl(1)), uint32(ownPodAt), uint16(0)) // which is answered
	r := testRouter(f)
	in := &switched{queue: queue{out: [][]byte{}}, pods: testPods()}
	w := r.NewSwitch(in)
	f.Fuzz(func(t *testing.T, b []byte, from uint32, start uint16) {
		in.in, in.from, in.out, in.to = [][]byte{b}, Interface(from), in.out[:0], in.to[:0]
		in.meta = Offload{NeedsChecksum: start != 0, ChecksumStart: start}
		if err := w.turn(); err != nil {
			t.Fatal(err)
		}
		for i, to := range in.to {
			p, fault := packet.ParseIPv4(in.out[i])
			if fault != 0 {
				t.Fatalf("let through: %v, % x", fault, in.out[i])
			}
			if to >= FirstPodInterface && p.DstU32() != in.pods.address(to) {
				t.Fatalf("to %v: % x", to, p)
			}
			if in.from < FirstPodInterface || to == UnderlayInterface {
				continue
			}
			pod := in.pods.address(in.from)
			answer := p.Protocol() == protoICMP && icmpError(p[packet.IPv4MinLen]) && p.Src() == self && p.DstU32() == pod
			if p.SrcU32() != pod && !answer {
				t.Fatalf("from %v: % x", in.from, p)
			}
		}
	})
}
