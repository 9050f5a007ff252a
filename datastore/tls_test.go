package datastore

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"margay/datastore/embedded"
)

// authority signs certificates for the tests.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir()}
	a.key = newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(raw); err != nil {
		t.Fatal(err)
	}
	a.file = writePEM(t, filepath.Join(a.dir, "ca.pem"), "CERTIFICATE", raw)
	return a
}

// issue makes a certificate for 127.0.0.1 that is valid until then, and returns the two files.
func (a *authority) issue(t *testing.T, name string, until time.Time) (cert, key string) {
	t.Helper()
	private := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: until, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	raw, err := x509.CreateCertificate(rand.Reader, template, a.cert, private.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return writePEM(t, filepath.Join(a.dir, name+".pem"), "CERTIFICATE", raw), writePEM(t, filepath.Join(a.dir, name+".key"), "EC PRIVATE KEY", secret)
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func writePEM(t *testing.T, file, kind string, raw []byte) string {
	t.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// serve runs an etcd of the test's own and returns its URL.
func serve(t *testing.T, cfg embedded.Config) string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan string, 1), make(chan error, 1)
	cfg.Dir, cfg.NoSync = t.TempDir(), true
	cfg.Ready = func(urls []string) { ready <- urls[0] }
	go func() { ended <- embedded.Serve(ctx, cfg) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("etcd: %v", err)
		}
	})
	select {
	case url := <-ready:
		return url
	case err := <-ended:
		ended <- nil
		t.Fatalf("etcd: %v", err)
	}
	return ""
}

// What is wrong with TLS is said in words, by every way to name the files.
func TestTLS(t *testing.T) {
	ca, other := newAuthority(t, "etcd"), newAuthority(t, "somebody else")
	hour := time.Now().Add(time.Hour)
	serverCert, serverKey := ca.issue(t, "server", hour)
	cert, key := ca.issue(t, "client", hour)
	strange, strangeKey := other.issue(t, "client", hour)
	old, oldKey := ca.issue(t, "expired", time.Now().Add(-time.Minute))
	oldServer, oldServerKey := ca.issue(t, "expired-server", time.Now().Add(-time.Minute))
	mutual := serve(t, embedded.Config{ClientURLs: []string{"https://127.0.0.1:0"}, CertFile: serverCert, KeyFile: serverKey, ClientCAFile: ca.file})
	simple := serve(t, embedded.Config{ClientURLs: []string{"https://127.0.0.1:0"}, CertFile: serverCert, KeyFile: serverKey})
	expired := serve(t, embedded.Config{ClientURLs: []string{"https://127.0.0.1:0"}, CertFile: oldServer, KeyFile: oldServerKey})
	for _, tt := range []struct {
		name string
		cfg  Config
		want string // part of the error; empty: it works
	}{
		{"server's certificate alone", Config{Endpoints: []string{simple}, CACert: ca.file}, ""},
		{"both certificates", Config{Endpoints: []string{mutual}, CACert: ca.file, Cert: cert, Key: key}, ""},
		{"no CA", Config{Endpoints: []string{simple}}, "certificate signed by unknown authority"},
		{"wrong CA", Config{Endpoints: []string{simple}, CACert: other.file}, "certificate signed by unknown authority"},
		{"expired server", Config{Endpoints: []string{expired}, CACert: ca.file}, "certificate has expired or is not yet valid"},
		{"no client certificate", Config{Endpoints: []string{mutual}, CACert: ca.file}, "tls handshake: remote error: tls: certificate required"},
		{"client of another CA", Config{Endpoints: []string{mutual}, CACert: ca.file, Cert: strange, Key: strangeKey}, "tls handshake: remote error: tls: "},
		{"expired client", Config{Endpoints: []string{mutual}, CACert: ca.file, Cert: old, Key: oldKey}, "tls handshake: remote error: tls: "},
		{"key of another certificate", Config{Endpoints: []string{mutual}, CACert: ca.file, Cert: cert, Key: oldKey}, "etcd client certificate: tls: private key does not match public key"},
		{"http to a server with TLS", Config{Endpoints: []string{strings.Replace(simple, "https", "http", 1)}}, "expected https:// for a server with TLS"},
		{"another name", Config{Endpoints: []string{strings.Replace(simple, "127.0.0.1", "localhost", 1)}, CACert: ca.file}, "localhost"},
	} {
		tt.cfg.DialTimeout = 20 * time.Second
		s, err := Open(t.Context(), tt.cfg)
		if err == nil {
			if _, err := s.Create(t.Context(), "/t/"+strings.ReplaceAll(tt.name, " ", "-"), nil); err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
			_ = s.Close()
		}
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, expected %q", tt.name, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), "deadline") {
			t.Errorf("%s: only the deadline ended it: %v", tt.name, err)
		}
	}
}

// An etcd that asks for a user: the right one works, and each wrong one is told what is wrong.
func TestAuthentication(t *testing.T) {
	url := serve(t, embedded.Config{ClientURLs: []string{"http://127.0.0.1:0"}})
	admin, err := clientv3.New(clientv3.Config{Endpoints: []string{url}})
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	ctx := t.Context()
	steps := []func() error{
		func() error { _, err := admin.RoleAdd(ctx, "root"); return err },
		func() error { _, err := admin.UserAdd(ctx, "root", "secret"); return err },
		func() error { _, err := admin.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := admin.RoleAdd(ctx, "reader"); return err },
		func() error {
			_, err := admin.RoleGrantPermission(ctx, "reader", "/calico/", clientv3.GetPrefixRangeEnd("/calico/"), clientv3.PermissionType(clientv3.PermRead))
			return err
		},
		func() error { _, err := admin.UserAdd(ctx, "reader", "reads"); return err },
		func() error { _, err := admin.UserGrantRole(ctx, "reader", "reader"); return err },
		func() error { _, err := admin.AuthEnable(ctx); return err },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	const hint = ": check ETCD_USERNAME and ETCD_PASSWORD"
	for _, tt := range []struct{ user, password, want string }{
		{"root", "secret", ""},
		{"root", "wrong", "authentication failed, invalid user ID or password" + hint},
		{"nobody", "secret", "authentication failed, invalid user ID or password" + hint},
		{"", "", "user name is empty" + hint},
	} {
		s, err := Open(ctx, Config{Endpoints: []string{url}, Username: tt.user, Password: tt.password})
		if err == nil {
			_, err = s.Create(ctx, "/calico/x", nil)
			_ = s.Close()
		}
		if tt.want == "" && err != nil || tt.want != "" && (!errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%q: %v, expected %q", tt.user, err, tt.want)
		}
	}
	// One who may only read can read, and is told when it writes.
	s, err := Open(ctx, Config{Endpoints: []string{url}, Username: "reader", Password: "reads"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Get(ctx, "/calico/x"); err != nil {
		t.Error(err)
	}
	if _, err := s.Create(ctx, "/calico/y", nil); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("write of a reader: %v", err)
	}
}
