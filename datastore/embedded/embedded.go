// Package embedded runs an etcd server inside a process: the datastore of one machine, for labs, tests and small
// clusters. It is a room of its own so that clients of datastore do not link the server.
package embedded

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
)

// startTimeout bounds the server's start: replaying a log of ordinary size takes far less.
const startTimeout = 60 * time.Second

// Config says where the server keeps its data and where it listens.
type Config struct {
	Dir        string                    // data directory; made if it is not there
	ClientURLs []string                  // http://address:port (or https) to listen on; port 0 picks a free one; default http://127.0.0.1:2379
	Log        *slog.Logger              // the server's own log; its routine messages arrive at debug level; nil: nowhere
	Ready      func(clientURLs []string) // called once the server answers, with the addresses it really listens on; may be nil
	// CertFile and KeyFile are the server's certificate and key (PEM), for client URLs of https. With ClientCAFile a client
	// has to show a certificate that this CA signed.
	CertFile, KeyFile, ClientCAFile string
	NoSync                          bool // never fsync: for tests and labs, data may be lost when the machine (not the process) dies
}

// Serve runs a single-member server until ctx is done, and then stops it cleanly. It opens no peer port.
func Serve(ctx context.Context, cfg Config) error {
	ec, err := cfg.embed()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("etcd data directory: %w", err)
	}
	// etcd reports a port in use with the whole configuration around it; asking first gives one clear line.
	if err := portsFree(ec.ListenClientUrls); err != nil {
		return err
	}
	server, err := embed.StartEtcd(ec)
	if err != nil {
		return fmt.Errorf("etcd in %s: %w", cfg.Dir, err)
	}
	defer server.Close()
	select {
	case <-server.Server.ReadyNotify():
	case err := <-server.Err():
		return fmt.Errorf("etcd in %s: %w", cfg.Dir, err)
	case <-server.Server.StopNotify():
		return fmt.Errorf("etcd in %s: stopped while starting", cfg.Dir)
	case <-ctx.Done():
		return nil
	case <-time.After(startTimeout):
		return fmt.Errorf("etcd in %s: not ready after %s", cfg.Dir, startTimeout)
	}
	if cfg.Ready != nil {
		urls := make([]string, len(server.Clients))
		for i, l := range server.Clients {
			urls[i] = ec.ListenClientUrls[0].Scheme + "://" + l.Addr().String()
		}
		cfg.Ready(urls)
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-server.Err():
		return fmt.Errorf("etcd in %s: %w", cfg.Dir, err)
	case <-server.Server.StopNotify():
		return fmt.Errorf("etcd in %s: stopped by itself", cfg.Dir)
	}
}

// embed translates to etcd's own configuration.
func (c Config) embed() (*embed.Config, error) {
	if c.Dir == "" {
		return nil, errors.New("etcd data directory: expected a path")
	}
	if len(c.ClientURLs) == 0 {
		c.ClientURLs = []string{"http://127.0.0.1:2379"}
		if c.CertFile != "" {
			c.ClientURLs = []string{"https://127.0.0.1:2379"}
		}
	}
	scheme := "http"
	if c.CertFile != "" {
		scheme = "https"
	}
	switch {
	case (c.CertFile == "") != (c.KeyFile == ""):
		return nil, errors.New("etcd server certificate: expected both a certificate and a key, or neither")
	case c.CertFile == "" && c.ClientCAFile != "":
		return nil, errors.New("etcd client CA: expected a server certificate and key beside it")
	}
	var urls []url.URL
	for _, text := range c.ClientURLs {
		u, err := url.Parse(text)
		if err != nil || u.Scheme != scheme || u.Port() == "" || strings.Trim(u.Path, "/") != "" {
			return nil, fmt.Errorf("etcd client URL %q: expected %s://address:port", text, scheme)
		}
		if net.ParseIP(u.Hostname()) == nil {
			return nil, fmt.Errorf("etcd client URL %q: expected an IP address, not a name", text)
		}
		u.Path = ""
		urls = append(urls, *u)
	}
	log := c.Log
	if log == nil {
		log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	ec := embed.NewConfig()
	ec.Name = "margay"
	ec.Dir = c.Dir
	ec.ListenClientUrls, ec.AdvertiseClientUrls = urls, urls
	// A single member is never dialled by a peer: the advertised peer URL is only its name, and there is no listener
	// that two servers on one machine could fight over.
	ec.ListenPeerUrls = nil
	ec.InitialCluster = ec.InitialClusterFromName(ec.Name)
	// Nobody else can be elected: there is no reason to wait long for the only candidate.
	ec.TickMs, ec.ElectionMs = 20, 100
	ec.AutoCompactionMode, ec.AutoCompactionRetention = embed.CompactorModePeriodic, "1h"
	ec.UnsafeNoFsync = c.NoSync
	ec.ClientTLSInfo = transport.TLSInfo{CertFile: c.CertFile, KeyFile: c.KeyFile, TrustedCAFile: c.ClientCAFile,
		ClientCertAuth: c.ClientCAFile != ""}
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(newZap(log))
	return ec, nil
}

// portsFree says which address cannot be listened on, and why.
func portsFree(urls []url.URL) error {
	for _, u := range urls {
		l, err := net.Listen("tcp", u.Host)
		if err != nil {
			return fmt.Errorf("etcd client URL %s: %w", u.String(), err)
		}
		if err := l.Close(); err != nil {
			return err
		}
	}
	return nil
}
