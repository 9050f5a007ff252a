package port

import (
	"slices"
	"sync"

	"margay/vrouter"
)

// Mem is a port in memory, for tests and benchmarks: what Inject puts in comes out of Recv, and what Send is given is
// kept for Take. It implements vrouter.Port.
type Mem struct {
	name string
	in   chan memPacket
	stop chan struct{}
	once sync.Once

	mu  sync.Mutex
	out [][]byte
}

type memPacket struct {
	bytes   []byte
	offload vrouter.Offload
}

// NewMem returns a port that holds up to capacity packets that have not been received yet.
func NewMem(name string, capacity int) *Mem {
	return &Mem{name: name, in: make(chan memPacket, capacity), stop: make(chan struct{})}
}

// Inject hands a packet, which begins with its IP header, to the next Recv. It copies the bytes, and blocks while the
// port is full.
func (m *Mem) Inject(b []byte, o vrouter.Offload) { m.in <- memPacket{slices.Clone(b), o} }

// Take returns what was sent since the last call, in order.
func (m *Mem) Take() [][]byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := m.out
	m.out = nil
	return out
}

// Name implements vrouter.Port.
func (m *Mem) Name() string { return m.name }

// Recv implements vrouter.Port.
func (m *Mem) Recv(batch []*vrouter.Packet) (int, error) {
	select {
	case first := <-m.in:
		m.fill(batch[0], first)
	case <-m.stop:
		return 0, vrouter.ErrStopped
	}
	for n := 1; n < len(batch); n++ {
		select {
		case next := <-m.in:
			m.fill(batch[n], next)
		default:
			return n, nil
		}
	}
	return len(batch), nil
}

func (m *Mem) fill(p *vrouter.Packet, from memPacket) {
	p.Off, p.Offload = vrouter.Headroom, from.offload
	p.Len = copy(p.Buf[vrouter.Headroom:], from.bytes)
}

// Send implements vrouter.Port.
func (m *Mem) Send(batch []*vrouter.Packet) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range batch {
		m.out = append(m.out, slices.Clone(p.Bytes()))
		p.Sent = 1
	}
}

// Counters implements vrouter.Port: memory loses nothing.
func (m *Mem) Counters() []vrouter.Counter { return nil }

// Stop implements vrouter.Port.
func (m *Mem) Stop() { m.once.Do(func() { close(m.stop) }) }

// Close implements vrouter.Port.
func (m *Mem) Close() error { return nil }
