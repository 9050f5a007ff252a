package vrouter

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

// pollQueue is a queue that can be polled.
type pollQueue struct{ queue }

func (q *pollQueue) Poll(batch []*Packet) int {
	n, _ := q.Recv(batch) // what is empty here is not at its end
	return n
}

// turns is a Waiter that gives each queue the same packets again for a number of turns.
type turns struct {
	queues []*pollQueue
	fill   [][][]byte // of each queue
	left   int
	found  []int // what it was told; not beyond its capacity
	end    error
}

func (w *turns) Wait(found int) error {
	if len(w.found) < cap(w.found) {
		w.found = append(w.found, found)
	}
	if w.left == 0 {
		return w.end
	}
	w.left--
	for i, q := range w.queues {
		q.in = w.fill[i]
	}
	return nil
}

// newTurns returns both directions of a router, for one thread.
func newTurns(t *testing.T) (*turns, []*Worker) {
	t.Helper()
	r := testRouter(t)
	device, underlay := &pollQueue{}, &pollQueue{}
	return &turns{queues: []*pollQueue{device, underlay}, end: ErrStopped, fill: [][][]byte{
		slices.Repeat([][]byte{ip(ownPod, pod2, 17, make([]byte, 100))}, 5),
		slices.Repeat([][]byte{ip(node2, self, 4, ip(pod2, ownPod, 17, nil))}, 3),
	}}, []*Worker{r.NewWorker(Encap, device, underlay), r.NewWorker(Decap, underlay, device)}
}

// TestRunTogether: workers that share a thread carry what comes to each of them, tell the waiter how much that was, and end
// when it says so.
func TestRunTogether(t *testing.T) {
	w, workers := newTurns(t)
	for _, q := range w.queues {
		q.out = [][]byte{}
	}
	w.left, w.found = 4, make([]int, 0, 5)
	if err := RunTogether(w, workers...); err != nil {
		t.Fatal(err)
	}
	if want := []int{0, 8, 8, 8, 8}; !slices.Equal(w.found, want) {
		t.Errorf("the waiter was told of %v packets, expected %v", w.found, want)
	}
	if device, underlay := len(w.queues[0].out), len(w.queues[1].out); device != 4*3 || underlay != 4*5 {
		t.Errorf("%d packets went to the device and %d to the underlay, expected 12 and 20", device, underlay)
	}

	broken := errors.New("broken")
	w.left, w.end = 0, broken
	if err := RunTogether(w, workers...); !errors.Is(err, broken) {
		t.Errorf("the waiter's error became %v", err)
	}
	alone := testRouter(t).NewWorker(Encap, &queue{}, &queue{})
	if err := RunTogether(w, workers[0], alone); err == nil || !strings.Contains(err.Error(), "polled") {
		t.Errorf("a port that cannot be polled: %v", err)
	}
}

// TestRunTogetherDoesNotAllocate: the beginning costs some memory, the turns cost none.
func TestRunTogetherDoesNotAllocate(t *testing.T) {
	w, workers := newTurns(t)
	of := func(count int) float64 {
		return testing.AllocsPerRun(10, func() {
			w.left = count
			if err := RunTogether(w, workers...); err != nil {
				t.Error(err)
			}
		})
	}
	if few, many := of(1), of(1000); many > few {
		t.Errorf("%v allocations in a thousand turns, %v in one", many, few)
	}
}
