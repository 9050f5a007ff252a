package datastore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"sigs.k8s.io/yaml"
)

// DecodeManifest reads what a user wrote: YAML or JSON, several documents, lists (`kind: List`, `kind: IPPoolList`).
// It is strict: an unknown or repeated field is an error, and so is a spec that does not validate after its defaults
// were filled. The error names the document and the field. Nothing is decoded if anything is wrong.
func DecodeManifest(data []byte) ([]Object, error) {
	var out []Object
	for i, doc := range documents(data) {
		objs, err := decodeDocument(doc)
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", i+1, err)
		}
		out = append(out, objs...)
	}
	if len(out) == 0 {
		return nil, errors.New("manifest: expected at least one resource")
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

func decodeDocument(doc []byte) ([]Object, error) {
	raw, err := yaml.YAMLToJSONStrict(doc)
	if err != nil {
		return nil, err
	}
	return decodeJSON(raw, true)
}

func decodeJSON(raw []byte, listAllowed bool) ([]Object, error) {
	var head struct {
		Kind       string            `json:"kind"`
		APIVersion string            `json:"apiVersion"`
		Items      []json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return nil, fmt.Errorf("expected a resource with kind, apiVersion, metadata and spec: %w", err)
	}
	if head.Kind == "" {
		return nil, errors.New("kind: expected one, such as IPPool")
	}
	if head.APIVersion != APIVersion && (head.Kind != "List" || head.APIVersion != "v1") {
		return nil, fmt.Errorf("%s: apiVersion %q: expected %s", head.Kind, head.APIVersion, APIVersion)
	}
	if listAllowed && strings.HasSuffix(head.Kind, "List") {
		var out []Object
		for i, item := range head.Items {
			objs, err := decodeJSON(item, false)
			if err != nil {
				return nil, fmt.Errorf("items[%d]: %w", i, err)
			}
			out = append(out, objs...)
		}
		return out, nil
	}
	for _, k := range Kinds() {
		if k.Kind == head.Kind {
			obj, err := decodeStrict(k, raw)
			return []Object{obj}, err
		}
	}
	_, err := LookupKind(head.Kind)
	if err == nil {
		err = errors.New("wrong case")
	}
	return nil, fmt.Errorf("kind %q: %w", head.Kind, err)
}

func decodeStrict(k *Kind, raw []byte) (Object, error) {
	obj := k.New()
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(obj); err != nil {
		return nil, fmt.Errorf("%s: %s", k.Kind, strings.TrimPrefix(err.Error(), "json: "))
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, fmt.Errorf("%s: expected nothing after the resource", k.Kind)
	}
	if err := prepare(obj); err != nil {
		return nil, err
	}
	return obj, nil
}
