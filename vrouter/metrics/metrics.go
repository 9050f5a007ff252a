// Package metrics tells Prometheus what a vRouter does. It reads what the workers count anyway, when it is asked, and
// costs the hot path nothing.
package metrics

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"margay/vrouter"
)

// collector reads one router.
type collector struct{ router *vrouter.Router }

// New returns a collector of what r counts, for a registry.
func New(r *vrouter.Router) prometheus.Collector { return collector{r} }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("margay_vrouter_"+name, help, labels, nil)
}

var (
	forwardedPackets = desc("forwarded_packets_total", "Packets forwarded, by path: encap to another node, decap from one, local between pods, host to the node's kernel. A superpacket counts as its segments.", "path")
	forwardedBytes   = desc("forwarded_bytes_total", "Bytes of IP packets forwarded, by path, superpackets as they are.", "path")
	droppedPackets   = desc("dropped_packets_total", "Packets dropped, by reason.", "reason")
	droppedBytes     = desc("dropped_bytes_total", "Bytes of IP packets dropped, by reason.", "reason")
	kernelPackets    = desc("kernel_dropped_packets_total", "Packets that the kernel lost around the vRouter, by where.", "where")
	eventPackets     = desc("events_total", "Packets that something else was done about, by what: split, the pieces of them, ICMP errors sent, failed, held back by their rate, passed on and refused, path MTUs refused, unexpected ECN fields.", "event")
	routes           = desc("fib_routes", "Routes in the table.", "family")
	gateways         = desc("fib_bytes", "Memory that the table takes as workers read it.")
	stale            = desc("fib_stale_entries", "Routes, nodes and pods that the synchronisation under way has not confirmed.")
	nodes            = desc("nodes", "Nodes of the cluster, that may tunnel to this one.")
	pods             = desc("pods", "Pods of this node that the agent has told.")
	configured       = desc("configured", "1 if the agent has told this node's address.")
	batch            = desc("batch_packets", "Packets that a worker took at once.", "worker")
	occupancy        = desc("queue_occupancy_ratio", "How full a queue between the kernel and the vRouter is now: 1 is full.", "queue")
)

var all = []*prometheus.Desc{forwardedPackets, forwardedBytes, droppedPackets, droppedBytes, kernelPackets, eventPackets,
	routes, gateways, stale, nodes, pods, configured, batch, occupancy}

// Describe implements prometheus.Collector.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range all {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	count := func(d *prometheus.Desc, n uint64, label string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), label)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for _, n := range merged(c.router.Counters()) {
		switch kind, label, _ := strings.Cut(n.Name, "_"); kind {
		case "forwarded":
			count(forwardedPackets, n.Packets, label)
			count(forwardedBytes, n.Bytes, label)
		case "drop":
			count(droppedPackets, n.Packets, label)
			count(droppedBytes, n.Bytes, label)
		case "kernel":
			count(kernelPackets, n.Packets, label)
		default:
			count(eventPackets, n.Packets, n.Name)
		}
	}
	s, table := c.router.Status(), c.router.Table()
	gauge(routes, float64(table.IPv4), "ipv4")
	gauge(routes, float64(table.IPv6), "ipv6")
	gauge(gateways, float64(table.Bytes))
	gauge(stale, float64(s.Stale))
	gauge(nodes, float64(s.Nodes))
	gauge(pods, float64(s.Pods))
	gauge(configured, map[bool]float64{true: 1}[s.Configured])
	for _, b := range c.router.Batches() {
		buckets := make(map[float64]uint64, len(b.UpTo))
		for i, n := range b.UpTo {
			buckets[float64(uint64(1)<<i)] = n
		}
		ch <- prometheus.MustNewConstHistogram(batch, b.Count, float64(b.Packets), buckets, b.Worker)
	}
	for _, q := range c.router.Queues() {
		gauge(occupancy, float64(q.Used)/float64(max(q.Size, 1)), q.Name)
	}
}

// merged adds counters of one name up: two ports may be of one kind, and Prometheus takes each name once.
func merged(all []vrouter.Counter) []vrouter.Counter {
	at := make(map[string]int, len(all))
	var out []vrouter.Counter
	for _, n := range all {
		i, ok := at[n.Name]
		if !ok {
			at[n.Name] = len(out)
			out = append(out, n)
			continue
		}
		out[i].Packets += n.Packets
		out[i].Bytes += n.Bytes
	}
	return out
}
