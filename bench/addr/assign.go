package addr

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"margay/bench/stat"
	"margay/datastore"
	"margay/ipam"
)

// blockBytes is the size of a block's JSON with 32 pods in it.
const blockBytes = 7900

// warmUp is how many of each kind come first and do not count.
const warmUp = 20

// Assign measures an assignment out of a node's own block beside two bare transactions of etcd by the same client: a small
// key, compared and written, and one as large as an assignment's, a block's bytes compared and written and a small key
// created. They take turns. The server waits for its disk, as a cluster's does, or not.
func Assign(ctx context.Context, rounds int, sync bool) (rows []Row, err error) {
	e, err := startEtcd(sync)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, e.close()) }()
	s, err := e.open(ctx, newPool("four", "10.16.0.0/12", 26))
	if err != nil {
		return nil, err
	}
	defer s.Close()
	const key = "/bench/bare"
	value, block := []byte(`{"a":"key that is compared and written"}`), bytes.Repeat([]byte("x"), blockBytes)
	rev, err := s.Create(ctx, key, value)
	if err != nil {
		return nil, err
	}
	blockRev, err := s.Create(ctx, key+"/block", block)
	if err != nil {
		return nil, err
	}
	a := ipam.New(s, "n1", nil)
	var ours, bare, shaped []float64
	for i := range rounds + warmUp {
		handle := fmt.Sprintf("k8s-pod-network.%064x", i)
		err := timed(&bare, func() (err error) { rev, err = s.Update(ctx, key, value, rev); return err })
		if err != nil {
			return nil, err
		}
		err = timed(&shaped, func() (err error) {
			blockRev, err = s.Txn(ctx, datastore.OpUpdate(key+"/block", block, blockRev), datastore.OpCreate(key+"/handle/"+handle, value))
			return err
		})
		if err != nil {
			return nil, err
		}
		req := ipam.Request{Handle: handle, Attrs: map[string]string{"namespace": "default", "pod": fmt.Sprintf("web-%d", i)}}
		if err := timed(&ours, func() error { _, err := a.Assign(ctx, req); return err }); err != nil {
			return nil, err
		}
		// Half of the block stays in use, as on a node in the middle of its life.
		if old := i - 32; old >= 0 {
			if _, err := a.ReleaseHandle(ctx, fmt.Sprintf("k8s-pod-network.%064x", old)); err != nil {
				return nil, err
			}
		}
		if i == warmUp {
			ours, bare, shaped = nil, nil, nil
		}
	}
	what := "assign from an own block, p50"
	if !sync {
		what += ", etcd without fsync"
	}
	row := Row{What: what, Unit: "ms", Ours: stat.Summarise(ours), AtLeast: 2, Aim: 1.1}
	small, large := row, row
	small.Peer, small.PeerIs = stat.Summarise(bare), "bare etcd transaction"
	large.Peer, large.PeerIs = stat.Summarise(shaped), "one with a block's bytes"
	return []Row{small.judge(), large.judge()}, nil
}
