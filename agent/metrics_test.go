package agent

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"margay/test/documented"
)

func TestMetrics(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	a := &Agent{cfg: Config{Node: "node1", Metrics: registry}, ready: true, desired: Desired{Rejected: make([]Rejected, 2)}}
	a.cluster = &cluster{affinities: &view[blockState]{items: map[string]blockState{
		"a": {pfx("10.244.0.0/26"), true}, "b": {pfx("10.244.0.64/26"), false}, "c": {pfx("fd00::/122"), true},
	}}}
	for _, pod := range []string{"10.244.0.1", "10.244.7.7", "fd00::1"} {
		a.pods.set(true, addr(pod), "cali1")
	}
	a.reconciled.count(nil)
	a.reconciled.count(errors.New("no"))
	observe := a.register()
	observe("ADD", 20*time.Millisecond, nil)
	problems, err := testutil.GatherAndLint(registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("promlint: %s: %s", p.Metric, p.Text)
	}
	const want = `
# HELP margay_agent_bgp_rejected_paths Learned paths that the import rules refuse.
# TYPE margay_agent_bgp_rejected_paths gauge
margay_agent_bgp_rejected_paths 2
# HELP margay_agent_ipam_block_addresses Addresses in those blocks.
# TYPE margay_agent_ipam_block_addresses gauge
margay_agent_ipam_block_addresses{family="ipv4"} 64
margay_agent_ipam_block_addresses{family="ipv6"} 64
# HELP margay_agent_ipam_borrowed_addresses Those of them that lie in no block of this node.
# TYPE margay_agent_ipam_borrowed_addresses gauge
margay_agent_ipam_borrowed_addresses{family="ipv4"} 1
margay_agent_ipam_borrowed_addresses{family="ipv6"} 0
# HELP margay_agent_ipam_pod_addresses Addresses of this node's pods.
# TYPE margay_agent_ipam_pod_addresses gauge
margay_agent_ipam_pod_addresses{family="ipv4"} 2
margay_agent_ipam_pod_addresses{family="ipv6"} 1
# HELP margay_agent_ready 1 if pods can be attached and the peers' first tables are in.
# TYPE margay_agent_ready gauge
margay_agent_ready 1
# HELP margay_agent_reconciliations_total How often the desired state was computed and applied, by result.
# TYPE margay_agent_reconciliations_total counter
margay_agent_reconciliations_total{result="error"} 1
margay_agent_reconciliations_total{result="ok"} 1
# HELP margay_agent_vrouter_up 1 if the vRouter beside the agent answers.
# TYPE margay_agent_vrouter_up gauge
margay_agent_vrouter_up 0
`
	names := []string{}
	for _, line := range strings.Split(want, "\n") {
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, _, _ := strings.Cut(rest, " ")
			names = append(names, name)
		}
	}
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want), names...); err != nil {
		t.Error(err)
	}
	if n := testutil.CollectAndCount(newCNISeconds()); n != 0 {
		t.Errorf("%d series before the first request", n)
	}
	if n, err := testutil.GatherAndCount(registry, "margay_agent_cni_request_duration_seconds"); err != nil || n != 1 {
		t.Errorf("%d series after it, %v", n, err)
	}
}

// TestMetricsAreDocumented: docs/metrics.md names every metric, and none that there is not.
func TestMetricsAreDocumented(t *testing.T) {
	descriptors := make(chan *prometheus.Desc, 1)
	newCNISeconds().Describe(descriptors)
	documented.Metrics(t, "../docs/metrics.md", "margay_agent_", append(metricDescriptors, <-descriptors))
}
