package cluster

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"margay/datastore"
)

// TestNodeStatusFromAnywhere: another node's status is had by way of the datastore, is the same that it tells on its own
// socket, and leaves nothing behind. A node whose agent is dead is an error.
func TestNodeStatusFromAnywhere(t *testing.T) {
	n1, n2 := node(t, 1), node(t, 2)
	settled(t, n2)
	until(t, n2.Name+" to have both nodes' routes", func() bool { return via(t, n2, n1.Address) && via(t, n2, node(t, 3).Address) })
	for _, ask := range []struct{ from, about labNode }{{n1, n2}, {n1, n1}} {
		out, err := tryIn(ask.from.Netns, "margayctl", "node", "status", ask.about.Name, "-o", "json")
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		var st nodeStatus
		if err := json.Unmarshal([]byte(out), &st); err != nil || !st.Ready || st.TunnelAddress != tunnelAddress(t, ask.about) || len(st.BGP) != 2 {
			t.Errorf("%s about %s: %v: %s", ask.from.Name, ask.about.Name, err, out)
		}
	}
	table := in(t, n1.Netns, "margayctl", "node", "status", n2.Name)
	local := in(t, n2.Netns, "margayctl", "node", "status")
	if table != local || !strings.Contains(table, "node-to-node mesh | up ") {
		t.Errorf("from afar:\n%s\non the node:\n%s", table, local)
	}
	if out, err := tryIn(n1.Netns, "margayctl", "node", "status", "nobody"); err == nil || !strings.Contains(out, "resource does not exist: Node(nobody)") {
		t.Errorf("of no node: %v: %s", err, out)
	}
	// A request of calicoctl's kind is answered, too, and kept.
	s := openStore(t)
	request, err := datastore.NewStatusRequest("watched", datastore.StatusRequest{Node: n2.Name, Classes: []string{"BGP", "Routes"}, UpdatePeriodSeconds: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := datastore.CreateResource(t.Context(), s, request); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := datastore.DeleteObject(t.Context(), s, datastore.CalicoNodeStatuses, "watched"); err != nil {
			t.Error(err)
		}
		if objs, _, err := datastore.ListObjects(t.Context(), s, datastore.CalicoNodeStatuses); err != nil || len(objs) != 0 {
			t.Errorf("left: %v, %v", objs, err)
		}
	}()
	var reports []datastore.NodeReport
	until(t, "two reports of one second after the other", func() bool {
		obj, err := datastore.GetObject(t.Context(), s, datastore.CalicoNodeStatuses, "watched")
		if err != nil {
			t.Fatal(err)
		}
		var r datastore.NodeReport
		if status := obj.(*datastore.Resource).Status; len(status) == 0 || json.Unmarshal(status, &r) != nil {
			return false
		}
		if n := len(reports); n == 0 || r.LastUpdated.After(reports[n-1].LastUpdated) {
			reports = append(reports, r)
		}
		return len(reports) == 2
	})
	if r := reports[1]; r.BGP.EstablishedV4 != 2 || len(r.BGP.PeersV4) != 2 || r.BGP.PeersV4[0].Type != "NodeMesh" || len(r.Routes.RoutesV4) < 2 || r.Agent.BIRDV4.State != "" {
		t.Errorf("%+v", r)
	}
	kill(t, n2.PIDs["agent"])
	out, err := tryIn(n1.Netns, "margayctl", "node", "status", n2.Name)
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(out, "node "+n2.Name+": no answer within 10s: is margay-agent running there?") {
		t.Errorf("of a node without an agent: %v: %s", err, out)
	}
	mustCtl(t, "lab", "restart", "--name", labName, n2.Name, "agent")
	settled(t, node(t, 2))
}

// TestNodeDiags: the archive holds the daemons' own words and the kernel's, and says what it could not get.
func TestNodeDiags(t *testing.T) {
	n := node(t, 1)
	file := filepath.Join(t.TempDir(), "diags.tar.gz")
	out := in(t, n.Netns, "margayctl", "node", "diags", "--file", file, "--log-dir", "/does/not/exist")
	if !strings.HasSuffix(out, "Diags saved to "+file+"\n") {
		t.Errorf("printed %s", out)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zip, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for r := tar.NewReader(zip); ; {
		head, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		found[head.Name] = string(content)
	}
	for name, want := range map[string]string{"ipv4_route": "proto 81", "links": "vr0", "nft_ruleset": "table inet margay", "margay/node_status.json": `"ready": true`,
		"margay/node_routes.json": `"tunnel"`, "margay/node_counters.json": "forwarded_encap", "margay/resources.yaml": "kind: IPPool", "margay/ipam.json": "10.244.0.0/16",
		"proc/version": "Linux", "failed": "logs: "} {
		if text, there := found["diagnostics/"+name]; !there || !strings.Contains(text, want) {
			t.Errorf("%s: expected %q, got %.300q", name, want, text)
		}
	}
	if out, err := tryIn(n.Netns, "margayctl", "node", "diags", "--file", file); err == nil {
		t.Errorf("an archive was overwritten: %s", out)
	}
}
