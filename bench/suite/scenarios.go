package suite

import (
	"context"
	"fmt"
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

// Scenario is one kind of load. Measure is called once for each path and round.
type Scenario struct {
	Name    string
	Title   string
	Nodes   int
	Metrics []Metric // the first is the main one
	Fits    func(p rig.Path) bool
	Measure func(ctx context.Context, e *Env, b *rig.Bed) (Values, error)
}

// Values are the figures of one measurement by the metric's name.
type Values map[string]float64

// Env is what a measurement may use of what was measured before.
type Env struct {
	Times Times
	// Own is what generator and sink cost by themselves in this round, in ns for each packet; by profile.
	Own map[traffic.Profile]float64
	// Limit is what the generator reaches with nothing in between, in packets per second; by profile.
	Limit map[traffic.Profile]float64
	// Note keeps a remark for the report.
	Note func(format string, args ...any)
}

// Times are how long things take.
type Times struct {
	Warm, Window time.Duration
	Step         time.Duration // one step of the search for the rate without loss
	Steps        int
}

// flows is the number of UDP flows: enough that RPS finds work for every processor.
const flows = 32

// The metrics that several scenarios share.
var (
	bitrate = Metric{Name: "rate", Unit: "Gbit/s"}
	perByte = Metric{Name: "cpu", Unit: "ns/KB", Lower: true}
	rate    = Metric{Name: "rate", Unit: "kpps"}
	perPkt  = Metric{Name: "cpu", Unit: "ns/packet", Lower: true}
	loss    = Metric{Name: "loss", Unit: "%", Lower: true}
)

// Scenarios returns all of them, in the order of the report.
func Scenarios() []Scenario {
	var all []Scenario
	for _, segmentation := range []bool{true, false} {
		for _, n := range []int{1, 4} {
			all = append(all, tcp(n, segmentation))
		}
	}
	return append(all,
		udp("udp", "small UDP, one node, as fast as it goes", 1, traffic.Small),
		lossless("udp-lossless", "small UDP, one node, at most 0.5 % lost", 1, traffic.Small),
		udp("udp2", "small UDP, two nodes, as fast as it goes", 2, traffic.Small),
		udp("imix", "IMIX, one node, as fast as it goes", 1, traffic.IMIX),
		lossless("imix-lossless", "IMIX, one node, at most 0.5 % lost", 1, traffic.IMIX),
	)
}

func notWire(p rig.Path) bool { return p.Kind != rig.KindWire }

func tcp(n int, segmentation bool) Scenario {
	name, title := fmt.Sprintf("tcp%d", n), fmt.Sprintf("TCP bulk, two nodes, %d flows", n)
	if n == 1 {
		title = "TCP bulk, two nodes, 1 flow"
	}
	if !segmentation {
		name, title = name+"-off", title+", TSO and GSO off and GRO on at the underlay"
	}
	return Scenario{
		Name: name, Title: title, Nodes: 2, Metrics: []Metric{bitrate, perByte}, Fits: notWire,
		Measure: func(ctx context.Context, e *Env, b *rig.Bed) (Values, error) {
			if err := b.Underlay(segmentation); err != nil {
				return nil, err
			}
			r, err := b.TCP(ctx, n, e.Times.Warm, e.Times.Window)
			if err != nil {
				return nil, err
			}
			busy := float64((r.CPU.Machine - r.CPU.Foreign).Nanoseconds())
			return Values{"rate": r.BitRate / 1e9, "cpu": busy / float64(r.Bytes) * 1e3}, nil
		},
	}
}

func udp(name, title string, nodes int, profile traffic.Profile) Scenario {
	return Scenario{
		Name: name, Title: title, Nodes: nodes, Metrics: []Metric{rate, perPkt, loss}, Fits: fitsUDP(nodes),
		Measure: func(ctx context.Context, e *Env, b *rig.Bed) (Values, error) {
			r, err := blast(ctx, e, b, rig.Load{Profile: profile, Flows: flows, Warm: e.Times.Warm, Window: e.Times.Window})
			if err != nil {
				return nil, err
			}
			if b.Path.Kind == rig.KindWire {
				e.Own[profile] = float64((r.CPU.Machine - r.CPU.Foreign).Nanoseconds()) / float64(r.CPU.Sent)
				e.Limit[profile] = r.Received
			}
			return e.values(r, profile), nil
		},
	}
}

// fitsUDP: with one node WireGuard has nobody to talk to.
func fitsUDP(nodes int) func(rig.Path) bool {
	return func(p rig.Path) bool { return nodes == 2 || p.Kind != rig.KindWireGuard }
}

// values turns a blast into the figures of a UDP scenario.
func (e *Env) values(r rig.Blast, profile traffic.Profile) Values {
	return Values{"rate": r.Received / 1e3, "cpu": r.CPU.PerPacket(e.Own[profile]), "loss": 100 * r.Loss}
}

// blast refuses what would not count.
func blast(ctx context.Context, e *Env, b *rig.Bed, l rig.Load) (rig.Blast, error) {
	r, err := b.Blast(ctx, l)
	for try := 0; err == nil && try < 2 && busy(r.CPU); try++ { // a machine with other work gives no figure: again
		r, err = b.Blast(ctx, l)
	}
	switch {
	case err != nil:
	case r.Got == 0:
		counters, _ := b.Counters(ctx, 1) // they only explain
		err = fmt.Errorf("none of %d packets arrived; the vRouter's counters: %v", r.Sent, counters)
	case r.Bad > 0:
		err = fmt.Errorf("%d packets arrived with a wrong checksum or length", r.Bad)
	case busy(r.CPU):
		e.Note("other processes took %.0f %% of the machine while %s was measured", 100*share(r.CPU), b.Path.Name)
	}
	if r.Missed > 0 {
		e.Note("%s: the sink itself lost %d packets of %d", b.Path.Name, r.Missed, r.Sent)
	}
	return r, err
}

// share is how much of the time that the machine was at work it worked for others.
func share(c rig.CPU) float64 { return float64(c.Foreign) / float64(c.Machine) }

// busy tells whether that is too much.
func busy(c rig.CPU) bool { return share(c) > 0.04 }

// maxLoss is what the search allows, of 1.
const maxLoss = 0.005

func lossless(name, title string, nodes int, profile traffic.Profile) Scenario {
	return Scenario{
		Name: name, Title: title, Nodes: nodes, Metrics: []Metric{rate, perPkt, loss}, Fits: fitsUDP(nodes),
		Measure: func(ctx context.Context, e *Env, b *rig.Bed) (Values, error) {
			try := func(rate float64, window time.Duration) (rig.Blast, error) {
				return blast(ctx, e, b, rig.Load{
					Profile: profile, Flows: flows, Rate: uint64(rate), Warm: e.Times.Step / 3, Window: window,
				})
			}
			flat, err := try(0, e.Times.Step)
			if err != nil {
				return nil, err
			}
			if b.Path.Kind == rig.KindWire {
				e.Own[profile] = float64((flat.CPU.Machine - flat.CPU.Foreign).Nanoseconds()) / float64(flat.CPU.Sent)
				e.Limit[profile] = flat.Received
			}
			best := flat
			if flat.Loss > maxLoss {
				best, err = search(flat, e.Times.Steps, func(rate float64) (rig.Blast, error) { return try(rate, e.Times.Step) })
			}
			if err != nil {
				return nil, err
			}
			return e.values(best, profile), nil
		},
	}
}

// search halves the range of rates for the highest at which no more than maxLoss is lost. flat is what full speed gave.
func search(flat rig.Blast, steps int, try func(rate float64) (rig.Blast, error)) (best rig.Blast, err error) {
	low, high := 0.0, min(flat.Offered, 1.3*flat.Received)
	for step := range steps {
		at := (low + high) / 2
		if step == 0 {
			at = 0.9 * flat.Received // most often near
		}
		r, err := try(at)
		if err != nil {
			return r, err
		}
		if r.Loss <= maxLoss {
			low, best = at, r
		} else {
			high = at
		}
	}
	if best.Got == 0 {
		return best, fmt.Errorf("lost more than %.1f %% at every rate down to %.0f packets/s", 100*maxLoss, high)
	}
	return best, nil
}
