package vrouter

import (
	"net/netip"
	"slices"
	"testing"
)

// dropsOf returns the counts of one flow, and whether it is counted apart.
func dropsOf(flows []DropFlow, reason Reason, src, dst netip.Addr) (packets uint64, ok bool) {
	for _, f := range flows {
		if f.Reason == reason && f.Src == src && f.Dst == dst {
			packets, ok = packets+f.Packets, true
		}
	}
	return packets, ok
}

func TestDropsAreSampledAndCountedByFlow(t *testing.T) {
	r := testRouter(t)
	lost := netip.MustParseAddr("10.244.9.9")
	batch := [][]byte{ip(ownPod, lost, 17, []byte("first")), ip(ownPod, lost, 17, []byte("second")), ip(ownPod, pod3, 17, nil), {0x60, 1}}
	if err := r.NewWorker(Encap, &queue{in: slices.Clone(batch)}, &queue{}).turn(); err != nil {
		t.Fatal(err)
	}
	stranger := netip.MustParseAddr("198.18.0.99")
	decap := r.NewWorker(Decap, &queue{in: [][]byte{ip(stranger, self, 4, ip(pod2, ownPod, 17, nil))}}, &queue{})
	if err := decap.turn(); err != nil {
		t.Fatal(err)
	}

	flows, samples := r.Drops(0)
	if n, _ := dropsOf(flows, ReasonNoRoute, ownPod, lost); n != 2 {
		t.Errorf("no_route counts %d for the flow: %+v", n, flows)
	}
	if n, _ := dropsOf(flows, ReasonDirectRoute, ownPod, pod3); n != 1 {
		t.Errorf("direct_route counts %d for the flow: %+v", n, flows)
	}
	if n, _ := dropsOf(flows, ReasonNotIPv4, netip.Addr{}, netip.Addr{}); n != 1 {
		t.Errorf("not_ipv4 counts %d without addresses: %+v", n, flows)
	}
	if n, _ := dropsOf(flows, ReasonOuterSourceNode, pod2, ownPod); n != 1 {
		t.Errorf("outer_source_not_node counts %d under the inner addresses: %+v", n, flows)
	}
	if len(samples) != 4 || samples[0].Seq != 1 || samples[3].Seq != 4 {
		t.Fatalf("samples %+v", samples)
	}
	i := slices.IndexFunc(samples, func(s DropSample) bool { return s.Reason == ReasonNoRoute })
	if i < 0 || !slices.Equal(samples[i].Bytes, batch[0]) || samples[i].Length != len(batch[0]) || samples[i].Time.IsZero() {
		t.Errorf("no_route: expected the first packet whole: %+v", samples)
	}
	if _, later := r.Drops(4); len(later) != 0 {
		t.Errorf("nothing new, and yet %+v", later)
	}

	if _, all := r.Drops(1000); len(all) != 4 {
		t.Errorf("asked for what follows a number that was never given: %d samples, expected all", len(all))
	}

	// The slot is free again, and long packets are cut.
	long := ip(ownPod, lost, 17, make([]byte, 1000))
	if err := r.NewWorker(Encap, &queue{in: [][]byte{long}}, &queue{}).turn(); err != nil {
		t.Fatal(err)
	}
	if _, later := r.Drops(4); len(later) != 1 || later[0].Length != 1020 || !slices.Equal(later[0].Bytes, long[:SampleBytes]) {
		t.Errorf("second round: %+v", later)
	}
}

// TestSpooferIsNamed: what bears another's address is counted for the pod that has sent it.
func TestSpooferIsNamed(t *testing.T) {
	r := testRouter(t)
	spoofed := ip(neighbourPod, pod2, 17, ports(1, 2))
	w := r.NewSwitch(&switched{queue: queue{in: [][]byte{spoofed}}, from: ownPodAt, pods: testPods()})
	if err := w.turn(); err != nil {
		t.Fatal(err)
	}
	flows, samples := r.Drops(0)
	if n, _ := dropsOf(flows, ReasonSpoofed, ownPod, pod2); n != 1 {
		t.Errorf("spoofed counts %d for the pod: %+v", n, flows)
	}
	if len(samples) != 1 || !slices.Equal(samples[0].Bytes, spoofed) {
		t.Errorf("expected the packet as it was: %+v", samples)
	}
}

// TestManyFlowsLoseNoCount: more flows than fit, and each drop is in the sum.
func TestManyFlowsLoseNoCount(t *testing.T) {
	r := testRouter(t)
	w := r.NewWorker(Encap, &queue{}, &queue{})
	src, lost := ownPod, netip.MustParseAddr("10.244.9.0")
	const n = 5000
	for range n {
		lost = lost.Next()
		w.in.(*queue).in = [][]byte{ip(src, lost, 17, nil)}
		if err := w.turn(); err != nil {
			t.Fatal(err)
		}
	}
	flows, _ := r.Drops(0)
	var sum, apart uint64
	for _, f := range flows {
		sum += f.Packets
		if f.Src.IsValid() {
			apart++
		}
	}
	if sum != n || apart < dropSets*dropWays/2 || apart > dropSets*dropWays {
		t.Errorf("%d drops counted, %d flows apart", sum, apart)
	}
}

func TestRecentSamplesAreBounded(t *testing.T) {
	r := testRouter(t)
	w := r.NewWorker(Encap, &queue{}, &queue{})
	for range recentSamples + 10 {
		w.in.(*queue).in = [][]byte{ip(ownPod, netip.MustParseAddr("192.0.2.1"), 17, nil)}
		if err := w.turn(); err != nil {
			t.Fatal(err)
		}
		r.collectDrops()
	}
	if _, samples := r.Drops(0); len(samples) != recentSamples || samples[recentSamples-1].Seq != recentSamples+10 {
		t.Errorf("%d samples", len(samples))
	}
}

// TestReadersDoNotDisturb reads while a worker drops; the race detector watches.
func TestReadersDoNotDisturb(t *testing.T) {
	r := testRouter(t)
	w := r.NewWorker(Encap, &queue{}, &queue{})
	c, err := r.StartCapture(CaptureOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Stop()
	done := make(chan error)
	const turns, each = 2000, 8
	go func() {
		batch := slices.Repeat([][]byte{ip(ownPod, netip.MustParseAddr("192.0.2.1"), 17, []byte("x"))}, each)
		for range turns {
			w.in.(*queue).in = batch
			if err := w.turn(); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	captured := 0
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		default:
		}
		flows, _ := r.Drops(0)
		for _, f := range flows {
			if f.Reason != ReasonNoRoute || f.Bytes > f.Packets*21 {
				t.Fatalf("torn: %+v", f)
			}
		}
		for _, p := range c.Drain() {
			if p.Verdict != VerdictDrop || p.Reason != ReasonNoRoute || len(p.Bytes) != 21 || p.Bytes[20] != 'x' {
				t.Fatalf("torn: %+v", p)
			}
			captured++
		}
	}
	if got := uint64(captured) + c.Lost(); got != turns*each {
		t.Errorf("captured %d, lost %d: expected %d together", captured, c.Lost(), turns*each)
	}
}
