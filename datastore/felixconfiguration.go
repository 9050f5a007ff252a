package datastore

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// prometheusHostPattern is Calico's rule for the address, or name, that metrics are served on.
var prometheusHostPattern = regexp.MustCompile(`^[a-zA-Z0-9:._+-]{1,64}$`)

// maxRouteTables is how many routing tables Calico lets routeTableRanges name together.
const maxRouteTables = 0xffff

func interfacePrefixes(name string) shape {
	return orEmpty(matching(name, "the beginnings of interface names, separated by ',': at most 15 characters each, without '/' and blanks", func(s string) bool {
		for prefix := range strings.SplitSeq(s, ",") {
			if prefix == "" || len(prefix) > 15 || strings.ContainsAny(prefix, "/ \t\n") {
				return false
			}
		}
		return true
	}))
}

// onOff are the words of many switches.
func onOff(name string) shape { return oneOf(name, true, "Enabled", "Disabled", "") }

func mtu(name string) shape { return whole(name, 0, 65535) }

func port(name string) shape { return whole(name, 0, 65535) }

var felixConfiguration = []shape{
	// tunnels
	flag("ipipEnabled"), mtu("ipipMTU"), flag("vxlanEnabled"), mtu("vxlanMTU"), mtu("vxlanMTUV6"), whole("vxlanPort", 1, 65535),
	whole("vxlanVNI", 0, 1<<24-1), flag("allowIPIPPacketsFromWorkloads"), flag("allowVXLANPacketsFromWorkloads"),
	flag("wireguardEnabled"), flag("wireguardEnabledV6"), whole("wireguardListeningPort", 1, 65535),
	whole("wireguardListeningPortV6", 1, 65535), mtu("wireguardMTU"), mtu("wireguardMTUV6"), whole("wireguardRoutingRulePriority", 1, 32765),
	orEmpty(interfaceName("wireguardInterfaceName")), orEmpty(interfaceName("wireguardInterfaceNameV6")),
	listOf(ipv4Network("externalNodesList")),
	// interfaces and routes
	interfacePrefixes("interfacePrefix"), text("interfaceExclude"), orEmpty(expression("mtuIfacePattern")), flag("ipv6Support"),
	oneOf("ipForwarding", true, "Enabled", "Disabled", ""), ipv4("deviceRouteSourceAddress"), ipv6("deviceRouteSourceAddressIPv6"),
	whole("deviceRouteProtocol", 0, 255), flag("removeExternalRoutes"), flag("routeSyncDisabled"),
	oneOf("routeSource", true, "CalicoIPAM", "WorkloadIPs", ""),
	object("routeTableRange", required(whole("min", 1, 250)), required(whole("max", 1, 250))),
	listOf(object("routeTableRanges", required(whole("min", 1, 1<<32-1)), required(whole("max", 1, 1<<32-1)))),
	oneOf("serviceLoopPrevention", true, "Drop", "Reject", "Disabled", ""), oneOf("workloadSourceSpoofing", true, "Disabled", "Any", ""),
	// address translation
	ipv4("natOutgoingAddress"), {name: "natPortRange", want: "a port, or a range such as 32768:65535", ok: portRange},
	oneOf("natOutgoingExclusions", false, "IPPoolsOnly", "IPPoolsAndHostIPs"), onOff("floatingIPs"),
	// what is logged, measured and reported
	oneOf("logSeverityScreen", true, append(severity, "")...), oneOf("logSeverityFile", true, append(severity, "")...),
	oneOf("logSeveritySys", true, append(severity, "")...), flag("healthEnabled"), text("healthHost"), port("healthPort"),
	flag("prometheusMetricsEnabled"), port("prometheusMetricsPort"), flag("prometheusGoMetricsEnabled"), flag("prometheusProcessMetricsEnabled"),
	orEmpty(matching("prometheusMetricsHost", "an address or a host name of at most 64 characters", prometheusHostPattern.MatchString)),
	port("debugPort"), flag("usageReportingEnabled"),
	// how often
	duration("routeRefreshInterval"), duration("interfaceRefreshInterval"), duration("iptablesRefreshInterval"),
	duration("ipsetsRefreshInterval"), duration("netlinkTimeout"), duration("reportingInterval"), duration("reportingTTL"),
	// filtering
	oneOf("chainInsertMode", true, "Insert", "Append", ""), oneOf("defaultEndpointToHostAction", true, "Drop", "Accept", "Return", ""),
	oneOf("iptablesBackend", true, "Auto", "Legacy", "NFT", ""),
	// the BPF data plane
	flag("bpfEnabled"), oneOf("bpfLogLevel", true, "Debug", "Info", "Off", ""), oneOf("bpfExternalServiceMode", true, "Tunnel", "DSR", ""),
	orEmpty(expression("bpfDataIfacePattern")), oneOf("bpfConnectTimeLoadBalancing", true, "TCP", "Enabled", "Disabled", ""),
	onOff("bpfHostNetworkedNATWithoutCTLB"),
}

// validateFelix checks what of a FelixConfiguration depends on several fields.
func validateFelix(_ *Resource, spec map[string]any) error {
	if spec["routeTableRange"] != nil && spec["routeTableRanges"] != nil {
		return errors.New("spec.routeTableRange and spec.routeTableRanges: expected at most one of them")
	}
	if one, ok := spec["routeTableRange"].(map[string]any); ok {
		if _, err := tables("spec.routeTableRange", one); err != nil {
			return err
		}
	}
	list, _ := spec["routeTableRanges"].([]any)
	var total int64
	for i, item := range list {
		one, _ := item.(map[string]any)
		n, err := tables(fmt.Sprintf("spec.routeTableRanges[%d]", i), one)
		if err != nil {
			return err
		}
		total += n
	}
	if total > maxRouteTables {
		return fmt.Errorf("spec.routeTableRanges: expected at most %d tables together, got %d", maxRouteTables, total)
	}
	return nil
}

// tables is how many routing tables a range has, whose shape was checked.
func tables(path string, one map[string]any) (int64, error) {
	low, _ := one["min"].(json.Number)
	high, _ := one["max"].(json.Number)
	a, err1 := low.Int64()
	b, err2 := high.Int64()
	if err1 != nil || err2 != nil || a > b {
		return 0, fmt.Errorf("%s %s to %s: expected min not above max", path, low, high)
	}
	return b - a + 1, nil
}
