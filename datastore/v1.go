package datastore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"sigs.k8s.io/yaml"
)

// The v1 kinds (Calico up to 2.6), as far as they are converted.
type (
	v1Pool struct {
		v1Header
		Metadata struct {
			CIDR string `json:"cidr"`
		} `json:"metadata"`
		Spec struct {
			IPIP *struct {
				Enabled bool   `json:"enabled"`
				Mode    string `json:"mode"`
			} `json:"ipip"`
			NATOutgoing bool `json:"nat-outgoing"`
			Disabled    bool `json:"disabled"`
		} `json:"spec"`
	}
	v1Peer struct {
		v1Header
		Metadata struct {
			Scope  string `json:"scope"`
			Node   string `json:"node"`
			PeerIP string `json:"peerIP"`
		} `json:"metadata"`
		Spec struct {
			ASNumber ASNumber `json:"asNumber"`
		} `json:"spec"`
	}
	v1Node struct {
		v1Header
		Metadata struct {
			Name string `json:"name"`
		} `json:"metadata"`
		Spec struct {
			BGP *struct {
				ASNumber    *ASNumber `json:"asNumber"`
				IPv4Address string    `json:"ipv4Address"`
				IPv6Address string    `json:"ipv6Address"`
			} `json:"bgp"`
			OrchRefs []OrchRef `json:"orchRefs"`
		} `json:"spec"`
	}
	v1Header struct {
		Kind       string `json:"kind"`
		APIVersion string `json:"apiVersion"`
	}
)

// ConvertV1 reads a manifest of Calico's v1 API (ipPool, bgpPeer, node; several documents, arrays and lists) and gives the
// v3 resources that Calico's own conversion gives. Like DecodeManifest it is strict, and all or nothing.
func ConvertV1(data []byte) ([]Object, error) {
	var (
		out  []Object
		errs []error
	)
	for i, doc := range documents(data) {
		raw, err := yaml.YAMLToJSONStrict(doc)
		if err == nil {
			var objs []Object
			if objs, err = convertV1(raw); err == nil {
				out = append(out, objs...)
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("document %d: %w", i+1, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if len(out) == 0 {
		return nil, ErrNoResources
	}
	return out, nil
}

func convertV1(raw []byte) ([]Object, error) {
	var items []json.RawMessage
	if bytes.HasPrefix(bytes.TrimSpace(raw), []byte("[")) {
		if err := json.Unmarshal(raw, &items); err != nil {
			return nil, err
		}
		return convertItems(items)
	}
	var head struct {
		v1Header
		Items []json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return nil, fmt.Errorf("expected a resource with kind, apiVersion, metadata and spec: %w", JSONError(err))
	}
	if head.APIVersion != "v1" {
		return nil, fmt.Errorf("%s: apiVersion %q: expected v1, the version that is converted", head.Kind, head.APIVersion)
	}
	var (
		obj Object
		err error
	)
	switch strings.ToLower(head.Kind) {
	case "ippoollist", "bgppeerlist", "nodelist", "list":
		return convertItems(head.Items)
	case "ippool":
		obj, err = v1Into(raw, v1Pool.convert)
	case "bgppeer":
		obj, err = v1Into(raw, v1Peer.convert)
	case "node":
		obj, err = v1Into(raw, v1Node.convert)
	default:
		return nil, fmt.Errorf("kind %q: expected ipPool, bgpPeer or node", head.Kind)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", head.Kind, err)
	}
	if err := prepare(obj); err != nil {
		return nil, err
	}
	return []Object{obj}, nil
}

func convertItems(items []json.RawMessage) ([]Object, error) {
	var out []Object
	for i, item := range items {
		// A list in a list has no meaning, and would let a small file nest without end.
		if bytes.HasPrefix(bytes.TrimSpace(item), []byte("[")) || bytes.Contains(item, []byte(`"items"`)) {
			return nil, fmt.Errorf("[%d]: expected a resource, not a list", i)
		}
		objs, err := convertV1(item)
		if err != nil {
			return nil, fmt.Errorf("[%d]: %w", i, err)
		}
		out = append(out, objs...)
	}
	return out, nil
}

// v1Into decodes strictly into V and converts.
func v1Into[V any](raw []byte, convert func(V) (Object, error)) (Object, error) {
	var v V
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		return nil, errors.New(strings.TrimPrefix(JSONError(err).Error(), "json: "))
	}
	return convert(v)
}

func (v v1Pool) convert() (Object, error) {
	prefix, err := netip.ParsePrefix(v.Metadata.CIDR)
	if err != nil {
		return nil, fmt.Errorf("metadata.cidr %q: expected a prefix such as 10.244.0.0/16", v.Metadata.CIDR)
	}
	p := NewIPPool(addressName(prefix.Masked().String()))
	p.Spec.CIDR, p.Spec.NATOutgoing, p.Spec.Disabled, p.Spec.IPIPMode = prefix.Masked().String(), v.Spec.NATOutgoing, v.Spec.Disabled, Never
	if v.Spec.IPIP != nil {
		mode := strings.ToLower(v.Spec.IPIP.Mode)
		switch {
		case mode != "" && mode != "always" && mode != "cross-subnet":
			return nil, fmt.Errorf("spec.ipip.mode %q: expected always or cross-subnet", v.Spec.IPIP.Mode)
		case v.Spec.IPIP.Enabled && mode == "cross-subnet":
			p.Spec.IPIPMode = CrossSubnet
		case v.Spec.IPIP.Enabled:
			p.Spec.IPIPMode = Always
		}
	}
	return p, nil
}

func (v v1Peer) convert() (Object, error) {
	m := v.Metadata
	ip, err := netip.ParseAddr(m.PeerIP)
	if err != nil {
		return nil, fmt.Errorf("metadata.peerIP %q: expected an address", m.PeerIP)
	}
	p := NewBGPPeer(addressName(ip.WithZone("").StringExpanded()))
	p.Spec.PeerIP, p.Spec.ASNumber = ip.String(), v.Spec.ASNumber
	switch {
	case m.Scope == "global" && m.Node == "":
	case m.Scope == "node" && m.Node != "":
		p.Spec.Node = nodeName(m.Node)
		p.Metadata.Name = p.Spec.Node + "." + p.Metadata.Name
	default:
		return nil, fmt.Errorf("metadata.scope %q and metadata.node %q: expected scope global without a node, or scope node with one", m.Scope, m.Node)
	}
	return p, nil
}

func (v v1Node) convert() (Object, error) {
	n := NewNode(nodeName(v.Metadata.Name))
	n.Spec.OrchRefs = v.Spec.OrchRefs
	if b := v.Spec.BGP; b != nil {
		if b.IPv4Address == "" && b.IPv6Address == "" {
			return nil, errors.New("spec.bgp: expected ipv4Address, ipv6Address or both")
		}
		n.Spec.BGP = &NodeBGP{ASNumber: b.ASNumber, IPv4Address: b.IPv4Address, IPv6Address: b.IPv6Address}
	}
	return n, nil
}

// addressName makes a v3 name of an address or a prefix, as Calico does: 10.0.0.0/8 is 10-0-0-0-8. (Of a peer's IPv6
// address nothing is left out, of a pool's the zeros are.)
func addressName(text string) string {
	return strings.NewReplacer(".", "-", ":", "-", "/", "-").Replace(text)
}

// notInName is what a v3 name must not hold.
var notInName = regexp.MustCompile(`[^-a-z0-9.]+`)

// nodeName makes a v3 name of a v1 node's: in lower case, and hyphens for what a v3 name must not hold.
func nodeName(name string) string {
	return strings.Trim(notInName.ReplaceAllString(strings.ToLower(name), "-"), "-.")
}
