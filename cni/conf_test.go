package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
)

func TestParseConf(t *testing.T) {
	for _, tc := range []struct{ name, in, want string }{
		{"defaults", `{"cniVersion":"1.0.0","name":"n","type":"margay"}`, ""},
		{"not JSON", `{`, "not valid JSON"},
		{"no name", `{"cniVersion":"1.0.0"}`, "name: missing"},
		{"socket", `{"name":"n","socket":"cni.sock"}`, "socket: \"cni.sock\", expected an absolute path"},
		{"long socket", `{"name":"n","socket":"/` + strings.Repeat("x", 120) + `"}`, "socket: 121 bytes"},
		{"mtu", `{"name":"n","mtu":9}`, "mtu: 9, expected"},
		{"ipam", `{"name":"n","ipam":{"type":"host-local"}}`, "ipam.type"},
		{"pools", `{"name":"n","ipam":{"ipv4_pools":["a",""]}}`, "ipam.ipv4_pools[1]: empty"},
		{"pools of IPv6", `{"name":"n","ipam":{"ipv6_pools":[""]}}`, "ipam.ipv6_pools[0]: empty"},
		{"neither family", `{"name":"n","ipam":{"assign_ipv4":"false","assign_ipv6":false}}`, "both false"},
		{"assign", `{"name":"n","ipam":{"assign_ipv6":"yes"}}`, "ipam.assign_ipv6: yes, expected"},
		{"log level", `{"name":"n","logLevel":"loud"}`, "logLevel"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := ParseConf([]byte(tc.in))
			if tc.want == "" {
				if err != nil || c.Socket != DefaultSocket || c.QueueDir != DefaultQueueDir {
					t.Fatalf("got %+v, %v", c, err)
				}
				return
			}
			var e *types.Error
			if !errors.As(err, &e) || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want %q in it", err, tc.want)
			}
		})
	}
}

func TestParseArgs(t *testing.T) {
	a, err := ParseArgs("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=x;IP=10.0.0.7")
	want := PodArgs{Namespace: "default", Name: "web-0", IP: netip.MustParseAddr("10.0.0.7")}
	if err != nil || a != want {
		t.Fatalf("got %+v, %v, want %+v", a, err, want)
	}
	for _, bad := range []string{"x", "K8S_POD_NAME=a", "IP=::ffff:10.0.0.1", "IP=10.0.0.300", "IP=fe80::1%eth0", "K8S_POD_NAMESPACE=a b;K8S_POD_NAME=c", "K8S_POD_UID=" + strings.Repeat("u", 300)} {
		if _, err := ParseArgs(bad); err == nil {
			t.Errorf("%.30q: no error", bad)
		}
	}
}

// The names are Calico's; the first digest is what `printf default.web-0 | sha1sum` prints.
func TestNames(t *testing.T) {
	r := Request{Network: "k8s-pod-network", ContainerID: "abc", IfName: "eth0", Pod: PodArgs{Namespace: "default", Name: "web-0"}}
	if got, want := r.HostName(), "cali0d7763386da"; got != want {
		t.Errorf("host name %s, want %s", got, want)
	}
	r.Pod = PodArgs{}
	if got, want := r.HostName(), "calia9993e36470"; got != want { // SHA-1 of "abc": FIPS 180-1, appendix A
		t.Errorf("host name %s, want %s", got, want)
	}
	if got, want := r.Handle(), "k8s-pod-network.abc"; got != want {
		t.Errorf("handle %s, want %s", got, want)
	}
	r.IfName = "net1"
	if r.Handle() != "k8s-pod-network.abc.net1" || r.HostName() == "calia9993e36470" {
		t.Errorf("second interface: %s %s", r.Handle(), r.HostName())
	}
}

func TestQueue(t *testing.T) {
	q := Queue{Dir: t.TempDir() + "/a/b"}
	if l, err := q.List(); err != nil || len(l) != 0 {
		t.Fatalf("missing directory: %v, %v", l, err)
	}
	r := &Request{Network: "n", ContainerID: "c1", IfName: "eth0", Pod: PodArgs{Namespace: "a", Name: "b"}}
	for range 2 {
		if err := q.Put(r); err != nil {
			t.Fatal(err)
		}
	}
	l, err := q.List()
	if err != nil || len(l) != 1 || l[0] != q.Path(r) {
		t.Fatalf("list: %v, %v", l, err)
	}
	got, err := q.Load(l[0])
	if err != nil || got.Verb != Del || got.Handle() != r.Handle() || got.HostName() != r.HostName() {
		t.Fatalf("load: %+v, %v", got, err)
	}
	if err := errors.Join(q.Remove(l[0]), q.Remove(l[0])); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(q.Path(r), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := q.Load(q.Path(r)); err == nil {
		t.Fatal("garbage loaded")
	}
	if l, _ := q.List(); len(l) != 0 {
		t.Fatalf("garbage not set aside: %v", l)
	}
}

func TestReadRequestBounds(t *testing.T) {
	if _, err := ReadRequest(strings.NewReader(strings.Repeat(" ", MaxMessage+1))); err == nil {
		t.Error("no limit")
	}
	_, err := ReadRequest(strings.NewReader(`{"protocol":2,"verb":"ADD"}`))
	if e := AsError(err, 0); e == nil || e.Code != types.ErrIncompatibleCNIVersion {
		t.Errorf("protocol 2: %v", err)
	}
}

func FuzzParseConf(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"n","type":"margay","mtu":1400,"ipam":{"ipv4_pools":["a"],"assign_ipv6":"true"},"args":{"cni":{"ips":["10.0.0.1"]}},"runtimeConfig":{"mac":"x","ips":["::1/64"],"io.kubernetes.cri.pod-annotations":{"cni.projectcalico.org/ipAddrs":"[\"10.0.0.9\"]"}},"prevResult":{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/x"},null],"ips":[{"address":"10.0.0.1/32","interface":0}]}}`))
	f.Add([]byte(`{"name":"n","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}`))
	f.Add([]byte(`{"name":"n","cniVersion":"0.3.1","prevResult":{"ips":[{"version":"4","address":"10.0.0.1/32"}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ParseConf(data)
		if err != nil {
			return
		}
		if four, six, mac, err := c.addresses(PodArgs{}); err == nil {
			r := Request{Protocol: Protocol, Verb: Add, Network: "n", ContainerID: "c", IfName: "eth0", IPv4: four, IPv6: six, MAC: mac}
			if err := r.Validate(); err != nil {
				t.Errorf("the plugin makes a request that the agent refuses: %v", err)
			}
		}
		if prev, err := prevResult(c); err == nil && prev != nil {
			_, _ = expectation(prev, &Request{IfName: "eth0", Netns: "/x"})
		}
	})
}

func FuzzParseArgs(f *testing.F) {
	f.Add("IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;IP=10.0.0.1/32")
	f.Add(";;=;")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseArgs(s)
		if err != nil && a != (PodArgs{}) {
			t.Errorf("error %v with a result", err)
		}
	})
}

// A request that was accepted means the same after a round trip through the queue's encoding.
func FuzzReadRequest(f *testing.F) {
	f.Add([]byte(`{"protocol":1,"verb":"ADD","network":"n","containerID":"c","ifName":"eth0","netns":"/run/netns/x","pod":{"namespace":"a","name":"b"},"ipv4":{"ip":"10.0.0.1"},"ipv6":{"assign":"required","pools":["p"]},"mac":"02:00:00:00:00:01"}`))
	f.Add([]byte(`{"protocol":1,"verb":"GC","network":"n","valid":[]}`))
	f.Add([]byte(`{"protocol":1,"verb":"CHECK","network":"n","containerID":"c","ifName":"eth0","expect":{"hostName":"calix","address":"","address6":"fd00::1"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ReadRequest(bytes.NewReader(data))
		if err != nil {
			return
		}
		if h := r.Handle(); r.Verb != GC && r.Verb != Status && len(h) > maxHandle {
			t.Errorf("handle of %d bytes", len(h))
		}
		if len(r.HostName()) != 15 {
			t.Errorf("host name %q", r.HostName())
		}
		out, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ReadRequest(bytes.NewReader(out)); err != nil && len(out) <= MaxMessage {
			t.Errorf("round trip: %v", err)
		}
	})
}
