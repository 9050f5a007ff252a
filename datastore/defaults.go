package datastore

import (
	"encoding/json"
	"slices"
	"strings"
	"time"
)

// defaultTier is the tier of policies that name none.
const defaultTier = "default"

// tierLabel is the label that Calico's client shows the tier of a policy in.
const tierLabel = "projectcalico.org/tier"

// Default fills what Calico's client fills, so that both store the same.
func (r *Resource) Default() {
	spec, err := r.spec()
	if err != nil {
		return // Validate says so
	}
	switch r.of {
	case NetworkPolicies, GlobalNetworkPolicies, StagedNetworkPolicies, StagedGlobalNetworkPolicies:
		defaultPolicyTypes(spec)
		defaultRules(spec)
		r.defaultTier(spec)
	case Profiles:
		defaultRules(spec)
	case Tiers:
		absent(spec, "order", json.Number("1000000"))
		absent(spec, "defaultAction", "Deny")
	case FelixConfigurations:
		defaultFelix(spec)
	case KubeControllersConfigurations:
		defaultControllers(spec)
		if len(r.Status) == 0 {
			r.Status = json.RawMessage(`{"runningConfig":{"controllers":{}}}`)
		}
	case WorkloadEndpoints:
		if r.Metadata.Name == "" {
			r.Metadata.Name, _ = endpointName(spec) // Validate says what is missing
		}
		return
	default:
		return
	}
	if raw, err := json.Marshal(spec); err == nil {
		r.Spec = raw
	}
}

// absent sets a field that is not there, or null.
func absent(object map[string]any, key string, value any) {
	if object[key] == nil {
		object[key] = value
	}
}

// defaultPolicyTypes says which traffic a policy is about, by the rules that it has.
func defaultPolicyTypes(spec map[string]any) {
	if types, there := spec["types"]; there && types != nil {
		if list, ok := types.([]any); !ok || len(list) > 0 {
			return
		}
	}
	in, _ := spec["ingress"].([]any)
	out, _ := spec["egress"].([]any)
	switch {
	case len(out) == 0:
		spec["types"] = []any{"Ingress"}
	case len(in) == 0:
		spec["types"] = []any{"Egress"}
	default:
		spec["types"] = []any{"Ingress", "Egress"}
	}
}

// defaultRules gives each rule the source and destination that Calico's types cannot leave out.
func defaultRules(spec map[string]any) {
	for _, direction := range []string{"ingress", "egress"} {
		list, _ := spec[direction].([]any)
		for _, item := range list {
			if rule, ok := item.(map[string]any); ok {
				absent(rule, "source", map[string]any{})
				absent(rule, "destination", map[string]any{})
			}
		}
	}
}

// defaultTier shows a policy's tier in spec and labels, as Calico's client does; what the user did not name is noted, and
// not stored for the default tier.
func (r *Resource) defaultTier(spec map[string]any) {
	tier, _ := spec["tier"].(string)
	if tier == "" {
		if spec["tier"] != nil && spec["tier"] != "" {
			return // no text: Validate says so
		}
		tier = tierOfName(r.Metadata.Name)
		spec["tier"], r.noTier = tier, true
	}
	if _, there := r.Metadata.Labels[tierLabel]; !there {
		labels := map[string]string{tierLabel: tier}
		for key, value := range r.Metadata.Labels {
			labels[key] = value
		}
		r.Metadata.Labels, r.noTierLabel = labels, tier == defaultTier
	}
}

// tierOfName is the tier of a policy that names none: what its name says before the first dot.
func tierOfName(name string) string {
	for prefix, tier := range map[string]string{"knp.default.": defaultTier, "ossg.": defaultTier,
		"kanp.adminnetworkpolicy.": "adminnetworkpolicy", "kbanp.baselineadminnetworkpolicy.": "baselineadminnetworkpolicy"} {
		if strings.HasPrefix(name, prefix) {
			return tier
		}
	}
	if tier, _, ok := strings.Cut(name, "."); ok {
		return tier
	}
	return defaultTier
}

// felixDurations are the fields of FelixConfiguration that hold a duration.
var felixDurations = []string{"dataplaneWatchdogTimeout", "routeRefreshInterval", "interfaceRefreshInterval", "iptablesRefreshInterval",
	"iptablesPostWriteCheckInterval", "iptablesLockTimeout", "iptablesLockProbeInterval", "ipsetsRefreshInterval", "xdpRefreshInterval",
	"netlinkTimeout", "reportingInterval", "reportingTTL", "endpointReportingDelay", "usageReportingInitialDelay",
	"usageReportingInterval", "debugSimulateCalcGraphHangAfter", "debugSimulateDataplaneHangAfter",
	"debugSimulateDataplaneApplyDelay", "nftablesRefreshInterval", "bpfKubeProxyMinSyncPeriod", "flowLogsFlushInterval", "wireguardKeepAlive"}

func defaultFelix(spec map[string]any) {
	normalDurations(spec, felixDurations...)
	absent(spec, "bpfLogLevel", "")
	absent(spec, "floatingIPs", "Disabled")
	if enabled, ok := spec["bpfConnectTimeLoadBalancingEnabled"].(bool); ok {
		// The older switch decides over both newer ones.
		spec["bpfConnectTimeLoadBalancing"] = map[bool]string{true: "Enabled", false: "Disabled"}[enabled]
		spec["bpfHostNetworkedNATWithoutCTLB"] = "Disabled"
		return
	}
	absent(spec, "bpfConnectTimeLoadBalancing", "TCP")
	absent(spec, "bpfHostNetworkedNATWithoutCTLB", "Enabled")
}

func defaultControllers(spec map[string]any) {
	normalDurations(spec, "etcdV3CompactionPeriod")
	absent(spec, "prometheusMetricsPort", json.Number("9094"))
	absent(spec, "controllers", map[string]any{})
	controllers, _ := spec["controllers"].(map[string]any)
	for name, value := range controllers {
		controller, ok := value.(map[string]any)
		if !ok {
			continue
		}
		normalDurations(controller, "reconcilerPeriod", "leakGracePeriod")
		switch name {
		case "node":
			absent(controller, "leakGracePeriod", "15m0s")
		case "loadBalancer":
			absent(controller, "assignIPs", "AllServices")
		}
	}
}

// normalDurations writes durations as Go does: 90s becomes 1m30s.
func normalDurations(object map[string]any, fields ...string) {
	for key, value := range object {
		if text, ok := value.(string); ok && slices.Contains(fields, key) {
			object[key] = normalDuration(text)
		}
	}
}

// normalDuration leaves alone what is no duration: Validate says so.
func normalDuration(text string) string {
	if d, err := time.ParseDuration(text); err == nil {
		return d.String()
	}
	return text
}
