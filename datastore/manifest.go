package datastore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"
)

// ErrNoResources says that a manifest holds no resource.
var ErrNoResources = errors.New("manifest: expected at least one resource")

// ManifestOptions says how a manifest is read; the zero value is DecodeManifest's.
type ManifestOptions struct {
	// Namespace is for namespaced resources that name none ("default" where it is empty too); where given, others must
	// name the same.
	Namespace string
	// StoredFields lets fields that the kind does not have pass for now: ApplyResource, ReplaceResource and
	// UpdateResource then accept those that are stored just so, and refuse the rest.
	StoredFields bool
}

// DecodeManifest reads what a user wrote: YAML or JSON, several documents, lists (`kind: List`, `kind: IPPoolList`, or
// a bare array). It is strict: an unknown or repeated field is an error, and so is a spec that does not validate after
// its defaults were filled. The error names every document that is wrong, the resource and the field. Nothing is decoded
// if anything is wrong.
func DecodeManifest(data []byte) ([]Object, error) { return DecodeManifestFor(data, ManifestOptions{}) }

// DecodeManifestFor is DecodeManifest with options.
func DecodeManifestFor(data []byte, opts ManifestOptions) ([]Object, error) {
	var (
		out  []Object
		errs []error
	)
	for i, doc := range documents(data) {
		objs, err := decodeDocument(doc, opts)
		if err != nil {
			errs = append(errs, fmt.Errorf("document %d: %w", i+1, err))
			continue
		}
		out = append(out, objs...)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if len(out) == 0 {
		return nil, ErrNoResources
	}
	return out, nil
}

// documents splits at the YAML document markers; documents with nothing in them are left out.
func documents(data []byte) [][]byte {
	var (
		out [][]byte
		cur []byte
	)
	flush := func() {
		var v any
		// A document that does not parse is kept: the decoder words the error.
		if err := yaml.Unmarshal(cur, &v); err != nil || v != nil {
			out = append(out, cur)
		}
		cur = nil
	}
	for line := range bytes.Lines(data) {
		if bytes.HasPrefix(line, []byte("---")) && strings.TrimSpace(string(line[3:])) == "" {
			flush()
			continue
		}
		cur = append(cur, line...)
	}
	flush()
	return out
}

func decodeDocument(doc []byte, opts ManifestOptions) ([]Object, error) {
	raw, err := yaml.YAMLToJSONStrict(doc)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(bytes.TrimSpace(raw), []byte("[")) {
		var items []json.RawMessage
		if err := json.Unmarshal(raw, &items); err != nil {
			return nil, err
		}
		return decodeItems("", items, opts)
	}
	return decodeJSON(raw, true, opts)
}

func decodeItems(list string, items []json.RawMessage, opts ManifestOptions) ([]Object, error) {
	var (
		out  []Object
		errs []error
	)
	for i, item := range items {
		objs, err := decodeJSON(item, false, opts)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s[%d]: %w", list, i, err))
			continue
		}
		out = append(out, objs...)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return out, nil
}

func decodeJSON(raw []byte, listAllowed bool, opts ManifestOptions) ([]Object, error) {
	var head struct {
		Kind       string            `json:"kind"`
		APIVersion string            `json:"apiVersion"`
		Items      []json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return nil, fmt.Errorf("expected a resource with kind, apiVersion, metadata and spec: %w", JSONError(err))
	}
	if head.Kind == "" {
		return nil, errors.New("kind: expected one, such as IPPool")
	}
	if head.APIVersion != APIVersion && (head.Kind != "List" || head.APIVersion != "v1") {
		return nil, fmt.Errorf("%s: apiVersion %q: expected %s", head.Kind, head.APIVersion, APIVersion)
	}
	item, isList := strings.CutSuffix(head.Kind, "List")
	for _, k := range Kinds() {
		switch {
		case k.Kind == head.Kind:
			obj, err := decodeOne(k, raw, opts)
			if err != nil {
				return nil, err
			}
			return []Object{obj}, nil
		case listAllowed && isList && (item == "" || item == k.Kind):
			return decodeItems("items", head.Items, opts)
		}
	}
	_, err := LookupKind(head.Kind)
	if err == nil {
		err = errors.New("wrong case")
	}
	return nil, fmt.Errorf("kind %q: %w", head.Kind, err)
}

func decodeOne(k *Kind, raw []byte, opts ManifestOptions) (Object, error) {
	doc, err := parseMap(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", k.Kind, err)
	}
	named, _ := at(doc, []string{"metadata", "name"})
	name, _ := named.(string)
	obj := k.New()
	h := obj.Head()
	if asText(reflect.TypeOf(obj), doc) {
		if raw, err = json.Marshal(doc); err != nil {
			return nil, err
		}
	}
	if err := json.Unmarshal(raw, obj); err != nil {
		return nil, &ResourceError{Kind: k.Kind, Name: name, Err: JSONError(err)}
	}
	h.unknown, h.source = unknownFields(reflect.TypeOf(obj), doc, nil), raw
	if !opts.StoredFields {
		if err := h.checkUnknown(nil); err != nil {
			return nil, &ResourceError{Kind: k.Kind, Name: name, Err: err}
		}
	}
	if err := h.setNamespace(k, opts.Namespace); err != nil {
		return nil, err
	}
	if err := prepare(obj); err != nil {
		return nil, err
	}
	return obj, nil
}

// asText makes texts of the numbers and truth values that a manifest has where t, the type of a resource or of a part of it,
// has text, as calicoctl does: YAML reads a label's value true, or 1, as something else. It says whether there were any.
func asText(t reflect.Type, value any) (changed bool) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if reflect.PointerTo(t).Implements(unmarshaler) {
		return false
	}
	switch v := value.(type) {
	case []any:
		if t.Kind() != reflect.Slice {
			return false
		}
		for i := range v {
			if text, ok := scalarText(t.Elem(), v[i]); ok {
				v[i], changed = text, true
			}
			changed = asText(t.Elem(), v[i]) || changed
		}
	case map[string]any:
		fields := map[string]jsonField{}
		if t.Kind() == reflect.Struct {
			fields = jsonFields(t)
		}
		for key := range v {
			field := fields[strings.ToLower(key)].typ
			if t.Kind() == reflect.Map {
				field = t.Elem()
			}
			if field == nil {
				continue
			}
			if text, ok := scalarText(field, v[key]); ok {
				v[key], changed = text, true
			}
			changed = asText(field, v[key]) || changed
		}
	}
	return changed
}

// scalarText is what a number or a truth value is as text, where t is text.
func scalarText(t reflect.Type, value any) (string, bool) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.String || reflect.PointerTo(t).Implements(unmarshaler) {
		return "", false
	}
	switch v := value.(type) {
	case bool:
		return strconv.FormatBool(v), true
	case json.Number:
		return v.String(), true
	}
	return "", false
}

// setNamespace brings together the namespace that a resource names and the one that it was asked to be in; the texts
// are calicoctl's.
func (h *Header) setNamespace(k *Kind, asked string) error {
	named := h.Metadata.Namespace
	switch {
	case !k.Namespaced && named != "":
		return fmt.Errorf("%s %q: metadata.namespace %q: namespace should not be specified for a non-namespaced resource. %s is not a namespaced resource",
			k.Kind, h.Metadata.Name, named, k.Kind)
	case !k.Namespaced && asked != "":
		return fmt.Errorf("%s is not namespaced", k.Kind)
	case !k.Namespaced:
	case named == "" && asked == "":
		h.Metadata.Namespace = "default"
	case named == "":
		h.Metadata.Namespace = asked
	case asked != "" && asked != named:
		return fmt.Errorf("%s %q: resource namespace does not match client namespace. %s != %s", k.Kind, h.Metadata.Name, named, asked)
	}
	return nil
}

// JSONError says which field of a JSON document is of the wrong type, in the words of a manifest; other errors it returns
// unchanged.
func JSONError(err error) error {
	var e *json.UnmarshalTypeError
	if !errors.As(err, &e) {
		return err
	}
	want := "an object"
	switch e.Type.Kind() {
	case reflect.String:
		want = "text"
	case reflect.Bool:
		want = "true or false"
	case reflect.Slice, reflect.Array:
		want = "a list"
	case reflect.Int, reflect.Int32, reflect.Int64:
		want = "a whole number"
	case reflect.Uint8, reflect.Uint16, reflect.Uint32:
		want = fmt.Sprintf("a whole number from 0 to %d", uint64(1)<<e.Type.Bits()-1)
	}
	got := map[string]string{"string": "text", "bool": "true or false", "array": "a list", "object": "an object", "number": "a number"}[e.Value]
	if got == "" {
		got = strings.TrimPrefix(e.Value, "number ")
	}
	field := strings.TrimPrefix(strings.TrimPrefix(e.Field, "v1Header."), "Header.")
	if field == "" {
		return fmt.Errorf("got %s instead of %s", got, want)
	}
	return fmt.Errorf("%s: expected %s, got %s", field, want, got)
}
