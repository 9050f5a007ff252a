package audit

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"margay/datastore"
	"margay/datastore/embedded/embeddedtest"
)

var endpoint string

func TestMain(m *testing.M) { os.Exit(embeddedtest.Main(m, &endpoint)) }

// store opens a store that holds exactly these keys.
func store(t *testing.T, keys map[string]string) *datastore.Store {
	t.Helper()
	s, err := datastore.Open(t.Context(), datastore.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	old, _, err := s.Keys(t.Context(), "/calico/")
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range old {
		if err := s.Delete(t.Context(), kv.Key, 0); err != nil {
			t.Fatal(err)
		}
	}
	for key, value := range keys {
		if _, err := s.Create(t.Context(), "/calico/"+key, []byte(value)); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

const (
	resources = "resources/v3/projectcalico.org/"
	blockAt   = "ipam/v2/assignment/ipv4/block/"
	confirmed = `{"state":"confirmed","deleted":false}`
)

// good is a store in order: node n1 with a tunnel address and a pod, n2 with an address borrowed from n1.
func good() map[string]string {
	return map[string]string{
		resources + "clusterinformations/default":          `{"spec":{"clusterGUID":"g","clusterType":"k8s","datastoreReady":false}}`,
		resources + "ippools/p":                            `{"spec":{"cidr":"10.0.0.0/24"}}`,
		resources + "nodes/n1":                             `{"spec":{"bgp":{"ipv4IPIPTunnelAddr":"10.0.0.0"}}}`,
		resources + "nodes/n2":                             `{"spec":{}}`,
		resources + "workloadendpoints/default/n1-k8s-web": `{"spec":{"node":"n1","ipNetworks":["10.0.0.1/32"]}}`,
		"ipam/v2/host/n1/ipv4/block/10.0.0.0-30":           confirmed,
		"ipam/v2/host/n2/ipv4/block/10.0.0.4-30":           `{"state":"pending","deleted":false}`,
		"ipam/v2/handle/tun":                               `{"block":{"10.0.0.0/30":1},"deleted":false}`,
		"ipam/v2/handle/web":                               `{"block":{"10.0.0.0/30":1},"deleted":false}`,
		"ipam/v2/handle/lent":                              `{"block":{"10.0.0.0/30":1},"deleted":false}`,
		blockAt + "10.0.0.0-30": `{"cidr":"10.0.0.0/30","affinity":"host:n1","allocations":[0,1,2,3],"unallocated":[],"attributes":[
			{"handle_id":"tun","secondary":{"node":"n1","type":"ipipTunnelAddress"}},
			{"handle_id":"web","secondary":{"node":"n1","namespace":"default","pod":"web","timestamp":"then"}},
			{"handle_id":"lent","secondary":{"node":"n2","namespace":"default","pod":"x"}},
			{"releasedAt":"2026-11-23T09:11:33Z"}],
			"sequenceNumber":9,"sequenceNumberForAllocation":{"0":5,"1":6,"2":7,"3":8},"deleted":false}`,
	}
}

func TestGoodStore(t *testing.T) {
	r, err := Check(t.Context(), store(t, good()), "v")
	if err != nil || len(r.Problems) != 0 {
		t.Fatalf("%v, %v", r.Problems, err)
	}
	seq := func(n uint64) *uint64 { return &n }
	want := map[string][]*Allocation{
		"10.0.0.0": {{IP: "10.0.0.0", Handle: "tun", SequenceNumber: seq(5), Node: "n1", Type: "ipipTunnelAddress", InUse: true, Owners: []string{"Node(n1)"}}},
		"10.0.0.1": {{IP: "10.0.0.1", Handle: "web", SequenceNumber: seq(6), Node: "n1", Namespace: "default", Pod: "web", CreationTimestamp: "then",
			InUse: true, Owners: []string{"Workload(default/n1-k8s-web)"}}},
		"10.0.0.2": {{IP: "10.0.0.2", Handle: "lent", SequenceNumber: seq(7), Node: "n2", Namespace: "default", Pod: "x", InUse: true, Borrowed: true}},
		"10.0.0.3": {{IP: "10.0.0.3", SequenceNumber: seq(8), Node: "n1", CoolingDown: true}},
	}
	for _, list := range r.Allocations {
		for _, a := range list {
			a.Block, a.BlockOwner, a.Attrs = "", "", nil
		}
	}
	if d := cmp.Diff(want, r.Allocations); d != "" {
		t.Error(d)
	}
	if r.ClusterGUID != "g" || !r.DatastoreLocked || r.ClusterType != "k8s" || r.ClusterInfoRevision == "" || r.Version != "v" || r.Unknown != 1 || r.Handles != 3 {
		t.Errorf("%+v", r)
	}
}

// Every kind of problem, each made by one change to a store in order.
func TestProblems(t *testing.T) {
	const b = blockAt + "10.0.0.0-30"
	free := `{"cidr":"%s","affinity":null,"allocations":[null,null,null,null],"unallocated":[0,1,2,3],"attributes":[],"deleted":false}`
	for _, tt := range []struct {
		name, key, value string // an empty value deletes
		want             []Kind
		what             string
	}{
		{"tunnel moved", resources + "nodes/n1", `{"spec":{"bgp":{"ipv4IPIPTunnelAddr":"10.0.0.9"}}}`, []Kind{AddressNotAllocated, LeakedAddress}, "10.0.0.9"},
		{"node gone", resources + "nodes/n2", "", []Kind{LeakedAddress}, "10.0.0.2"},
		{"pod has another address", resources + "workloadendpoints/default/n1-k8s-web", `{"spec":{"node":"n1","ipNetworks":["192.0.2.1/32"]}}`,
			[]Kind{AddressOutsidePools, LeakedAddress}, "192.0.2.1"},
		{"pool gone", resources + "ippools/p", "", []Kind{AllocationOutsidePool}, "10.0.0.0"},
		{"handle gone", "ipam/v2/handle/lent", "", []Kind{MissingHandle}, "lent"},
		{"handle too many", "ipam/v2/handle/more", `{"block":{"10.0.0.0/30":1}}`, []Kind{LeakedHandle}, "more"},
		{"handle miscounts", "ipam/v2/handle/lent", `{"block":{"10.0.0.0/30":2}}`, []Kind{HandleMismatch}, "lent"},
		{"handle counts elsewhere", "ipam/v2/handle/lent", `{"block":{"10.0.0.4/30":1}}`, []Kind{HandleMismatch, HandleMismatch}, "lent"},
		{"affinity gone", "ipam/v2/host/n1/ipv4/block/10.0.0.0-30", "", []Kind{BlockWithoutAffinity}, "10.0.0.0/30"},
		{"affinity without block", "ipam/v2/host/n2/ipv4/block/10.0.0.8-30", confirmed, []Kind{AffinityWithoutBlock}, "n2 10.0.0.8/30"},
		{"affinity for another's block", "ipam/v2/host/n2/ipv4/block/10.0.0.0-30", confirmed, []Kind{AffinityWithoutBlock}, "n2 10.0.0.0/30"},
		{"empty block of nobody", blockAt + "10.0.0.4-30", strings.ReplaceAll(free, "%s", "10.0.0.4/30"), []Kind{BlockWithoutAffinity}, "10.0.0.4/30"},
		{"overlapping block", blockAt + "10.0.0.0-31", `{"cidr":"10.0.0.0/31","affinity":null,"allocations":[0,null],"unallocated":[1],
			"attributes":[{"handle_id":"windows-reserved-ipam-handle"}]}`, []Kind{DuplicateAddress}, "10.0.0.0"},
		{"no handle", blockAt + "10.0.0.4-30", `{"cidr":"10.0.0.4/30","affinity":null,"allocations":[0,null,null,null],"unallocated":[1,2,3],
			"attributes":[{"secondary":{"node":"n2"}}]}`, []Kind{AddressWithoutHandle}, "10.0.0.4"},
		{"free and held", b, strings.Replace(good()[b], `"unallocated":[]`, `"unallocated":[3]`, 1), []Kind{InvalidBlock}, "10.0.0.0/30"},
		{"unused attribute", b, strings.Replace(good()[b], `[0,1,2,3],"unallocated":[]`, `[0,1,2,null],"unallocated":[3]`, 1), []Kind{InvalidBlock}, "10.0.0.0/30"},
		{"too many entries", blockAt + "255.255.255.252-30", `{"cidr":"255.255.255.252/30","affinity":null,"allocations":[0,0,0,0,0,0],"unallocated":[],
			"attributes":[{"releasedAt":"2026-11-23T09:11:33Z"}]}`, []Kind{AllocationOutsidePool, AllocationOutsidePool, AllocationOutsidePool, AllocationOutsidePool, InvalidBlock}, "255.255.255.252/30"},
		{"not JSON", "ipam/v2/handle/broken", `{`, []Kind{Malformed}, "/calico/ipam/v2/handle/broken"},
		{"negative sequence", blockAt + "10.0.0.4-30", strings.Replace(strings.ReplaceAll(free, "%s", "10.0.0.4/30"), "{", `{"sequenceNumber":-1,`, 1), []Kind{Malformed}, "/calico/" + blockAt + "10.0.0.4-30"},
		{"key and value differ", blockAt + "10.0.0.4-30", strings.ReplaceAll(free, "%s", "10.0.0.8/30"), []Kind{Malformed}, "/calico/" + blockAt + "10.0.0.4-30"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			keys := good()
			if keys[tt.key] = tt.value; tt.value == "" {
				delete(keys, tt.key)
			}
			r, err := Check(t.Context(), store(t, keys), "v")
			if err != nil {
				t.Fatal(err)
			}
			var got []Kind
			named := false
			for _, p := range r.Problems {
				got = append(got, p.Kind)
				named = named || p.What == tt.what
			}
			if tt.name == "pool gone" {
				got = slices.Compact(got)
			}
			slices.Sort(got)
			slices.Sort(tt.want)
			if !slices.Equal(got, tt.want) || !named {
				t.Errorf("%v, expected %v and %s named", r.Problems, tt.want, tt.what)
			}
		})
	}
}

// Whatever stands in etcd ends in a report, never in a panic.
func FuzzBlock(f *testing.F) {
	for key, value := range good() {
		if strings.HasPrefix(key, blockAt) {
			f.Add("10.0.0.0-30", value)
		}
	}
	f.Add("fd00--40-122", `{"cidr":"fd00::40/122","allocations":[0]}`)
	f.Add("255.255.255.255-32", `{"cidr":"255.255.255.255/32","allocations":[0,1],"attributes":[{},{}]}`)
	f.Fuzz(func(_ *testing.T, name, value string) {
		s := &snapshot{}
		if err := s.readBlock(datastore.KV{Value: []byte(value)}, name); err == nil {
			s.report("v")
		}
	})
}
