package ctl

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"sigs.k8s.io/yaml"

	"margay/ctl"
)

const others = `
apiVersion: projectcalico.org/v3
kind: Node
metadata: {name: n1, labels: {rack: r1}}
spec: {bgp: {ipv4Address: 192.0.2.1/24}}
---
apiVersion: projectcalico.org/v3
kind: Node
metadata: {name: n2}
spec: {bgp: {ipv4Address: 192.0.2.2/24, asNumber: "1.10"}}
---
apiVersion: projectcalico.org/v3
kind: Node
metadata: {name: n3}
---
apiVersion: projectcalico.org/v3
kind: BGPConfiguration
metadata: {name: default}
spec: {asNumber: 64513, nodeToNodeMeshEnabled: false}
---
apiVersion: projectcalico.org/v3
kind: BGPPeer
metadata: {name: tor}
spec: {peerIP: 192.0.2.9, asNumber: 64514, nodeSelector: rack == 'r1'}
---
apiVersion: projectcalico.org/v3
kind: BGPFilter
metadata: {name: f}
spec: {exportV4: [{action: Accept}, {action: Reject}]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkSet
metadata: {name: s}
spec: {nets: [10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 198.18.0.0/15, 198.51.100.0/24, 203.0.113.0/24, 192.0.2.0/24]}
---
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata: {name: n1-k8s-web--0-eth0, namespace: a}
spec: {orchestrator: k8s, pod: web-0, node: n1, endpoint: eth0, interfaceName: cali1, ipNetworks: [10.1.0.1/32, "fd00::1/128"], profiles: [kns.a], ipNATs: [{internalIP: 10.1.0.1, externalIP: 192.0.2.7}]}
---
apiVersion: projectcalico.org/v3
kind: Tier
metadata: {name: t}
spec: {order: 1e6}
---
apiVersion: projectcalico.org/v3
kind: Profile
metadata: {name: p}
spec: {labelsToApply: {b: "2", a: "1"}}
---
`

func TestGetTables(t *testing.T) {
	openStore(t)
	play(t, t.TempDir(), []step{
		{args: "create -f -", stdin: pool("a", "10.1.0.0/16", "  natOutgoing: true\n") + policy("", "p") + policy("x", "q") + others, out: "Successfully created 13 resource(s)\n"},
		{args: "get ippools", out: "NAME   CIDR          SELECTOR   \na      10.1.0.0/16   all()      \n\n"},
		{args: "get ipp -o wide", out: "NAME   CIDR          NAT    IPIPMODE   VXLANMODE   DISABLED   DISABLEBGPEXPORT   SELECTOR   ASSIGNMENTMODE   \n" +
			"a      10.1.0.0/16   true   Never      Never       false      false              all()      Automatic        \n\n"},
		{args: "get nodes", out: "NAME   \nn1     \nn2     \nn3     \n\n"},
		{args: "get nodes -o wide", out: "NAME   ASN       IPV4           IPV6   \nn1     (64513)   192.0.2.1/24          \nn2     65546     192.0.2.2/24          \nn3                                     \n\n"},
		{args: "get node n2 n1", out: "NAME   \nn2     \n\nNAME   \nn1     \n\n"},
		{args: "get node n1 n9", out: "NAME   \nn1     \n\n", err: "resource does not exist: Node(n9) with error: not found"},
		{args: "get node n9", err: "resource does not exist: Node(n9) with error: not found"},
		{args: "get bgppeers", out: "NAME   PEERIP      NODE           ASN     \ntor    192.0.2.9   rack == 'r1'   64514   \n\n"},
		{args: "get bgpconfig", out: "NAME      LOGSEVERITY   MESHENABLED   ASNUMBER   \ndefault                 false         64513      \n\n"},
		{args: "get bgpfilters", out: "NAME   NUMEXPORTV4   NUMIMPORTV4   NUMEXPORTV6   NUMIMPORTV6   \nf      2             0             0             0             \n\n"},
		{args: "get globalnetworksets -o wide", out: "NAME   NETS                                                                               \n" +
			"s      10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,198.18.0.0/15,198.51.100.0/24,203.0.1...   \n\n"},
		{args: "get tier", out: "NAME                         ORDER   \nadminnetworkpolicy           1000    \ndefault                      1e+06   \n" +
			"t                            1e+06   \nbaselineadminnetworkpolicy   1e+07   \n\n"},
		{args: "get profile -o wide", out: "NAME   LABELS    \np      a=1,b=2   \n\n"},
		{args: "get wep -n a", out: "NAMESPACE   WORKLOAD   NODE   NETWORKS                  INTERFACE   \na           web-0      n1     10.1.0.1/32,fd00::1/128   cali1       \n\n"},
		{args: "get wep -A -o wide", out: "NAMESPACE   NAME                 WORKLOAD   NODE   NETWORKS                  INTERFACE   PROFILES   NATS                   \n" +
			"a           n1-k8s-web--0-eth0   web-0      n1     10.1.0.1/32,fd00::1/128   cali1       kns.a      {10.1.0.1 192.0.2.7}   \n\n"},
		{args: "get wep", out: "WORKLOAD   NODE   NETWORKS   INTERFACE   \n\n"},
		{args: "get np", out: "NAME   TIER      \np      default   \n\n"},
		{args: "get np -A -o wide", out: "NAMESPACE   NAME   TIER      ORDER   SELECTOR       \ndefault     p      default   10      role == 'db'   \nx           q      default   10      role == 'db'   \n\n"},
		{args: "get np q -n x -o name", out: "networkpolicy/q\n"},
		{args: "get np q", err: "resource does not exist: NetworkPolicy(default/q) with error: not found"},
		{args: "get np q -A", err: "cannot use --all-namespace flag for getting a single resource"},
		{args: "get np -A -n x", err: "cannot use both --namespace and --all-namespaces flags at the same time"},
		{args: "get ippools -A", err: "IPPool is not namespaced"},
		{args: "get ippool a -n x", err: "IPPool is not namespaced"},
		{args: "get ippools -o custom-columns=NAME,CIDR,NAT", out: "NAME   CIDR          NAT    \na      10.1.0.0/16   true   \n\n"},
		{args: "get ippools -o custom-columns=NAME,COLOUR", err: "unknown heading COLOUR, valid values are: ASSIGNMENTMODE, CIDR, DISABLEBGPEXPORT, DISABLED, IPIPMODE, NAME, NAT, SELECTOR, VXLANMODE"},
		{args: "get ippools -o custom-columns=", err: "need to specify at least one column"},
		{args: "get ippools -o xml", err: "unrecognized output format 'xml': expected ps, wide, yaml, json, name, go-template=…, go-template-file=… or custom-columns=…"},
		{args: "get ippools -o go-template={{range␣.}}{{range␣.Items}}{{.ObjectMeta.Name}}␣{{.Spec.CIDR}}␣{{.Spec.Disabled}}␣{{join␣.Spec.AllowedUses␣\"+\"}};{{end}}{{end}}", out: "a 10.1.0.0/16 false Workload+Tunnel;"},
		{args: "get wep -n a -o go-template={{range␣.}}{{range␣.Items}}{{.ObjectMeta.Namespace}}␣{{join␣.Spec.IPNetworks␣\",\"}}␣{{.Spec.MAC}}{{end}}{{end}}", out: "a 10.1.0.1/32,fd00::1/128 "},
		{args: "get node n1 -o go-template={{range␣.}}{{.Spec.BGP.IPv4Address}}␣{{config␣\"asnumber\"}}{{end}}", out: "192.0.2.1/24 64513"},
		{args: "get node n1 -o go-template={{.Nope}}", err: `template: get:1:2: executing "get" at <.Nope>: can't evaluate field Nope in type []interface {}`},
		{args: "get node -o go-template=", err: "need to specify a template"},
		{args: "get pods", err: "failed to get resources: resource type 'pods' is not supported: expected one of " + plurals()},
		{args: "get", err: "arguments: expected KIND and at least one NAME, or --filename"},
		{args: "get -f - -o name", stdin: pool("a", "10.1.0.0/16", "") + policy("x", "q"), out: "ippool/a\nnetworkpolicy/q\n"},
	})
	dir := t.TempDir()
	write(t, dir, "names.tpl", "{{range .}}{{range .Items}}{{.Metadata.Name}}\n{{end}}{{end}}")
	play(t, dir, []step{
		{args: "get nodes -o go-template-file={dir}/names.tpl", out: "n1\nn2\nn3\n"},
		{args: "get nodes -o go-template-file={dir}/none.tpl", err: "open {dir}/none.tpl: no such file or directory"},
	})
}

func TestGetDocuments(t *testing.T) {
	openStore(t)
	play(t, t.TempDir(), []step{{args: "create -f -", stdin: pool("a", "10.1.0.0/16", "") + pool("b", "10.2.0.0/16", ""), out: "Successfully created 2 'IPPool' resource(s)\n"}})
	var list struct {
		Kind     string
		Metadata struct{ ResourceVersion string }
		Items    []struct {
			Metadata struct{ Name, UID, ResourceVersion string }
		}
	}
	out, err := run(t, "", "get", "ippools", "-o", "json")
	if err != nil || json.Unmarshal([]byte(out), &list) != nil || list.Kind != "IPPoolList" || len(list.Items) != 2 || list.Metadata.ResourceVersion == "" ||
		list.Items[1].Metadata.Name != "b" || list.Items[1].Metadata.ResourceVersion == "" {
		t.Errorf("a list: %v\n%s", err, out)
	}
	var several []map[string]any
	out, err = run(t, "", "get", "ippool", "b", "a", "-o", "yaml")
	if err != nil || yaml.Unmarshal([]byte(out), &several) != nil || len(several) != 2 || several[0]["kind"] != "IPPool" {
		t.Errorf("several: %v\n%s", err, out)
	}
	if out, err := run(t, out, "apply", "-f", "-"); err != nil || out != "Successfully applied 2 'IPPool' resource(s)\n" {
		t.Errorf("several, applied: %s, %v", out, err)
	}
	out, err = run(t, "", "get", "ippool", "a", "-o", "yaml", "--export")
	const want = `apiVersion: projectcalico.org/v3
kind: IPPool
metadata:
  creationTimestamp: null
  name: a
spec:
  allowedUses:
  - Workload
  - Tunnel
  assignmentMode: Automatic
  blockSize: 26
  cidr: 10.1.0.0/16
  ipipMode: Never
  nodeSelector: all()
  vxlanMode: Never
`
	if err != nil || out != want {
		t.Errorf("exported: %v\n%s", err, out)
	}
}

func TestLabelAndPatch(t *testing.T) {
	s := openStore(t)
	if _, err := s.Create(t.Context(), "/calico/resources/v3/projectcalico.org/nodes/n1",
		[]byte(`{"kind":"Node","apiVersion":"projectcalico.org/v3","metadata":{"name":"n1"},"spec":{"bgp":{"ipv4Address":"192.0.2.1/24","newer":[9007199254740993]}}}`)); err != nil {
		t.Fatal(err)
	}
	play(t, t.TempDir(), []step{
		{args: "label nodes n1 rack=r1", out: "Successfully set label rack on nodes n1\n"},
		{args: "label nodes n1 rack=r1", out: "Successfully updated label rack on nodes n1\n"},
		{args: "label nodes n1 rack=r2", err: "failed to update label of nodes n1, key rack is already present. please use '--overwrite' to set a new value"},
		{args: "label nodes n1 rack=r2 --overwrite", out: "Successfully updated label rack on nodes n1\n"},
		{args: "label nodes n1 a=b=c", err: "invalid label a=b=c: expected KEY=VALUE, or KEY with --remove"},
		{args: "label nodes n1 rack", err: "invalid label rack: expected KEY=VALUE, or KEY with --remove"},
		{args: "label nodes n1 rank --remove", err: "cannot remove label of nodes n1, key rank does not exist"},
		{args: "label nodes n1 rack --remove", out: "Successfully removed label rack from nodes n1\n"},
		{args: "label nodes n2 rack=r1", err: "nodes n2 not found"},
		{args: "label ippool n2 rack=r1 -n x", err: "IPPool is not namespaced"},
		{args: `patch node n1 -p {"spec":{"bgp":{"asNumber":64513}}}`, out: "Successfully patched 1 'Node' resource\n"},
		{args: `patch node n1 --type merge -p {"spec":{"bgp":{"ipv4Address":null,"ipv6Address":"2001:db8::1/64"}}}`, out: "Successfully patched 1 'Node' resource\n"},
		{args: `patch node n1 -t json -p [{"op":"add","path":"/metadata/annotations","value":{"a":"b"}}]`, out: "Successfully patched 1 'Node' resource\n"},
		{args: `patch node n1 -t json -p [{"op":"remove","path":"/spec/nothing"}]`, err: "hit error: error in remove for path: '/spec/nothing': Unable to remove nonexistent key: nothing: missing value"},
		{args: `patch node n1 -t json -p {}`, err: `--patch: expected a list of operations such as [{"op":"replace","path":"/spec/…","value":…}]`},
		{args: `patch node n1 -t yaml -p {}`, err: `--type "yaml": expected strategic, merge or json`},
		{args: `patch node n1 -p []`, err: `--patch: expected an object such as {"spec":{…}}`},
		{args: `patch node n1 -p {"metadata":{"name":"n2"}}`, err: "hit error: kind, metadata.name and metadata.namespace: expected them unchanged"},
		{args: `patch node n1 -p {"spec":{"bpg":{}}}`, err: `hit error: Node "n1": spec.bpg: unknown field: expected one of addresses, bgp, interfaces, ipv4VXLANTunnelAddr, ipv6VXLANTunnelAddr, orchRefs, vxlanTunnelMACAddr, vxlanTunnelMACAddrV6, wireguard`},
		{args: `patch node n2 -p {}`, err: "hit error: resource does not exist: Node(n2) with error: not found"},
		{args: "get node n1 -o json --export", out: `{
  "kind": "Node",
  "apiVersion": "projectcalico.org/v3",
  "metadata": {
    "name": "n1",
    "creationTimestamp": null,
    "annotations": {
      "a": "b"
    }
  },
  "spec": {
    "bgp": {
      "newer": [
        9007199254740993
      ],
      "asNumber": 64513,
      "ipv6Address": "2001:db8::1/64"
    }
  }
}
`},
	})
}

func TestCompletion(t *testing.T) {
	openStore(t)
	play(t, t.TempDir(), []step{
		{args: "create -f -", stdin: pool("a-pool", "10.1.0.0/16", ""), out: "Successfully created 1 'IPPool' resource(s)\n"},
		{args: "__complete get ippool a", out: "a-pool\n:4\nCompletion ended with directive: ShellCompDirectiveNoFileComp\n"},
	})
	if out, err := run(t, "", "__complete", "patch", "bgpp"); err != nil || !strings.Contains(out, "bgppeers\n") {
		t.Errorf("kinds: %s, %v", out, err)
	}
	for shell, check := range map[string][]string{"bash": {"bash", "-n"}, "zsh": {"zsh", "-n"}, "fish": nil} {
		out, err := run(t, "", "completion", shell)
		if err != nil || !strings.Contains(out, "margayctl") {
			t.Errorf("%s: %v", shell, err)
		}
		if check != nil {
			cmd := exec.Command(check[0], check[1:]...)
			cmd.Stdin = strings.NewReader(out)
			if said, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", shell, err, said)
			}
		}
	}
}

// Where the datastore is: the file of --config, which must be there; an etcd that does not answer is named.
func TestConfigFile(t *testing.T) {
	openStore(t)
	dir := t.TempDir()
	write(t, dir, "good.cfg", "apiVersion: projectcalico.org/v3\nkind: CalicoAPIConfig\nspec: {datastoreType: etcdv3, etcdEndpoints: \""+endpoint+"\"}\n")
	write(t, dir, "empty.cfg", "spec: {}\n")
	write(t, dir, "dead.cfg", "spec: {etcdEndpoints: \"http://127.0.0.1:1\"}\n")
	// The file that was named wins over the environment.
	play(t, dir, []step{
		{args: "get nodes -c {dir}/good.cfg --allow-version-mismatch", out: "NAME   \n\n"},
		{args: "get nodes --config {dir}/none.cfg", err: "stat {dir}/none.cfg: no such file or directory"},
		{args: "get nodes --config={dir}/empty.cfg", err: "etcd endpoints: none given: set ETCD_ENDPOINTS (http://host:2379) or spec.etcdEndpoints in /etc/calico/calicoctl.cfg"},
		{args: "get nodes --config={dir}/dead.cfg", err: "etcd at http://127.0.0.1:1: not reachable: dial tcp 127.0.0.1:1: connect: connection refused"},
	})
}

// Scripts go by the exit status; what went wrong is on standard error.
func TestExitStatus(t *testing.T) {
	openStore(t)
	for _, tt := range []struct {
		args   string
		status int
		stderr string
	}{
		{"get ippool nope", 1, "margayctl: resource does not exist: IPPool(nope) with error: not found\n"},
		{"delete ippool nope --skip-not-exists", 0, ""},
		{"validate -f /nowhere", 1, "margayctl: failed to execute command: stat /nowhere: no such file or directory\n"},
		{"get ippools --colour", 1, "margayctl: unknown flag: --colour\n"},
	} {
		var stderr bytes.Buffer
		if status := ctl.Main(t.Context(), strings.Fields(tt.args), &stderr); status != tt.status || stderr.String() != tt.stderr {
			t.Errorf("%s: status %d, %q", tt.args, status, stderr.String())
		}
	}
}

// Edits that do not name a version are made again when somebody else was faster: none is lost.
func TestEditorsAtOnce(t *testing.T) {
	openStore(t)
	play(t, t.TempDir(), []step{{args: "create -f -", stdin: pool("p", "10.1.0.0/16", ""), out: "Successfully created 1 'IPPool' resource(s)\n"}})
	const editors = 8
	var wg sync.WaitGroup
	for i := range editors {
		wg.Go(func() {
			if out, err := run(t, "", "label", "ippool", "p", fmt.Sprintf("key%d=v", i)); err != nil {
				t.Errorf("%s, %v", out, err)
			}
		})
	}
	wg.Wait()
	out, err := run(t, "", "get", "ippool", "p", "-o", "json")
	if n := strings.Count(out, `"key`); err != nil || n != editors {
		t.Errorf("%d of %d labels are there, %v", n, editors, err)
	}
}
