package datastore

import (
	"fmt"
	"slices"
	"strings"
)

// Kind is one kind of resource.
type Kind struct {
	Kind    string   // as in a manifest: IPPool
	Plural  string   // as in the key: ippools
	Aliases []string // what else calicoctl's users type, lower case

	empty func() Object
}

// The kinds.
var (
	IPPools           = &Kind{"IPPool", "ippools", []string{"pool", "pools", "ipp", "ipps"}, func() Object { return new(IPPool) }}
	Nodes             = &Kind{"Node", "nodes", []string{"no", "nos"}, func() Object { return new(Node) }}
	BGPPeers          = &Kind{"BGPPeer", "bgppeers", []string{"bgpp", "bgpps", "bp", "bps"}, func() Object { return new(BGPPeer) }}
	BGPConfigurations = &Kind{"BGPConfiguration", "bgpconfigurations", []string{"bgpconfig", "bgpconfigs"},
		func() Object { return new(BGPConfiguration) }}
	ClusterInformations = &Kind{"ClusterInformation", "clusterinformations", []string{"clusterinfo", "clusterinfos"},
		func() Object { return new(ClusterInformation) }}
)

// New makes an empty resource of this kind.
func (k *Kind) New() Object {
	obj := k.empty()
	*obj.Head() = k.header("")
	return obj
}

// Prefix is the key prefix under which resources of this kind lie, ending in "/".
func (k *Kind) Prefix() string { return resourceRoot + k.Plural + "/" }

// Key is the key of the resource of that name.
func (k *Kind) Key(name string) string { return k.Prefix() + name }

// Kinds returns all kinds, sorted by plural.
func Kinds() []*Kind {
	return []*Kind{BGPConfigurations, BGPPeers, ClusterInformations, IPPools, Nodes}
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
	return nil, fmt.Errorf("resource type %q: expected one of %s", word, strings.Join(known, ", "))
}

// header makes the header of a new resource.
func (k *Kind) header(name string) Header {
	return Header{Kind: k.Kind, APIVersion: APIVersion, Metadata: Metadata{Name: name}}
}
