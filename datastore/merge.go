package datastore

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// encode gives the JSON to store for obj. Where obj was read from the store, that is what was read with the typed
// changes laid over it: what this version's types do not know stays, at every depth. (A changed array is replaced as
// a whole.)
func encode(obj Object) ([]byte, error) {
	h := obj.Head()
	defer h.storedForm()()
	after, err := toMap(obj)
	if err != nil {
		return nil, err
	}
	if h.raw == nil {
		if r, ok := obj.(*Resource); ok {
			r.hideTier(after)
		}
		return marshalNew(obj, after)
	}
	known := obj.kind().New()
	if err := json.Unmarshal(h.raw, known); err != nil {
		return nil, fmt.Errorf("stored value: %w", err)
	}
	// A default that was never written is not a change, and stays unwritten.
	known.Default()
	before, err := toMap(known)
	if err != nil {
		return nil, err
	}
	stored, err := parseMap(h.raw)
	if err != nil {
		return nil, fmt.Errorf("stored value: %w", err)
	}
	if r, ok := known.(*Resource); ok {
		r.hideTier(before, after)
	}
	overlay(stored, before, after)
	return marshalLike(stored, h.raw)
}

// hideTier takes out of documents of a policy what Default filled in for the eye only, where they say no more than that.
func (r *Resource) hideTier(docs ...map[string]any) {
	shown := tierOfName(r.Metadata.Name)
	for _, doc := range docs {
		if spec, ok := doc["spec"].(map[string]any); ok && r.noTier && spec["tier"] == shown {
			delete(spec, "tier")
		}
		meta, _ := doc["metadata"].(map[string]any)
		if labels, ok := meta["labels"].(map[string]any); ok && r.noTierLabel && labels[tierLabel] == shown {
			delete(labels, tierLabel)
			if len(labels) == 0 {
				delete(meta, "labels")
			}
		}
	}
}

// overlay applies to stored what changed between before and after.
func overlay(stored, before, after map[string]any) {
	for key := range before {
		if _, kept := after[key]; !kept {
			delete(stored, key)
		}
	}
	for key, now := range after {
		was, had := before[key]
		if had && equal(was, now) {
			continue
		}
		nowMap, a := now.(map[string]any)
		storedMap, b := stored[key].(map[string]any)
		if a && b {
			wasMap, _ := was.(map[string]any)
			overlay(storedMap, wasMap, nowMap)
			continue
		}
		stored[key] = now
	}
}

func toMap(v any) (map[string]any, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return parseMap(raw)
}

// parseMap keeps numbers as they are written: a float64 would lose the low digits of a large one.
func parseMap(raw []byte) (map[string]any, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var m map[string]any
	if err := d.Decode(&m); err != nil {
		return nil, err
	}
	if m == nil {
		return nil, fmt.Errorf("expected a JSON object")
	}
	return m, nil
}

// sameJSON says whether two JSON objects say the same.
func sameJSON(a, b []byte) bool {
	x, err1 := parseMap(a)
	y, err2 := parseMap(b)
	return err1 == nil && err2 == nil && equal(x, y)
}

// equal compares parsed JSON. Numbers are the same when they mean the same: YAML writes 1.50 as 1.5.
func equal(a, b any) bool {
	switch x := a.(type) {
	case map[string]any:
		y, ok := b.(map[string]any)
		return ok && maps.EqualFunc(x, y, equal)
	case []any:
		y, ok := b.([]any)
		return ok && slices.EqualFunc(x, y, equal)
	case json.Number:
		y, ok := b.(json.Number)
		if !ok || x == y {
			return ok
		}
		if !strings.ContainsAny(x.String()+y.String(), ".eE") {
			return false // two integers, perhaps too large for a float64 to tell apart
		}
		f, err1 := x.Float64()
		g, err2 := y.Float64()
		return err1 == nil && err2 == nil && f == g
	}
	return a == b
}

// Document is the resource as it is stored, fields that this version does not know included, with its resourceVersion;
// where it was not read from the store, what would be stored.
func Document(obj Object) (map[string]any, error) {
	doc, err := ExportDocument(obj)
	if meta, ok := doc["metadata"].(map[string]any); ok && obj.Head().raw != nil {
		meta["resourceVersion"] = obj.Head().Metadata.ResourceVersion
		if obj.kind().tiered() {
			showTier(obj, doc, meta)
		}
	}
	return doc, err
}

// ExportDocument is the resource as it is stored, but for a policy's name, which is that by which users know it.
func ExportDocument(obj Object) (map[string]any, error) {
	h := obj.Head()
	if h.raw == nil {
		return toMap(obj)
	}
	doc, err := parseMap(h.raw)
	if err != nil {
		return nil, &ResourceError{Kind: obj.kind().Kind, Name: h.Path(), Err: fmt.Errorf("stored value: %w", err)}
	}
	meta, ok := doc["metadata"].(map[string]any)
	if !ok || h.stored == "" {
		return doc, nil
	}
	meta["name"] = h.Metadata.Name
	if annotations, ok := meta["annotations"].(map[string]any); ok {
		delete(annotations, nameAnnotation)
		if len(annotations) == 0 {
			delete(meta, "annotations")
		}
	}
	return doc, nil
}

// showTier shows a policy's tier, as Calico's client does.
func showTier(obj Object, doc, meta map[string]any) {
	spec, ok := doc["spec"].(map[string]any)
	if !ok {
		spec = map[string]any{}
		doc["spec"] = spec
	}
	if spec["tier"] == nil || spec["tier"] == "" {
		spec["tier"] = tierOfName(obj.Head().Metadata.Name)
	}
	labels, ok := meta["labels"].(map[string]any)
	if !ok {
		labels = map[string]any{}
		meta["labels"] = labels
	}
	absent(labels, tierLabel, spec["tier"])
}
