package oracle

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"margay/test/node"
	"margay/vrouter"
	"margay/vrouter/port"
)

// batch is how many packets one run of a property sends; rapid runs it a hundred times.
const batch = 110

func nodeOptions() vrouter.Options {
	// Without these two the vRouter does what no kernel does, see docs/router.md.
	return vrouter.Options{NestedTunnels: true, ICMPRate: 1_000_000}
}

// TestTable gives both routers the packets that somebody has thought of.
func TestTable(t *testing.T) {
	node.OnEach(t, node.Drivers, func(t *testing.T, driver port.Options) {
		oracle, box := newKernelBox(t, wideWorld.mtu), newNodeBox(t, driver, nodeOptions())
		for _, c := range table() {
			if d := difference(oracle.route(t, c.direction, c.bytes), box.route(t, c.direction, c.bytes)); d != "" {
				t.Errorf("%s: % x\n%s", c.name, head(c.bytes), d)
			}
		}
		box.balance(t)
	})
}

// TestRandom gives both routers more than ten thousand packets that nobody has thought of.
func TestRandom(t *testing.T) { node.OnEach(t, node.Drivers, randomly) }

// TestRandomQueued is TestRandom with two queues.
func TestRandomQueued(t *testing.T) { node.OnEach(t, node.Queued(2), randomly) }

func randomly(t *testing.T, driver port.Options) {
	oracle, box := newKernelBox(t, wideWorld.mtu), newNodeBox(t, driver, nodeOptions())
	random(t, wideWorld, oracle, func(in input) result { return box.route(t, in.direction, in.bytes) })
	box.balance(t)
}

// random gives the oracle and another router more than ten thousand packets that nobody has thought of.
func random(t *testing.T, w world, oracle *kernelBox, route func(input) result) {
	t.Helper()
	sent, routed, answered := 0, 0, 0
	rapid.Check(t, func(r *rapid.T) {
		for i := range batch {
			in := w.draw(r)
			want := oracle.route(t, in.direction, in.bytes)
			if d := difference(want, route(in)); d != "" {
				r.Fatalf("packet %d: % x\n%s", i, head(in.bytes), d)
			}
			sent++
			routed += len(want.out)
			answered += len(want.back)
		}
	})
	t.Logf("%d packets, of which came %d toward the other node and %d toward pods", sent, routed, answered)
	if sent < 10_000 || routed < sent/5 || answered < sent/10 {
		t.Errorf("%d packets, %d and %d came of them: expected more", sent, routed, answered)
	}
}

// difference compares what two routers have done, but for what docs/router.md allows; "" says that there is none.
func difference(kernel, vrouter result) string {
	var b strings.Builder
	compare(&b, "toward the other node", kernel.out, vrouter.out)
	compare(&b, "toward the pods", kernel.back, vrouter.back)
	return b.String()
}

func compare(w *strings.Builder, where string, kernel, vrouter [][]byte) {
	for i := range max(len(kernel), len(vrouter)) {
		switch {
		case i >= len(vrouter):
			fmt.Fprintf(w, "%s the vRouter has not sent % x\n", where, head(kernel[i]))
		case i >= len(kernel):
			fmt.Fprintf(w, "%s the kernel has not sent % x\n", where, head(vrouter[i]))
		case !bytes.Equal(normal(kernel[i]), normal(vrouter[i])):
			fmt.Fprintf(w, "%s\n  kernel  % x\n  vRouter % x\n", where, head(kernel[i]), head(vrouter[i]))
		}
	}
}

// normal takes out of a packet what two routers may do differently.
func normal(b []byte) []byte {
	if !isError(b) {
		return b
	}
	b = bytes.Clone(b)
	hl := int(b[0]&15) * 4
	// The identification of what a router originates is its own (RFC 6864, 4.1).
	b[4], b[5] = 0, 0
	// The kernel copies all that RFC 1349 called the type of service, and with it a bit of what is ECN now; an ICMP error
	// is no ECN-capable transport (RFC 3168, 5).
	b[1] &^= 2
	mend(b)
	if icmp := b[hl:]; icmp[0] == 3 && icmp[1] <= 1 && len(icmp) >= 28 {
		// The node's kernel is a hop before the vRouter, which says that there is no way (RFC 1812, 5.3.1).
		icmp[16], icmp[18], icmp[19] = 0, 0, 0
		icmp[2], icmp[3] = 0, 0
	}
	return b
}

// isError reports whether a packet is an ICMP error.
func isError(b []byte) bool {
	if len(b) < 28 || b[9] != 1 || len(b) < int(b[0]&15)*4+8 {
		return false
	}
	return isErrorType(b[int(b[0]&15)*4])
}

func isErrorType(icmp byte) bool {
	switch icmp {
	case 3, 4, 5, 11, 12:
		return true
	}
	return false
}

func head(b []byte) []byte { return b[:min(len(b), 100)] }
