package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"margay/datastore"
	"margay/datastore/embedded"
	"margay/ipam"
	"margay/ipam/audit"
)

// ipamStore starts an etcd that margayctl will find, and puts a cluster into it: n1 owns 10.244.0.0/29 and has pod
// default/web there, n2 has borrowed an address of it for default/job.
func ipamStore(t *testing.T) *datastore.Store {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan string, 1), make(chan error, 1)
	go func() {
		ended <- embedded.Serve(ctx, embedded.Config{Dir: t.TempDir(), ClientURLs: []string{"http://127.0.0.1:0"}, NoSync: true,
			Ready: func(urls []string) { ready <- urls[0] }})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	var url string
	select {
	case url = <-ready:
	case err := <-ended:
		ended <- nil
		t.Fatal(err)
	}
	t.Setenv("ETCD_ENDPOINTS", url)
	s, err := datastore.Open(t.Context(), datastore.Config{Endpoints: []string{url}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	pool := datastore.NewIPPool("p")
	pool.Spec.CIDR, pool.Spec.BlockSize = "10.244.0.0/29", 29
	info, locked := datastore.NewClusterInformation("default"), true
	info.Spec.ClusterGUID, info.Spec.DatastoreReady = "guid", &locked
	for _, obj := range []datastore.Object{pool, info, datastore.NewNode("n1"), datastore.NewNode("n2")} {
		if err := datastore.CreateResource(t.Context(), s, obj); err != nil {
			t.Fatal(err)
		}
	}
	assign(t, s, "n1", "web", "10.244.0.1")
	assign(t, s, "n2", "job", "10.244.0.2")
	return s
}

func assign(t *testing.T, s *datastore.Store, node, pod, ip string) {
	t.Helper()
	_, err := ipam.New(s, node, nil).Assign(t.Context(), ipam.Request{Handle: "net." + pod, IPv4: ipam.Ask{IP: netip.MustParseAddr(ip)},
		Attrs: map[string]string{"namespace": "default", "pod": pod, "timestamp": "then"}})
	if err != nil {
		t.Fatal(err)
	}
}

// runIPAM executes margayctl and returns what it printed.
func runIPAM(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	cmd := NewCommand()
	cmd.SetArgs(append([]string{"ipam"}, args...))
	cmd.SetOut(&out)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func wantText(t *testing.T, what, want, got string, err error) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("%s: %v (-want +got):\n%s", what, err, d)
	}
}

func TestIPAMShow(t *testing.T) {
	ipamStore(t)
	out, err := runIPAM(t, "show", "--ip=10.244.0.1")
	wantText(t, "held", "IP 10.244.0.1 is in use\nAttributes:\n  namespace: default\n  node: n1\n  pod: web\n  timestamp: then\n", out, err)
	out, err = runIPAM(t, "show", "--ip=10.244.0.7")
	wantText(t, "free", "10.244.0.7 is not assigned\n", out, err)
	if _, err = runIPAM(t, "show", "--ip=10.244"); err == nil || err.Error() != `--ip "10.244": expected an IP address such as 10.244.0.5` {
		t.Errorf("no address: %v", err)
	}
	out, err = runIPAM(t, "show", "--show-borrowed")
	wantText(t, "borrowed", `+------------+----------------+---------------+-------------+------+--------------+
|     IP     | BORROWING-NODE |     BLOCK     | BLOCK OWNER | TYPE | ALLOCATED-TO |
+------------+----------------+---------------+-------------+------+--------------+
| 10.244.0.2 | n2             | 10.244.0.0/29 | n1          | pod  | default/job  |
+------------+----------------+---------------+-------------+------+--------------+
`, out, err)
	out, err = runIPAM(t, "configure", "--strictaffinity=true", "--max-blocks-per-host=4")
	wantText(t, "configure", "Successfully set StrictAffinity to: true\nSuccessfully set MaxBlocksPerHost to: 4\n", out, err)
	out, err = runIPAM(t, "show", "--show-configuration")
	wantText(t, "configuration", `+--------------------+-------+
|      PROPERTY      | VALUE |
+--------------------+-------+
| StrictAffinity     | true  |
| AutoAllocateBlocks | true  |
| MaxBlocksPerHost   |     4 |
+--------------------+-------+
`, out, err)
	for want, args := range map[string][]string{
		"maxBlocksPerHost: expected strictAffinity to be true where it is set":                                     {"configure", "--strictaffinity=false"},
		`--strictaffinity "perhaps": expected true or false`:                                                       {"configure", "--strictaffinity=perhaps"},
		`--max-blocks-per-host "-1": expected a number, 0 for no limit`:                                            {"configure", "--max-blocks-per-host=-1"},
		"at least one of the flags in the group [ip node from-report] is required":                                 {"release"},
		"node n1 is still in the datastore. Either delete it (`margayctl delete node n1`), or re-run with --force": {"release", "--node=n1"},
		"IP address 10.244.0.7 is not assigned":                                                                    {"release", "--ip=10.244.0.7"},
	} {
		if _, err := runIPAM(t, args...); err == nil || err.Error() != want {
			t.Errorf("%v: %v, expected %q", args, err, want)
		}
	}
}

func TestIPAMCheckAndRelease(t *testing.T) {
	s := ipamStore(t)
	out, err := runIPAM(t, "check", "--show-all-ips")
	if err != nil {
		t.Errorf("a store in order: %v\n%s", err, out)
	}
	for _, want := range []string{"Checking IPAM for inconsistencies...\n\nLoading all IPAM blocks...\nFound 1 IPAM blocks.\n IPAM block 10.244.0.0/29 affinity=host:n1:\n" +
		"  10.244.0.1 allocated; attrs Main:net.web Extra:namespace=default,node=n1,pod=web,timestamp=then\n",
		"IPAM blocks record 2 allocations.\n", "Found 1 active IP pools.\n", "  n1 has 1 allocations\n", "2 IPs belong to pods of nodes that write no workload endpoints",
		"Found 0 handles with no matching IPs (and 2 handles with matches).\n", "Check complete; found 0 problems.\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing in\n%s", want, out)
		}
	}
	// Node n2 leaves for good, and a handle is left over.
	if err := datastore.DeleteResource[datastore.Node](t.Context(), s, "n2"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(t.Context(), "/calico/ipam/v2/handle/net.old", []byte(`{"block":{},"deleted":false}`)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "report.json")
	out, err = runIPAM(t, "check", "--show-problem-ips", "--output", file)
	if exit := (ExitError{}); !errors.As(err, &exit) || exit.Code != 1 {
		t.Errorf("problems, and exit status %v", err)
	}
	for _, want := range []string{"  10.244.0.2: held by net.job, and node \"n2\" is not in the datastore\nFound 1 IPs that are allocated in IPAM but not actually in use.\n",
		"  net.old: holds no address\nFound 1 handles with no matching IPs (and 2 handles with matches).\n", "Check complete; found 2 problems.\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing in\n%s", want, out)
		}
	}
	out, err = runIPAM(t, "check", "-o", "json")
	var r audit.Report
	if jsonErr := json.Unmarshal([]byte(out), &r); jsonErr != nil || len(r.Problems) != 2 || r.ClusterGUID != "guid" || err == nil {
		t.Errorf("-o json: %v, %v: %s", jsonErr, err, out)
	}
	// Released is only what the report names, and only from a locked store.
	if _, err = runIPAM(t, "release", "--from-report", file); err == nil || !strings.Contains(err.Error(), "data store is not locked") {
		t.Errorf("not locked: %v", err)
	}
	// The address changes hands after the report: it stays.
	if out, err = runIPAM(t, "release", "--ip=10.244.0.2"); err != nil || out != "Successfully released IP address 10.244.0.2\n" {
		t.Errorf("release --ip: %q, %v", out, err)
	}
	assign(t, s, "n1", "fresh", "10.244.0.2")
	out, err = runIPAM(t, "release", "--force", "--from-report", file)
	wantText(t, "stale report", `WARNING: Data store is not locked. Ignoring due to --force option
Releasing 1 old IPs...
Released 0 IPs successfully
1 addresses have changed hands since the report and were left alone.
Deleting 1 handles...
Released 1 handles; 0 skipped; 0 errors.
You may now unlock the data store.
`, out, err)
	if out, err = runIPAM(t, "check"); err != nil {
		t.Errorf("afterwards: %v\n%s", err, out)
	}
	// A leak again, and this time the report is fresh.
	assign(t, s, "n9", "lost", "10.244.0.3")
	if _, err = runIPAM(t, "check", "--output", file); err == nil {
		t.Error("the leak went unnoticed")
	}
	out, err = runIPAM(t, "release", "--force", "--from-report", file, "--from-report", file)
	wantText(t, "fresh report", `WARNING: Data store is not locked. Ignoring due to --force option
Releasing 1 old IPs...
Released 1 IPs successfully
Report didn't contain any handles to clean up.
You may now unlock the data store.
`, out, err)
	if out, err = runIPAM(t, "check"); err != nil {
		t.Errorf("afterwards: %v\n%s", err, out)
	}
	// A node that is gone for good leaves nothing behind.
	out, err = runIPAM(t, "release", "--force", "--node=n1")
	wantText(t, "node", "Successfully released 2 IP addresses of node n1\n", out, err)
	if kvs, _, err := s.Keys(t.Context(), "/calico/ipam/v2/"); err != nil || len(kvs) != 0 {
		t.Errorf("left: %v, %v", kvs, err)
	}
}
