package datastore

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// shape is what a field of a generic spec has to look like. An absent or null field is in order unless required.
type shape struct {
	name     string
	required bool
	want     string         // what was expected, for the error
	ok       func(any) bool // of the field, or of each element where list
	list     bool
	inner    []shape // the fields of an object, or of each object in a list
}

func (f shape) check(object map[string]any) error { return f.under("spec", object) }

// under checks the field in object, which lies at path.
func (f shape) under(path string, object map[string]any) error {
	path += "." + f.name
	value, there := object[f.name]
	if !there || value == nil {
		if f.required {
			return fmt.Errorf("%s: expected %s, there is none", path, f.want)
		}
		return nil
	}
	if !f.list {
		return f.one(path, value)
	}
	items, ok := value.([]any)
	if !ok {
		return fmt.Errorf("%s %s: expected a list, each %s", path, show(value), f.want)
	}
	for i, item := range items {
		if err := f.one(fmt.Sprintf("%s[%d]", path, i), item); err != nil {
			return err
		}
	}
	return nil
}

func (f shape) one(path string, value any) error {
	if f.ok != nil && !f.ok(value) {
		return fmt.Errorf("%s %s: expected %s", path, show(value), f.want)
	}
	object, _ := value.(map[string]any)
	for _, in := range f.inner {
		if err := in.under(path, object); err != nil {
			return err
		}
	}
	return nil
}

// show quotes what was found, shortened.
func show(value any) string {
	raw, err := json.Marshal(value)
	if err != nil {
		return "?"
	}
	if len(raw) > 60 {
		return string(raw[:60]) + "…"
	}
	return string(raw)
}

func text(name string) shape {
	return shape{name: name, want: "text", ok: func(v any) bool { _, ok := v.(string); return ok }}
}

func flag(name string) shape {
	return shape{name: name, want: "true or false", ok: func(v any) bool { _, ok := v.(bool); return ok }}
}

func number(name string) shape {
	return shape{name: name, want: "a number", ok: func(v any) bool { _, ok := v.(json.Number); return ok }}
}

func whole(name string, low, high int64) shape {
	return shape{name: name, want: fmt.Sprintf("a whole number from %d to %d", low, high), ok: func(v any) bool {
		n, ok := v.(json.Number)
		if !ok {
			return false
		}
		i, err := n.Int64()
		return err == nil && i >= low && i <= high
	}}
}

// oneOf ignores case where Calico does: in log levels, for instance.
func oneOf(name string, ignoreCase bool, values ...string) shape {
	known := strings.TrimSuffix(strings.Join(values, ", "), ", ")
	return shape{name: name, want: "one of " + known, ok: func(v any) bool {
		s, ok := v.(string)
		return ok && slices.ContainsFunc(values, func(known string) bool {
			return s == known || ignoreCase && strings.EqualFold(s, known)
		})
	}}
}

func matching(name, want string, ok func(string) bool) shape {
	return shape{name: name, want: want, ok: func(v any) bool { s, isText := v.(string); return isText && ok(s) }}
}

func address(name string) shape {
	return matching(name, "an IP address", func(s string) bool { a, err := netip.ParseAddr(s); return err == nil && a.Zone() == "" })
}

// ipv4 is an IPv4 address, or nothing.
func ipv4(name string) shape {
	return orEmpty(matching(name, "an IPv4 address", func(s string) bool { a, err := netip.ParseAddr(s); return err == nil && a.Unmap().Is4() }))
}

// ipv6 is an IPv6 address, or nothing.
func ipv6(name string) shape {
	return orEmpty(matching(name, "an IPv6 address", func(s string) bool {
		a, err := netip.ParseAddr(s)
		return err == nil && a.Unmap().Is6() && a.Zone() == ""
	}))
}

func ipv4Network(name string) shape {
	return matching(name, "an IPv4 address or prefix such as 10.0.0.0/8", func(s string) bool {
		p, err := parseAddress(s)
		return err == nil && p.Addr().Unmap().Is4()
	})
}

func network(name string) shape {
	return matching(name, "an IP address or a prefix such as 10.0.0.0/8", func(s string) bool { _, err := parseAddress(s); return err == nil })
}

func duration(name string) shape {
	return matching(name, "a duration such as 90s", func(s string) bool { _, err := time.ParseDuration(s); return err == nil })
}

func expression(name string) shape {
	return matching(name, "a regular expression", func(s string) bool { _, err := regexp.Compile(s); return err == nil })
}

func interfaceName(name string) shape {
	return matching(name, "an interface name of at most 15 characters, without '/' and blanks", func(s string) bool {
		return s == "*" || s != "" && len(s) <= 15 && !strings.ContainsAny(s, "/ \t\n")
	})
}

func object(name string, inner ...shape) shape {
	return shape{name: name, want: "an object", ok: func(v any) bool { _, ok := v.(map[string]any); return ok }, inner: inner}
}

func listOf(f shape) shape {
	f.list = true
	return f
}

func required(f shape) shape {
	f.required = true
	return f
}

// orEmpty lets the empty text pass, which Calico takes for no value.
func orEmpty(f shape) shape {
	ok := f.ok
	f.ok = func(v any) bool { return v == "" || ok(v) }
	return f
}

// portRange is a port, or two with a colon between them.
func portRange(v any) bool {
	s := fmt.Sprint(v)
	low, high, isRange := strings.Cut(s, ":")
	a, err := strconv.ParseUint(low, 10, 16)
	if !isRange {
		_, named := v.(string)
		return err == nil && a > 0 || err != nil && named && s != "" // a named port
	}
	b, err2 := strconv.ParseUint(high, 10, 16)
	return err == nil && err2 == nil && 0 < a && a <= b
}

func protocol(name string) shape {
	return shape{name: name, want: "a protocol such as TCP, or its number from 1 to 255", ok: func(v any) bool {
		s := strings.ToLower(fmt.Sprint(v))
		n, err := strconv.ParseUint(s, 10, 8)
		return err == nil && n > 0 || slices.Contains([]string{"tcp", "udp", "icmp", "icmpv6", "sctp", "udplite"}, s)
	}}
}

// portProtocol is a protocol that has ports.
func portProtocol(name string) shape {
	return shape{name: name, want: "TCP, UDP or SCTP", ok: func(v any) bool {
		return slices.Contains([]string{"TCP", "UDP", "SCTP", "6", "17", "132"}, fmt.Sprint(v))
	}}
}

func entity(name string) shape {
	ports := shape{want: "a port, a range such as 8000:8080, or a named port", ok: portRange, list: true}
	ports.name = "ports"
	notPorts := ports
	notPorts.name = "notPorts"
	return object(name, text("selector"), text("notSelector"), text("namespaceSelector"), listOf(network("nets")),
		listOf(network("notNets")), ports, notPorts)
}

var (
	rule = []shape{required(oneOf("action", false, "Allow", "Deny", "Log", "Pass")), whole("ipVersion", 4, 6), protocol("protocol"),
		protocol("notProtocol"), entity("source"), entity("destination"), object("http"), object("icmp"), object("notICMP"), object("metadata")}
	rules  = []shape{listOf(object("ingress", rule...)), listOf(object("egress", rule...))}
	policy = append([]shape{number("order"), text("selector"), text("tier"), text("serviceAccountSelector"),
		listOf(oneOf("types", false, "Ingress", "Egress"))}, rules...)
	staged         = oneOf("stagedAction", false, "Set", "Delete", "Learn", "Ignore")
	globalPolicy   = append([]shape{text("namespaceSelector"), flag("doNotTrack"), flag("preDNAT"), flag("applyOnForward")}, policy...)
	severity       = []string{"Trace", "Debug", "Info", "Warning", "Error", "Fatal", "None"}
	endpointPort   = []shape{text("name"), required(protocol("protocol")), required(whole("port", 1, 65535)), whole("hostPort", 0, 65535)}
	networkSetSpec = []shape{listOf(network("nets"))}
)

// shapes is what is known of the generic kinds' fields. Fields that are not listed pass as they are.
var shapes = map[*Kind][]shape{
	NetworkPolicies:             policy,
	StagedNetworkPolicies:       append([]shape{staged}, policy...),
	GlobalNetworkPolicies:       globalPolicy,
	StagedGlobalNetworkPolicies: append([]shape{staged}, globalPolicy...),
	StagedKubernetesNetworkPolicies: {staged, object("podSelector"), listOf(object("ingress")), listOf(object("egress")),
		listOf(oneOf("policyTypes", false, "Ingress", "Egress"))},
	NetworkSets:       networkSetSpec,
	GlobalNetworkSets: networkSetSpec,
	Profiles: append([]shape{{name: "labelsToApply", want: "an object of texts", ok: func(v any) bool {
		labels, ok := v.(map[string]any)
		for _, value := range labels {
			if _, isText := value.(string); !isText {
				return false
			}
		}
		return ok
	}}}, rules...),
	Tiers: {number("order"), oneOf("defaultAction", false, "Deny", "Pass")},
	HostEndpoints: {text("node"), interfaceName("interfaceName"), listOf(address("expectedIPs")), listOf(text("profiles")),
		listOf(object("ports", endpointPort...))},
	WorkloadEndpoints:   workloadEndpoint,
	FelixConfigurations: felixConfiguration,
	CalicoNodeStatuses:  {text("node"), listOf(oneOf("classes", false, "Agent", "BGP", "Routes")), whole("updatePeriodSeconds", 0, 1<<31-1)},
	KubeControllersConfigurations: {oneOf("logSeverityScreen", true, severity...), oneOf("healthChecks", false, "Enabled", "Disabled"),
		duration("etcdV3CompactionPeriod"), whole("prometheusMetricsPort", 0, 65535), object("controllers")},
}

// deep is what of a kind depends on several fields; it is checked after the shapes.
var deep = map[*Kind]func(*Resource, map[string]any) error{
	WorkloadEndpoints:   validateEndpoint,
	FelixConfigurations: validateFelix,
}
