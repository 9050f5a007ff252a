package oracle

import (
	"bytes"
	"net/netip"
	"testing"

	"pgregory.net/rapid"

	"margay/test/node"
	"margay/vrouter"
)

// memoryBox is the vRouter as the router of the attachment `direct`, without a kernel: its interfaces are in memory, one
// for each pod. What it leaves to the kernel behind it is kept apart. It implements vrouter.SwitchPort.
type memoryBox struct {
	worker *vrouter.Worker
	pods   *vrouter.Pods
	next   []byte // what Recv will hand over; nil: nothing
	from   vrouter.Interface

	result
	kernel [][]byte
	router *vrouter.Router
	sent   uint64
}

func newMemoryBox(t testing.TB, options vrouter.Options) *memoryBox {
	t.Helper()
	m := &memoryBox{router: vrouter.New()}
	addresses := make([]netip.Addr, 1<<16)
	for i := range addresses {
		addresses[i] = netip.AddrFrom4([4]byte{10, 245, byte(i >> 8), byte(i)})
	}
	m.pods = vrouter.NewPods(addresses, nil)
	if err := m.router.SetOptions(options); err != nil {
		t.Fatal(err)
	}
	if err := m.router.Update(update()); err != nil {
		t.Fatal(err)
	}
	m.worker = m.router.NewSwitch(m)
	return m
}

func (m *memoryBox) Pods() *vrouter.Pods         { return m.pods }
func (m *memoryBox) Name() string                { return "memory" }
func (m *memoryBox) Counters() []vrouter.Counter { return nil }
func (m *memoryBox) Stop()                       {}
func (m *memoryBox) Close() error                { return nil }

func (m *memoryBox) Recv(batch []*vrouter.Packet) (int, error) {
	if m.next == nil {
		return 0, vrouter.ErrStopped
	}
	p := batch[0]
	p.Len, p.In = copy(p.Buf[p.Off:], m.next), m.from
	m.next = nil
	return 1, nil
}

func (m *memoryBox) Send(batch []*vrouter.Packet) {
	for _, p := range batch {
		b := bytes.Clone(p.Bytes())
		switch p.Out {
		case vrouter.HostInterface:
			m.kernel = append(m.kernel, b)
		case vrouter.UnderlayInterface:
			m.out = append(m.out, b)
		default:
			m.back = append(m.back, b)
		}
		p.Sent = 1
	}
}

// route sends a packet from the interface of the pod that is its source; from another one, if none is.
func (m *memoryBox) route(t testing.TB, d direction, b []byte) result {
	t.Helper()
	m.result, m.kernel = result{}, nil
	m.next, m.from = b, vrouter.FirstPodInterface
	if d == inward {
		m.next, m.from = tunnel(b), vrouter.UnderlayInterface
	} else if len(b) >= 16 && b[12] == 10 && b[13] == 245 {
		m.from += vrouter.Interface(int(b[14])<<8 | int(b[15]))
	}
	if err := m.worker.Run(); err != nil {
		t.Fatal(err)
	}
	m.sent++
	for i, b := range m.out {
		inner, ok := untunnel(t, b)
		if !ok {
			t.Fatalf("to the other node without a tunnel: % x", head(b))
		}
		m.out[i] = inner
	}
	return m.result
}

// mayBeKernels says what the vRouter of `direct` may leave to the kernel behind it: docs/router.md.
func mayBeKernels(in input) bool {
	b := in.bytes[:int(in.bytes[2])<<8|int(in.bytes[3])] // without padding
	dst := netip.AddrFrom4([4]byte(b[16:]))
	remote := netip.MustParsePrefix(remotePrefix).Contains(dst)
	pod := netip.MustParsePrefix(podsPrefix).Contains(dst)
	switch {
	case in.direction == outward && !remote && !pod, in.direction == inward && b[8] <= 1:
		return true
	case b[0] != 0x45, b[6]&0x3f != 0 || b[7] != 0:
		return true
	}
	return b[9] == 1 && (len(b) == 20 || isErrorType(b[20]))
}

// TestMemory compares what the vRouter of `direct` does by itself with what a kernel does, in the order of ten thousand
// packets, and looks that it leaves to the kernel what is the kernel's, untouched.
func TestMemory(t *testing.T) {
	oracle, memory := newKernelBox(t, wideWorld.mtu), newMemoryBox(t, nodeOptions())
	var itself, kernels int
	check := func(in input) string {
		got := memory.route(t, in.direction, in.bytes)
		want := oracle.route(t, in.direction, in.bytes)
		if len(memory.kernel) == 0 {
			itself++
			return difference(want, got)
		}
		kernels++
		total := int(in.bytes[2])<<8 | int(in.bytes[3])
		if len(memory.kernel) != 1 || len(got.out)+len(got.back) != 0 || !bytes.Equal(memory.kernel[0], in.bytes[:total]) {
			return "what goes to the kernel is not what came"
		}
		if !mayBeKernels(in) {
			return "the vRouter should have routed this itself"
		}
		return ""
	}
	for _, c := range table() {
		if d := check(c.input); d != "" {
			t.Errorf("%s: % x\n%s", c.name, head(c.bytes), d)
		}
	}
	if t.Failed() {
		return
	}
	rapid.Check(t, func(r *rapid.T) {
		for i := range batch {
			in := wideWorld.draw(r)
			if d := check(in); d != "" {
				r.Fatalf("packet %d: % x\n%s", i, head(in.bytes), d)
			}
		}
	})
	t.Logf("%d packets by itself, %d left to the kernel", itself, kernels)
	if itself < 5000 {
		t.Error("too few of them")
	}
	var accounted uint64
	for _, c := range memory.router.Counters() {
		if node.IsOutcome(c.Name) {
			accounted += c.Packets
		}
		switch c.Name {
		case "split":
			accounted += c.Packets
		case "pieces":
			accounted -= c.Packets
		}
	}
	if accounted != memory.sent {
		t.Errorf("%d packets, %d of them are accounted for", memory.sent, accounted)
	}
}
