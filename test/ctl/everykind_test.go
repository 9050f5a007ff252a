package ctl

import (
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"margay/datastore"
)

// update writes the golden file anew. What it held when it was written had been compared with calicoctl 3.31.3, byte for
// byte, over a store with the same resources.
var update = flag.Bool("update", false, "write testdata/tables.txt anew")

// everyKind fills the store with at least one resource of each kind.
func everyKind(t *testing.T) *datastore.Store {
	t.Helper()
	s := openStore(t)
	if out, err := run(t, "", "create", "-f", "testdata/every-kind.yaml"); err != nil {
		t.Fatal(out, err)
	}
	for _, k := range datastore.Kinds() {
		if kvs, _, err := s.Keys(t.Context(), k.Prefix()); err != nil || len(kvs) == 0 {
			t.Fatalf("no %s in testdata/every-kind.yaml, %v", k.Kind, err)
		}
	}
	return s
}

// What get shows of any kind, in any form, can be applied and replaced again, and etcd does not even see a write.
func TestEveryKindRoundTrips(t *testing.T) {
	s := everyKind(t)
	_, before, err := s.Keys(t.Context(), "/calico/")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range datastore.Kinds() {
		args := []string{"get", k.Plural}
		if k.Namespaced {
			args = append(args, "-A")
		}
		for _, format := range []string{"yaml", "json"} {
			shown, err := run(t, "", append(args, "-o", format)...)
			if err != nil {
				t.Fatal(err)
			}
			for _, verb := range []string{"apply", "replace"} {
				if said, err := run(t, shown, verb, "-f", "-"); err != nil || !strings.HasPrefix(said, "Successfully") {
					t.Errorf("get %s -o %s | %s: %s, %v\n%s", k.Plural, format, verb, said, err, shown)
				}
			}
		}
	}
	if _, after, err := s.Keys(t.Context(), "/calico/"); err != nil || after != before {
		t.Errorf("the datastore went from revision %d to %d, %v", before, after, err)
	}
	// The same manifests again are no change either.
	if out, err := run(t, "", "apply", "-f", "testdata/every-kind.yaml"); err != nil {
		t.Error(out, err)
	}
	if _, after, err := s.Keys(t.Context(), "/calico/"); err != nil || after != before {
		t.Errorf("applied again, the datastore went from revision %d to %d, %v", before, after, err)
	}
}

// The tables of all kinds, to the byte.
func TestTables(t *testing.T) {
	everyKind(t)
	var got strings.Builder
	for _, k := range datastore.Kinds() {
		if k == datastore.ClusterInformations {
			continue // it has a random identity
		}
		for _, args := range [][]string{{}, {"-o", "wide"}, {"-A"}, {"-A", "-o", "wide"}, {"-o", "name"}} {
			if !k.Namespaced && len(args) > 0 && args[0] == "-A" {
				continue
			}
			args := append([]string{"get", k.Plural}, args...)
			out, err := run(t, "", args...)
			if err != nil {
				t.Fatal(args, err)
			}
			got.WriteString("$ margayctl " + strings.Join(args, " ") + "\n" + out)
		}
	}
	if *update {
		if err := os.WriteFile("testdata/tables.txt", []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/tables.txt")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got.String()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}
