package addr

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"margay/bench/stat"
	"margay/datastore"
	"margay/ipam"
)

// Claim measures how long a node without a block takes to get its first address, in a store with 5,000 nodes' blocks and
// in one with 5; they take turns. With full, the pools are 95 % full.
func Claim(ctx context.Context, rounds int, full bool) (row Row, err error) {
	type side struct {
		store *datastore.Store
		took  []float64
	}
	var sides [2]side
	many, few := "10.16.0.0/12", "10.16.0.0/12"
	blocks := [2]int{5000, 5}
	if full {
		many, few = "10.16.0.0/13", "10.16.0.0/19" // 8,192 and 128 blocks
		blocks = [2]int{7782, 122}
	}
	for i, cidr := range []string{many, few} {
		e, err := startEtcd(true)
		if err != nil {
			return Row{}, err
		}
		defer func() { err = errors.Join(err, e.close()) }()
		if sides[i].store, err = e.open(ctx, newPool("four", cidr, 26)); err != nil {
			return Row{}, err
		}
		defer sides[i].store.Close()
		if err := occupy(ctx, sides[i].store, blocks[i]); err != nil {
			return Row{}, err
		}
	}
	for n := range rounds + 2 {
		for i := range sides {
			s := &sides[i]
			node := fmt.Sprintf("new%d", n)
			var got ipam.Assignment
			a := ipam.New(s.store, node, nil)
			if err := timed(&s.took, func() (err error) { got, err = a.Assign(ctx, ipam.Request{Handle: "net." + node}); return err }); err != nil {
				return Row{}, err
			}
			if n < 2 {
				s.took = nil // the first ones do not count
			}
			// The store is to be as full as before.
			name := strings.Replace(got.Block.String(), "/", "-", 1)
			if _, err := s.store.Txn(ctx, datastore.OpDelete("/calico/ipam/v2/assignment/ipv4/block/"+name, 0),
				datastore.OpDelete(ipam.AffinityPrefix(node)+name, 0), datastore.OpDelete(ipam.HandlePrefix+"net."+node, 0)); err != nil {
				return Row{}, err
			}
		}
	}
	what := "claim of a block beside 5,000 nodes' blocks, p50"
	if full {
		what += ", pools 95 % full"
	}
	return Row{What: what, Unit: "ms", Ours: stat.Summarise(sides[0].took), Peer: stat.Summarise(sides[1].took),
		PeerIs: fmt.Sprintf("beside %d blocks", blocks[1]), AtLeast: 2, Aim: 1.1}.judge(), nil
}

// occupy has as many nodes as blocks claim one each, as they do in life: each with a pod in it.
func occupy(ctx context.Context, s *datastore.Store, blocks int) error {
	var (
		next atomic.Int64
		wg   sync.WaitGroup
		mu   sync.Mutex
		errs []error
	)
	for range 32 {
		wg.Go(func() {
			for i := next.Add(1); int(i) <= blocks; i = next.Add(1) {
				a := ipam.New(s, fmt.Sprintf("full%d", i), nil)
				if _, err := a.Assign(ctx, ipam.Request{Handle: fmt.Sprintf("net.full%d", i)}); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
