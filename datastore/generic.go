package datastore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// Resource is a resource of a kind that Margay keeps for others and does not act on: a policy, a host endpoint. Its spec
// and status stay as they were written; Validate looks at their shape and at the fields whose meaning is certain.
type Resource struct {
	Header
	Spec   json.RawMessage `json:"spec,omitempty"`
	Status json.RawMessage `json:"status,omitempty"`

	of *Kind

	noTier, noTierLabel bool // Default filled in the tier, and the label of the default one: neither is stored
}

// noKind is the kind of a Resource that was not made by a Kind: there is nothing under its prefix.
var noKind = &Kind{Kind: "Resource", Plural: "resources"}

func (r *Resource) kind() *Kind {
	if r.of == nil {
		return noKind
	}
	return r.of
}

// Validate checks the shape of spec and status, and the fields that are known for the kind.
func (r *Resource) Validate() error {
	if r.of == nil {
		return errors.New("kind: expected a resource made for a kind")
	}
	spec, err := r.spec()
	if err != nil {
		return err
	}
	if raw := bytes.TrimSpace(r.Status); len(raw) > 0 && !bytes.Equal(raw, []byte("null")) {
		if _, err := parseMap(raw); err != nil {
			return errors.New("status: expected an object")
		}
	}
	for _, f := range shapes[r.of] {
		if err := f.check(spec); err != nil {
			return err
		}
	}
	if check := deep[r.of]; check != nil {
		return check(r, spec)
	}
	return nil
}

// spec is the parsed spec; empty where there is none.
func (r *Resource) spec() (map[string]any, error) {
	raw := bytes.TrimSpace(r.Spec)
	if len(raw) == 0 || bytes.Equal(raw, []byte("null")) {
		return map[string]any{}, nil
	}
	spec, err := parseMap(raw)
	if err != nil {
		return nil, fmt.Errorf("spec: expected an object with fields")
	}
	return spec, nil
}
