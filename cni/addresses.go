package cni

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// Whether a pod gets an address of a family.
const (
	AssignNone     = "none"
	AssignIfPool   = "if-pool"  // where there is a pool that serves the node
	AssignRequired = "required" // or the ADD fails
)

// Family is what a pod is to have of one address family.
type Family struct {
	// Assign is AssignNone, AssignIfPool or AssignRequired; empty means required for IPv4 and none for IPv6.
	Assign string `json:"assign,omitempty"`
	// Pools are names or prefixes of the pools to choose from; empty means any that serves the node.
	Pools []string `json:"pools,omitempty"`
	// IP is the address wanted; the zero value for any.
	IP netip.Addr `json:"ip,omitzero"`
}

// Calico's annotations on a pod. They reach the plugin where the network configuration's "capabilities" name
// io.kubernetes.cri.pod-annotations, in containerd (1.5 and later) and in CRI-O: no Kubernetes API is asked.
const (
	annotationPools4   = "cni.projectcalico.org/ipv4pools"  // JSON list of names or prefixes
	annotationPools6   = "cni.projectcalico.org/ipv6pools"  // the same
	annotationAddrs    = "cni.projectcalico.org/ipAddrs"    // JSON list, one address of a family
	annotationFamilies = "cni.projectcalico.org/ipFamilies" // JSON list of "ipv4", "ipv6"
	annotationMAC      = "cni.projectcalico.org/hwAddr"     // of the pod's interface
)

// RuntimeConfig is what the runtime adds for the capabilities that the network configuration declares.
type RuntimeConfig struct {
	PodAnnotations map[string]string `json:"io.kubernetes.cri.pod-annotations,omitempty"`
	IPs            []string          `json:"ips,omitempty"` // ADDRESS or ADDRESS/LENGTH
	MAC            string            `json:"mac,omitempty"`
}

// Args is the configuration's "args" section, as the CNI conventions have it.
type Args struct {
	CNI struct {
		IPs []string `json:"ips,omitempty"`
	} `json:"cni,omitzero"`
}

// addresses says what the pod is to have: what the configuration says, and over it what the pod's annotations say. Of
// addresses asked for in several places the first counts: the annotation, the capability "ips", args.cni.ips, CNI_ARGS.
func (c *NetConf) addresses(pod PodArgs) (four, six Family, mac string, err error) {
	fail := func(err error) (Family, Family, string, error) { return Family{}, Family{}, "", err }
	four = Family{Assign: c.IPAM.assign4, Pools: c.IPAM.IPv4Pools}
	six = Family{Assign: c.IPAM.assign6, Pools: c.IPAM.IPv6Pools}
	notes := c.RuntimeConfig.PodAnnotations
	for key, pools := range map[string]*[]string{annotationPools4: &four.Pools, annotationPools6: &six.Pools} {
		if list, ok, err := annotatedList(notes, key); err != nil {
			return fail(err)
		} else if ok {
			*pools = list
		}
	}
	if families, ok, err := annotatedList(notes, annotationFamilies); err != nil {
		return fail(err)
	} else if ok {
		if four.Assign, six.Assign, err = familiesWanted(families); err != nil {
			return fail(err)
		}
	}
	wanted, ok, err := annotatedList(notes, annotationAddrs)
	where := "annotation " + annotationAddrs
	if err != nil {
		return fail(err)
	}
	switch {
	case ok:
	case len(c.RuntimeConfig.IPs) > 0:
		wanted, where = c.RuntimeConfig.IPs, "runtimeConfig.ips"
	case len(c.Args.CNI.IPs) > 0:
		wanted, where = c.Args.CNI.IPs, "args.cni.ips"
	case pod.IP.IsValid():
		wanted, where = []string{pod.IP.String()}, "CNI_ARGS: IP"
	}
	if four.IP, six.IP, err = onePerFamily(wanted, where); err != nil {
		return fail(err)
	}
	// Who asks for an address of one family only, and did not say that the other is required, gets that.
	if six.IP.IsValid() && !four.IP.IsValid() && c.IPAM.AssignIPv4 == nil && len(notes[annotationFamilies]) == 0 {
		four.Assign = AssignIfPool
	}
	mac, where = c.RuntimeConfig.MAC, "runtimeConfig.mac"
	if text, ok := notes[annotationMAC]; ok {
		mac, where = text, "annotation "+annotationMAC
	}
	if err := checkMAC(mac); err != nil {
		return fail(badConf("%s: %v", where, err))
	}
	return four, six, mac, nil
}

func badConf(format string, args ...any) error {
	return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf(format, args...), "")
}

// annotatedList reads an annotation that is a JSON list of strings; false if the pod does not have it.
func annotatedList(notes map[string]string, key string) (list []string, ok bool, err error) {
	text, ok := notes[key]
	if !ok {
		return nil, false, nil
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil || len(list) == 0 || slices.Contains(list, "") {
		return nil, false, badConf("annotation %s: %q, expected a JSON list of strings such as [\"a\"]", key, text)
	}
	return list, true, nil
}

func familiesWanted(families []string) (four, six string, err error) {
	four, six = AssignNone, AssignNone
	for _, f := range families {
		switch strings.ToLower(f) {
		case "ipv4":
			four = AssignRequired
		case "ipv6":
			six = AssignRequired
		default:
			return "", "", badConf("annotation %s: %q, expected ipv4 or ipv6", annotationFamilies, f)
		}
	}
	return four, six, nil
}

// onePerFamily reads addresses, of each family at most one.
func onePerFamily(list []string, where string) (four, six netip.Addr, err error) {
	for _, text := range list {
		addr, err := parseIP(text)
		if err != nil {
			return four, six, badConf("%s: %v", where, err)
		}
		into := &four
		if addr.Is6() {
			into = &six
		}
		if into.IsValid() {
			return four, six, badConf("%s: %s and %s, expected one address of a family", where, *into, addr)
		}
		*into = addr
	}
	return four, six, nil
}

// parseIP reads ADDRESS or ADDRESS/LENGTH, of which only the address counts.
func parseIP(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if p, perr := netip.ParsePrefix(text); err != nil && perr == nil {
		addr, err = p.Addr(), nil
	}
	if err != nil || addr.Is4In6() || addr.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q, expected an IP address", text)
	}
	return addr, nil
}

// checkMAC accepts no address at all, or a unicast one of six bytes.
func checkMAC(mac string) error {
	if mac == "" {
		return nil
	}
	m, err := net.ParseMAC(mac)
	if err != nil || len(m) != 6 || m[0]&1 != 0 || m.String() == "00:00:00:00:00:00" {
		return fmt.Errorf("%q, expected a unicast hardware address such as 02:00:00:00:00:01", mac)
	}
	return nil
}

// check validates what came from outside.
func (f Family) check(field string, six bool) error {
	switch f.Assign {
	case "", AssignNone, AssignIfPool, AssignRequired:
	default:
		return fmt.Errorf("%s.assign: %q, expected %s, %s or %s", field, f.Assign, AssignNone, AssignIfPool, AssignRequired)
	}
	if f.IP.IsValid() && (f.IP.Is6() != six || f.IP.Is4In6() || f.IP.Zone() != "") {
		return fmt.Errorf("%s.ip: %s, expected an %s address", field, f.IP, field)
	}
	return nil
}

// readAssign turns "true", true, "false" and false into what is meant; Calico writes text.
func readAssign(field string, v any, unset string) (string, error) {
	switch v {
	case nil:
		return unset, nil
	case true, "true":
		return AssignRequired, nil
	case false, "false":
		return AssignNone, nil
	}
	return "", badConf("ipam.%s: %v, expected \"true\" or \"false\"", field, v)
}
