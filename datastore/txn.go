package datastore

import (
	"context"
	"errors"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Op is one part of a transaction; made by OpCreate, OpUpdate, OpDelete, OpCheck and OpUnchanged.
type Op struct {
	key  string
	cmps []clientv3.Cmp
	then []clientv3.Op
	// probe is what the transaction reads, when it fails, to say why.
	probe clientv3.Op
	fault func(got *clientv3.GetResponse) error // nil if this part was satisfied
}

// OpCreate writes a key that must not exist.
func OpCreate(key string, value []byte) Op {
	op := compareRevision(key, 0)
	op.then = []clientv3.Op{clientv3.OpPut(key, string(value))}
	return op
}

// OpUpdate writes a key that must exist at rev.
func OpUpdate(key string, value []byte, rev int64) Op {
	op := compareRevision(key, rev)
	if rev <= 0 {
		// 0 would mean "absent": an update of something never read is a mistake, and must not become a create.
		op.cmps = []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", -1)}
		op.fault = func(*clientv3.GetResponse) error { return ErrConflict }
	}
	op.then = []clientv3.Op{clientv3.OpPut(key, string(value))}
	return op
}

// OpDelete removes a key that must exist, at rev; rev 0 means at any revision.
func OpDelete(key string, rev int64) Op {
	op := compareRevision(key, rev)
	if rev == 0 {
		op.cmps = []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(key), ">", 0)}
		op.fault = func(got *clientv3.GetResponse) error {
			if len(got.Kvs) == 0 {
				return ErrNotFound
			}
			return nil
		}
	}
	op.then = []clientv3.Op{clientv3.OpDelete(key)}
	return op
}

// OpCheck writes nothing, and requires that key is still at rev; rev 0 means that it must not exist.
func OpCheck(key string, rev int64) Op { return compareRevision(key, rev) }

// OpUnchanged writes nothing, and requires that no key under prefix was created or changed after rev. (A key that was
// deleted meanwhile goes unnoticed.)
func OpUnchanged(prefix string, rev int64) Op {
	return Op{
		key:   prefix,
		cmps:  []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(prefix), "<", rev+1).WithPrefix()},
		probe: clientv3.OpGet(prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithMinModRev(rev+1), clientv3.WithLimit(1)),
		fault: func(got *clientv3.GetResponse) error {
			if len(got.Kvs) > 0 {
				return ErrConflict
			}
			return nil
		},
	}
}

// compareRevision requires key at rev, where 0 is "absent".
func compareRevision(key string, rev int64) Op {
	return Op{
		key:   key,
		cmps:  []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", rev)},
		probe: clientv3.OpGet(key, clientv3.WithKeysOnly()),
		fault: func(got *clientv3.GetResponse) error {
			switch {
			case len(got.Kvs) == 0 && rev != 0:
				return ErrNotFound
			case len(got.Kvs) > 0 && rev == 0:
				return ErrExists
			case len(got.Kvs) > 0 && got.Kvs[0].ModRevision != rev:
				return ErrConflict
			}
			return nil
		},
	}
}

// TxnError says which key kept a transaction from happening; Err is ErrExists, ErrNotFound or ErrConflict.
type TxnError struct {
	Key string
	Err error
}

func (e *TxnError) Error() string { return e.Key + ": " + e.Err.Error() }

func (e *TxnError) Unwrap() error { return e.Err }

// Txn does all of ops or none of them, and returns the revision that all written keys then have. A condition that does
// not hold gives a *TxnError for the first such op. After ErrUnreachable it is unknown whether it happened.
func (s *Store) Txn(ctx context.Context, ops ...Op) (int64, error) {
	if len(ops) == 0 {
		return 0, errors.New("transaction: expected at least one operation")
	}
	var (
		cmps       []clientv3.Cmp
		then, read []clientv3.Op
	)
	for _, op := range ops {
		cmps = append(cmps, op.cmps...)
		then = append(then, op.then...)
		read = append(read, op.probe)
	}
	ctx, done := s.bound(ctx)
	defer done()
	resp, err := s.client.Txn(ctx).If(cmps...).Then(then...).Else(read...).Commit()
	if err != nil {
		return 0, s.wrap(ctx, err)
	}
	if resp.Succeeded {
		return resp.Header.Revision, nil
	}
	for i, op := range ops {
		if i >= len(resp.Responses) {
			break
		}
		if fault := op.fault((*clientv3.GetResponse)(resp.Responses[i].GetResponseRange())); fault != nil {
			return 0, &TxnError{Key: op.key, Err: fault}
		}
	}
	return 0, fmt.Errorf("transaction on %s: %w", ops[0].key, ErrConflict)
}
