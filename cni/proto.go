package cni

import (
	"bytes"
	"crypto/sha1"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"
)

// Protocol is the version of the JSON protocol between plugin and agent.
const Protocol = 1

// MaxMessage bounds a request and a response, in bytes. The longest by far is a GC's list of attachments.
const MaxMessage = 1 << 20

// Error codes of ours (the CNI specification leaves 100 and above to plugins).
const (
	// CodeExists: the container has that interface already.
	CodeExists uint = 100
	// CodeCheck: CHECK found the attachment other than it was made.
	CodeCheck uint = 101
	// CodeIPAM: no address could be had.
	CodeIPAM uint = 102
	// CodePlumbing: the kernel refused an interface, address, route or rule.
	CodePlumbing uint = 103
)

// Verbs of a Request.
const (
	Add    = "ADD"
	Del    = "DEL"
	Check  = "CHECK"
	GC     = "GC"
	Status = "STATUS"
)

// Request is what the plugin asks. One connection carries one request, ended by shutting down the writing half, and
// one response. ADD and CHECK carry the open network namespace as SCM_RIGHTS ancillary data with the first byte.
type Request struct {
	Protocol    int     `json:"protocol"`
	Verb        string  `json:"verb"`
	Network     string  `json:"network"`
	ContainerID string  `json:"containerID,omitempty"`
	IfName      string  `json:"ifName,omitempty"`
	Netns       string  `json:"netns,omitempty"` // the runtime's path, for the result and messages only
	Pod         PodArgs `json:"pod,omitzero"`
	MTU         int     `json:"mtu,omitempty"` // bytes; 0: the agent's choice
	// IPv4 and IPv6 say, for ADD, which addresses the pod is to have; MAC its interface's hardware address, empty for any.
	IPv4 Family `json:"ipv4,omitzero"`
	IPv6 Family `json:"ipv6,omitzero"`
	MAC  string `json:"mac,omitempty"`
	// Expect is, for CHECK, what the previous result said.
	Expect *Attachment `json:"expect,omitempty"`
	// Valid lists, for GC, the attachments to keep; an empty list keeps none.
	Valid []types.GCAttachment `json:"valid,omitempty"`
}

// Attachment describes one interface of one pod. It has at least one address.
type Attachment struct {
	HostName string     `json:"hostName"`
	HostMAC  string     `json:"hostMAC,omitempty"`
	PodMAC   string     `json:"podMAC,omitempty"`
	Address  netip.Addr `json:"address,omitzero"`  // IPv4
	Address6 netip.Addr `json:"address6,omitzero"` // IPv6
	MTU      int        `json:"mtu,omitempty"`     // bytes
	// Gateway and Gateway6 are the link-local addresses by which the pod's default routes go.
	Gateway  netip.Addr `json:"gateway,omitzero"`
	Gateway6 netip.Addr `json:"gateway6,omitzero"`
}

// Response is the agent's answer: Error, or for ADD the Attachment.
type Response struct {
	Protocol   int          `json:"protocol"`
	Error      *types.Error `json:"error,omitempty"`
	Attachment *Attachment  `json:"attachment,omitempty"`
}

// Handle is the name under which IPAM keeps the address: Calico's "network.containerID", and for any interface but
// eth0 the interface's name after it, so that a container may have several.
func (r *Request) Handle() string {
	h := r.Network + "." + r.ContainerID
	if r.IfName != DefaultIfName {
		h += "." + r.IfName
	}
	return h
}

// HostName is the name of the host's side: Calico's "cali" and the first 11 hexadecimal digits of the SHA-1 of
// "namespace.pod". Without a pod's name the container's ID is hashed instead; an interface other than eth0 is
// hashed with ".ifname" appended.
func (r *Request) HostName() string {
	id := r.ContainerID
	if r.Pod.Name != "" {
		id = r.Pod.Namespace + "." + r.Pod.Name
	}
	if r.IfName != DefaultIfName {
		id += "." + r.IfName
	}
	sum := sha1.Sum([]byte(id))
	return "cali" + hex.EncodeToString(sum[:])[:11]
}

// Validate checks a request that came from outside. An error is a *types.Error.
func (r *Request) Validate() error {
	bad := func(format string, args ...any) error {
		return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf(format, args...), "")
	}
	if r.Protocol != Protocol {
		return types.NewError(types.ErrIncompatibleCNIVersion,
			fmt.Sprintf("protocol: %d, expected %d: margay-cni and margay-agent are of different releases", r.Protocol, Protocol), "")
	}
	switch r.Verb {
	case Status:
		return nil
	case Add, Del, Check, GC:
	default:
		return bad("verb: %q, expected ADD, DEL, CHECK, GC or STATUS", r.Verb)
	}
	if r.Network == "" {
		return types.NewError(types.ErrInvalidNetworkConfig, "network: missing, expected the network's name", "")
	}
	if err := utils.ValidateNetworkName(r.Network); err != nil {
		return err
	}
	if r.Verb == GC {
		return nil
	}
	if err := utils.ValidateContainerID(r.ContainerID); err != nil {
		return err
	}
	if err := utils.ValidateInterfaceName(r.IfName); err != nil {
		return err
	}
	if n := len(r.Network) + len(r.ContainerID) + len(r.IfName) + 2; n > maxHandle {
		return bad("containerID: network name, container ID and interface name have %d bytes together, expected at most %d", n, maxHandle)
	}
	if !validName(r.Pod.Namespace) || !validName(r.Pod.Name) || !validName(r.Pod.UID) {
		return bad("pod: names expected to be at most 253 printable characters")
	}
	if r.MTU != 0 && (r.MTU < 68 || r.MTU > 65535) {
		return bad("mtu: %d, expected 68 to 65535, or 0", r.MTU)
	}
	if err := errors.Join(r.IPv4.check("ipv4", false), r.IPv6.check("ipv6", true)); err != nil {
		return bad("%v", err)
	}
	if err := checkMAC(r.MAC); err != nil {
		return bad("mac: %v", err)
	}
	return nil
}

// ReadRequest decodes and validates the one request that rd holds. Errors are *types.Error.
func ReadRequest(rd io.Reader) (*Request, error) {
	r := &Request{}
	if err := readMessage(rd, r); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "request: "+err.Error(), "")
	}
	if err := r.Validate(); err != nil {
		return nil, err
	}
	return r, nil
}

func readMessage(rd io.Reader, v any) error {
	data, err := io.ReadAll(io.LimitReader(rd, MaxMessage+1))
	if err != nil {
		return err
	}
	if len(data) > MaxMessage {
		return fmt.Errorf("longer than %d bytes", MaxMessage)
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return io.ErrUnexpectedEOF
	}
	return json.Unmarshal(data, v)
}

// AsError turns any error into one the CNI can print; code is used where err is no *types.Error itself.
func AsError(err error, code uint) *types.Error {
	if err == nil {
		return nil
	}
	var e *types.Error
	if errors.As(err, &e) {
		return e
	}
	return types.NewError(code, strings.TrimSpace(err.Error()), "")
}
