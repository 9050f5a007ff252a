package metrics

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"margay/test/documented"
	"margay/vrouter"
)

// port is one that hands out some batches of packets, and takes them.
type port struct {
	name    string
	batches [][][]byte
}

func (p *port) Recv(batch []*vrouter.Packet) (int, error) {
	if len(p.batches) == 0 {
		return 0, vrouter.ErrStopped
	}
	now := p.batches[0]
	p.batches = p.batches[1:]
	for i, b := range now {
		batch[i].Len = copy(batch[i].Buf[batch[i].Off:], b)
	}
	return len(now), nil
}

func (p *port) Send(batch []*vrouter.Packet) {
	for _, pkt := range batch {
		pkt.Sent = 1
	}
}
func (p *port) Name() string { return "port" }
func (p *port) Counters() []vrouter.Counter {
	return []vrouter.Counter{{Name: "kernel_port_full", Packets: 7}}
}
func (p *port) Queues() []vrouter.Queue {
	return []vrouter.Queue{{Name: p.name, Used: 1, Size: 4}}
}
func (p *port) Stop()        {}
func (p *port) Close() error { return nil }

// busy is a router that has forwarded five packets and dropped one, in three batches.
func busy(t *testing.T) *vrouter.Router {
	t.Helper()
	r := vrouter.New()
	gateway := netip.MustParseAddr("198.18.0.2")
	err := r.Update(vrouter.Update{
		Config:   &vrouter.Config{NodeAddress: netip.MustParseAddr("198.18.0.1"), Underlay: "eth0", MTU: 1480},
		AddNodes: []netip.Addr{gateway},
		Set: []vrouter.Route{{Prefix: netip.MustParsePrefix("10.1.0.0/16"), NextHop: vrouter.NextHop{Kind: vrouter.KindTunnel, Gateway: gateway}},
			{Prefix: netip.MustParsePrefix("fd00::/64")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	good := []byte{0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0x66, 0xd7, 10, 0, 0, 1, 10, 1, 0, 1}
	in := &port{name: "port_receive", batches: [][][]byte{{good}, {good, good, good}, {good, {0x60}}}}
	if err := r.NewWorker(vrouter.Encap, in, &port{name: "port_send"}).Run(); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestMetrics(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(New(busy(t)))
	problems, err := testutil.GatherAndLint(registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("promlint: %s: %s", p.Metric, p.Text)
	}
	const want = `
# HELP margay_vrouter_batch_packets Packets that a worker took at once.
# TYPE margay_vrouter_batch_packets histogram
margay_vrouter_batch_packets_bucket{worker="encap",le="1"} 1
margay_vrouter_batch_packets_bucket{worker="encap",le="2"} 2
margay_vrouter_batch_packets_bucket{worker="encap",le="4"} 3
margay_vrouter_batch_packets_bucket{worker="encap",le="8"} 3
margay_vrouter_batch_packets_bucket{worker="encap",le="16"} 3
margay_vrouter_batch_packets_bucket{worker="encap",le="32"} 3
margay_vrouter_batch_packets_bucket{worker="encap",le="64"} 3
margay_vrouter_batch_packets_bucket{worker="encap",le="+Inf"} 3
margay_vrouter_batch_packets_sum{worker="encap"} 6
margay_vrouter_batch_packets_count{worker="encap"} 3
# HELP margay_vrouter_fib_routes Routes in the table.
# TYPE margay_vrouter_fib_routes gauge
margay_vrouter_fib_routes{family="ipv4"} 1
margay_vrouter_fib_routes{family="ipv6"} 1
# HELP margay_vrouter_kernel_dropped_packets_total Packets that the kernel lost around the vRouter, by where.
# TYPE margay_vrouter_kernel_dropped_packets_total counter
margay_vrouter_kernel_dropped_packets_total{where="port_full"} 14
# HELP margay_vrouter_queue_occupancy_ratio How full a queue between the kernel and the vRouter is now: 1 is full.
# TYPE margay_vrouter_queue_occupancy_ratio gauge
margay_vrouter_queue_occupancy_ratio{queue="port_receive"} 0.25
margay_vrouter_queue_occupancy_ratio{queue="port_send"} 0.25
`
	err = testutil.GatherAndCompare(registry, strings.NewReader(want), "margay_vrouter_batch_packets", "margay_vrouter_fib_routes",
		"margay_vrouter_kernel_dropped_packets_total", "margay_vrouter_queue_occupancy_ratio")
	if err != nil {
		t.Error(err)
	}
	for line, want := range map[string]float64{
		`margay_vrouter_forwarded_packets_total{path="encap"}`:    5,
		`margay_vrouter_forwarded_bytes_total{path="encap"}`:      200,
		`margay_vrouter_dropped_packets_total{reason="not_ipv4"}`: 1,
		`margay_vrouter_dropped_packets_total{reason="no_route"}`: 0, // a reason that has not happened is there
		`margay_vrouter_configured`:                               1,
		`margay_vrouter_nodes`:                                    1,
	} {
		got, err := value(registry, line)
		if err != nil || got != want {
			t.Errorf("%s: %v, %v: want %v", line, got, err, want)
		}
	}
}

// TestDocumented: docs/metrics.md names every metric, and none that there is not.
func TestDocumented(t *testing.T) {
	documented.Metrics(t, "../../docs/metrics.md", "margay_vrouter_", all)
}

// value finds a sample by its name and labels as text.
func value(g prometheus.Gatherer, line string) (float64, error) {
	families, err := g.Gather()
	if err != nil {
		return 0, err
	}
	name, label, _ := strings.Cut(strings.TrimSuffix(line, "}"), "{")
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			text := ""
			for _, l := range m.GetLabel() {
				text += l.GetName() + `="` + l.GetValue() + `"`
			}
			if text == label {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue(), nil
			}
		}
	}
	return 0, errors.New("not there")
}
