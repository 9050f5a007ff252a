package vrouter

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func startCapture(t *testing.T, r *Router, o CaptureOptions) *Capture {
	t.Helper()
	c, err := r.StartCapture(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Stop)
	return c
}

func TestCaptureSaysWhatBecameOfEach(t *testing.T) {
	r := testRouter(t)
	batch := [][]byte{ip(ownPod, pod2, 17, []byte("goes")), ip(ownPod, pod3, 17, []byte("stays"))}
	out := &queue{}
	w := r.NewWorker(Encap, &queue{in: slices.Clone(batch)}, out)
	c := startCapture(t, r, CaptureOptions{})
	if err := w.turn(); err != nil {
		t.Fatal(err)
	}
	got := c.Drain()
	if len(got) != 2 {
		t.Fatalf("captured %+v", got)
	}
	for i, b := range batch {
		if !slices.Equal(got[i].Bytes, b) || got[i].Length != len(b) || got[i].Port != "queue" || got[i].Time.IsZero() {
			t.Errorf("packet %d: %+v: expected it as it came", i, got[i])
		}
	}
	if got[0].Verdict != VerdictForward || got[0].Gateway != node2 || got[0].Sent != 1 {
		t.Errorf("forwarded: %+v", got[0])
	}
	if got[1].Verdict != VerdictDrop || got[1].Reason != ReasonDirectRoute {
		t.Errorf("dropped: %+v", got[1])
	}

	// What the port cannot send is a drop, too; and a worker that comes later is captured as well.
	late := r.NewWorker(Encap, &queue{in: [][]byte{batch[0]}}, &queue{fail: ReasonSendTooBig})
	if err := late.turn(); err != nil {
		t.Fatal(err)
	}
	if got := c.Drain(); len(got) != 1 || got[0].Verdict != VerdictDrop || got[0].Reason != ReasonSendTooBig {
		t.Errorf("send failed: %+v", got)
	}
	c.Stop()
	if w.taps.Load() != nil || late.taps.Load() != nil {
		t.Error("a stopped capture is still attached")
	}
}

func TestCaptureFilterAsksTheInnerPacket(t *testing.T) {
	r := testRouter(t)
	outer := ip(node2, self, 4, ip(pod2, ownPod, 17, []byte("payload")))
	for _, tt := range []struct {
		o    CaptureOptions
		want int
	}{
		{CaptureOptions{Filter: "src host 10.244.2.5"}, 1},
		{CaptureOptions{Filter: "host 198.18.0.2"}, 0},
		{CaptureOptions{Filter: "host 198.18.0.2", Outer: true}, 1},
		{CaptureOptions{SnapLen: 20}, 1},
	} {
		c := startCapture(t, r, tt.o)
		if err := r.NewWorker(Decap, &queue{in: [][]byte{outer}}, &queue{}).turn(); err != nil {
			t.Fatal(err)
		}
		got := c.Drain()
		if len(got) != tt.want {
			t.Errorf("%+v: captured %d, expected %d", tt.o, len(got), tt.want)
			continue
		}
		if want := outer[:min(max(tt.o.SnapLen, 0)+len(outer)*b2i(tt.o.SnapLen == 0), len(outer))]; len(got) == 1 && !slices.Equal(got[0].Bytes, want) {
			t.Errorf("%+v: % x: expected % x", tt.o, got[0].Bytes, want)
		}
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestCaptureRefuses(t *testing.T) {
	r := testRouter(t)
	if _, err := r.StartCapture(CaptureOptions{Filter: "prot 80"}); err == nil || !strings.HasPrefix(err.Error(), "filter: ") {
		t.Errorf("bad filter: %v", err)
	}
	if _, err := r.StartCapture(CaptureOptions{SnapLen: -1}); err == nil {
		t.Error("a negative snap length was accepted")
	}
	for range maxCaptures {
		startCapture(t, r, CaptureOptions{})
	}
	if _, err := r.StartCapture(CaptureOptions{}); !errors.Is(err, ErrCaptures) {
		t.Errorf("one too many: %v", err)
	}
}

// TestCaptureNeverBlocks: with nobody reading, forwarding goes on, and what found no room is counted.
func TestCaptureNeverBlocks(t *testing.T) {
	r := testRouter(t)
	b := ip(ownPod, pod2, 17, make([]byte, 1400))
	w := r.NewWorker(Encap, &queue{}, &queue{})
	c := startCapture(t, r, CaptureOptions{})
	const n = 3 * captureRing / 1400
	for range n {
		w.in.(*queue).in = [][]byte{b}
		if err := w.turn(); err != nil {
			t.Fatal(err)
		}
	}
	if got := w.tallies.forwarded[pathEncap].packets.Load(); got != n {
		t.Errorf("forwarded %d of %d", got, n)
	}
	got := c.Drain()
	if lost := c.Lost(); lost == 0 || len(got) == 0 || uint64(len(got))+lost != n {
		t.Errorf("captured %d, lost %d of %d", len(got), lost, n)
	}
	for _, p := range got {
		if !slices.Equal(p.Bytes, b) {
			t.Fatalf("damaged: % x", p.Bytes[:40])
		}
	}
}

// TestCaptureDoesNotAllocate in the worker, also while it is on.
func TestCaptureDoesNotAllocate(t *testing.T) {
	r := testRouter(t)
	in := &queue{}
	w := r.NewWorker(Encap, in, &queue{})
	startCapture(t, r, CaptureOptions{Filter: "udp and net 10.244.0.0/16 and not port 9"})
	batch := slices.Repeat([][]byte{ip(ownPod, pod2, 17, make([]byte, 100))}, 16)
	if n := testing.AllocsPerRun(100, func() {
		in.in = batch
		if err := w.turn(); err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a turn", n)
	}
}
