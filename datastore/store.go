package datastore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Errors of the store, to be tested with errors.Is. The error itself names the key.
var (
	// ErrNotFound says that the key does not exist.
	ErrNotFound = errors.New("not found")
	// ErrExists says that a key to be created is there already.
	ErrExists = errors.New("exists already")
	// ErrConflict says that the key was changed by somebody else since it was read; read again and retry.
	ErrConflict = errors.New("changed since it was read")
	// ErrUnreachable says that etcd gave no answer; whether a write took effect is then unknown.
	ErrUnreachable = errors.New("not reachable")
	// ErrRefused says that etcd does not let this user do it: a wrong password, or a permission that is missing.
	ErrRefused = errors.New("refused")
)

// pageSize is the number of keys that List asks for at a time: a page of blocks stays well under etcd's message limit.
const pageSize = 500

// reconnect is how soon etcd is tried again when it does not answer. gRPC's own waits grow to two minutes; a datastore that is
// back after an hour should be found as soon as one that is back after a second, and within the time of one operation.
var reconnect = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
	MinConnectTimeout: DefaultDialTimeout,
}

// KV is one key as it was read.
type KV struct {
	Key      string
	Value    []byte // owned by the caller
	Revision int64  // etcd's ModRevision: what compare-and-swap compares
}

// Store is a connection to etcd. It is safe for concurrent use and reconnects by itself.
type Store struct {
	client    *clientv3.Client
	endpoints string        // for error texts
	timeout   time.Duration // bound of one operation, where the caller's context has no nearer one
}

// Open connects to etcd and makes sure that it answers: an error names the endpoints and why, and arrives within
// Config.DialTimeout. The store lives until Close; ctx only bounds Open.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	tlsConfig, err := cfg.check()
	if err != nil {
		return nil, err
	}
	timeout := cfg.DialTimeout
	if timeout <= 0 {
		timeout = DefaultDialTimeout
	}
	names := strings.Join(cfg.Endpoints, ", ")
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := probe(ctx, cfg.Endpoints, tlsConfig); err != nil {
		return nil, fmt.Errorf("etcd at %s: %w: %w", names, ErrUnreachable, err)
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            cfg.Endpoints,
		DialTimeout:          timeout,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		TLS:                  tlsConfig,
		Username:             cfg.Username,
		Password:             cfg.Password,
		Logger:               zap.NewNop(),
		DialOptions:          []grpc.DialOption{grpc.WithConnectParams(reconnect)},
	})
	s := &Store{client: client, endpoints: names, timeout: timeout}
	if err != nil {
		return nil, s.wrap(ctx, err)
	}
	// Any read will do: it shows that TLS, credentials and quorum are in order.
	if _, err := s.Get(ctx, resourceRoot); err != nil && !errors.Is(err, ErrNotFound) {
		_ = client.Close() // the read's error is the one to report
		return nil, err
	}
	return s, nil
}

// Close ends the connection; watches end with their own contexts.
func (s *Store) Close() error { return s.client.Close() }

// Get reads one key; ErrNotFound if there is none.
func (s *Store) Get(ctx context.Context, key string) (KV, error) {
	ctx, done := s.bound(ctx)
	defer done()
	resp, err := s.client.Get(ctx, key)
	if err != nil {
		return KV{}, s.wrap(ctx, err)
	}
	if len(resp.Kvs) == 0 {
		return KV{}, fmt.Errorf("%s: %w", key, ErrNotFound)
	}
	kv := resp.Kvs[0]
	return KV{Key: string(kv.Key), Value: kv.Value, Revision: kv.ModRevision}, nil
}

// List reads all keys under prefix, sorted, as they were at one revision, which it returns: a watch continues from it.
func (s *Store) List(ctx context.Context, prefix string) ([]KV, int64, error) {
	return s.list(ctx, prefix)
}

// Keys is List without the values.
func (s *Store) Keys(ctx context.Context, prefix string) ([]KV, int64, error) {
	return s.list(ctx, prefix, clientv3.WithKeysOnly())
}

func (s *Store) list(ctx context.Context, prefix string, opts ...clientv3.OpOption) ([]KV, int64, error) {
	var (
		out  []KV
		rev  int64
		from = prefix
		end  = clientv3.GetPrefixRangeEnd(prefix)
	)
	for {
		resp, err := s.page(ctx, from, end, rev, opts)
		if err != nil {
			return nil, 0, err
		}
		if rev == 0 {
			rev = resp.Header.Revision
		}
		for _, kv := range resp.Kvs {
			out = append(out, KV{Key: string(kv.Key), Value: kv.Value, Revision: kv.ModRevision})
		}
		if !resp.More || len(resp.Kvs) == 0 {
			return out, rev, nil
		}
		from = out[len(out)-1].Key + "\x00"
	}
}

// page reads one page of [from, end) at rev; rev 0 is now.
func (s *Store) page(ctx context.Context, from, end string, rev int64, opts []clientv3.OpOption) (*clientv3.GetResponse, error) {
	ctx, done := s.bound(ctx)
	defer done()
	opts = append(slices.Clone(opts), clientv3.WithRange(end), clientv3.WithLimit(pageSize))
	if rev != 0 {
		opts = append(opts, clientv3.WithRev(rev))
	}
	resp, err := s.client.Get(ctx, from, opts...)
	if err != nil {
		return nil, s.wrap(ctx, err)
	}
	return resp, nil
}

// ListMany reads several keys or prefixes in one round trip, all as they were at the one revision it returns. A name
// that ends in "/" is a prefix, anything else a single key; the result has one (perhaps empty) list for each name. It
// is not paged: for a few small lists that must agree with each other.
func (s *Store) ListMany(ctx context.Context, names ...string) ([][]KV, int64, error) {
	ctx, done := s.bound(ctx)
	defer done()
	ops := make([]clientv3.Op, len(names))
	for i, name := range names {
		if strings.HasSuffix(name, "/") {
			ops[i] = clientv3.OpGet(name, clientv3.WithPrefix())
		} else {
			ops[i] = clientv3.OpGet(name)
		}
	}
	resp, err := s.client.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		return nil, 0, s.wrap(ctx, err)
	}
	out := make([][]KV, len(names))
	for i, r := range resp.Responses {
		for _, kv := range r.GetResponseRange().GetKvs() {
			out[i] = append(out[i], KV{Key: string(kv.Key), Value: kv.Value, Revision: kv.ModRevision})
		}
	}
	return out, resp.Header.Revision, nil
}

// Create writes a key that must not exist (else ErrExists), and returns its revision.
func (s *Store) Create(ctx context.Context, key string, value []byte) (int64, error) {
	return s.Txn(ctx, OpCreate(key, value))
}

// Update writes a key that must still be at rev (else ErrConflict, or ErrNotFound if it is gone), and returns its new
// revision.
func (s *Store) Update(ctx context.Context, key string, value []byte, rev int64) (int64, error) {
	return s.Txn(ctx, OpUpdate(key, value, rev))
}

// Delete removes a key that must exist (else ErrNotFound) and still be at rev (else ErrConflict); rev 0 means any.
func (s *Store) Delete(ctx context.Context, key string, rev int64) error {
	_, err := s.Txn(ctx, OpDelete(key, rev))
	return err
}

// bound gives an operation the store's timeout where the caller's context has no nearer deadline.
func (s *Store) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, s.timeout)
}

// wrap turns the client's error into one that names the endpoints; no answer becomes ErrUnreachable.
func (s *Store) wrap(ctx context.Context, err error) error {
	code := status.Code(err)
	switch {
	case errors.Is(err, rpctypes.ErrAuthFailed), errors.Is(err, rpctypes.ErrUserEmpty), errors.Is(err, rpctypes.ErrInvalidAuthToken):
		return fmt.Errorf("etcd at %s: %w: %w: check ETCD_USERNAME and ETCD_PASSWORD, or etcdUsername and etcdPassword in the file", s.endpoints, ErrRefused, err)
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return fmt.Errorf("etcd at %s: %w: %w: grant the user's role read and write on /calico/", s.endpoints, ErrRefused, err)
	case errors.Is(err, context.Canceled) || code == codes.Canceled:
		return fmt.Errorf("etcd at %s: %w", s.endpoints, context.Canceled)
	case ctx.Err() != nil, errors.Is(err, context.DeadlineExceeded), code == codes.DeadlineExceeded, code == codes.Unavailable:
		return fmt.Errorf("etcd at %s: %w: %w", s.endpoints, ErrUnreachable, err)
	}
	return fmt.Errorf("etcd at %s: %w", s.endpoints, err)
}
