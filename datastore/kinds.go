package datastore

import (
	"fmt"
	"slices"
	"strings"
)

// Kind is one kind of resource.
type Kind struct {
	Kind       string   // as in a manifest: IPPool
	Plural     string   // as in the key: ippools
	Namespaced bool     // the key has a namespace before the name
	Aliases    []string // what else calicoctl's users type, lower case

	empty func() Object
}

// The kinds that Margay has types of its own for.
var (
	IPPools             = &Kind{Kind: "IPPool", Plural: "ippools", Aliases: []string{"pool", "pools", "ipp", "ipps"}, empty: func() Object { return new(IPPool) }}
	Nodes               = &Kind{Kind: "Node", Plural: "nodes", Aliases: []string{"no", "nos"}, empty: func() Object { return new(Node) }}
	BGPPeers            = &Kind{Kind: "BGPPeer", Plural: "bgppeers", Aliases: []string{"bgpp", "bgpps", "bp", "bps"}, empty: func() Object { return new(BGPPeer) }}
	BGPConfigurations   = &Kind{Kind: "BGPConfiguration", Plural: "bgpconfigurations", Aliases: []string{"bgpconfig", "bgpconfigs"}, empty: func() Object { return new(BGPConfiguration) }}
	BGPFilters          = &Kind{Kind: "BGPFilter", Plural: "bgpfilters", Aliases: []string{"bgpf", "bgpfs", "bf", "bfs"}, empty: func() Object { return new(BGPFilter) }}
	ClusterInformations = &Kind{Kind: "ClusterInformation", Plural: "clusterinformations", Aliases: []string{"clusterinfo", "clusterinfos"}, empty: func() Object { return new(ClusterInformation) }}
	IPReservations      = &Kind{Kind: "IPReservation", Plural: "ipreservations", Aliases: []string{"reservation", "reservations"}, empty: func() Object { return new(IPReservation) }}
	// IPAMConfigurations are stored for whoever reads them. What Calico's IPAM on etcd, and ours, goes by is the key
	// /calico/ipam/v2/config.
	IPAMConfigurations = &Kind{Kind: "IPAMConfiguration", Plural: "ipamconfigurations", Aliases: []string{"ipamconfig", "ipamconfigs"}, empty: func() Object { return new(IPAMConfiguration) }}
)

// The kinds that Margay stores for others and does not act on: their objects are *Resource.
var (
	FelixConfigurations           = generic("FelixConfiguration", "felixconfigurations", "felixconfig", "felixconfigs")
	GlobalNetworkPolicies         = generic("GlobalNetworkPolicy", "globalnetworkpolicies", "gnp", "gnps")
	GlobalNetworkSets             = generic("GlobalNetworkSet", "globalnetworksets", "gnetsets")
	HostEndpoints                 = generic("HostEndpoint", "hostendpoints", "hep", "heps")
	Profiles                      = generic("Profile", "profiles", "pro", "pros")
	Tiers                         = generic("Tier", "tiers")
	CalicoNodeStatuses            = generic("CalicoNodeStatus", "caliconodestatuses", "nodestatus", "nodestatuses")
	KubeControllersConfigurations = generic("KubeControllersConfiguration", "kubecontrollersconfigurations", "kubecontrollersconfig", "kubecontrollersconfigs")
	StagedGlobalNetworkPolicies   = generic("StagedGlobalNetworkPolicy", "stagedglobalnetworkpolicies", "sgnp", "sgnps")

	NetworkPolicies                 = namespaced(generic("NetworkPolicy", "networkpolicies", "policy", "np", "policies", "pol", "pols"))
	NetworkSets                     = namespaced(generic("NetworkSet", "networksets", "netsets"))
	WorkloadEndpoints               = namespaced(generic("WorkloadEndpoint", "workloadendpoints", "wep", "weps"))
	StagedNetworkPolicies           = namespaced(generic("StagedNetworkPolicy", "stagednetworkpolicies", "stagedpolicy", "snp", "stagedpolicies", "spol", "spols"))
	StagedKubernetesNetworkPolicies = namespaced(generic("StagedKubernetesNetworkPolicy", "stagedkubernetesnetworkpolicies",
		"stagedkubernetespolicy", "sknp", "stagedkubernetespolicies", "skpol", "skpols"))
)

func generic(kind, plural string, aliases ...string) *Kind {
	k := &Kind{Kind: kind, Plural: plural, Aliases: aliases}
	k.empty = func() Object { return &Resource{of: k} }
	return k
}

func namespaced(k *Kind) *Kind {
	k.Namespaced = true
	return k
}

// New makes an empty resource of this kind.
func (k *Kind) New() Object {
	obj := k.empty()
	*obj.Head() = k.header("")
	return obj
}

// Prefix is the key prefix under which resources of this kind lie, ending in "/".
func (k *Kind) Prefix() string { return resourceRoot + k.Plural + "/" }

// Key is the key of the resource of that name; for a namespaced kind the name is <namespace>/<name>.
func (k *Kind) Key(name string) string { return k.Prefix() + name }

// validateName checks a name as Key takes it.
func (k *Kind) validateName(name string) error {
	if !k.Namespaced {
		return validateName(name)
	}
	namespace, name, ok := strings.Cut(name, "/")
	if !ok || !labelPattern.MatchString(namespace) || len(namespace) > 63 {
		return fmt.Errorf("metadata.namespace %q: expected lower-case letters, digits and '-', at most 63 characters, beginning and ending with a letter or digit", namespace)
	}
	return validateName(name)
}

// Kinds returns all kinds, sorted by plural.
func Kinds() []*Kind {
	return []*Kind{BGPConfigurations, BGPFilters, BGPPeers, CalicoNodeStatuses, ClusterInformations, FelixConfigurations,
		GlobalNetworkPolicies, GlobalNetworkSets, HostEndpoints, IPAMConfigurations, IPPools, IPReservations,
		KubeControllersConfigurations, NetworkPolicies, NetworkSets, Nodes, Profiles, StagedGlobalNetworkPolicies,
		StagedKubernetesNetworkPolicies, StagedNetworkPolicies, Tiers, WorkloadEndpoints}
}

// LookupKind finds a kind by what a user typed: kind, plural or alias, in any case, with or without hyphens.
func LookupKind(word string) (*Kind, error) {
	w := strings.ToLower(strings.NewReplacer("-", "", "_", "").Replace(word))
	var known []string
	for _, k := range Kinds() {
		if w == strings.ToLower(k.Kind) || w == k.Plural || slices.Contains(k.Aliases, w) {
			return k, nil
		}
		known = append(known, k.Plural)
	}
	return nil, fmt.Errorf("resource type '%s' is not supported: expected one of %s", word, strings.Join(known, ", "))
}

// header makes the header of a new resource.
func (k *Kind) header(name string) Header {
	return Header{Kind: k.Kind, APIVersion: APIVersion, Metadata: Metadata{Name: name}}
}
