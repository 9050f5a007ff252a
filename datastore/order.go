package datastore

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
	"strings"
)

// keyOrder is the order of the keys in a JSON text, at every depth.
type keyOrder struct {
	rank  map[string]int
	inner map[string]*keyOrder
	items []*keyOrder
}

// orderOf reads the order of keys off a JSON text; nil for what has none.
func orderOf(raw []byte) *keyOrder {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	order, err := readOrder(d)
	if err != nil {
		return nil
	}
	return order
}

func readOrder(d *json.Decoder) (*keyOrder, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	delim, _ := token.(json.Delim)
	order := &keyOrder{}
	switch delim {
	case '{':
		order.rank, order.inner = map[string]int{}, map[string]*keyOrder{}
		for d.More() {
			key, err := d.Token()
			if err != nil {
				return nil, err
			}
			name, _ := key.(string)
			order.rank[name] = len(order.rank)
			if order.inner[name], err = readOrder(d); err != nil {
				return nil, err
			}
		}
	case '[':
		for d.More() {
			item, err := readOrder(d)
			if err != nil {
				return nil, err
			}
			order.items = append(order.items, item)
		}
	default:
		return nil, nil
	}
	_, err = d.Token() // the closing delimiter
	return order, err
}

// metadataRank is Calico's order of a resource's metadata; resourceVersion is never stored and has to find its place.
var metadataRank = ranked([]string{"name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "labels", "annotations", "finalizers"})

// topRank is the order of a resource's parts.
var topRank = ranked([]string{"kind", "apiVersion", "metadata", "spec", "status"})

// endpointRank is genericRank for the one kind that has profiles before its interface.
var endpointRank = ranked([]string{"orchestrator", "workload", "node", "containerID", "pod", "endpoint", "serviceAccountName", "ipNetworks", "ipNATs",
	"ipv4Gateway", "ipv6Gateway", "profiles", "interfaceName", "mac", "ports", "name", "protocol", "port", "hostPort", "allowSpoofedSourcePrefixes"})

// genericRank is Calico's order of the fields of kinds that have no type here, for what is stored anew; at all depths
// together, as no two fields of a kind contradict each other. FelixConfiguration's many fields are left in theirs.
var genericRank = ranked([]string{"stagedAction", "tier", "node", "order", "defaultAction", "logSeverityScreen", "healthChecks", "etcdV3CompactionPeriod", "prometheusMetricsPort",
	"controllers", "reconcilerPeriod", "syncLabels", "hostEndpoint", "leakGracePeriod", "interfaceName",
	"expectedIPs", "profiles", "podSelector", "ingress", "egress", "action", "ipVersion", "name", "protocol", "port",
	"icmp", "notProtocol", "notICMP", "source", "destination", "http", "metadata", "type", "code", "nets", "selector", "namespaceSelector",
	"services", "ports", "notNets", "notSelector", "notPorts", "serviceAccounts", "types", "serviceAccountSelector", "policyTypes", "labelsToApply"})

// OrderedJSON marshals a resource's document, as Document gives it, in the order of fields in which the resource is
// stored: what Calico's client has written comes out as that client would print it.
func OrderedJSON(obj Object, doc map[string]any) (json.RawMessage, error) {
	if like := obj.Head().raw; like != nil {
		order := orderOf(like)
		if order != nil && obj.kind().tiered() {
			order.inner["spec"].placeTier()
		}
		return marshalOrdered(doc, order)
	}
	return marshalNew(obj, doc)
}

// marshalLike marshals a resource's document with its keys in the order that they have in like. New keys come last,
// except in the metadata.
func marshalLike(doc map[string]any, like []byte) ([]byte, error) {
	return marshalOrdered(doc, orderOf(like))
}

// marshalNew is marshalLike for an object that is not stored yet.
func marshalNew(obj Object, doc map[string]any) ([]byte, error) {
	like, err := json.Marshal(obj)
	if err != nil {
		return nil, err
	}
	order := orderOf(like)
	if _, generic := obj.(*Resource); generic && order != nil {
		rank := genericRank
		if obj.kind() == WorkloadEndpoints {
			rank = endpointRank
		}
		order.inner["spec"].rerank(rank)
	}
	return marshalOrdered(doc, order)
}

// placeTier finds the place of a policy's tier, which the store leaves out where it is the default one.
func (o *keyOrder) placeTier() {
	if o == nil || o.rank == nil {
		return
	}
	if _, there := o.rank["tier"]; there {
		return
	}
	o.rank["tier"] = -1
	if rank, there := o.rank["stagedAction"]; there {
		o.rank["tier"] = rank // and then by name
	}
}

// rerank gives o, and all that is in it, another order.
func (o *keyOrder) rerank(rank map[string]int) {
	if o == nil {
		return
	}
	if o.rank != nil {
		o.rank = rank
	}
	for _, inner := range o.inner {
		inner.rerank(rank)
	}
	for _, item := range o.items {
		item.rerank(rank)
	}
}

func marshalOrdered(doc map[string]any, order *keyOrder) ([]byte, error) {
	if order == nil || order.rank == nil {
		order = &keyOrder{rank: map[string]int{}, inner: map[string]*keyOrder{}}
	}
	order.rank = topRank
	if meta := order.inner["metadata"]; meta != nil && meta.rank != nil {
		meta.rank = metadataRank
	} else {
		order.inner["metadata"] = &keyOrder{rank: metadataRank}
	}
	var out bytes.Buffer
	if err := order.write(&out, doc); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func ranked(keys []string) map[string]int {
	rank := make(map[string]int, len(keys))
	for i, key := range keys {
		rank[key] = i
	}
	return rank
}

func (o *keyOrder) write(out *bytes.Buffer, value any) error {
	switch v := value.(type) {
	case map[string]any:
		out.WriteByte('{')
		for i, key := range o.keys(v) {
			if i > 0 {
				out.WriteByte(',')
			}
			if err := writeScalar(out, key); err != nil {
				return err
			}
			out.WriteByte(':')
			var inner *keyOrder
			if o != nil {
				inner = o.inner[key]
			}
			if err := inner.write(out, v[key]); err != nil {
				return err
			}
		}
		out.WriteByte('}')
	case []any:
		out.WriteByte('[')
		for i, item := range v {
			if i > 0 {
				out.WriteByte(',')
			}
			var inner *keyOrder
			if o != nil && i < len(o.items) {
				inner = o.items[i]
			}
			if err := inner.write(out, item); err != nil {
				return err
			}
		}
		out.WriteByte(']')
	default:
		return writeScalar(out, value)
	}
	return nil
}

func writeScalar(out *bytes.Buffer, value any) error {
	raw, err := json.Marshal(value)
	out.Write(raw)
	return err
}

// keys are those of object: first the ranked ones, then the others by name.
func (o *keyOrder) keys(object map[string]any) []string {
	return slices.SortedFunc(maps.Keys(object), func(a, b string) int {
		ra, rb := o.place(a), o.place(b)
		if ra != rb {
			return ra - rb
		}
		return strings.Compare(a, b)
	})
}

func (o *keyOrder) place(key string) int {
	if o != nil {
		if rank, ok := o.rank[key]; ok {
			return rank
		}
	}
	return 1 << 30
}
