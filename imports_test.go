// Package margay holds no code: its test keeps the import tables of docs/design.md true.
package margay

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// rooms is the table "The rooms" of docs/design.md: what each room may import of the others. A room covers the
// packages below it unless one of them has a row of its own. cmd/* and bench may import anything, and nothing may
// import bench.
var rooms = map[string][]string{
	"vrouter/packet":   {},
	"vrouter/fib":      {},
	"vrouter":          {"vrouter/packet", "vrouter/fib"},
	"vrouter/port":     {"vrouter", "vrouter/packet"},
	"vrouter/rpc":      {"vrouter", "vrouter/fib"},
	"vrouter/metrics":  {"vrouter"},
	"datastore":        {},
	"ipam":             {"datastore"},
	"bgp":              {},
	"cni":              {},
	"cni/server":       {"cni"},
	"agent/api":        {},
	"agent/netfilter":  {"vrouter/packet"},
	"agent":            {"datastore", "ipam", "bgp", "cni/server", "vrouter/rpc", "vrouter/packet", "agent/api", "agent/netfilter", "check"},
	"lab":              {"datastore"},
	"ctl":              {"datastore", "ipam", "bgp", "lab", "vrouter/rpc", "vrouter/packet", "vrouter/port", "agent/api", "check"},
	"check":            {"agent/netfilter"},
	"internal/version": {},
	"internal/monitor": {},
	"internal/dump":    {},
}

// anywhere lists the packages that every room may import.
var anywhere = map[string]bool{"internal/version": true, "internal/dump": true}

// homes says where an external module may be imported (non-test code only).
var homes = map[string][]string{
	"github.com/osrg/gobgp/":         {"bgp"},
	"go.etcd.io/etcd/":               {"datastore"},
	"github.com/songgao/water":       {"vrouter/port"},
	"github.com/cilium/ebpf":         {"vrouter/port"},
	"golang.org/x/sys/":              {"internal/dump", "check", "vrouter/port", "cni/server", "agent", "agent/netfilter", "lab"},
	"github.com/vishvananda/netlink": {"internal/dump", "check", "vrouter/port", "cni/server", "agent", "agent/netfilter", "lab"},
	"google.golang.org/grpc":         {"vrouter/rpc", "datastore"}, // datastore reads the codes of etcd's errors
	"github.com/google/gopacket":     {},
	"github.com/prometheus/":         {"vrouter/metrics", "internal/monitor", "agent"},
}

// roomOf returns the row of the table that a package of ours (path relative to the module) belongs to.
func roomOf(pkg string) string {
	for p := pkg; p != ""; {
		if _, ok := rooms[p]; ok {
			return p
		}
		i := strings.LastIndexByte(p, '/')
		if i < 0 {
			return ""
		}
		p = p[:i]
	}
	return ""
}

func contains(list []string, s string) bool {
	for _, l := range list {
		if l == s {
			return true
		}
	}
	return false
}

func TestImportsFollowTheDesign(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}}{{range .Imports}} {{.}}{{end}}`, "./...").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	seen := 0
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		fields := strings.Fields(line)
		pkg := strings.TrimPrefix(strings.TrimPrefix(fields[0], "margay"), "/")
		if pkg == "" || strings.HasPrefix(pkg, "cmd/") || strings.HasPrefix(pkg, "bench") || strings.HasPrefix(pkg, "test/") {
			continue
		}
		room := roomOf(pkg)
		if room == "" {
			t.Errorf("package %s belongs to no room of docs/design.md", pkg)
			continue
		}
		seen++
		for _, imp := range fields[1:] {
			checkImport(t, pkg, room, imp)
		}
	}
	if seen < 10 {
		t.Fatalf("go list named only %d of our packages: the check saw too little", seen)
	}
}

func checkImport(t *testing.T, pkg, room, imp string) {
	t.Helper()
	if own, ok := strings.CutPrefix(imp, "margay/"); ok {
		target := roomOf(own)
		if target != room && !anywhere[target] && !contains(rooms[room], target) {
			t.Errorf("%s (room %s) imports %s: docs/design.md does not allow it", pkg, room, imp)
		}
		return
	}
	for prefix, allowed := range homes {
		if strings.HasPrefix(imp, prefix) && !contains(allowed, room) {
			t.Errorf("%s (room %s) imports %s, whose home is %v", pkg, room, imp, allowed)
		}
	}
}

// TestPluginIsSmall holds the plugin to what a runtime can start in milliseconds: no etcd, no BGP, no gRPC.
func TestPluginIsSmall(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "./cmd/margay-cni").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	for _, dep := range strings.Fields(string(out)) {
		for _, banned := range []string{"go.etcd.io/", "github.com/osrg/", "google.golang.org/grpc"} {
			if strings.HasPrefix(dep, banned) {
				t.Errorf("margay-cni links %s", dep)
			}
		}
	}
}

// TestListsAreWhole: netlink's own lists may come with an error only because something else of the node has changed, which
// package internal/dump answers by asking again; nobody, tests included, takes them raw.
func TestListsAreWhole(t *testing.T) {
	raw := regexp.MustCompile(`\.(LinkList|AddrList|RouteList|RouteListFiltered|RuleList|RuleListFiltered|NeighList|QdiscList|FilterList|ClassList)\(`)
	files := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" || filepath.Dir(path) == filepath.Join("internal", "dump") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		for i, line := range strings.Split(string(text), "\n") {
			if m := raw.FindString(line); m != "" {
				t.Errorf("%s:%d: %s: use package internal/dump", path, i+1, m)
			}
		}
		return nil
	})
	if err != nil || files < 100 {
		t.Fatalf("%d files read, %v", files, err)
	}
}
