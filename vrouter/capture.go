package vrouter

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"margay/vrouter/filter"
	"margay/vrouter/packet"
)

const (
	// captureRing is the memory between a worker and the reader of a capture, in bytes.
	captureRing = 4 << 20
	// capturePoll is how often a reader that has nothing looks again: a worker wakes nobody.
	capturePoll = 10 * time.Millisecond
	// maxCaptures is how many captures run at once.
	maxCaptures = 8
)

// CaptureOptions say what to capture.
type CaptureOptions struct {
	// Filter is a text of package filter; empty for everything. Of an IP-in-IP packet it is asked about the inner one.
	Filter string
	// Outer has the filter asked about the packet as it is on the wire instead.
	Outer bool
	// SnapLen is how much of a packet is kept, in bytes; 0 for all.
	SnapLen int
}

// Captured is a packet as a worker received it, and what became of it.
type Captured struct {
	Time         time.Time
	Port         string // where it was received
	Direction    Direction
	Verdict      Verdict
	Reason       Reason     // for VerdictDrop
	Gateway      netip.Addr // the node that a packet was encapsulated for
	Sent         int        // packets that were sent for this one: the segments of a superpacket
	Length       int        // in bytes, of the packet
	Bytes        []byte     // its first bytes, by SnapLen
	Segmentation Segmentation
	SegmentSize  int  // payload of a superpacket's segments, in bytes
	PartialSum   bool // the checksum of TCP or UDP was not complete yet
}

// Capture is one capture that runs. One goroutine at a time reads from it.
type Capture struct {
	router *Router
	filter *filter.Filter
	outer  bool
	snap   int
	taps   []*tap // guarded by router.mu
}

// ErrCaptures is returned, wrapped, when too many captures run.
var ErrCaptures = errors.New("too many captures are running")

// StartCapture begins a capture. It costs memory and time until Stop; forwarding never waits for its reader: what finds no
// room is lost, and counted.
func (r *Router) StartCapture(o CaptureOptions) (*Capture, error) {
	f, err := filter.Parse(o.Filter)
	if err != nil {
		return nil, err
	}
	if o.SnapLen < 0 || o.SnapLen > MaxPacket {
		return nil, fmt.Errorf("snap length %d: expected 0 to %d", o.SnapLen, MaxPacket)
	}
	if o.SnapLen == 0 {
		o.SnapLen = MaxPacket
	}
	c := &Capture{router: r, filter: f, outer: o.Outer, snap: o.SnapLen}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.captures) == maxCaptures {
		return nil, fmt.Errorf("%w: %d: stop one", ErrCaptures, maxCaptures)
	}
	r.captures = append(r.captures, c)
	for _, w := range r.workers {
		c.attach(w)
	}
	r.tellCaptures()
	return c, nil
}

// attach puts a tap at w. router.mu is held.
func (c *Capture) attach(w *Worker) {
	t := &tap{capture: c, worker: w, ring: make([]byte, captureRing)}
	c.taps = append(c.taps, t)
	var list taps
	if old := w.taps.Load(); old != nil {
		list = slices.Clone(*old)
	}
	list = append(list, t)
	w.taps.Store(&list)
}

// Stop ends the capture. What was captured until then can still be read.
func (c *Capture) Stop() {
	r := c.router
	r.mu.Lock()
	defer r.mu.Unlock()
	r.captures = slices.DeleteFunc(slices.Clone(r.captures), func(o *Capture) bool { return o == c })
	r.tellCaptures()
	for _, t := range c.taps {
		old := t.worker.taps.Load()
		if old == nil {
			continue
		}
		list := slices.DeleteFunc(slices.Clone(*old), func(o *tap) bool { return o == t })
		if len(list) == 0 {
			t.worker.taps.Store(nil)
		} else {
			t.worker.taps.Store(&list)
		}
	}
}

// Read returns what has been captured since the last call, in the order of time, and waits until there is something; the
// error is ctx's. The packets are the caller's.
func (c *Capture) Read(ctx context.Context) ([]Captured, error) {
	for {
		if got := c.Drain(); len(got) > 0 {
			return got, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(capturePoll):
		}
	}
}

// Drain is Read without waiting.
func (c *Capture) Drain() []Captured {
	var out []Captured
	for _, t := range c.allTaps() {
		out = t.drain(out)
	}
	slices.SortStableFunc(out, func(a, b Captured) int { return a.Time.Compare(b.Time) })
	return out
}

// Lost returns how many packets found no room so far.
func (c *Capture) Lost() (n uint64) {
	for _, t := range c.allTaps() {
		n += t.lost.Load()
	}
	return n
}

func (c *Capture) allTaps() []*tap {
	c.router.mu.Lock()
	defer c.router.mu.Unlock()
	return slices.Clone(c.taps)
}

// taps are the captures that a worker feeds; a worker looks for them once per batch.
type taps []*tap

// before notes the packets as they came.
func (l taps) before(batch []*Packet) {
	now := time.Now().UnixNano()
	for _, t := range l {
		t.before(batch, now)
	}
}

// after notes what became of them, and hands them to the readers.
func (l taps) after(batch []*Packet) {
	for _, t := range l {
		t.after(batch)
	}
}

// tap is one capture at one worker: a ring of records that the worker writes and the reader reads, without a lock.
type tap struct {
	capture *Capture
	worker  *Worker
	ring    []byte
	lost    atomic.Uint64
	read    atomic.Uint64 // bytes read, of all that were ever written
	written atomic.Uint64 // bytes written and complete

	// The worker's own.
	next    uint64            // bytes written, the batch under way included
	pending [batchSize]uint64 // where each packet's record begins, plus one; 0: none
}

// A record: its length with padding and header (4), bytes kept (4), time (8), packet's length (4), sent (4), gateway (4),
// segment size (2), drop reason, segmentation, flags, padding to 40. The bytes follow. A length of 0 leads back to the
// ring's beginning.
const (
	recordHeader  = 40
	recordDropped = 1 << 0
	recordPartial = 1 << 1
	recordGateway = 1 << 2
)

func (t *tap) before(batch []*Packet, now int64) {
	for i, p := range batch {
		t.pending[i] = 0
		b := p.Bytes()
		if !t.wants(b) {
			continue
		}
		kept := min(len(b), t.capture.snap)
		at, ok := t.reserve((recordHeader + kept + 7) &^ 7)
		if !ok {
			t.lost.Add(1)
			continue
		}
		r := t.ring[at:]
		binary.LittleEndian.PutUint32(r[4:], uint32(kept))
		binary.LittleEndian.PutUint64(r[8:], uint64(now))
		binary.LittleEndian.PutUint32(r[16:], uint32(len(b)))
		binary.LittleEndian.PutUint16(r[28:], p.Offload.Size)
		r[31] = byte(p.Offload.Segmentation)
		r[32] = 0
		if p.Offload.NeedsChecksum {
			r[32] = recordPartial
		}
		copy(r[recordHeader:], b[:kept])
		t.pending[i] = uint64(at) + 1
	}
}

// wants asks the filter, about the inner packet unless told otherwise.
func (t *tap) wants(b []byte) bool {
	if !t.capture.outer && len(b) >= 20 && b[0]>>4 == 4 && b[9] == packet.ProtocolIPIP {
		b = b[min(max(int(b[0]&0x0f)<<2, 20), len(b)):]
	}
	return t.capture.filter.Match(b, len(b))
}

// reserve makes room for a record of n bytes, writes its length and returns where it begins.
func (t *tap) reserve(n int) (int, bool) {
	at := int(t.next % captureRing)
	skip := 0
	if at+n > captureRing {
		skip = captureRing - at
	}
	if t.next+uint64(skip+n)-t.read.Load() > captureRing {
		return 0, false
	}
	if skip > 0 {
		binary.LittleEndian.PutUint32(t.ring[at:], 0)
		at = 0
	}
	binary.LittleEndian.PutUint32(t.ring[at:], uint32(n))
	t.next += uint64(skip + n)
	return at, true
}

func (t *tap) after(batch []*Packet) {
	for i, p := range batch {
		if t.pending[i] == 0 {
			continue
		}
		r := t.ring[t.pending[i]-1:]
		r[30] = byte(p.Drop)
		binary.LittleEndian.PutUint32(r[20:], uint32(p.Sent))
		switch b := p.Bytes(); {
		case p.Drop != ReasonNotSet || p.Sent == 0:
			r[32] |= recordDropped
		case p.Off < Headroom && len(b) >= 20 && b[9] == packet.ProtocolIPIP: // it has got an outer header
			r[32] |= recordGateway
			copy(r[24:28], b[16:20])
		}
	}
	t.written.Store(t.next)
}

// drain appends what the worker has completed.
func (t *tap) drain(out []Captured) []Captured {
	at, end := t.read.Load(), t.written.Load()
	for at < end {
		r := t.ring[at%captureRing:]
		n := binary.LittleEndian.Uint32(r)
		if n == 0 {
			at += uint64(len(r))
			continue
		}
		c := Captured{
			Time:         time.Unix(0, int64(binary.LittleEndian.Uint64(r[8:]))),
			Port:         t.worker.in.Name(),
			Direction:    t.worker.direction,
			Verdict:      VerdictForward,
			Sent:         int(binary.LittleEndian.Uint32(r[20:])),
			Length:       int(binary.LittleEndian.Uint32(r[16:])),
			Bytes:        slices.Clone(r[recordHeader : recordHeader+binary.LittleEndian.Uint32(r[4:])]),
			Segmentation: Segmentation(r[31]),
			SegmentSize:  int(binary.LittleEndian.Uint16(r[28:])),
			PartialSum:   r[32]&recordPartial != 0,
		}
		if r[32]&recordDropped != 0 {
			c.Verdict, c.Reason = VerdictDrop, Reason(r[30])
		}
		if r[32]&recordGateway != 0 {
			c.Gateway = netip.AddrFrom4([4]byte(r[24:28]))
		}
		out = append(out, c)
		at += uint64(n)
	}
	t.read.Store(at)
	return out
}
