// Package documented holds documents to what they are about.
package documented

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics fails the test unless a document names every metric of all, and of those whose names begin with prefix no other.
func Metrics(t *testing.T, file, prefix string, all []*prometheus.Desc) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	said := map[string]bool{}
	for _, name := range regexp.MustCompile(prefix+"[a-z_]+").FindAllString(string(b), -1) {
		said[name] = true
	}
	for _, d := range all {
		name, _, _ := strings.Cut(strings.TrimPrefix(d.String(), `Desc{fqName: "`), `"`)
		if !said[name] {
			t.Errorf("%s is not in %s", name, file)
		}
		delete(said, name)
	}
	for name := range said {
		t.Errorf("%s has %s, which there is not", file, name)
	}
}
