package datastore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// CreateResource stores a new resource (else ErrExists), and fills its defaults, UID, creation time and version.
func CreateResource(ctx context.Context, s *Store, obj Object) error {
	if err := obj.Head().checkUnknown(nil); err != nil {
		return resourceError(obj.kind(), obj.Head().Path(), err)
	}
	return create(ctx, s, obj, nil)
}

// RestoreResource is CreateResource for a resource from an export, read with ManifestOptions.StoredFields: the fields
// that this version does not know are stored with it.
func RestoreResource(ctx context.Context, s *Store, obj Object) error {
	return create(ctx, s, obj, obj.Head().source)
}

// create stores a new resource, laid over base where there is one.
func create(ctx context.Context, s *Store, obj Object, base []byte) error {
	k, h := obj.kind(), obj.Head()
	if err := prepare(obj); err != nil {
		return err
	}
	if h.Metadata.UID == "" {
		h.Metadata.UID = newUID()
	}
	now := time.Now().UTC().Truncate(time.Second)
	h.Metadata.CreationTimestamp = &now
	h.raw = base
	if err := checkReferences(ctx, s, obj); err != nil {
		return resourceError(k, h.Path(), err)
	}
	if err := layOut(ctx, s, obj); err != nil {
		return resourceError(k, h.Path(), err)
	}
	value, err := encode(obj)
	if err != nil {
		return resourceError(k, h.Path(), err)
	}
	for try := range modifyTries {
		ops := []Op{OpCreate(k.Key(h.storedPath()), value)}
		if pool, ok := obj.(*IPPool); ok {
			guard, err := overlapGuard(ctx, s, pool)
			if err != nil {
				return resourceError(k, h.Path(), err)
			}
			ops = append(ops, guard)
		}
		// A conflict can only come from the guard: another pool was written meanwhile, so look for overlaps again.
		if err := write(ctx, s, obj, value, ops...); !errors.Is(err, ErrConflict) {
			return err
		}
		if err := Backoff(ctx, try); err != nil {
			return err
		}
	}
	return resourceError(k, h.Path(), ErrConflict)
}

// UpdateResource stores a resource that was read before, if nobody changed it since (else ErrConflict). What an update
// must not change (a pool's cidr and blockSize) is refused. Where nothing changed nothing is written, and the version
// stays.
func UpdateResource(ctx context.Context, s *Store, obj Object) error {
	k, h := obj.kind(), obj.Head()
	if err := prepare(obj); err != nil {
		return err
	}
	rev, err := strconv.ParseInt(h.Metadata.ResourceVersion, 10, 64)
	if err != nil || rev <= 0 {
		return resourceError(k, h.Path(), fmt.Errorf("metadata.resourceVersion %q: expected the version that was read", h.Metadata.ResourceVersion))
	}
	if h.raw == nil {
		// Built from a manifest: what is stored, at that very version, lends its unknown fields.
		kv, err := k.locate(ctx, s, h.Path())
		if err != nil {
			return resourceError(k, h.Path(), err)
		}
		h.stored = storedAs(k, kv, h.Path())
		if kv.Revision != rev {
			return resourceError(k, h.Path(), ErrConflict)
		}
		h.raw = kv.Value
	}
	if err := h.checkUnknown(h.raw); err != nil {
		return resourceError(k, h.Path(), err)
	}
	if err := checkImmutable(obj); err != nil {
		return resourceError(k, h.Path(), err)
	}
	if err := checkReferences(ctx, s, obj); err != nil {
		return resourceError(k, h.Path(), err)
	}
	value, err := encode(obj)
	if err != nil {
		return resourceError(k, h.Path(), err)
	}
	if sameJSON(value, h.raw) {
		// Nothing to write; that the caller saw the latest is still to be answered.
		_, err := s.Txn(ctx, OpCheck(k.Key(h.storedPath()), rev))
		return resourceError(k, h.Path(), err)
	}
	return write(ctx, s, obj, value, OpUpdate(k.Key(h.storedPath()), value, rev))
}

// ApplyResource creates the resource, or replaces the one of that name: its known fields become obj's, those this version
// does not know stay as stored. A resourceVersion in obj must be the stored one, where something is stored. Created says
// which of both it was.
func ApplyResource(ctx context.Context, s *Store, obj Object) (created bool, err error) {
	return apply(ctx, s, obj, true)
}

// ReplaceResource is ApplyResource for a resource that must be there already (else ErrNotFound).
func ReplaceResource(ctx context.Context, s *Store, obj Object) error {
	_, err := apply(ctx, s, obj, false)
	return err
}

func apply(ctx context.Context, s *Store, obj Object, mayCreate bool) (created bool, err error) {
	k, h := obj.kind(), obj.Head()
	wanted := h.Metadata.ResourceVersion
	for try := range modifyTries {
		old, err := GetObject(ctx, s, k, h.Path())
		switch {
		case errors.Is(err, ErrNotFound):
			if !mayCreate {
				return false, err
			}
			created, err = true, CreateResource(ctx, s, obj)
		case err != nil:
			return false, err
		case wanted != "" && wanted != old.Head().Metadata.ResourceVersion:
			return false, resourceError(k, h.Path(), ErrConflict)
		default:
			meta := old.Head().Metadata
			// As with calicoctl, of the metadata only labels and annotations are the manifest's to say.
			h.Metadata.UID, h.Metadata.CreationTimestamp = meta.UID, meta.CreationTimestamp
			h.Metadata.Generation, h.Metadata.Finalizers = meta.Generation, meta.Finalizers
			h.Metadata.ResourceVersion = meta.ResourceVersion
			h.raw, h.stored = old.Head().raw, old.Head().stored
			created, err = false, UpdateResource(ctx, s, obj)
		}
		if wanted != "" || !contended(err) || try == modifyTries-1 {
			return created, err
		}
		if err := Backoff(ctx, try); err != nil {
			return false, err
		}
	}
	return false, resourceError(k, h.Path(), ErrConflict)
}

// ModifyResource reads a resource, lets change alter it and writes it back, again from the start when somebody else was
// faster, within bounds. When change alters nothing, nothing is written.
func ModifyResource[T any, P Pointer[T]](ctx context.Context, s *Store, name string, change func(P) error) error {
	return ModifyObject(ctx, s, kindOf[T, P](), name, func(obj Object) error { return change(obj.(P)) })
}

// ModifyObject is ModifyResource for a kind found with LookupKind.
func ModifyObject(ctx context.Context, s *Store, k *Kind, name string, change func(Object) error) error {
	for try := range modifyTries {
		obj, err := GetObject(ctx, s, k, name)
		if err != nil {
			return err
		}
		before, err := json.Marshal(obj)
		if err != nil {
			return resourceError(k, name, err)
		}
		if err := change(obj); err != nil {
			return err
		}
		after, err := json.Marshal(obj)
		if err != nil {
			return resourceError(k, name, err)
		}
		if bytes.Equal(before, after) {
			return nil
		}
		if err := UpdateResource(ctx, s, obj); !contended(err) {
			return err
		}
		if err := Backoff(ctx, try); err != nil {
			return err
		}
	}
	return resourceError(k, name, ErrConflict)
}

// DeleteObject removes a resource of a kind found with LookupKind; ErrNotFound if there is none.
func DeleteObject(ctx context.Context, s *Store, k *Kind, name string) error {
	if err := k.validateName(name); err != nil {
		return &ResourceError{Kind: k.Kind, Name: name, Err: err}
	}
	key := k.Key(name)
	if k.tiered() {
		kv, err := k.locate(ctx, s, name)
		if err != nil {
			return resourceError(k, name, err)
		}
		key = kv.Key
	}
	if err := checkDelete(ctx, s, k, name); err != nil {
		return resourceError(k, name, err)
	}
	return resourceError(k, name, s.Delete(ctx, key, 0))
}

// DeleteResource removes a resource: DeleteResource[BGPPeer](ctx, s, name); ErrNotFound if there is none.
func DeleteResource[T any, P Pointer[T]](ctx context.Context, s *Store, name string) error {
	return DeleteObject(ctx, s, kindOf[T, P](), name)
}

// prepare fills defaults and checks the whole object.
func prepare(obj Object) error {
	k, h := obj.kind(), obj.Head()
	h.Kind, h.APIVersion = k.Kind, APIVersion
	obj.Default()
	err := k.validateName(h.Path())
	if k == WorkloadEndpoints && h.Metadata.Name == "" {
		err = obj.Validate() // which names the field that the name could not be made without
	}
	if h.Metadata.Namespace == "" && k.Namespaced {
		err = errors.New("metadata.namespace: expected one, the kind is namespaced")
	}
	if h.Metadata.Namespace != "" && !k.Namespaced {
		err = fmt.Errorf("metadata.namespace %q: expected none, the kind is not namespaced", h.Metadata.Namespace)
	}
	if err == nil {
		err = validateLabels(h.Metadata.Labels)
	}
	if err == nil {
		err = obj.Validate()
	}
	return resourceError(k, h.Path(), err)
}

// write commits ops, of which the first writes obj's value, and notes the new version in obj.
func write(ctx context.Context, s *Store, obj Object, value []byte, ops ...Op) error {
	h := obj.Head()
	rev, err := s.Txn(ctx, ops...)
	if err != nil {
		return resourceError(obj.kind(), h.Path(), err)
	}
	h.Metadata.ResourceVersion, h.raw = strconv.FormatInt(rev, 10), value
	return nil
}

// CheckFields looks for fields of resources read with ManifestOptions.StoredFields that neither their kind nor what is
// stored has, so that a misspelt one can be refused before anything is written.
func CheckFields(ctx context.Context, s *Store, objs ...Object) error {
	var errs []error
	for _, obj := range objs {
		k, h := obj.kind(), obj.Head()
		if len(h.unknown) == 0 {
			continue
		}
		var stored []byte
		switch kv, err := k.locate(ctx, s, h.Path()); {
		case err == nil:
			stored = kv.Value
		case !errors.Is(err, ErrNotFound):
			return resourceError(k, h.Path(), err)
		}
		errs = append(errs, resourceError(k, h.Path(), h.checkUnknown(stored)))
	}
	return errors.Join(errs...)
}
