package lab

import (
	"io"
	"net"
	"sync"
	"time"
)

// tunnel is a listener on the caller's loopback whose connections go on from inside another network namespace: a way
// to a lab's etcd that depends neither on the host's firewall nor on whose underlay the host routes to.
type tunnel struct {
	listener net.Listener
	netns    string // path
	target   string // ADDRESS:PORT, reached from there

	mu     sync.Mutex
	open   map[net.Conn]bool
	closed bool
	wg     sync.WaitGroup
}

// newTunnel opens a tunnel; Close ends it and its connections.
func newTunnel(netns, target string) (*tunnel, error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	t := &tunnel{listener: ln, netns: netns, target: target, open: map[net.Conn]bool{}}
	t.wg.Go(t.accept)
	return t, nil
}

// URL is where the tunnel begins.
func (t *tunnel) URL() string { return "http://" + t.listener.Addr().String() }

// Close returns when nothing of the tunnel runs any more.
func (t *tunnel) Close() {
	t.listener.Close()
	t.mu.Lock()
	t.closed = true
	for c := range t.open {
		c.Close()
	}
	t.mu.Unlock()
	t.wg.Wait()
}

func (t *tunnel) accept() {
	for {
		near, err := t.listener.Accept()
		if err != nil {
			return
		}
		t.wg.Go(func() { t.carry(near) })
	}
}

// carry joins one connection to one on the far side, until either ends.
func (t *tunnel) carry(near net.Conn) {
	defer near.Close()
	var far net.Conn
	err := within(t.netns, func() (err error) {
		// The address is a literal, so that the dialer makes its socket on this very thread.
		far, err = net.DialTimeout("tcp4", t.target, 2*time.Second)
		return err
	})
	if err != nil {
		return // the client sees the connection end, and tries again
	}
	defer far.Close()
	if !t.keep(near, far) {
		return
	}
	defer t.forget(near, far)
	var back sync.WaitGroup
	back.Go(func() {
		_, _ = io.Copy(far, near)
		far.Close()
	})
	_, _ = io.Copy(near, far)
	near.Close()
	back.Wait()
}

func (t *tunnel) keep(conns ...net.Conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range conns {
		t.open[c] = true
	}
	return !t.closed
}

func (t *tunnel) forget(conns ...net.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range conns {
		delete(t.open, c)
	}
}
