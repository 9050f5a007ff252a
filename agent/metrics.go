package agent

import (
	"math"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// collector tells Prometheus what the agent's status says, when it is asked.
type collector struct{ a *Agent }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("margay_agent_"+name, help, labels, nil)
}

var (
	metricReady       = desc("ready", "1 if pods can be attached and the peers' first tables are in.")
	metricReconciled  = desc("reconciliations_total", "How often the desired state was computed and applied, by result.", "result")
	metricVRouter     = desc("vrouter_up", "1 if the vRouter beside the agent answers.")
	metricStale       = desc("vrouter_stale_entries", "Routes, nodes and pods of the vRouter that a synchronisation under way has not confirmed.")
	metricPeerUp      = desc("bgp_peer_up", "1 if the session with a peer is established.", "peer", "asn", "type")
	metricReceived    = desc("bgp_received_prefixes", "Prefixes that a peer has sent.", "peer")
	metricAdvertised  = desc("bgp_advertised_prefixes", "Prefixes that a peer was sent.", "peer")
	metricRejected    = desc("bgp_rejected_paths", "Learned paths that the import rules refuse.")
	metricBlocks      = desc("ipam_blocks", "Blocks of addresses that are this node's.", "family")
	metricCapacity    = desc("ipam_block_addresses", "Addresses in those blocks.", "family")
	metricPodAddrs    = desc("ipam_pod_addresses", "Addresses of this node's pods.", "family")
	metricBorrowed    = desc("ipam_borrowed_addresses", "Those of them that lie in no block of this node.", "family")
	metricDescriptors = []*prometheus.Desc{metricReady, metricReconciled, metricVRouter, metricStale, metricPeerUp, metricReceived,
		metricAdvertised, metricRejected, metricBlocks, metricCapacity, metricPodAddrs, metricBorrowed}
)

// reconciliations counts how they end.
type reconciliations struct{ ok, failed atomic.Uint64 }

func (r *reconciliations) count(err error) {
	if err != nil {
		r.failed.Add(1)
		return
	}
	r.ok.Add(1)
}

// newCNISeconds returns the histogram of how long requests of the CNI plugin take.
func newCNISeconds() *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "margay_agent_cni_request_duration_seconds",
		Help:    "How long requests of the CNI plugin took, by command and result.",
		Buckets: prometheus.ExponentialBuckets(0.001, 4, 8),
	}, []string{"command", "result"})
}

// register hands the agent's metrics to cfg.Metrics, and has the CNI server's requests observed.
func (a *Agent) register() (observe func(command string, took time.Duration, err error)) {
	if a.cfg.Metrics == nil {
		return nil
	}
	seconds := newCNISeconds()
	a.cfg.Metrics.MustRegister(collector{a}, seconds)
	return func(command string, took time.Duration, err error) {
		result := "ok"
		if err != nil {
			result = "error"
		}
		seconds.WithLabelValues(command, result).Observe(took.Seconds())
	}
}

// Describe implements prometheus.Collector.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range metricDescriptors {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	truth := map[bool]float64{true: 1}
	st := c.a.status()
	gauge(metricReady, truth[st.Ready])
	gauge(metricVRouter, truth[st.VRouter.Connected])
	gauge(metricStale, float64(st.VRouter.Stale))
	gauge(metricRejected, float64(len(st.Rejected)))
	for _, p := range st.BGP {
		peer := p.Address.String()
		gauge(metricPeerUp, truth[p.State == "Established"], peer, strconv.FormatUint(uint64(p.AS), 10), p.Kind)
		gauge(metricReceived, float64(p.Received), peer)
		gauge(metricAdvertised, float64(p.Advertised), peer)
	}
	for result, n := range map[string]*atomic.Uint64{"ok": &c.a.reconciled.ok, "error": &c.a.reconciled.failed} {
		ch <- prometheus.MustNewConstMetric(metricReconciled, prometheus.CounterValue, float64(n.Load()), result)
	}
	c.addresses(gauge)
}

// addresses tells about the node's blocks and the pods in them, by family.
func (c collector) addresses(gauge func(*prometheus.Desc, float64, ...string)) {
	type count struct{ blocks, capacity, pods, borrowed float64 }
	var families [2]count
	of := func(is4 bool) *count {
		if is4 {
			return &families[0]
		}
		return &families[1]
	}
	blocks := c.a.cluster.blocks()
	for _, b := range blocks {
		n := of(b.Addr().Is4())
		n.blocks++
		n.capacity += math.Ldexp(1, b.Addr().BitLen()-b.Bits())
	}
	for _, addr := range c.a.pods.all() {
		n := of(addr.Is4())
		n.pods++
		own := false
		for _, b := range blocks {
			own = own || b.Contains(addr)
		}
		if !own {
			n.borrowed++
		}
	}
	for i, family := range []string{"ipv4", "ipv6"} {
		n := families[i]
		gauge(metricBlocks, n.blocks, family)
		gauge(metricCapacity, n.capacity, family)
		gauge(metricPodAddrs, n.pods, family)
		gauge(metricBorrowed, n.borrowed, family)
	}
}
