package datastore

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
)

// encode gives the JSON to store for obj. Where obj was read from the store, that is what was read with the typed
// changes laid over it: what this version's types do not know stays, at every depth. (A changed array is replaced as
// a whole.)
func encode(obj Object) ([]byte, error) {
	h := obj.Head()
	version := h.Metadata.ResourceVersion
	h.Metadata.ResourceVersion = ""
	defer func() { h.Metadata.ResourceVersion = version }()
	after, err := toMap(obj)
	if err != nil {
		return nil, err
	}
	if h.raw == nil {
		return json.Marshal(after)
	}
	known := obj.kind().New()
	if err := json.Unmarshal(h.raw, known); err != nil {
		return nil, fmt.Errorf("stored value: %w", err)
	}
	before, err := toMap(known)
	if err != nil {
		return nil, err
	}
	stored, err := parseMap(h.raw)
	if err != nil {
		return nil, fmt.Errorf("stored value: %w", err)
	}
	overlay(stored, before, after)
	return json.Marshal(stored)
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
		if had && reflect.DeepEqual(was, now) {
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
