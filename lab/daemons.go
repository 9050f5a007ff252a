package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"margay/datastore"
)

// How long we wait for a daemon.
const (
	readyTimeout = 60 * time.Second // until it serves; a machine with few cores starts many at once
	stopGrace    = 10 * time.Second // from SIGTERM to SIGKILL
	pollEvery    = 50 * time.Millisecond
)

func (l *Lab) startEtcd(s *state) (*child, error) {
	return daemon{
		netns: netnsPath(underlayName(l.name)),
		argv: []string{filepath.Join(s.BinDir, "margay-agent"), "etcd",
			"--data-dir", filepath.Join(l.Dir(), "etcd"), "--listen-client", s.endpoint()},
		log: filepath.Join(l.Dir(), "logs", "etcd.log"),
	}.start()
}

func (l *Lab) startVRouter(s *state, n *node) (*child, error) {
	if err := l.makeNodeDirs(n); err != nil {
		return nil, err
	}
	argv := []string{filepath.Join(s.BinDir, "vrouter"),
		"--socket", filepath.Join(l.runDir(n.Name), "vrouter.sock"), "--state-dir", l.varDir(n.Name)}
	if s.Attach != "" {
		argv = append(argv, "--attach", s.Attach)
	}
	if s.IO != "" {
		argv = append(argv, "--io", s.IO)
	}
	if s.Queues != 0 {
		argv = append(argv, "--queues", strconv.Itoa(s.Queues))
	}
	if s.Threads != 0 {
		argv = append(argv, "--threads-per-queue", strconv.Itoa(s.Threads))
	}
	return daemon{netns: netnsPath(n.Name), argv: argv, log: filepath.Join(l.logsDir(n.Name), "vrouter.log")}.start()
}

func (l *Lab) startAgent(s *state, n *node) (*child, error) {
	if err := l.makeNodeDirs(n); err != nil {
		return nil, err
	}
	return daemon{
		netns: netnsPath(n.Name),
		argv: []string{filepath.Join(s.BinDir, "margay-agent"), "--node", n.Name,
			"--run-dir", l.runDir(n.Name), "--state-dir", l.varDir(n.Name),
			"--etcd-endpoints", s.endpoint(), "--ip-autodetection-method", "interface=" + nodeLink},
		log: filepath.Join(l.logsDir(n.Name), "agent.log"),
	}.start()
}

func (l *Lab) makeNodeDirs(n *node) error {
	return errors.Join(os.MkdirAll(l.runDir(n.Name), 0o755), os.MkdirAll(l.varDir(n.Name), 0o755))
}

// await calls check until it succeeds. It gives up when the child dies, ctx ends or the time is over; check's last
// error then says what was missing.
func await(ctx context.Context, c *child, what string, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		err := check(ctx)
		select {
		case <-c.gone: // whoever has answered, it was not this one
			return fmt.Errorf("%s: %w", what, c.ended())
		default:
		}
		if err == nil {
			return nil
		}
		select {
		case <-c.gone:
			return fmt.Errorf("%s: %w", what, c.ended())
		case <-ctx.Done():
			return fmt.Errorf("%s: not ready: %w; its log: %s", what, err, c.log)
		case <-time.After(pollEvery):
		}
	}
}

func (l *Lab) awaitVRouter(ctx context.Context, n *node, c *child) error {
	socket := filepath.Join(l.runDir(n.Name), "vrouter.sock")
	return await(ctx, c, "vrouter of "+n.Name, func(ctx context.Context) error {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", socket)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

func (l *Lab) awaitAgent(ctx context.Context, n *node, c *child) error {
	socket := filepath.Join(l.runDir(n.Name), "agent.sock")
	return await(ctx, c, "agent of "+n.Name, func(ctx context.Context) error { return agentReady(ctx, socket) })
}

// agentReady asks an agent for its status. (The types of agent/api stay outside this room; two fields are all we need.)
func agentReady(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/v1/status", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("no answer on %s", socket)
	}
	defer resp.Body.Close()
	var status struct {
		Ready  bool   `json:"ready"`
		Reason string `json:"reason"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&status); err != nil {
		return fmt.Errorf("status on %s: %w", socket, err)
	}
	if !status.Ready {
		return fmt.Errorf("it says: %s", status.Reason)
	}
	return nil
}

// withStore waits until etcd answers and runs f with a connection to it.
func withStore(ctx context.Context, s *state, c *child, f func(*datastore.Store) error) error {
	way, err := newTunnel(netnsPath(underlayName(s.Name)), fmt.Sprintf("%s:%d", at(s.Subnet, etcdOctet), etcdPort))
	if err != nil {
		return err
	}
	defer way.Close()
	var store *datastore.Store
	err = await(ctx, c, "etcd", func(ctx context.Context) (err error) {
		store, err = datastore.Open(ctx, datastore.Config{Endpoints: []string{way.URL()}, DialTimeout: time.Second})
		return err
	})
	if err != nil {
		return err
	}
	defer store.Close()
	return f(store)
}

// seed writes what a cluster's installer writes: the pool, and that the datastore is ready.
func seed(ctx context.Context, pool *datastore.IPPool) func(*datastore.Store) error {
	return func(store *datastore.Store) error {
		info := datastore.NewClusterInformation("default")
		info.Spec.DatastoreReady = new(true)
		if err := datastore.CreateResource(ctx, store, info); err != nil {
			return err
		}
		return datastore.CreateResource(ctx, store, pool)
	}
}
