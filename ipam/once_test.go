package ipam

import (
	"bufio"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"margay/datastore"
)

// etcdCalls is how many calls of its API the server has counted, by method.
func etcdCalls(t *testing.T) map[string]int {
	t.Helper()
	resp, err := http.Get(endpoint + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	out := map[string]int{}
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		name, value, ok := strings.Cut(lines.Text(), " ")
		labels, found := strings.CutPrefix(name, "grpc_server_started_total{")
		if !ok || !found {
			continue
		}
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			t.Fatal(err)
		}
		_, method, _ := strings.Cut(labels, `grpc_method="`)
		method, _, _ = strings.Cut(method, `"`)
		out[method] += int(n)
	}
	if len(out) == 0 {
		t.Fatal("etcd's metrics have no grpc_server_started_total")
	}
	return out
}

// An assignment on a node whose own blocks have room is one transaction, as etcd itself counts: with one family and with
// two, with and without reservations, selectors and other pools, and also when another node has just claimed a block.
func TestAssignIsOneTransaction(t *testing.T) {
	s, ctx := openStore(t, pool("four", "10.244.0.0/16"), pool("other", "10.245.0.0/16", func(s *datastore.IPPoolSpec) { s.NodeSelector = "rack == '9'" }),
		pool("six", "fd00::/64")), t.Context()
	put(t, s, reservationPrefix+"r", `{"spec":{"reservedCIDRs":["10.244.0.0/24"]}}`)
	if err := datastore.CreateResource(ctx, s, datastore.NewNode("n1")); err != nil {
		t.Fatal(err)
	}
	a := New(s, "n1", nil)
	mustAssign(t, a, Request{Handle: "first", IPv4: both, IPv6: both}) // claims the blocks
	for i, req := range []Request{{}, {IPv6: both}, {IPv4: both, IPv6: Ask{Want: IfPool}}, {IPv4: Ask{Pools: []string{"four"}}}, {IPv4: both, IPv6: both}} {
		mustAssign(t, New(s, fmt.Sprint("stranger", i), nil), Request{Handle: fmt.Sprint("stranger", i)})
		req.Handle = fmt.Sprint("net.", i)
		before := etcdCalls(t)
		mustAssign(t, a, req)
		after := etcdCalls(t)
		for method := range after {
			want := 0
			if method == "Txn" {
				want = 1
			}
			if got := after[method] - before[method]; got != want {
				t.Errorf("%+v: %d calls of %s, expected %d", req, got, method, want)
			}
		}
	}
	clean(t, s)
}

// Whatever an assignment stands on may change behind the allocator's back: the next one goes by it.
func TestWhatIsRememberedIsChecked(t *testing.T) {
	four := pool("four", "10.244.0.0/26")
	s, ctx := openStore(t, four), t.Context()
	a, n := New(s, "n1", nil), 0
	assign := func() (Assignment, error) {
		n++
		return a.Assign(ctx, Request{Handle: fmt.Sprint("net.", n)})
	}
	if _, err := assign(); err != nil {
		t.Fatal(err)
	}
	info, ready := datastore.NewClusterInformation("default"), false
	info.Spec.DatastoreReady = &ready
	for _, step := range []struct {
		what   string
		change func() error
		want   string // in the error; empty if there is none
	}{
		{"a lock that comes", func() error { return datastore.CreateResource(ctx, s, info) }, "locked"},
		{"and goes", func() error { ready = true; return datastore.UpdateResource(ctx, s, info) }, ""},
		{"a pool that is disabled", func() error {
			return datastore.ModifyResource(ctx, s, "four", func(p *datastore.IPPool) error { p.Spec.Disabled = true; return nil })
		}, "it is disabled"},
		{"and enabled", func() error {
			return datastore.ModifyResource(ctx, s, "four", func(p *datastore.IPPool) error { p.Spec.Disabled = false; return nil })
		}, ""},
		{"a reservation that comes", func() error {
			_, err := s.Create(ctx, reservationPrefix+"r", []byte(`{"spec":{"reservedCIDRs":["10.244.0.0/16"]}}`))
			return err
		}, "no free address"},
		{"and goes", func() error { return s.Delete(ctx, reservationPrefix+"r", 0) }, ""},
		{"a configuration that comes", func() error { _, err := s.Create(ctx, configKey, []byte(`[`)); return err }, "expected the IPAM configuration"},
		{"and goes", func() error { return s.Delete(ctx, configKey, 0) }, ""},
		{"another pool, first by its name", func() error {
			return datastore.CreateResource(ctx, s, pool("before", "10.200.0.0/24"))
		}, ""},
		{"the pool is deleted", func() error { return datastore.DeleteResource[datastore.IPPool](ctx, s, "four") }, ""},
		{"so is the other", func() error { return datastore.DeleteResource[datastore.IPPool](ctx, s, "before") }, "there is no IP pool"},
	} {
		if err := step.change(); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		for range 2 {
			got, err := assign()
			if err == nil && step.want != "" || err != nil && (step.want == "" || !strings.Contains(err.Error(), step.want)) {
				t.Errorf("%s: %+v, %v, expected %q", step.what, got, err, step.want)
			}
		}
	}
	// The block is taken away, as `ipam release --node` does.
	if err := datastore.CreateResource(ctx, s, pool("five", "10.245.0.0/26")); err != nil {
		t.Fatal(err)
	}
	first, err := assign()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(s, "", nil).ReleaseNode(ctx, "n1"); err != nil {
		t.Fatal(err)
	}
	if got, err := assign(); err != nil || got.Addr != first.Addr {
		t.Errorf("after the node was released: %+v, %v", got, err)
	}
}
