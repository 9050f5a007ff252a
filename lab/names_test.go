package lab

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestCheckName(t *testing.T) {
	for _, good := range []string{"lab", "a", "a-1", "0", strings.Repeat("x", maxName)} {
		if err := CheckName(good); err != nil {
			t.Errorf("CheckName(%q) = %v", good, err)
		}
	}
	for _, bad := range []string{"", "-a", "a-", "A", "a/b", "..", "a b", "a.b", strings.Repeat("x", maxName+1), "é", "a\n"} {
		if err := CheckName(bad); err == nil {
			t.Errorf("CheckName(%q) accepts it", bad)
		}
	}
}

// A unix socket's path has 108 bytes with the terminating zero; the agent may add a suffix for a moment.
func TestSocketsFitTheLongestName(t *testing.T) {
	l := &Lab{name: strings.Repeat("x", maxName)}
	path := l.runDir(nodeName(l.name, MaxNodes)) + "/vrouter.sock"
	if len(path)+len(".tmp") > 107 {
		t.Errorf("%s has %d bytes", path, len(path))
	}
	if n := len(hostLink(l.name)); n > 15 {
		t.Errorf("host interface name of %d bytes, IFNAMSIZ allows 15", n)
	}
}

// No namespace may belong to two labs, or `lab down` of one would take from another.
func TestNamespacesBelongToOneLab(t *testing.T) {
	labs := []string{"a", "a-node1", "a-underlay", "a-node1-pod1", "node1", "a-node", "node1-pod1"}
	for _, owner := range labs {
		n := nodeName(owner, 1)
		for _, ns := range []string{underlayName(owner), n, nodeName(owner, 250), podName(n, 1), podName(n, 12)} {
			for _, other := range labs {
				if got, want := namespaceForm(other).MatchString(ns), other == owner; got != want {
					t.Errorf("namespace %s of lab %s matches lab %s: %v", ns, owner, other, got)
				}
			}
		}
	}
	if namespaceForm("a").MatchString("a-underlay-x") || namespaceForm("a").MatchString("xa-node1") {
		t.Error("the pattern is not anchored")
	}
}

func TestShortAndFullNames(t *testing.T) {
	s := &state{Name: "node1", Nodes: []*node{{Name: "node1-node1", Pods: []*pod{{Name: "node1-node1-pod1"}}}}}
	for name, want := range map[string]string{
		"node1": "node1-node1", "node1-node1": "node1-node1", "node1-pod1": "node1-node1-pod1",
		"node1-node1-pod1": "node1-node1-pod1", "underlay": "node1-underlay", "node1-underlay": "node1-underlay",
	} {
		if got, err := s.namespace(name); err != nil || got != want {
			t.Errorf("namespace(%q) = %q, %v; want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"", "node2", "node1-pod2", "../x"} {
		if got, err := s.namespace(name); err == nil {
			t.Errorf("namespace(%q) = %q, want an error", name, got)
		}
	}
}

func TestNodeState(t *testing.T) {
	p := Process{PID: 1}
	for _, c := range []struct {
		n    node
		pids PIDs
		want string
	}{
		{node{VRouter: p, Agent: p}, PIDs{1, 1}, "up"},
		{node{}, PIDs{}, "stopped"},
		{node{VRouter: p, Agent: p}, PIDs{1, 0}, "agent dead"},
		{node{VRouter: p, Agent: p}, PIDs{0, 1}, "vrouter dead"},
		{node{VRouter: p, Agent: p}, PIDs{}, "vrouter and agent dead"},
	} {
		if got := nodeState(&c.n, c.pids); got != c.want {
			t.Errorf("nodeState(%+v) = %q, want %q", c.pids, got, c.want)
		}
	}
}

// The keys that issue and tools rely on.
func TestStatusKeys(t *testing.T) {
	b, err := json.Marshal(Status{Nodes: []NodeStatus{{Pods: []PodStatus{{}}}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{`"name"`, `"etcd"`, `"nodes"`, `"netns"`, `"address"`, `"pids":{"vrouter":0,"agent":0}`, `"pods"`} {
		if !strings.Contains(string(b), key) {
			t.Errorf("status lacks %s: %s", key, b)
		}
	}
}

func TestResultAddress(t *testing.T) {
	good := `{"cniVersion":"1.0.0","ips":[{"address":"fd00::1/128"},{"address":"10.244.0.7/32","interface":1}]}`
	if a, err := resultAddress([]byte(good)); err != nil || a.String() != "10.244.0.7" {
		t.Errorf("got %v, %v", a, err)
	}
	for _, bad := range []string{``, `{}`, `{"ips":[{"address":"10.0.0.1"}]}`, `{"ips":[{"address":"fd00::1/128"}]}`, `[]`} {
		if a, err := resultAddress([]byte(bad)); err == nil {
			t.Errorf("%s: got %v, want an error", bad, a)
		}
	}
}

func TestOptionsAreChecked(t *testing.T) {
	for want, change := range map[string]func(*Options){
		"lab name":          func(o *Options) { o.Name = "Bad_Name" },
		"nodes 0":           func(o *Options) { o.Nodes = 0 },
		"nodes 251":         func(o *Options) { o.Nodes = 251 },
		"pods -1":           func(o *Options) { o.Pods = -1 },
		"mtu 100":           func(o *Options) { o.MTU = 100 },
		"spec.cidr":         func(o *Options) { o.Pool = "10.0.0.0/33" },
		"IPv4":              func(o *Options) { o.Pool, o.IPIPMode = "fd00:1::/64", "Never" },
		"spec.ipipMode":     func(o *Options) { o.IPIPMode = "Sometimes" },
		"spec.blockSize":    func(o *Options) { o.BlockSize = 19 },
		"not an executable": func(o *Options) { o.BinDir = t.TempDir() },
	} {
		o := Options{Nodes: 1}
		change(&o)
		dir := t.TempDir() + "/lab"
		if _, err := (Host{Dir: dir}).Up(t.Context(), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v", want, err)
		}
		if names, err := (Host{Dir: dir}).Names(); err != nil || len(names) > 0 {
			t.Errorf("%s: left %v behind, %v", want, names, err)
		}
	}
}
