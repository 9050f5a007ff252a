package suite

import (
	"context"
	"fmt"
	"strings"
	"time"

	"margay/bench/rig"
	"margay/bench/traffic"
)

// Metric is one figure of a scenario.
type Metric struct {
	Name  string `json:"name"`
	Unit  string `json:"unit"`
	Lower bool   `json:"lower_is_better"`
}

// Scenario is one kind of load. Measure is called once for each path and round; it is nil where there is no network: what is
// measured then are variants.
type Scenario struct {
	Name    string
	Title   string
	Shape   rig.Shape
	Metrics []Metric // the first is the main one
	Peer    string   // the path that others are compared with, where that is not the kernel's VXLAN
	Fits    func(p rig.Path) bool
	Measure func(ctx context.Context, e *Env, b *rig.Bed) (Values, error)
	// Cost is how long one measurement should take on a quiet machine; the estimate of the time left begins with it.
	Cost     func(Times) time.Duration
	variants int // how many, about
}

// Values are the figures of one measurement by the metric's name.
type Values map[string]float64

// Env is what a measurement may use of what was measured before.
type Env struct {
	Times Times
	// Own is what generator and sink cost by themselves in this round, in ns for each packet; by profile.
	Own map[traffic.Profile]float64
	// OwnPaced is the same when the generator keeps a rate instead of sending as fast as it can.
	OwnPaced map[traffic.Profile]float64
	// Alone is what generator and sink do with nothing in between; by profile.
	Alone map[traffic.Profile]Alone
	// Measured is how many measurements had their CPU time looked at, Disturbed in how many of them others were busy.
	Measured, Disturbed int
	// Note keeps a remark for the report.
	Note func(format string, args ...any)
}

// Times are how long things take.
type Times struct {
	Warm, Window time.Duration
	Step         time.Duration // one step of the search for the rate without loss
	Steps        int
}

// discarded are the times of the round that does not count: it warms caches, neighbours and connection tracking, for which half is
// enough.
func (t Times) discarded() Times {
	return Times{Warm: t.Warm / 2, Window: t.Window / 2, Step: t.Step / 2, Steps: (t.Steps + 1) / 2}
}

// What comes to the times of a measurement, about: starting its processes, and waiting for the last packets.
const (
	startTraffic = 100 * time.Millisecond
	drain        = 50 * time.Millisecond
)

// flows is the number of UDP flows: enough that RPS finds work for every processor.
const flows = 32

// The metrics that several scenarios share.
var (
	bitrate = Metric{Name: "rate", Unit: "Gbit/s"}
	perByte = Metric{Name: "cpu", Unit: "ns/KB", Lower: true}
	rate    = Metric{Name: "rate", Unit: "kpps"}
	perPkt  = Metric{Name: "cpu", Unit: "ns/packet", Lower: true}
	p50     = Metric{Name: "p50", Unit: "µs", Lower: true}
	p99     = Metric{Name: "p99", Unit: "µs", Lower: true}
	loss    = Metric{Name: "loss", Unit: "%", Lower: true}
)

// Scenarios returns all of them, in the order of the report.
func Scenarios() []Scenario {
	var all []Scenario
	for _, n := range []int{1, 4} {
		all = append(all, tcp(fmt.Sprintf("tcp%d", n), fmt.Sprintf("TCP bulk, two nodes, %s", flowsText(n)), n, rig.Pair, true))
	}
	for _, n := range []int{1, 4} {
		all = append(all, tcp(fmt.Sprintf("tcp%d-off", n),
			fmt.Sprintf("TCP bulk, two nodes, %s, TSO and GSO off and GRO on at the underlay", flowsText(n)), n, rig.Pair, false))
	}
	for _, n := range []int{1, 4} {
		all = append(all, tcp(fmt.Sprintf("tcp%d-local", n), fmt.Sprintf("TCP bulk, two pods of one node, %s", flowsText(n)), n, rig.Local, true))
	}
	all = append(all,
		roundTrips(),
		udp("udp", "small UDP, one node, as fast as it goes", rig.Edge, traffic.Small),
		udp("udp-xdp", "small UDP, one node, made by XDP, as fast as it goes", rig.Edge, traffic.SmallXDP),
		lossless("udp-lossless", "small UDP, one node, at most 0.5 % lost", rig.Edge, traffic.Small),
		udp("udp2", "small UDP, two nodes, as fast as it goes", rig.Pair, traffic.Small),
		udp("imix", "IMIX, one node, as fast as it goes", rig.Edge, traffic.IMIX),
	)
	return append(all, memory()...)
}

// ProfileOf returns the packet sizes of a UDP scenario.
func ProfileOf(scenario string) traffic.Profile {
	switch {
	case strings.HasPrefix(scenario, "imix"):
		return traffic.IMIX
	case scenario == "udp-xdp":
		return traffic.SmallXDP
	}
	return traffic.Small
}

func notWire(p rig.Path) bool { return p.Kind != rig.KindWire }

// local tells which paths have a way of their own between two pods of one node: where the kernel routes, it is one for all.
func local(p rig.Path) bool {
	return p.Kind == rig.KindRoute || p.Kind == rig.KindVRouter && p.Attach == "direct"
}

func flowsText(n int) string {
	if n == 1 {
		return "1 flow"
	}
	return fmt.Sprintf("%d flows", n)
}

func tcp(name, title string, n int, shape rig.Shape, segmentation bool) Scenario {
	fits := notWire
	if shape == rig.Local {
		fits = local
	}
	return Scenario{
		Name: name, Title: title, Shape: shape, Metrics: []Metric{bitrate, perByte}, Fits: fits,
		Cost: func(t Times) time.Duration { return startTraffic + t.Warm + t.Window },
		Measure: func(ctx context.Context, e *Env, b *rig.Bed) (Values, error) {
			if err := b.Underlay(segmentation); err != nil {
				return nil, err
			}
			r, err := b.TCP(ctx, n, e.Times.Warm, e.Times.Window)
			for try := 0; err == nil && try < retries && busy(r.CPU); try++ {
				r, err = b.TCP(ctx, n, e.Times.Warm, e.Times.Window)
			}
			if err != nil {
				return nil, err
			}
			values := Values{"rate": r.BitRate / 1e9}
			if e.sober(r.CPU) {
				values["cpu"] = float64((r.CPU.Machine - r.CPU.Foreign).Nanoseconds()) / float64(r.Bytes) * 1e3
			}
			return values, nil
		},
	}
}

func roundTrips() Scenario {
	return Scenario{
		Name: "rr", Title: "request and response of 64 bytes, two nodes", Shape: rig.Pair, Metrics: []Metric{p50, p99}, Fits: notWire,
		Cost: func(t Times) time.Duration { return t.Window },
		Measure: func(ctx context.Context, e *Env, b *rig.Bed) (Values, error) {
			if err := b.Underlay(true); err != nil {
				return nil, err
			}
			r, err := b.RoundTrips(ctx, e.Times.Window)
			if err != nil {
				return nil, err
			}
			if r.Lost > 0 {
				e.Note("%s: %d of %d requests were lost", b.Path.Name, r.Lost, r.N)
			}
			return Values{"p50": float64(r.P50) / 1e3, "p99": float64(r.P99) / 1e3}, nil
		},
	}
}

func udp(name, title string, shape rig.Shape, profile traffic.Profile) Scenario {
	return Scenario{
		Name: name, Title: title, Shape: shape, Metrics: []Metric{rate, perPkt, loss}, Fits: fitsUDP(shape),
		Cost: func(t Times) time.Duration { return startTraffic + t.Warm + t.Window + drain },
		Measure: func(ctx context.Context, e *Env, b *rig.Bed) (Values, error) {
			r, err := blast(ctx, e, b, rig.Load{Profile: profile, Flows: flows, Warm: e.Times.Warm, Window: e.Times.Window})
			if err != nil {
				return nil, err
			}
			e.wire(b, r, profile)
			return e.values(b, r, e.Own, profile), nil
		},
	}
}

// fitsUDP: with one node WireGuard has nobody to talk to.
func fitsUDP(shape rig.Shape) func(rig.Path) bool {
	return func(p rig.Path) bool { return shape == rig.Pair || p.Kind != rig.KindWireGuard }
}

// values turns a blast into the figures of a UDP scenario.
func (e *Env) values(b *rig.Bed, r rig.Blast, owns map[traffic.Profile]float64, profile traffic.Profile) Values {
	v := Values{"rate": r.Received / 1e3, "loss": 100 * r.Loss}
	if own, ok := owns[profile]; ok && b.Path.Kind != rig.KindWire && e.sober(r.CPU) && r.Loss <= tellableLoss {
		v["cpu"] = r.CPU.PerPacket(own)
	}
	return v
}

// tellableLoss is up to which loss a figure of CPU time is told: what is lost early costs the sink nothing, and yet the sink's
// cost is taken off for every packet sent.
const tellableLoss = 0.3

// wire keeps what generator and sink alone have cost and reached.
func (e *Env) wire(b *rig.Bed, r rig.Blast, profile traffic.Profile) {
	if b.Path.Kind != rig.KindWire {
		return
	}
	if r.Received > e.Alone[profile].Rate {
		e.Alone[profile] = Alone{Rate: r.Received, Generator: float64(r.CPU.Source) / float64(r.CPU.Wall),
			Sink: float64(r.CPU.Sink) / float64(r.CPU.Wall), Plain: r.Plain}
	}
	e.keep(e.Own, r, profile)
}

// keep notes in owns what a packet has cost over the wire.
func (e *Env) keep(owns map[traffic.Profile]float64, r rig.Blast, profile traffic.Profile) {
	delete(owns, profile) // that of an earlier round is not this one's
	if e.sober(r.CPU) {
		owns[profile] = float64((r.CPU.Machine - r.CPU.Foreign).Nanoseconds()) / float64(r.CPU.Sent)
	}
}

// blast refuses what would not count.
func blast(ctx context.Context, e *Env, b *rig.Bed, l rig.Load) (rig.Blast, error) {
	r, err := b.Blast(ctx, l)
	for try := 0; err == nil && try < retries && busy(r.CPU); try++ { // a machine with other work gives no figure: again
		r, err = b.Blast(ctx, l)
	}
	switch {
	case err != nil:
	case r.Got == 0:
		counters, _ := b.Counters(ctx, 1) // they only explain
		err = fmt.Errorf("none of %d packets arrived; the vRouter's counters: %v", r.Sent, counters)
	case r.Bad > 0:
		err = fmt.Errorf("%d packets arrived with a wrong checksum or length", r.Bad)
	}
	if r.Missed > 0 {
		e.Note("%s: the sink itself lost %d packets of %d", b.Path.Name, r.Missed, r.Sent)
	}
	return r, err
}

// retries is how often a measurement is made again when other processes were busy meanwhile.
const retries = 2

// share is how much of the time that the machine was at work it worked for others.
func share(c rig.CPU) float64 { return float64(c.Foreign) / float64(c.Machine) }

// busy tells whether that is too much.
func busy(c rig.CPU) bool { return share(c) > 0.04 }

// sober tells whether a figure of CPU time may be told at all: what others use cannot be told well enough when it is much.
func (e *Env) sober(c rig.CPU) bool {
	e.Measured++
	if busy(c) {
		e.Disturbed++
	}
	return share(c) < 0.2
}

// maxLoss is what the search allows, of 1.
const maxLoss = 0.005

func lossless(name, title string, shape rig.Shape, profile traffic.Profile) Scenario {
	return Scenario{
		Name: name, Title: title, Shape: shape, Metrics: []Metric{rate, perPkt, loss}, Fits: fitsUDP(shape),
		Cost: func(t Times) time.Duration {
			step := t.Step/3 + drain
			return startTraffic + time.Duration(t.Steps)*(step+t.Step) + 2*(step+t.Window)
		},
		Measure: func(ctx context.Context, e *Env, b *rig.Bed) (Values, error) {
			try := func(rate float64, window time.Duration) (rig.Blast, error) {
				return blast(ctx, e, b, rig.Load{
					Profile: profile, Flows: flows, Rate: uint64(rate), Warm: e.Times.Step / 3, Window: window,
				})
			}
			r, err := try(0, e.Times.Window)
			if err != nil {
				return nil, err
			}
			if e.wire(b, r, profile); b.Path.Kind == rig.KindWire {
				// A generator that keeps a rate sleeps and wakes, and costs more for a packet.
				paced, err := try(r.Received/2, e.Times.Window)
				if err != nil {
					return nil, err
				}
				e.keep(e.OwnPaced, paced, profile)
				return e.values(b, r, e.Own, profile), nil
			}
			if r.Loss <= maxLoss {
				return e.values(b, r, e.Own, profile), nil
			}
			at, err := search(r, e.Times.Steps, func(rate float64) (rig.Blast, error) { return try(rate, e.Times.Step) })
			if err != nil {
				return nil, err
			}
			// A step is short: what it found has to hold for as long as everything else is measured.
			for r, err = try(at, e.Times.Window); err == nil && r.Loss > maxLoss; r, err = try(at, e.Times.Window) {
				if at *= 0.95; at < 1000 {
					return nil, fmt.Errorf("lost more than %.1f %% at every rate down to %.0f packets/s", 100*maxLoss, at)
				}
			}
			if err != nil {
				return nil, err
			}
			return e.values(b, r, e.OwnPaced, profile), nil
		},
	}
}

// search halves the range of rates for the highest, in packets per second, at which no more than maxLoss is lost. flat is what
// full speed gave.
func search(flat rig.Blast, steps int, try func(rate float64) (rig.Blast, error)) (float64, error) {
	low, high := 0.0, min(flat.Offered, 1.3*flat.Received)
	for step := range steps {
		at := (low + high) / 2
		if step == 0 {
			at = 0.9 * flat.Received // most often near
		}
		r, err := try(at)
		if err != nil {
			return 0, err
		}
		if r.Loss <= maxLoss {
			low = at
		} else {
			high = at
		}
	}
	if low == 0 {
		return 0, fmt.Errorf("lost more than %.1f %% at every rate down to %.0f packets/s", 100*maxLoss, high)
	}
	return low, nil
}
