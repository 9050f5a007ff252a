package datastore

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	mathrand "math/rand/v2"
	"regexp"
	"slices"
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

	stored  string         // a policy's name in the older layout, with its namespace; empty: Path
	raw     []byte         // as stored, nil if never read: holds the fields that this version does not know
	unknown []unknownField // of a manifest read by DecodeManifestFor
	source  []byte         // that manifest, as JSON
}

// Head returns the header itself, for code that handles any Object.
func (h *Header) Head() *Header { return h }

// ObjectMeta is Metadata under the name that templates written for calicoctl know.
func (h *Header) ObjectMeta() Metadata { return h.Metadata }

// Path is the name as GetObject takes it: <namespace>/<name> where there is a namespace.
func (h *Header) Path() string {
	if h.Metadata.Namespace == "" {
		return h.Metadata.Name
	}
	return h.Metadata.Namespace + "/" + h.Metadata.Name
}

// Object is any resource: *IPPool, *Node, *BGPPeer and so on, or a *Resource.
type Object interface {
	Head() *Header
	// Default fills the fields that Calico fills where they are empty.
	Default()
	// Validate checks the spec; the error names the field and what was expected.
	Validate() error
	// kind is the resource's entry in Kinds.
	kind() *Kind
}

// KindOf returns the kind of a resource.
func KindOf(obj Object) *Kind { return obj.kind() }

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
		return fail(JSONError(err))
	}
	h := obj.Head()
	if h.Kind != k.Kind {
		return fail(fmt.Errorf("kind %q: expected %s", h.Kind, k.Kind))
	}
	if h.Path() != name {
		return fail(fmt.Errorf("metadata.name %q: expected the key's %s", h.Path(), name))
	}
	if k.tiered() {
		h.giveName()
	}
	h.Metadata.ResourceVersion = strconv.FormatInt(kv.Revision, 10)
	h.raw = kv.Value
	return obj, nil
}

// DecodeObject is Decode for a kind found with LookupKind.
func DecodeObject(k *Kind, kv KV) (Object, error) { return decode(k, kv) }

// GetObject reads one resource of a kind found with LookupKind. The name of a namespaced one is <namespace>/<name>.
func GetObject(ctx context.Context, s *Store, k *Kind, name string) (Object, error) {
	if err := k.validateName(name); err != nil {
		return nil, &ResourceError{Kind: k.Kind, Name: name, Err: err}
	}
	kv, err := k.locate(ctx, s, name)
	if err != nil {
		return nil, resourceError(k, name, err)
	}
	return decode(k, kv)
}

// ListObjects reads all resources of a kind, sorted by name, and the revision at which they were read. A stored value
// that cannot be understood is left out of the list and named in the error; the rest of the list is good.
func ListObjects(ctx context.Context, s *Store, k *Kind) ([]Object, int64, error) {
	return listObjects(ctx, s, k, k.Prefix())
}

// ListNamespace is ListObjects for one namespace of a namespaced kind.
func ListNamespace(ctx context.Context, s *Store, k *Kind, namespace string) ([]Object, int64, error) {
	if err := k.validateName(namespace + "/x"); err != nil {
		return nil, 0, fmt.Errorf("%s: %w", k.Kind, err)
	}
	return listObjects(ctx, s, k, k.Prefix()+namespace+"/")
}

func listObjects(ctx context.Context, s *Store, k *Kind, prefix string) ([]Object, int64, error) {
	kvs, rev, err := s.List(ctx, prefix)
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
	if errors.As(err, &txn) && (txn.Key == k.Key(name) || k.tiered() && txn.Key == k.Key(tieredName(name))) {
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

// labelPattern is a DNS-1123 label: the rule for namespaces.
var labelPattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

func validateName(name string) error {
	if len(name) > 253 || !namePattern.MatchString(name) {
		return fmt.Errorf("metadata.name %q: expected lower-case letters, digits, '-' and '.', at most 253 characters, beginning and ending with a letter or digit", name)
	}
	return nil
}

// labelPart is a label's name, behind the prefix that it may have, and its value: Kubernetes' and Calico's rule.
var labelPart = regexp.MustCompile(`^[a-zA-Z0-9]([-a-zA-Z0-9_.]*[a-zA-Z0-9])?$`)

func validateLabels(labels map[string]string) error {
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		prefix, name, prefixed := strings.Cut(key, "/")
		if !prefixed {
			name = key
		}
		if prefixed && (len(prefix) > 253 || !namePattern.MatchString(prefix)) || len(name) > 63 || !labelPart.MatchString(name) {
			return fmt.Errorf("metadata.labels: key %q: expected at most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or digit, "+
				"and before them, if anything, a domain name and '/'", key)
		}
		if value := labels[key]; value != "" && (len(value) > 63 || !labelPart.MatchString(value)) {
			return fmt.Errorf("metadata.labels: %s %q: expected at most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or digit", key, value)
		}
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
