package datastore

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	"sigs.k8s.io/yaml"
)

// DefaultDialTimeout bounds Open, and each operation, where Config says nothing.
const DefaultDialTimeout = 5 * time.Second

// ConfigFile is the file that calicoctl reads, and margayctl too.
const ConfigFile = "/etc/calico/calicoctl.cfg"

// Config says where etcd is.
type Config struct {
	Endpoints          []string      // http://host:port, https://host:port; at least one
	CACert, Cert, Key  string        // PEM files, for https
	Username, Password string        // optional
	DialTimeout        time.Duration // 0 is DefaultDialTimeout
}

// ConfigFromEnv reads DATASTORE_TYPE, ETCD_ENDPOINTS, ETCD_CA_CERT_FILE, ETCD_CERT_FILE, ETCD_KEY_FILE, ETCD_USERNAME and
// ETCD_PASSWORD, and takes what they leave open from ConfigFile, if there is one. Endpoints may come out empty, so that
// the caller can fill them from elsewhere; Open then refuses.
func ConfigFromEnv() (Config, error) { return configFrom(os.Getenv, ConfigFile) }

// ConfigFromFile reads a file like ConfigFile, which must exist. Who names a file means that one: the environment has no
// say.
func ConfigFromFile(file string) (Config, error) {
	if _, err := os.Stat(file); err != nil {
		return Config{}, err
	}
	return configFrom(func(string) string { return "" }, file)
}

// fileConfig is the spec of calicoctl.cfg, as far as it concerns etcd.
type fileConfig struct {
	Spec struct {
		DatastoreType  string `json:"datastoreType"`
		EtcdEndpoints  string `json:"etcdEndpoints"`
		EtcdUsername   string `json:"etcdUsername"`
		EtcdPassword   string `json:"etcdPassword"`
		EtcdKeyFile    string `json:"etcdKeyFile"`
		EtcdCertFile   string `json:"etcdCertFile"`
		EtcdCACertFile string `json:"etcdCACertFile"`
	} `json:"spec"`
}

func configFrom(getenv func(string) string, file string) (Config, error) {
	var fc fileConfig
	raw, err := os.ReadFile(file)
	switch {
	case err == nil:
		if err := yaml.Unmarshal(raw, &fc); err != nil {
			return Config{}, fmt.Errorf("%s: expected YAML with spec.etcdEndpoints: %w", file, err)
		}
	case !errors.Is(err, os.ErrNotExist):
		return Config{}, err
	}
	pick := func(variable, fromFile string) string {
		if v := strings.TrimSpace(getenv(variable)); v != "" {
			return v
		}
		return strings.TrimSpace(fromFile)
	}
	if t := pick("DATASTORE_TYPE", fc.Spec.DatastoreType); t != "" && t != "etcdv3" {
		return Config{}, fmt.Errorf("DATASTORE_TYPE %q: expected etcdv3", t)
	}
	cfg := Config{
		CACert:   pick("ETCD_CA_CERT_FILE", fc.Spec.EtcdCACertFile),
		Cert:     pick("ETCD_CERT_FILE", fc.Spec.EtcdCertFile),
		Key:      pick("ETCD_KEY_FILE", fc.Spec.EtcdKeyFile),
		Username: pick("ETCD_USERNAME", fc.Spec.EtcdUsername),
		Password: pick("ETCD_PASSWORD", fc.Spec.EtcdPassword),
	}
	for _, e := range strings.Split(pick("ETCD_ENDPOINTS", fc.Spec.EtcdEndpoints), ",") {
		if e = strings.TrimSpace(e); e != "" {
			cfg.Endpoints = append(cfg.Endpoints, e)
		}
	}
	return cfg, nil
}

// check validates the configuration and loads the TLS files; a nil tls.Config means plain http.
func (c Config) check() (*tls.Config, error) {
	if len(c.Endpoints) == 0 {
		return nil, fmt.Errorf("etcd endpoints: none given: set ETCD_ENDPOINTS (http://host:2379) or spec.etcdEndpoints in %s", ConfigFile)
	}
	secure := false
	for _, e := range c.Endpoints {
		u, err := url.Parse(e)
		if err != nil || u.Hostname() == "" || u.Port() == "" || (u.Scheme != "http" && u.Scheme != "https") {
			return nil, fmt.Errorf("etcd endpoint %q: expected http://host:port or https://host:port", e)
		}
		secure = secure || u.Scheme == "https"
	}
	if (c.Cert == "") != (c.Key == "") {
		return nil, errors.New("etcd client certificate: expected both a certificate (ETCD_CERT_FILE) and a key (ETCD_KEY_FILE), or neither")
	}
	if !secure {
		return nil, nil
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CACert != "" {
		pem, err := os.ReadFile(c.CACert)
		if err != nil {
			return nil, fmt.Errorf("etcd CA certificate: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("etcd CA certificate %s: expected PEM certificates", c.CACert)
		}
	}
	if c.Cert != "" {
		pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
		if err != nil {
			return nil, fmt.Errorf("etcd client certificate: %w", err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf, nil
}
