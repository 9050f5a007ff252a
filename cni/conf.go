package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// Defaults of the network configuration.
const (
	// PluginType is the value of "type" in the network configuration: the base name of the plugin's binary may differ.
	PluginType = "margay"
	// DefaultSocket is where the agent listens.
	DefaultSocket = "/run/margay/cni.sock"
	// DefaultQueueDir is where DELs wait while the agent is away.
	DefaultQueueDir = "/var/lib/margay/cni/deleted"
	// DefaultIfName is the interface name that Kubernetes runtimes ask for; it alone gets Calico's plain names.
	DefaultIfName = "eth0"
)

// maxHandle bounds "network.containerID.ifname": it is kept in the interface's alias, of which Linux stores 255 bytes.
const maxHandle = 180

// NetConf is the network configuration, as read from the plugin's standard input.
type NetConf struct {
	types.PluginConf
	// Socket is the agent's unix socket.
	Socket string `json:"socket,omitempty"`
	// QueueDir is the directory in which DELs wait for an agent that is away.
	QueueDir string `json:"queueDir,omitempty"`
	// MTU of the pod's interface in bytes; 0 leaves the choice to the agent (underlay's minus the encapsulation).
	MTU int `json:"mtu,omitempty"`
	// IPAM says which addresses a pod gets, and from which pools.
	IPAM IPAMConf `json:"ipam,omitempty"`
	// RuntimeConfig and Args are the runtime's.
	RuntimeConfig RuntimeConfig `json:"runtimeConfig,omitzero"`
	Args          Args          `json:"args,omitzero"`
	// LogLevel is "", "error", "warning", "info" or "debug"; at "debug" the plugin tells on standard error what it did.
	LogLevel string `json:"logLevel,omitempty"`
}

// IPAMConf is the optional "ipam" section. Addresses always come from the agent's own IPAM.
type IPAMConf struct {
	// Type is "" or "margay".
	Type string `json:"type,omitempty"`
	// AssignIPv4 and AssignIPv6 are "true", "false" or absent: then a pod gets IPv4, and IPv6 where there is a pool for it.
	AssignIPv4 any `json:"assign_ipv4,omitempty"`
	AssignIPv6 any `json:"assign_ipv6,omitempty"`
	// IPv4Pools and IPv6Pools are names or prefixes of the pools to choose from; empty means any.
	IPv4Pools []string `json:"ipv4_pools,omitempty"`
	IPv6Pools []string `json:"ipv6_pools,omitempty"`

	assign4, assign6 string
}

// ParseConf decodes and checks a network configuration and fills in the defaults. An error is a *types.Error that
// names the field and what was expected.
func ParseConf(data []byte) (*NetConf, error) {
	c := &NetConf{}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "network configuration: not valid JSON", err.Error())
	}
	if c.Socket == "" {
		c.Socket = DefaultSocket
	}
	if c.QueueDir == "" {
		c.QueueDir = DefaultQueueDir
	}
	bad := badConf
	switch {
	case c.Name == "":
		return nil, bad("name: missing, expected the network's name")
	case !filepath.IsAbs(c.Socket):
		return nil, bad("socket: %q, expected an absolute path", c.Socket)
	case len(c.Socket) > 107: // sizeof(sun_path) - 1
		return nil, bad("socket: %d bytes, expected at most 107 as Linux allows", len(c.Socket))
	case !filepath.IsAbs(c.QueueDir):
		return nil, bad("queueDir: %q, expected an absolute path", c.QueueDir)
	case c.MTU != 0 && (c.MTU < 68 || c.MTU > 65535): // RFC 791: every module forwards 68 bytes unfragmented
		return nil, bad("mtu: %d, expected 68 to 65535, or 0 to let the agent choose", c.MTU)
	case c.IPAM.Type != "" && c.IPAM.Type != PluginType:
		return nil, bad("ipam.type: %q, expected %q or none: addresses come from the agent", c.IPAM.Type, PluginType)
	}
	switch c.LogLevel {
	case "", "error", "warning", "info", "debug":
	default:
		return nil, bad("logLevel: %q, expected error, warning, info or debug", c.LogLevel)
	}
	for field, pools := range map[string][]string{"ipv4_pools": c.IPAM.IPv4Pools, "ipv6_pools": c.IPAM.IPv6Pools} {
		if i := slices.Index(pools, ""); i >= 0 {
			return nil, bad("ipam.%s[%d]: empty, expected a pool's name or prefix", field, i)
		}
	}
	var err error
	if c.IPAM.assign4, err = readAssign("assign_ipv4", c.IPAM.AssignIPv4, AssignRequired); err != nil {
		return nil, err
	}
	if c.IPAM.assign6, err = readAssign("assign_ipv6", c.IPAM.AssignIPv6, AssignIfPool); err != nil {
		return nil, err
	}
	if c.IPAM.assign4 == AssignNone && c.IPAM.assign6 == AssignNone {
		return nil, bad("ipam.assign_ipv4 and ipam.assign_ipv6: both false, expected at least one of them to be true")
	}
	return c, nil
}

// PodArgs is what CNI_ARGS says of the pod. All fields may be empty: a runtime that is not Kubernetes sends none.
type PodArgs struct {
	Namespace string `json:"namespace,omitempty"` // K8S_POD_NAMESPACE
	Name      string `json:"name,omitempty"`      // K8S_POD_NAME
	UID       string `json:"uid,omitempty"`       // K8S_POD_UID
	// IP asks for this very address (CNI_ARGS key IP); the zero value for any. The Request has it in IPv4 or IPv6.
	IP netip.Addr `json:"-"`
}

// ParseArgs decodes CNI_ARGS, "KEY=value;KEY=value". Keys it does not know are ignored, with or without IgnoreUnknown:
// each runtime brings some of its own. An error is a *types.Error.
func ParseArgs(s string) (PodArgs, error) {
	var a PodArgs
	bad := func(format string, args ...any) (PodArgs, error) {
		return PodArgs{}, types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: "+fmt.Sprintf(format, args...), "")
	}
	for pair := range strings.SplitSeq(s, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			return bad("%q, expected KEY=value", pair)
		}
		var field *string
		switch key {
		case "K8S_POD_NAMESPACE":
			field = &a.Namespace
		case "K8S_POD_NAME":
			field = &a.Name
		case "K8S_POD_UID":
			field = &a.UID
		case "IP":
			ip, err := parseIP(value)
			if err != nil {
				return bad("IP: %v", err)
			}
			a.IP = ip
			continue
		default:
			continue
		}
		if !validName(value) {
			return bad("%s: %q, expected at most 253 printable characters", key, value)
		}
		*field = value
	}
	if (a.Namespace == "") != (a.Name == "") {
		return bad("expected both K8S_POD_NAMESPACE and K8S_POD_NAME, or neither")
	}
	return a, nil
}

// validName accepts what Kubernetes can call an object (RFC 1123 subdomain) and a little more, so that other
// orchestrators may use their own names; it keeps control characters and spaces out of logs and aliases.
func validName(s string) bool {
	if len(s) > 253 {
		return false
	}
	for _, r := range s {
		if r <= ' ' || r > '~' {
			return false
		}
	}
	return true
}
