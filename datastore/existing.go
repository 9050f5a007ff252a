package datastore

import (
	"context"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// existingOps is how many names one transaction asks about; etcd's own limit is 128.
const existingOps = 100

// Existing says which of some keys are there, without reading their values. A name that ends in "*" asks for all keys
// that begin with what is before it. The cost is that of the names, not of the store.
func (s *Store) Existing(ctx context.Context, names ...string) ([]string, error) {
	var out []string
	for len(names) > 0 {
		batch := names[:min(existingOps, len(names))]
		names = names[len(batch):]
		found, err := s.existing(ctx, batch)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

func (s *Store) existing(ctx context.Context, names []string) ([]string, error) {
	ctx, done := s.bound(ctx)
	defer done()
	ops := make([]clientv3.Op, len(names))
	for i, name := range names {
		if prefix, ok := strings.CutSuffix(name, "*"); ok {
			ops[i] = clientv3.OpGet(prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
		} else {
			ops[i] = clientv3.OpGet(name, clientv3.WithCountOnly())
		}
	}
	resp, err := s.client.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		return nil, s.wrap(ctx, err)
	}
	var out []string
	for i, r := range resp.Responses {
		if strings.HasSuffix(names[i], "*") {
			for _, kv := range r.GetResponseRange().GetKvs() {
				out = append(out, string(kv.Key))
			}
		} else if r.GetResponseRange().GetCount() > 0 {
			out = append(out, names[i])
		}
	}
	return out, nil
}
