package audit

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"margay/datastore"
)

const (
	ipamRoot     = "/calico/ipam/v2/"
	resourceRoot = "/calico/resources/v3/projectcalico.org/"
)

// snapshot is everything that bears on addresses, as it was read.
type snapshot struct {
	info         clusterInfo
	infoRevision int64
	pools        []pool
	nodes        map[string]bool // Node resources
	vouched      map[string]bool // nodes whose pods the store lists
	owners       []Owner
	blocks       []storedBlock
	affinities   map[affinityID]affinity
	handles      map[string]storedHandle
	problems     []Problem // what cannot be read
}

type clusterInfo struct {
	Spec struct {
		ClusterGUID    string `json:"clusterGUID"`
		ClusterType    string `json:"clusterType"`
		DatastoreReady *bool  `json:"datastoreReady"`
	} `json:"spec"`
}

type pool struct {
	cidr     netip.Prefix
	disabled bool
}

type affinityID struct {
	node string
	cidr netip.Prefix
}

type affinity struct {
	State   string `json:"state"`
	Deleted bool   `json:"deleted"`
}

type storedHandle struct {
	Block    map[string]int `json:"block"`
	revision int64
}

type storedBlock struct {
	key         string
	cidr        netip.Prefix
	Affinity    *string           `json:"affinity"`
	Allocations []*int            `json:"allocations"`
	Unallocated []int             `json:"unallocated"`
	Attributes  []attributes      `json:"attributes"`
	Sequence    uint64            `json:"sequenceNumber"`
	Given       map[string]uint64 `json:"sequenceNumberForAllocation"`
	Deleted     bool              `json:"deleted"`
}

type attributes struct {
	Handle     *string           `json:"handle_id"`
	Secondary  map[string]string `json:"secondary"`
	ReleasedAt *time.Time        `json:"releasedAt"`
}

// owner is the node of "host:<node>"; empty if the block is nobody's.
func (b *storedBlock) owner() string {
	if b.Affinity == nil {
		return ""
	}
	_, node, _ := strings.Cut(*b.Affinity, ":")
	return node
}

// take reads the store. Who uses an address is read before who was given one: an address is used only after it was given
// out, so that what came between looks like a leak at worst, and a second look clears that up.
func take(ctx context.Context, s *datastore.Store) (*snapshot, error) {
	snap := &snapshot{nodes: map[string]bool{}, vouched: map[string]bool{}, affinities: map[affinityID]affinity{},
		handles: map[string]storedHandle{}}
	for _, part := range []struct {
		prefix string
		read   func(datastore.KV, string) error
	}{
		{resourceRoot + "clusterinformations/", snap.readInfo},
		{resourceRoot + "nodes/", snap.readNode},
		{resourceRoot + "workloadendpoints/", snap.readWorkload},
		{resourceRoot + "ippools/", snap.readPool},
		{ipamRoot, snap.readIPAM}, // one list: blocks, affinities and handles of one moment
	} {
		kvs, _, err := s.List(ctx, part.prefix)
		if err != nil {
			return nil, err
		}
		for _, kv := range kvs {
			if err := part.read(kv, strings.TrimPrefix(kv.Key, part.prefix)); err != nil {
				snap.problems = append(snap.problems, Problem{Malformed, kv.Key, err.Error()})
			}
		}
	}
	return snap, nil
}

func (s *snapshot) readInfo(kv datastore.KV, name string) error {
	if name != "default" {
		return nil
	}
	s.infoRevision = kv.Revision
	return json.Unmarshal(kv.Value, &s.info)
}

func (s *snapshot) readNode(kv datastore.KV, name string) error {
	var n struct {
		Spec struct {
			BGP struct {
				IPIP string `json:"ipv4IPIPTunnelAddr"`
			} `json:"bgp"`
			VXLAN4    string `json:"ipv4VXLANTunnelAddr"`
			VXLAN6    string `json:"ipv6VXLANTunnelAddr"`
			Wireguard struct {
				V4 string `json:"interfaceIPv4Address"`
				V6 string `json:"interfaceIPv6Address"`
			} `json:"wireguard"`
		} `json:"spec"`
	}
	s.nodes[name] = true
	if err := json.Unmarshal(kv.Value, &n); err != nil {
		return err
	}
	for _, text := range []string{n.Spec.BGP.IPIP, n.Spec.VXLAN4, n.Spec.VXLAN6, n.Spec.Wireguard.V4, n.Spec.Wireguard.V6} {
		if err := s.use(text, "Node("+name+")"); err != nil {
			return err
		}
	}
	return nil
}

func (s *snapshot) readWorkload(kv datastore.KV, name string) error {
	var w struct {
		Spec struct {
			Node     string   `json:"node"`
			Networks []string `json:"ipNetworks"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(kv.Value, &w); err != nil {
		return err
	}
	s.vouched[w.Spec.Node] = true
	for _, text := range w.Spec.Networks {
		if err := s.use(text, "Workload("+name+")"); err != nil {
			return err
		}
	}
	return nil
}

// use records that somebody uses an address, written alone or with a prefix length.
func (s *snapshot) use(text, owner string) error {
	if text == "" {
		return nil
	}
	addr, _, _ := strings.Cut(text, "/")
	a, err := netip.ParseAddr(addr)
	if err != nil {
		return fmt.Errorf("address %q: expected an IP address", text)
	}
	s.owners = append(s.owners, Owner{a, owner})
	return nil
}

func (s *snapshot) readPool(kv datastore.KV, _ string) error {
	var p struct {
		Spec struct {
			CIDR     string `json:"cidr"`
			Disabled bool   `json:"disabled"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(kv.Value, &p); err != nil {
		return err
	}
	cidr, err := netip.ParsePrefix(p.Spec.CIDR)
	s.pools = append(s.pools, pool{cidr.Masked(), p.Spec.Disabled})
	return err
}

func (s *snapshot) readIPAM(kv datastore.KV, name string) error {
	part := strings.Split(name, "/")
	switch {
	case len(part) == 4 && part[0] == "assignment" && part[2] == "block":
		return s.readBlock(kv, part[3])
	case len(part) == 5 && part[0] == "host" && part[3] == "block":
		cidr, err := cidrOfKey(part[4])
		if err != nil {
			return err
		}
		var a affinity
		if err := json.Unmarshal(kv.Value, &a); err != nil {
			return err
		}
		s.affinities[affinityID{part[1], cidr}] = a
	case len(part) == 2 && part[0] == "handle":
		h := storedHandle{revision: kv.Revision}
		if err := json.Unmarshal(kv.Value, &h); err != nil {
			return err
		}
		s.handles[part[1]] = h
	}
	return nil
}

func (s *snapshot) readBlock(kv datastore.KV, name string) error {
	cidr, err := cidrOfKey(name)
	if err != nil {
		return err
	}
	var w struct {
		CIDR string `json:"cidr"`
		storedBlock
	}
	if err := json.Unmarshal(kv.Value, &w); err != nil {
		return err
	}
	if got, err := netip.ParsePrefix(w.CIDR); err != nil || got != cidr {
		return fmt.Errorf("cidr %q: expected the key's %s", w.CIDR, cidr)
	}
	w.key, w.cidr = kv.Key, cidr
	s.blocks = append(s.blocks, w.storedBlock)
	return nil
}

// cidrOfKey reads "10.244.0.64-26", and "fd00--40-122" with hyphens for colons.
func cidrOfKey(name string) (netip.Prefix, error) {
	i := strings.LastIndexByte(name, '-')
	if i < 0 {
		return netip.Prefix{}, fmt.Errorf("block %q: expected ADDRESS-LENGTH", name)
	}
	host, bits := name[:i], name[i+1:]
	if !strings.Contains(host, ".") {
		host = strings.ReplaceAll(host, "-", ":")
	}
	p, err := netip.ParsePrefix(host + "/" + bits)
	if err != nil || p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("block %q: expected ADDRESS-LENGTH", name)
	}
	return p, nil
}

func revisionText(rev int64) string {
	if rev == 0 {
		return ""
	}
	return strconv.FormatInt(rev, 10)
}
