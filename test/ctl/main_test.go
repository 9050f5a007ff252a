// Package ctl tests margayctl's resource commands as a whole, against a real etcd: what they print, what they store and
// how they end.
package ctl

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"margay/ctl"
	"margay/datastore"
	"margay/datastore/embedded/embeddedtest"
)

// endpoint is the server that all tests of this package share.
var endpoint string

// TestMain lets scripts execute margayctl: this binary, under that name.
func TestMain(m *testing.M) {
	testscript.Main(tests{m}, map[string]func(){"margayctl": func() { os.Exit(ctl.Main(context.Background(), os.Args[1:], os.Stderr)) }})
}

// tests runs the package's tests beside an etcd.
type tests struct{ m *testing.M }

func (t tests) Run() int { return embeddedtest.Main(t.m, &endpoint) }

// openStore empties the datastore, and makes margayctl use it.
func openStore(t *testing.T) *datastore.Store {
	t.Helper()
	t.Setenv("DATASTORE_TYPE", "etcdv3")
	t.Setenv("ETCD_ENDPOINTS", endpoint)
	s, err := datastore.Open(t.Context(), datastore.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	kvs, _, err := s.Keys(t.Context(), "/calico/")
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range kvs {
		if err := s.Delete(t.Context(), kv.Key, 0); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// run runs margayctl.
func run(t *testing.T, stdin string, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	cmd := ctl.NewCommand()
	cmd.SetArgs(args)
	cmd.SetIn(strings.NewReader(stdin))
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

// step is one command, with what it must print and the error it must end in.
type step struct {
	args  string // split at blanks; {dir} is the test's directory
	stdin string
	out   string // all of standard output
	err   string // all of the error; empty: success
}

func play(t *testing.T, dir string, steps []step) {
	t.Helper()
	for _, st := range steps {
		args := strings.Fields(strings.ReplaceAll(st.args, "{dir}", dir))
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "␣", " ")
		}
		out, err := run(t, st.stdin, args...)
		text := ""
		if err != nil {
			text = strings.ReplaceAll(err.Error(), dir, "{dir}")
		}
		if out != st.out || text != st.err {
			t.Errorf("margayctl %s\nprinted %q\nwant    %q\nerror   %q\nwant    %q", st.args, out, st.out, text, st.err)
		}
	}
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	file := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// pool is a manifest.
func pool(name, cidr, more string) string {
	return "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata:\n  name: " + name + "\nspec:\n  cidr: " + cidr + "\n" + more + "---\n"
}

func policy(namespace, name string) string {
	in := ""
	if namespace != "" {
		in = "\n  namespace: " + namespace
	}
	return "apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nmetadata:\n  name: " + name + in +
		"\nspec:\n  order: 10\n  selector: role == 'db'\n  tier: default\n  ingress: [{action: Allow}]\n---\n"
}
