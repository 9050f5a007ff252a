package datastore

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// unknownField is a field of a manifest that the kind's type does not have.
type unknownField struct {
	path  []string // spec, bgp, newField; a list's index is written [3]
	known []string // what the object has instead
	value any
}

func (u unknownField) err() error {
	path := strings.ReplaceAll(strings.Join(u.path, "."), ".[", "[")
	return fmt.Errorf("%s: unknown field: expected one of %s", path, strings.Join(u.known, ", "))
}

// forgotten are the fields of Kubernetes' metadata that a manifest may have and that nobody stores from one.
var forgotten = []string{"generateName", "selfLink", "ownerReferences", "managedFields", "deletionTimestamp", "deletionGracePeriodSeconds"}

var unmarshaler = reflect.TypeFor[json.Unmarshaler]()

// unknownFields finds what t, the type of a resource or of a part of it, does not have a field for.
func unknownFields(t reflect.Type, value any, path []string) []unknownField {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if reflect.PointerTo(t).Implements(unmarshaler) {
		return nil
	}
	var out []unknownField
	switch t.Kind() {
	case reflect.Slice:
		items, _ := value.([]any)
		for i, item := range items {
			out = append(out, unknownFields(t.Elem(), item, append(slices.Clone(path), fmt.Sprintf("[%d]", i)))...)
		}
	case reflect.Struct:
		object, _ := value.(map[string]any)
		fields := jsonFields(t)
		for _, key := range slices.Sorted(maps.Keys(object)) {
			under := append(slices.Clone(path), key)
			if ft, ok := fields[strings.ToLower(key)]; ok {
				out = append(out, unknownFields(ft.typ, object[key], under)...)
			} else if t != reflect.TypeFor[Metadata]() || !slices.Contains(forgotten, key) {
				var known []string
				for _, f := range fields {
					known = append(known, f.name)
				}
				slices.Sort(known)
				out = append(out, unknownField{path: under, known: known, value: object[key]})
			}
		}
	}
	return out
}

type jsonField struct {
	name string
	typ  reflect.Type
}

// jsonFields are a struct's fields by their JSON names in lower case: encoding/json ignores case.
func jsonFields(t reflect.Type) map[string]jsonField {
	out := map[string]jsonField{}
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && name == "":
			maps.Copy(out, jsonFields(f.Type))
		case name != "" && f.IsExported():
			out[strings.ToLower(name)] = jsonField{name, f.Type}
		}
	}
	return out
}

// checkUnknown refuses the manifest's unknown fields that the stored value does not have just so. What a newer version
// stored can thereby be read here, edited and written back; what is misspelled is still an error.
func (h *Header) checkUnknown(stored []byte) error {
	if len(h.unknown) == 0 {
		return nil
	}
	var have map[string]any
	if stored != nil {
		var err error
		if have, err = parseMap(stored); err != nil {
			return fmt.Errorf("stored value: %w", err)
		}
	}
	var errs []error
	for _, u := range h.unknown {
		if was, there := at(have, u.path); !there || !equal(was, u.value) {
			errs = append(errs, u.err())
		}
	}
	return errors.Join(errs...)
}

// at follows path into value, and says whether it leads anywhere.
func at(value any, path []string) (any, bool) {
	for _, step := range path {
		switch v := value.(type) {
		case map[string]any:
			inner, there := v[step]
			if !there {
				return nil, false
			}
			value = inner
		case []any:
			i, err := strconv.Atoi(strings.Trim(step, "[]"))
			if err != nil || i < 0 || i >= len(v) {
				return nil, false
			}
			value = v[i]
		default:
			return nil, false
		}
	}
	return value, true
}
