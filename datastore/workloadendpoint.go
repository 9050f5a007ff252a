package datastore

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
)

// containerIDPattern is Calico's rule for a container's ID.
var containerIDPattern = regexp.MustCompile(`^[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?$`)

// portNamePattern is the rule for a port's name, beside those that portName adds (RFC 6335 5.1).
var portNamePattern = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)

// resourceName is a field that holds the name of something, or nothing.
func resourceName(name string) shape {
	return orEmpty(matching(name, "a name of lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit", namePattern.MatchString))
}

// singleAddress is an address, alone or with the longest prefix length of its family.
func singleAddress(name string) shape {
	return matching(name, "one address, such as 10.244.0.1/32 or fd00::1/128", func(s string) bool {
		p, err := parseAddress(s)
		return err == nil && p.IsSingleIP()
	})
}

func portName(name string) shape {
	return orEmpty(matching(name, "a port's name: at most 15 lower-case letters, digits and single '-' between them, at least one letter", func(s string) bool {
		return len(s) <= 15 && portNamePattern.MatchString(s) && strings.ContainsAny(s, "abcdefghijklmnopqrstuvwxyz")
	}))
}

// workloadEndpoint is the spec of a WorkloadEndpoint.
var workloadEndpoint = []shape{
	resourceName("orchestrator"), resourceName("workload"), resourceName("node"), resourceName("pod"), resourceName("endpoint"),
	resourceName("serviceAccountName"), listOf(matching("profiles", "a profile's name", namePattern.MatchString)),
	orEmpty(matching("containerID", "letters, digits and '-', beginning and ending with a letter or digit", containerIDPattern.MatchString)),
	listOf(singleAddress("ipNetworks")), listOf(object("ipNATs", required(address("internalIP")), required(address("externalIP")))),
	ipv4("ipv4Gateway"), ipv6("ipv6Gateway"), required(interfaceName("interfaceName")),
	orEmpty(matching("mac", "a MAC address such as ee:ee:ee:ee:ee:ee", func(s string) bool { _, err := net.ParseMAC(s); return err == nil })),
	listOf(object("ports", portName("name"), required(portProtocol("protocol")), required(whole("port", 1, 65535)), whole("hostPort", 0, 65535),
		orEmpty(network("hostIP")))),
	listOf(network("allowSpoofedSourcePrefixes")), object("qosControls"),
}

// validateEndpoint checks what of a WorkloadEndpoint depends on several fields.
func validateEndpoint(r *Resource, spec map[string]any) error {
	if err := validateNATs(spec); err != nil {
		return err
	}
	ports, _ := spec["ports"].([]any)
	for i, item := range ports {
		port, _ := item.(map[string]any)
		if name, _ := port["name"].(string); name == "" && !set(port["hostPort"]) {
			return fmt.Errorf("spec.ports[%d].name: expected one, or a hostPort beside it", i)
		}
	}
	name, err := endpointName(spec)
	if err != nil {
		return err
	}
	if r.Metadata.Name != name {
		return fmt.Errorf("metadata.name %q: expected %s, which spec.%s give", r.Metadata.Name, name, strings.Join(endpointNameFields(spec), ", spec."))
	}
	return nil
}

// set says whether a number is there and not 0.
func set(value any) bool { return value != nil && value != json.Number("0") }

// endpointNameFields are the fields that a WorkloadEndpoint's name is made of, which depend on the orchestrator.
func endpointNameFields(spec map[string]any) []string {
	workload := "workload"
	switch spec["orchestrator"] {
	case "k8s":
		workload = "pod"
	case "cni":
		workload = "containerID"
	case "libnetwork":
		workload = "orchestrator"
	}
	return []string{"node", "orchestrator", workload, "endpoint"}
}

// endpointName is the name that a WorkloadEndpoint must have: the fields that tell it from others, with their '-' doubled,
// and a single '-' between them.
func endpointName(spec map[string]any) (string, error) {
	fields := endpointNameFields(spec)
	parts := make([]string, len(fields))
	for i, field := range fields {
		value, _ := spec[field].(string)
		if value == "" {
			return "", fmt.Errorf("spec.%s: expected one, it is a part of metadata.name", field)
		}
		parts[i] = strings.ReplaceAll(value, "-", "--")
	}
	return strings.Join(parts, "-"), nil
}

// validateNATs checks that each address that is translated to is one of the endpoint's.
func validateNATs(spec map[string]any) error {
	own := map[netip.Addr]bool{}
	networks, _ := spec["ipNetworks"].([]any)
	for _, text := range networks {
		if p, err := parseAddress(fmt.Sprint(text)); err == nil {
			own[p.Addr().Unmap()] = true
		}
	}
	nats, _ := spec["ipNATs"].([]any)
	for i, item := range nats {
		nat, _ := item.(map[string]any)
		inside, err1 := netip.ParseAddr(fmt.Sprint(nat["internalIP"]))
		outside, err2 := netip.ParseAddr(fmt.Sprint(nat["externalIP"]))
		switch path := fmt.Sprintf("spec.ipNATs[%d]", i); {
		case err1 != nil || err2 != nil: // the shape has said so
		case inside.Unmap().Is4() != outside.Unmap().Is4():
			return fmt.Errorf("%s.externalIP %q: expected an address of internalIP's family (%s)", path, outside, inside)
		case !own[inside.Unmap()]:
			return fmt.Errorf("%s.internalIP %q: expected an address of spec.ipNetworks", path, inside)
		}
	}
	return nil
}
