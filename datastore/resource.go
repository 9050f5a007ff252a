package datastore

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// APIVersion is the apiVersion of all resources.
const APIVersion = "projectcalico.org/v3"

// resourceRoot is where the resources lie: <root><plural>/<name>.
const resourceRoot = "/calico/resources/v3/projectcalico.org/"

// modifyTries bounds the attempts of a read-modify-write that keeps meeting other writers.
const modifyTries = 20

// Metadata identifies a resource. ResourceVersion is etcd's revision of the key as read; it is never stored.
type Metadata struct {
	Name              string            `json:"name"`
	Namespace         string            `json:"namespace,omitempty"`
	UID               string            `json:"uid,omitempty"`
	ResourceVersion   string            `json:"resourceVersion,omitempty"`
	Generation        int64             `json:"generation,omitempty"`
	CreationTimestamp *time.Time        `json:"creationTimestamp,omitempty"`
	Labels            map[string]string `json:"labels,omitempty"`
	Annotations       map[string]string `json:"annotations,omitempty"`
	Finalizers        []string          `json:"finalizers,omitempty"`
}

// Header is what all resources begin with.
type Header struct {
	Kind       string   `json:"kind"`
	APIVersion string   `json:"apiVersion"`
	Metadata   Metadata `json:"metadata"`

	raw []byte // as stored, nil if never read: holds the fields that this version does not know
}

// Head returns the header itself, for code that handles any Object.
func (h *Header) Head() *Header { return h }

// Object is any resource: *IPPool, *Node, *BGPPeer, *BGPConfiguration or *ClusterInformation.
type Object interface {
	Head() *Header
	// Default fills the fields that Calico fills where they are empty.
	Default()
	// Validate checks the spec; the error names the field and what was expected.
	Validate() error
	// kind is the resource's entry in Kinds.
	kind() *Kind
}

// Pointer is satisfied by *T where T is one of the resource structs; it is inferred, never written by a caller.
type Pointer[T any] interface {
	*T
	Object
}

// ResourceError is an error about one resource; Err may be ErrNotFound, ErrExists or ErrConflict.
type ResourceError struct {
	Kind, Name string
	Err        error
}

func (e *ResourceError) Error() string { return fmt.Sprintf("%s %q: %v", e.Kind, e.Name, e.Err) }

func (e *ResourceError) Unwrap() error { return e.Err }

// kindOf returns the Kind of a resource type.
func kindOf[T any, P Pointer[T]]() *Kind { return P(new(T)).kind() }

// Decode reads a stored resource, as List or Watch delivers it; what it does not know it keeps for the next write.
func Decode[T any, P Pointer[T]](kv KV) (P, error) {
	obj, err := decode(kindOf[T, P](), kv)
	if err != nil {
		return nil, err
	}
	return obj.(P), nil
}

func decode(k *Kind, kv KV) (Object, error) {
	name := strings.TrimPrefix(kv.Key, k.Prefix())
	obj := k.New()
	fail := func(err error) (Object, error) {
		return nil, &ResourceError{Kind: k.Kind, Name: name, Err: fmt.Errorf("stored value: %w", err)}
	}
	if err := json.Unmarshal(kv.Value, obj); err != nil {
		return fail(err)
	}
	h := obj.Head()
	if h.Kind != k.Kind {
		return fail(fmt.Errorf("kind %q: expected %s", h.Kind, k.Kind))
	}
	if h.Metadata.Name != name {
		return fail(fmt.Errorf("metadata.name %q: expected the key's %s", h.Metadata.Name, name))
	}
	h.Metadata.ResourceVersion = strconv.FormatInt(kv.Revision, 10)
	h.raw = kv.Value
	return obj, nil
}

// GetObject reads one resource of a kind found with LookupKind.
func GetObject(ctx context.Context, s *Store, k *Kind, name string) (Object, error) {
	if err := validateName(name); err != nil {
		return nil, &ResourceError{Kind: k.Kind, Name: name, Err: err}
	}
	kv, err := s.Get(ctx, k.Key(name))
	if err != nil {
		return nil, resourceError(k, name, err)
	}
	return decode(k, kv)
}

// ListObjects reads all resources of a kind, sorted by name, and the revision at which they were read. A stored value
// that cannot be understood is left out of the list and named in the error; the rest of the list is good.
func ListObjects(ctx context.Context, s *Store, k *Kind) ([]Object, int64, error) {
	kvs, rev, err := s.List(ctx, k.Prefix())
	if err != nil {
		return nil, 0, err
	}
	var (
		out  []Object
		errs []error
	)
	for _, kv := range kvs {
		obj, err := decode(k, kv)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, obj)
	}
	return out, rev, errors.Join(errs...)
}

// GetResource reads one resource: GetResource[IPPool](ctx, s, name) gives a *IPPool.
func GetResource[T any, P Pointer[T]](ctx context.Context, s *Store, name string) (P, error) {
	obj, err := GetObject(ctx, s, kindOf[T, P](), name)
	if err != nil {
		return nil, err
	}
	return obj.(P), nil
}

// ListResources is ListObjects for one resource type: ListResources[Node](ctx, s) gives []*Node.
func ListResources[T any, P Pointer[T]](ctx context.Context, s *Store) ([]P, int64, error) {
	objs, rev, err := ListObjects(ctx, s, kindOf[T, P]())
	out := make([]P, len(objs))
	for i, obj := range objs {
		out[i] = obj.(P)
	}
	return out, rev, err
}

// CreateResource stores a new resource (else ErrExists), and fills its defaults, UID, creation time and version.
func CreateResource(ctx context.Context, s *Store, obj Object) error {
	k, h := obj.kind(), obj.Head()
	if err := prepare(obj); err != nil {
		return err
	}
	if h.Metadata.UID == "" {
		h.Metadata.UID = newUID()
	}
	now := time.Now().UTC().Truncate(time.Second)
	h.Metadata.CreationTimestamp = &now
	h.raw = nil
	value, err := encode(obj)
	if err != nil {
		return resourceError(k, h.Metadata.Name, err)
	}
	for try := range modifyTries {
		ops := []Op{OpCreate(k.Key(h.Metadata.Name), value)}
		if pool, ok := obj.(*IPPool); ok {
			guard, err := overlapGuard(ctx, s, pool)
			if err != nil {
				return resourceError(k, h.Metadata.Name, err)
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
	return resourceError(k, h.Metadata.Name, ErrConflict)
}

// UpdateResource stores a resource that was read before, if nobody changed it since (else ErrConflict). What an update
// must not change (a pool's cidr and blockSize) is refused.
func UpdateResource(ctx context.Context, s *Store, obj Object) error {
	k, h := obj.kind(), obj.Head()
	if err := prepare(obj); err != nil {
		return err
	}
	rev, err := strconv.ParseInt(h.Metadata.ResourceVersion, 10, 64)
	if err != nil || rev <= 0 {
		return resourceError(k, h.Metadata.Name, fmt.Errorf("metadata.resourceVersion %q: expected the version that was read", h.Metadata.ResourceVersion))
	}
	if h.raw == nil {
		// Built from a manifest: what is stored, at that very version, lends its unknown fields.
		kv, err := s.Get(ctx, k.Key(h.Metadata.Name))
		if err != nil {
			return resourceError(k, h.Metadata.Name, err)
		}
		if kv.Revision != rev {
			return resourceError(k, h.Metadata.Name, ErrConflict)
		}
		h.raw = kv.Value
	}
	if err := checkImmutable(obj); err != nil {
		return resourceError(k, h.Metadata.Name, err)
	}
	value, err := encode(obj)
	if err != nil {
		return resourceError(k, h.Metadata.Name, err)
	}
	return write(ctx, s, obj, value, OpUpdate(k.Key(h.Metadata.Name), value, rev))
}

// ApplyResource creates the resource, or replaces the one of that name: its known fields become obj's, those this version
// does not know stay as stored. A resourceVersion in obj must be the stored one. Created says which of both it was.
func ApplyResource(ctx context.Context, s *Store, obj Object) (created bool, err error) {
	k, h := obj.kind(), obj.Head()
	wanted := h.Metadata.ResourceVersion
	for try := range modifyTries {
		old, err := GetObject(ctx, s, k, h.Metadata.Name)
		switch {
		case errors.Is(err, ErrNotFound):
			if wanted != "" {
				return false, err
			}
			created, err = true, CreateResource(ctx, s, obj)
		case err != nil:
			return false, err
		case wanted != "" && wanted != old.Head().Metadata.ResourceVersion:
			return false, resourceError(k, h.Metadata.Name, ErrConflict)
		default:
			meta := old.Head().Metadata
			h.Metadata.UID, h.Metadata.CreationTimestamp = meta.UID, meta.CreationTimestamp
			h.Metadata.ResourceVersion = meta.ResourceVersion
			h.raw = old.Head().raw
			created, err = false, UpdateResource(ctx, s, obj)
		}
		if wanted != "" || !contended(err) || try == modifyTries-1 {
			return created, err
		}
		if err := Backoff(ctx, try); err != nil {
			return false, err
		}
	}
	return false, resourceError(k, h.Metadata.Name, ErrConflict)
}

// ModifyResource reads a resource, lets change alter it and writes it back, again from the start when somebody else was
// faster, within bounds. When change alters nothing, nothing is written.
func ModifyResource[T any, P Pointer[T]](ctx context.Context, s *Store, name string, change func(P) error) error {
	for try := range modifyTries {
		obj, err := GetResource[T, P](ctx, s, name)
		if err != nil {
			return err
		}
		before, err := json.Marshal(obj)
		if err != nil {
			return resourceError(obj.kind(), name, err)
		}
		if err := change(obj); err != nil {
			return err
		}
		after, err := json.Marshal(obj)
		if err != nil {
			return resourceError(obj.kind(), name, err)
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
	return resourceError(kindOf[T, P](), name, ErrConflict)
}

// DeleteObject removes a resource of a kind found with LookupKind; ErrNotFound if there is none.
func DeleteObject(ctx context.Context, s *Store, k *Kind, name string) error {
	if err := validateName(name); err != nil {
		return &ResourceError{Kind: k.Kind, Name: name, Err: err}
	}
	return resourceError(k, name, s.Delete(ctx, k.Key(name), 0))
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
	err := validateName(h.Metadata.Name)
	if err == nil && h.Metadata.Namespace != "" {
		err = fmt.Errorf("metadata.namespace %q: expected none, the kind is not namespaced", h.Metadata.Namespace)
	}
	if err == nil {
		err = obj.Validate()
	}
	return resourceError(k, h.Metadata.Name, err)
}

// write commits ops, of which the first writes obj's value, and notes the new version in obj.
func write(ctx context.Context, s *Store, obj Object, value []byte, ops ...Op) error {
	h := obj.Head()
	rev, err := s.Txn(ctx, ops...)
	if err != nil {
		return resourceError(obj.kind(), h.Metadata.Name, err)
	}
	h.Metadata.ResourceVersion, h.raw = strconv.FormatInt(rev, 10), value
	return nil
}

// contended says that somebody else wrote first, and that reading again may help.
func contended(err error) bool {
	return errors.Is(err, ErrConflict) || errors.Is(err, ErrExists) || errors.Is(err, ErrNotFound)
}

// Backoff waits before attempt try+1 of something that met another writer: longer each time, and by chance, so that
// two who collided do not collide again. It ends early with ctx's error.
func Backoff(ctx context.Context, try int) error {
	limit := min(200*time.Millisecond, 2*time.Millisecond<<min(try, 10))
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(limit/4 + mathrand.N(limit)):
		return nil
	}
}

func resourceError(k *Kind, name string, err error) error {
	var txn *TxnError
	if errors.As(err, &txn) && txn.Key == k.Key(name) {
		err = txn.Err // the key says nothing that kind and name do not
	}
	for _, plain := range []error{ErrNotFound, ErrExists, ErrConflict} {
		if errors.Is(err, plain) {
			err = plain
		}
	}
	if err == nil {
		return nil
	}
	return &ResourceError{Kind: k.Kind, Name: name, Err: err}
}

// namePattern is a DNS-1123 subdomain (RFC 1123 2.1): Kubernetes' and Calico's rule for names.
var namePattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

func validateName(name string) error {
	if len(name) > 253 || !namePattern.MatchString(name) {
		return fmt.Errorf("metadata.name %q: expected lower-case letters, digits, '-' and '.', at most 253 characters, beginning and ending with a letter or digit", name)
	}
	return nil
}

// newUID makes a random UUID (RFC 9562 5.4).
func newUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: it crashes the program instead
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:])
}
