//go:build amd64 && !race

package vrouter

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

// budgetPackets is how many packets the pieces carry at once: few, because single steps take their time.
const budgetPackets = 8

// endless is a port that has the same packets at every turn.
type endless struct {
	queue
	all [][]byte
}

func (e *endless) Recv(batch []*Packet) (int, error) {
	e.in = e.all
	return e.queue.Recv(batch)
}

// endlessWorker returns a worker that has small packets at every turn. change, if any, is made in their headers.
func endlessWorker(d Direction, change ...func([]byte)) *Worker {
	r := New()
	if err := r.Update(testUpdate()); err != nil {
		panic(err)
	}
	b := ip(ownPod, pod2, 17, make([]byte, 26), change...)
	if d == Decap {
		b = ip(node2, self, 4, ip(pod2, ownPod, 17, make([]byte, 26), change...), change...)
	}
	return r.NewWorker(d, &endless{all: slices.Repeat([][]byte{b}, budgetPackets)}, &queue{})
}

// turnsOf returns one turn of w.
func turnsOf(w *Worker) func() {
	return func() {
		if err := w.turn(); err != nil {
			panic(err)
		}
	}
}

// turnWithoutCapture is Worker.turn as if nobody could capture.
func turnWithoutCapture(w *Worker) error {
	w.reset()
	n, err := w.in.Recv(w.packets)
	if err != nil {
		return err
	}
	w.forward(n)
	return nil
}

// stepped are the pieces whose instructions are counted. Each makes itself ready and returns what is to be counted.
var stepped = map[string]func() func(){
	"encap":     func() func() { return turnsOf(endlessWorker(Encap)) },
	"encap, DF": func() func() { return turnsOf(endlessWorker(Encap, dontFragment)) },
	"decap":     func() func() { return turnsOf(endlessWorker(Decap)) },
	"encap, no capture built in": func() func() {
		w := endlessWorker(Encap)
		return func() {
			if err := turnWithoutCapture(w); err != nil {
				panic(err)
			}
		}
	},
	"encap, a capture stopped": func() func() {
		w := endlessWorker(Encap)
		c, err := w.router.StartCapture(CaptureOptions{})
		if err != nil {
			panic(err)
		}
		turnsOf(w)()
		c.Stop()
		return turnsOf(w)
	},
}

// TestCaptureOffCostsNothing: a worker that nobody captures at looks once per batch whether somebody does, and that is all.
func TestCaptureOffCostsNothing(t *testing.T) {
	const look = 24 // instructions for a batch, whatever its size: a load, two comparisons, a call
	without, _ := steps(t, "encap, no capture built in")
	never, _ := steps(t, "encap")
	stopped, _ := steps(t, "encap, a capture stopped")
	t.Logf("a batch of %d packets: %d instructions without capture built in, %d with it, %d after a capture", budgetPackets, without, never, stopped)
	if never > without+look {
		t.Errorf("a batch takes %d instructions, without capture built in %d: expected at most %d more", never, without, look)
	}
	if stopped != never {
		t.Errorf("a batch takes %d instructions, and %d after a capture has been stopped: expected as many", never, stopped)
	}
}

// TestLoopBudget holds the loop to what it takes for a small packet, in instructions; ports are not counted. One that takes
// more is not wrong, but whoever makes it do so should know: raise the budget if it is worth it.
func TestLoopBudget(t *testing.T) {
	for piece, budget := range map[string]int{"encap": 545, "encap, DF": 570, "decap": 740} {
		_, by := steps(t, piece)
		maps.DeleteFunc(by, func(name string, _ int) bool { return !ofLoop(name) })
		n := 0
		for _, k := range by {
			n += k
		}
		t.Logf("%s: %d instructions a packet", piece, n/budgetPackets)
		if n > budget*budgetPackets {
			t.Errorf("%s: %d instructions a packet: expected at most %d. They are in\n%s", piece, n/budgetPackets, budget, byFunction(by))
		}
	}
}

// ofLoop reports whether a function is part of the loop, and not of a port or of what counts.
func ofLoop(name string) bool {
	for _, other := range []string{"(*queue)", "(*endless)", "vrouter.stop", "vrouter.init", "vrouter.turnsOf", "vrouter.stepThrough"} {
		if strings.Contains(name, other) {
			return false
		}
	}
	return strings.HasPrefix(name, "margay/") || strings.HasPrefix(name, "encoding/binary.") || strings.HasPrefix(name, "sync/atomic.")
}

func byFunction(by map[string]int) string {
	var b strings.Builder
	for _, name := range slices.SortedFunc(maps.Keys(by), func(a, b string) int { return cmp.Compare(by[b], by[a]) }) {
		fmt.Fprintf(&b, "%6.1f %s\n", float64(by[name])/budgetPackets, name)
	}
	return b.String()
}
