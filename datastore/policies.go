package datastore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Policies that belong to a tier have had two layouts in etcd. Calico up to 3.31 stores a policy "web" of the default tier
// under default.web, and notes the name that its user gave in an annotation; Calico 3.32 stores it under web. Both are read;
// what is there already keeps its layout, and a new policy gets that of the Calico that the store belongs to.

// nameAnnotation holds {"name": …}, the name that users know a policy by.
const nameAnnotation = "projectcalico.org/metadata"

// tiered says whether policies of this kind belong to a tier.
func (k *Kind) tiered() bool {
	return slices.Contains([]*Kind{NetworkPolicies, GlobalNetworkPolicies, StagedNetworkPolicies, StagedGlobalNetworkPolicies}, k)
}

// tieredName is the name, as Key takes it, that a policy has in the older layout.
func tieredName(path string) string {
	namespace, name, ok := strings.Cut(path, "/")
	if !ok {
		namespace, name = "", path
	} else {
		namespace += "/"
	}
	if !strings.Contains(name, ".") {
		name = defaultTier + "." + name
	}
	return namespace + name
}

// locate finds the key that a resource is stored under: that of its name, or for a policy perhaps that of the older layout.
// Where there is none the error is ErrNotFound.
func (k *Kind) locate(ctx context.Context, s *Store, path string) (KV, error) {
	if !k.tiered() {
		return s.Get(ctx, k.Key(path))
	}
	lists, _, err := s.ListMany(ctx, k.Key(tieredName(path)), k.Key(path))
	if err != nil {
		return KV{}, err
	}
	for _, kvs := range lists {
		if len(kvs) > 0 && givenName(k, kvs[0]) == path {
			return kvs[0], nil
		}
	}
	return KV{}, fmt.Errorf("%s: %w", k.Key(path), ErrNotFound)
}

// givenName is the name, with its namespace, that users know a stored policy by.
func givenName(k *Kind, kv KV) string {
	path := strings.TrimPrefix(kv.Key, k.Prefix())
	var head struct {
		Metadata struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(kv.Value, &head); err != nil {
		return path
	}
	name, ok := noted(head.Metadata.Annotations)
	if !ok {
		return path
	}
	if namespace, _, ok := strings.Cut(path, "/"); ok {
		return namespace + "/" + name
	}
	return name
}

// storedAs is Header.stored for a resource that is stored at kv.
func storedAs(k *Kind, kv KV, path string) string {
	if name := strings.TrimPrefix(kv.Key, k.Prefix()); name != path {
		return name
	}
	return ""
}

// noted is the name that nameAnnotation holds.
func noted(annotations map[string]string) (string, bool) {
	var given struct {
		Name string `json:"name"`
	}
	err := json.Unmarshal([]byte(annotations[nameAnnotation]), &given)
	return given.Name, err == nil && given.Name != ""
}

// giveName brings a policy, as it is stored, to the name that users know it by. Its key keeps the other one.
func (h *Header) giveName() {
	name, ok := noted(h.Metadata.Annotations)
	if !ok {
		return
	}
	h.stored = h.Path()
	h.Metadata.Name = name
	delete(h.Metadata.Annotations, nameAnnotation)
	if len(h.Metadata.Annotations) == 0 {
		h.Metadata.Annotations = nil
	}
}

// storedPath is the name that the resource has in the store.
func (h *Header) storedPath() string {
	if h.stored != "" {
		return h.stored
	}
	return h.Path()
}

// storedForm gives the header the form in which it is stored, until the returned function is called.
func (h *Header) storedForm() (restore func()) {
	before := h.Metadata
	h.Metadata.ResourceVersion = ""
	if h.stored != "" {
		note, _ := json.Marshal(struct { // text always marshals
			Name string `json:"name"`
		}{h.Metadata.Name})
		annotations := map[string]string{nameAnnotation: string(note)}
		for key, value := range h.Metadata.Annotations {
			annotations[key] = value
		}
		h.Metadata.Annotations = annotations
		h.Metadata.Name = h.stored[strings.LastIndexByte(h.stored, '/')+1:]
	}
	return func() { h.Metadata = before }
}

// layOut chooses the layout of a policy that is about to be created, and checks what its tier asks for.
func layOut(ctx context.Context, s *Store, obj Object) error {
	k, h := obj.kind(), obj.Head()
	r, ok := obj.(*Resource)
	if !ok || !k.tiered() {
		return nil
	}
	spec, err := r.spec()
	if err != nil {
		return err
	}
	tier, _ := spec["tier"].(string)
	_, err = s.Get(ctx, Tiers.Key(tier))
	switch {
	case h.raw != nil: // of an export, which has its tiers somewhere
	case errors.Is(err, ErrNotFound):
		return fmt.Errorf("spec.tier %q: expected a Tier that exists", tier)
	case err != nil:
		return err
	}
	older, err := olderLayout(ctx, s)
	if err != nil || !older {
		return err
	}
	h.stored = tieredName(h.Path())
	if tierOfName(h.Metadata.Name) != tier {
		return fmt.Errorf("metadata.name %q: expected it to begin with %q, the policy's tier", h.Metadata.Name, tier+".")
	}
	return nil
}

// olderLayout says whether the store belongs to a Calico before 3.32, or to one that does not say its version: what is
// stored in the older layout is read by both.
func olderLayout(ctx context.Context, s *Store) (bool, error) {
	info, err := GetResource[ClusterInformation](ctx, s, "default")
	if errors.Is(err, ErrNotFound) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	parts := strings.SplitN(strings.TrimPrefix(info.Spec.CalicoVersion, "v"), ".", 3)
	if len(parts) < 2 {
		return true, nil
	}
	major, err1 := strconv.Atoi(parts[0])
	minor, err2 := strconv.Atoi(parts[1])
	return err1 != nil || err2 != nil || major < 3 || major == 3 && minor < 32, nil
}
