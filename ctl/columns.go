package ctl

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"margay/datastore"
)

// column is one of calicoctl's table columns.
type column struct {
	head string
	cell func(doc map[string]any) string
}

// table is what a kind's tables can show: all columns, and which of them make the plain and the wide table.
type table struct {
	columns   []column
	ps, wider []string
}

// listLimit is where calicoctl cuts off a list in a cell.
const listLimit = 80

// tables are calicoctl's. A kind that is not here has NAME alone.
var tables = map[*datastore.Kind]table{
	datastore.IPPools: {[]column{
		field("CIDR", "spec.cidr", ""), field("NAT", "spec.natOutgoing", "false"), field("IPIPMODE", "spec.ipipMode", "Never"),
		field("VXLANMODE", "spec.vxlanMode", "Never"), field("DISABLED", "spec.disabled", "false"),
		field("DISABLEBGPEXPORT", "spec.disableBGPExport", "false"), field("SELECTOR", "spec.nodeSelector", ""),
		field("ASSIGNMENTMODE", "spec.assignmentMode", "")},
		[]string{"NAME", "CIDR", "SELECTOR"},
		[]string{"NAME", "CIDR", "NAT", "IPIPMODE", "VXLANMODE", "DISABLED", "DISABLEBGPEXPORT", "SELECTOR", "ASSIGNMENTMODE"}},
	datastore.Nodes: {[]column{
		{"ASN", nodeASN}, field("IPV4", "spec.bgp.ipv4Address", ""), field("IPV6", "spec.bgp.ipv6Address", "")},
		[]string{"NAME"}, []string{"NAME", "ASN", "IPV4", "IPV6"}},
	datastore.BGPPeers: {[]column{
		field("PEERIP", "spec.peerIP", ""), firstOf("NODE", "(global)", "spec.node", "spec.nodeSelector"), {"ASN", asNumber("spec.asNumber", "0")}},
		[]string{"NAME", "PEERIP", "NODE", "ASN"}, nil},
	datastore.BGPConfigurations: {[]column{
		field("LOGSEVERITY", "spec.logSeverityScreen", ""), field("MESHENABLED", "spec.nodeToNodeMeshEnabled", "-"),
		{"ASNUMBER", asNumber("spec.asNumber", "-")}},
		[]string{"NAME", "LOGSEVERITY", "MESHENABLED", "ASNUMBER"}, nil},
	datastore.BGPFilters: {[]column{
		count("NUMEXPORTV4", "spec.exportV4"), count("NUMIMPORTV4", "spec.importV4"), count("NUMEXPORTV6", "spec.exportV6"),
		count("NUMIMPORTV6", "spec.importV6")},
		[]string{"NAME", "NUMEXPORTV4", "NUMIMPORTV4", "NUMEXPORTV6", "NUMIMPORTV6"}, nil},
	datastore.ClusterInformations: {[]column{
		field("CLUSTERGUID", "spec.clusterGUID", ""), field("CLUSTERTYPE", "spec.clusterType", ""),
		field("CALICOVERSION", "spec.calicoVersion", ""), field("DATASTOREREADY", "spec.datastoreReady", "<nil>")},
		[]string{"NAME", "CLUSTERGUID", "CLUSTERTYPE", "CALICOVERSION", "DATASTOREREADY"}, nil},
	datastore.IPReservations: {[]column{list("CIDRS", "spec.reservedCIDRs", listLimit)}, []string{"NAME"}, []string{"NAME", "CIDRS"}},
	datastore.IPAMConfigurations: {[]column{
		field("STRICTAFFINITY", "spec.strictAffinity", "false"), field("AUTOALLOCATEBLOCKS", "spec.autoAllocateBlocks", "false"),
		field("MAXBLOCKSPERHOST", "spec.maxBlocksPerHost", "0")},
		[]string{"NAME", "STRICTAFFINITY", "AUTOALLOCATEBLOCKS"},
		[]string{"NAME", "STRICTAFFINITY", "AUTOALLOCATEBLOCKS", "MAXBLOCKSPERHOST"}},
	datastore.GlobalNetworkSets: {[]column{list("NETS", "spec.nets", listLimit)}, []string{"NAME"}, []string{"NAME", "NETS"}},
	datastore.NetworkSets:       {[]column{list("NETS", "spec.nets", listLimit)}, []string{"NAME"}, []string{"NAME", "NETS"}},
	datastore.HostEndpoints: {[]column{
		field("NODE", "spec.node", ""), field("INTERFACE", "spec.interfaceName", ""), list("IPS", "spec.expectedIPs", 0),
		list("PROFILES", "spec.profiles", 0)},
		[]string{"NAME", "NODE"}, []string{"NAME", "NODE", "INTERFACE", "IPS", "PROFILES"}},
	datastore.Profiles: {[]column{list("LABELS", "spec.labelsToApply", 0)}, []string{"NAME"}, []string{"NAME", "LABELS"}},
	datastore.Tiers:    {[]column{{"ORDER", order}}, []string{"NAME", "ORDER"}, nil},
	datastore.CalicoNodeStatuses: {[]column{field("NODE", "spec.node", ""), list("CLASSES", "spec.classes", 0)},
		[]string{"NAME", "NODE"}, []string{"NAME", "NODE", "CLASSES"}},
	datastore.WorkloadEndpoints: {[]column{
		firstOf("WORKLOAD", "", "spec.workload", "spec.pod"), field("ORCHESTRATOR", "spec.orchestrator", ""), field("NODE", "spec.node", ""),
		list("NETWORKS", "spec.ipNetworks", 0), field("INTERFACE", "spec.interfaceName", ""), list("PROFILES", "spec.profiles", 0),
		{"NATS", natPairs}},
		[]string{"WORKLOAD", "NODE", "NETWORKS", "INTERFACE"},
		[]string{"NAME", "WORKLOAD", "NODE", "NETWORKS", "INTERFACE", "PROFILES", "NATS"}},
	datastore.StagedKubernetesNetworkPolicies: {[]column{field("PODSELECTOR", "spec.podSelector", "")},
		[]string{"NAME"}, []string{"NAME", "PODSELECTOR"}},
	datastore.NetworkPolicies:             policyTable,
	datastore.GlobalNetworkPolicies:       policyTable,
	datastore.StagedNetworkPolicies:       policyTable,
	datastore.StagedGlobalNetworkPolicies: policyTable,
}

var policyTable = table{[]column{
	{"ORDER", order}, field("SELECTOR", "spec.selector", ""), field("TIER", "spec.tier", "")},
	[]string{"NAME", "TIER"}, []string{"NAME", "TIER", "ORDER", "SELECTOR"}}

// columnsOf picks the columns of a kind's table: those asked for by name, or the plain or wide ones.
func columnsOf(kind *datastore.Kind, asked []string, wide, namespace bool) ([]column, error) {
	t := tables[kind]
	known := append([]column{field("NAME", "metadata.name", "")}, t.columns...)
	if kind.Namespaced {
		known = append(known, field("NAMESPACE", "metadata.namespace", ""))
	}
	heads := asked
	switch {
	case len(asked) > 0:
	case len(t.ps) == 0:
		heads = []string{"NAME"}
	case wide && t.wider != nil:
		heads = t.wider
	default:
		heads = t.ps
	}
	if namespace && kind.Namespaced {
		heads = append([]string{"NAMESPACE"}, heads...)
	}
	var out []column
	for _, head := range heads {
		i := slices.IndexFunc(known, func(c column) bool { return c.head == head })
		if i < 0 {
			var names []string
			for _, c := range known {
				names = append(names, c.head)
			}
			slices.Sort(names)
			return nil, fmt.Errorf("unknown heading %s, valid values are: %s", head, strings.Join(names, ", "))
		}
		out = append(out, known[i])
	}
	return out, nil
}

// lookup follows a dotted path.
func lookup(doc map[string]any, path string) any {
	var value any = doc
	for _, step := range strings.Split(path, ".") {
		object, _ := value.(map[string]any)
		value = object[step]
	}
	return value
}

// plain prints a value as a template of calicoctl's would.
func plain(value any) string {
	if n, ok := value.(json.Number); ok && strings.ContainsAny(n.String(), ".eE") {
		if f, err := n.Float64(); err == nil {
			return fmt.Sprint(f)
		}
	}
	return fmt.Sprint(value)
}

// field shows one value, or what calicoctl shows where there is none.
func field(head, path, none string) column {
	return column{head, func(doc map[string]any) string {
		value := lookup(doc, path)
		if value == nil || value == "" {
			return none
		}
		return plain(value)
	}}
}

// order is a float64 to calicoctl: a million is 1e+06.
func order(doc map[string]any) string {
	n, ok := lookup(doc, "spec.order").(json.Number)
	if !ok {
		return "<nil>"
	}
	f, err := n.Float64()
	if err != nil {
		return n.String()
	}
	return fmt.Sprint(f)
}

// firstOf shows the first value that is there.
func firstOf(head, none string, paths ...string) column {
	return column{head, func(doc map[string]any) string {
		for _, path := range paths {
			if s, _ := lookup(doc, path).(string); s != "" {
				return s
			}
		}
		return none
	}}
}

func list(head, path string, limit int) column {
	return column{head, func(doc map[string]any) string { return joinAndTruncate(lookup(doc, path), ",", limit) }}
}

func count(head, path string) column {
	return column{head, func(doc map[string]any) string {
		items, _ := lookup(doc, path).([]any)
		return fmt.Sprint(len(items))
	}}
}

// asNumber shows an AS number that may be stored as a number, or as text in either notation.
func asNumber(path, none string) func(map[string]any) string {
	return func(doc map[string]any) string {
		value := lookup(doc, path)
		if value == nil {
			return none
		}
		n, err := datastore.ParseASNumber(fmt.Sprint(value))
		if err != nil {
			return fmt.Sprint(value)
		}
		return fmt.Sprint(n)
	}
}

// clusterASNumber is a key that the table of nodes finds the cluster's AS number under.
const clusterASNumber = "cluster AS number"

// nodeASN is the node's AS number, or the cluster's in parentheses; nothing for a node without BGP.
func nodeASN(doc map[string]any) string {
	if lookup(doc, "spec.bgp") == nil {
		return ""
	}
	cluster, _ := doc[clusterASNumber].(string)
	if cluster == "" {
		cluster = fmt.Sprint(datastore.DefaultASNumber)
	}
	return asNumber("spec.bgp.asNumber", "("+cluster+")")(doc)
}

func natPairs(doc map[string]any) string {
	var out []string
	nats, _ := lookup(doc, "spec.ipNATs").([]any)
	for _, nat := range nats {
		pair, _ := nat.(map[string]any)
		out = append(out, fmt.Sprintf("{%v %v}", pair["internalIP"], pair["externalIP"]))
	}
	return strings.Join(out, ",")
}
