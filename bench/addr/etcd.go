package addr

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"margay/datastore"
	"margay/datastore/embedded"
)

// etcd is a server of one's own that can be stopped and started again on its data.
type etcd struct {
	cfg    embedded.Config
	addr   string
	cancel context.CancelFunc
	ended  chan error
}

// startEtcd starts a server in a directory of its own. Without sync it does not wait for the disk, which does not matter
// to what is stored as long as the process lives.
func startEtcd(sync bool) (*etcd, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := l.Addr().String()
	_ = l.Close() // only the number was wanted
	dir, err := os.MkdirTemp("", "margay-bench-etcd-")
	if err != nil {
		return nil, err
	}
	e := &etcd{cfg: embedded.Config{Dir: dir, ClientURLs: []string{"http://" + addr}, NoSync: !sync}, addr: addr}
	if err := e.start(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return e, nil
}

func (e *etcd) start() error {
	ctx, cancel := context.WithCancel(context.Background())
	ready := make(chan struct{})
	cfg := e.cfg
	cfg.Ready = func([]string) { close(ready) }
	e.cancel, e.ended = cancel, make(chan error, 1)
	go func() { e.ended <- embedded.Serve(ctx, cfg) }()
	select {
	case <-ready:
		return nil
	case err := <-e.ended:
		cancel()
		return fmt.Errorf("etcd: %w", err)
	}
}

func (e *etcd) stop() error {
	e.cancel()
	return <-e.ended
}

// close stops the server for good.
func (e *etcd) close() error { return errors.Join(e.stop(), os.RemoveAll(e.cfg.Dir)) }

func (e *etcd) url() string { return "http://" + e.addr }

// open connects to the server, with the pools in it.
func (e *etcd) open(ctx context.Context, pools ...*datastore.IPPool) (*datastore.Store, error) {
	s, err := datastore.Open(ctx, datastore.Config{Endpoints: []string{e.url()}})
	if err != nil {
		return nil, err
	}
	for _, p := range pools {
		if err := datastore.CreateResource(ctx, s, p); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	return s, nil
}

// newPool makes a pool; blockSize 0 is the default of its family.
func newPool(name, cidr string, blockSize int) *datastore.IPPool {
	p := datastore.NewIPPool(name)
	p.Spec.CIDR, p.Spec.BlockSize = cidr, blockSize
	return p
}
