package check

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// newNamespace moves the test into a network namespace of its own, with eth0 (MTU 1500) and vr0 (MTU 1480).
func newNamespace(t *testing.T) {
	t.Helper()
	// The thread is left locked: it ends with the test's goroutine, and the namespace with it.
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	addVeth(t, "eth0", "vr0")
	setMTU(t, "vr0", 1480)
	// A sysctl that a namespace inherits or not is this test's to set.
	set(t, "ipv4/ip_forward", "1")
	for _, dev := range []string{"all", "default", "vr0", "eth0"} {
		set(t, "ipv4/conf/"+dev+"/rp_filter", "0")
	}
}

func addVeth(t *testing.T, name, peer string) {
	t.Helper()
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: peer}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{name, peer} {
		if err := netlink.LinkSetUp(link(t, n)); err != nil {
			t.Fatal(err)
		}
	}
}

func link(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func setMTU(t *testing.T, name string, mtu int) {
	t.Helper()
	if err := netlink.LinkSetMTU(link(t, name), mtu); err != nil {
		t.Fatal(err)
	}
}

func set(t *testing.T, name, value string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// node is one that is as it should be.
func node() *Node { return &Node{Options{Underlay: "eth0", Tunnel: "vr0", Agent: true}} }

// expect checks one result; every word has to be in what it found or says to do.
func expect(t *testing.T, r Result, want Status, words ...string) {
	t.Helper()
	if r.Status != want {
		t.Errorf("%s: %s: %s: expected %s", r.Name, r.Status, r.Found, want)
	}
	for _, w := range words {
		if !strings.Contains(r.Found+" "+r.Do, w) {
			t.Errorf("%s: %q, to do %q: expected %q in it", r.Name, r.Found, r.Do, w)
		}
	}
	if r.Found == "" || (r.Do == "") != (want == OK) || strings.ContainsAny(r.Found+r.Do, "\n") {
		t.Errorf("%s: found %q, to do %q", r.Name, r.Found, r.Do)
	}
}

// A node on which nothing is wrong has no failures, whatever runs beside this test.
func TestHealthyNode(t *testing.T) {
	newNamespace(t)
	all := Host(Options{Underlay: "eth0", Tunnel: "vr0", Agent: true})
	if Failed(all) || len(all) != 10 {
		t.Errorf("%+v", all)
	}
	for _, r := range all {
		if r.Name != "capabilities" {
			expect(t, r, OK)
		}
	}
	if !Failed([]Result{{Status: OK}, {}}) {
		t.Error("the zero status is no failure")
	}
	b, err := json.Marshal(Result{Name: "x", Status: Warn, Found: "y"})
	if err != nil || string(b) != `{"name":"x","status":"warn","found":"y"}` {
		t.Errorf("%s, %v", b, err)
	}
}

func TestSysctls(t *testing.T) {
	newNamespace(t)
	n := node()
	expect(t, n.ipForward(), OK)
	set(t, "ipv4/ip_forward", "0")
	expect(t, n.ipForward(), Fail, "ip_forward is 0", "sysctl -w")
	n.Agent = false
	expect(t, n.ipForward(), OK)

	expect(t, n.reversePath(), OK)
	set(t, "ipv4/conf/vr0/rp_filter", "1")
	expect(t, n.reversePath(), Warn, "net.ipv4.conf.vr0.rp_filter is 1")
	set(t, "ipv4/conf/vr0/rp_filter", "0")
	set(t, "ipv4/conf/all/rp_filter", "1")
	expect(t, n.reversePath(), Warn, "net.ipv4.conf.all.rp_filter is 1")
	set(t, "ipv4/conf/all/rp_filter", "2")
	expect(t, n.reversePath(), OK)
	set(t, "ipv4/conf/all/rp_filter", "1")
	n.Tunnel = "vr7"
	expect(t, n.reversePath(), Warn, "will be strict on vr7")
}

// filter is a base chain to be.
type filter struct {
	family nftables.TableFamily
	hook   *nftables.ChainHook
	policy nftables.ChainPolicy
	rules  [][]expr.Any
}

// install puts a chain into a table of its own, and returns what takes it away.
func install(t *testing.T, f filter) (remove func()) {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	table := conn.AddTable(&nftables.Table{Name: "firewall", Family: f.family})
	chain := &nftables.Chain{Name: "CHAIN", Table: table, Type: nftables.ChainTypeFilter, Hooknum: f.hook,
		Priority: nftables.ChainPriorityFilter, Policy: &f.policy}
	if f.family == nftables.TableFamilyNetdev {
		chain.Device = "eth0"
	}
	conn.AddChain(chain)
	for _, r := range f.rules {
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: r})
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	return func() {
		conn.DelTable(table)
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
	}
}

func from(device string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(device)}}
}

func protocol(n byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{n}}}
}

func verdict(k expr.VerdictKind, match ...expr.Any) []expr.Any {
	return append(match, &expr.Counter{}, &expr.Verdict{Kind: k})
}

func TestForwardPolicy(t *testing.T) {
	newNamespace(t)
	n := node()
	forward := func(policy nftables.ChainPolicy, rules ...[]expr.Any) filter {
		return filter{nftables.TableFamilyIPv4, nftables.ChainHookForward, policy, rules}
	}
	for _, c := range []struct {
		f     filter
		want  Status
		words []string
	}{
		{forward(nftables.ChainPolicyAccept), OK, nil},
		{forward(nftables.ChainPolicyDrop), Fail, []string{"CHAIN", "table ip firewall", "drops everything", "cali+"}},
		{forward(nftables.ChainPolicyDrop, verdict(expr.VerdictAccept, from("docker0")...)), Warn, []string{"none is about cali"}},
		{forward(nftables.ChainPolicyDrop, verdict(expr.VerdictAccept, from("cali")...)), OK, nil},
		{forward(nftables.ChainPolicyDrop, verdict(expr.VerdictDrop, from("cali")...)), Warn, nil},
		{forward(nftables.ChainPolicyDrop, verdict(expr.VerdictAccept)), OK, nil},
		{filter{nftables.TableFamilyINet, nftables.ChainHookForward, nftables.ChainPolicyDrop, nil}, Fail, []string{"inet"}},
		{filter{nftables.TableFamilyIPv6, nftables.ChainHookForward, nftables.ChainPolicyDrop, nil}, OK, nil},
		{filter{nftables.TableFamilyIPv4, nftables.ChainHookInput, nftables.ChainPolicyDrop, nil}, OK, nil},
	} {
		remove := install(t, c.f)
		expect(t, n.forwardPolicy(), c.want, c.words...)
		remove()
	}
	// The old iptables has tables of its own, which only its own tool shows.
	n.Root = t.TempDir()
	write(t, n.Root, "/proc/thread-self/net/ip_tables_names", "nat\nfilter\n")
	bin := t.TempDir()
	t.Setenv("PATH", bin)
	expect(t, n.forwardPolicy(), Unknown, "iptables-legacy")
	for text, want := range map[string]Status{"-P FORWARD DROP": Warn, "-P FORWARD DROP\\n-A FORWARD -i cali+ -j ACCEPT": OK, "-P FORWARD ACCEPT": OK} {
		script := fmt.Sprintf("#!/bin/sh\nprintf '%s\\n'\n", strings.ReplaceAll(text, "-P", `\055P`))
		if err := os.WriteFile(filepath.Join(bin, "iptables-legacy"), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		expect(t, n.forwardPolicy(), want)
	}
}

func TestProtocol4(t *testing.T) {
	newNamespace(t)
	n := node()
	payload := []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 9, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{4}}}
	for _, c := range []struct {
		name string
		f    filter
		want Status
	}{
		{"dropped on the way out", filter{nftables.TableFamilyIPv4, nftables.ChainHookOutput, nftables.ChainPolicyAccept, [][]expr.Any{verdict(expr.VerdictDrop, protocol(4)...)}}, Fail},
		{"the same, by the header's byte", filter{nftables.TableFamilyIPv4, nftables.ChainHookPostrouting, nftables.ChainPolicyAccept, [][]expr.Any{verdict(expr.VerdictDrop, payload...)}}, Fail},
		{"rejected", filter{nftables.TableFamilyIPv4, nftables.ChainHookOutput, nftables.ChainPolicyAccept, [][]expr.Any{append(protocol(4), &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 2})}}, Fail},
		{"another protocol", filter{nftables.TableFamilyIPv4, nftables.ChainHookOutput, nftables.ChainPolicyAccept, [][]expr.Any{verdict(expr.VerdictDrop, protocol(41)...)}}, OK},
		{"accepted", filter{nftables.TableFamilyIPv4, nftables.ChainHookOutput, nftables.ChainPolicyAccept, [][]expr.Any{verdict(expr.VerdictAccept, protocol(4)...)}}, OK},
		{"everything that leaves", filter{nftables.TableFamilyINet, nftables.ChainHookOutput, nftables.ChainPolicyDrop, nil}, Fail},
		{"at the interface", filter{nftables.TableFamilyNetdev, nftables.ChainHookIngress, nftables.ChainPolicyAccept, [][]expr.Any{verdict(expr.VerdictDrop, protocol(4)...)}}, Fail},
		{"all but others at the interface", filter{nftables.TableFamilyNetdev, nftables.ChainHookIngress, nftables.ChainPolicyDrop, [][]expr.Any{verdict(expr.VerdictAccept, protocol(6)...)}}, Fail},
		{"all but others on the way out", filter{nftables.TableFamilyIPv4, nftables.ChainHookOutput, nftables.ChainPolicyDrop, [][]expr.Any{verdict(expr.VerdictAccept, protocol(6)...)}}, Fail},
		{"all but it on the way out", filter{nftables.TableFamilyIPv4, nftables.ChainHookOutput, nftables.ChainPolicyDrop, [][]expr.Any{verdict(expr.VerdictAccept, protocol(4)...)}}, OK},
		{"accepted before it is dropped", filter{nftables.TableFamilyIPv4, nftables.ChainHookOutput, nftables.ChainPolicyAccept, [][]expr.Any{verdict(expr.VerdictAccept, protocol(4)...), verdict(expr.VerdictDrop, protocol(4)...)}}, OK},
		{"above a rate", filter{nftables.TableFamilyIPv4, nftables.ChainHookOutput, nftables.ChainPolicyAccept, [][]expr.Any{verdict(expr.VerdictDrop, append(protocol(4), &expr.Limit{Type: expr.LimitTypePkts, Rate: 9, Unit: expr.LimitTimeSecond, Burst: 5, Over: true})...)}}, Warn},
		{"in input, after the packet socket", filter{nftables.TableFamilyIPv4, nftables.ChainHookInput, nftables.ChainPolicyAccept, [][]expr.Any{verdict(expr.VerdictDrop, protocol(4)...)}}, OK},
	} {
		remove := install(t, c.f)
		r := n.protocol4()
		r.Name += ", " + c.name
		expect(t, r, c.want)
		remove()
	}
}

// TestForeignTunnel: the kernel here has no ipip module, so the device is one in name only, unless it has.
func TestForeignTunnel(t *testing.T) {
	newNamespace(t)
	n := node()
	expect(t, n.foreignTunnel(), OK)
	down := &netlink.Iptun{LinkAttrs: netlink.LinkAttrs{Name: "tunl0"}}
	up := &netlink.Iptun{LinkAttrs: netlink.LinkAttrs{Name: "tunl0", Flags: net.FlagUp}}
	other := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vr0", Flags: net.FlagUp}}
	if got := tunnelUp([]netlink.Link{other, down}); got != nil {
		t.Errorf("%v is taken for the kernel's tunnel", got.Attrs().Name)
	}
	if got := tunnelUp([]netlink.Link{other, down, up}); got != netlink.Link(up) {
		t.Errorf("got %v", got)
	}
	expect(t, tunnelTaken("other tunnels", "tunl0", 1, 2), Fail, "tunl0", "1 addresses", "2 routes", "ip link set tunl0 down")
	if err := netlink.LinkAdd(&netlink.Iptun{LinkAttrs: netlink.LinkAttrs{Name: "tunl7"}, Local: net.IPv4(198, 18, 0, 1)}); err != nil {
		return
	}
	expect(t, n.foreignTunnel(), OK)
	if err := netlink.LinkSetUp(link(t, "tunl7")); err != nil {
		t.Fatal(err)
	}
	expect(t, n.foreignTunnel(), Fail, "tunl7", "ip link set tunl7 down")
}

// A route of BIRD's, its process and its port.
func TestForeignBGP(t *testing.T) {
	newNamespace(t)
	n := node()
	n.Root = t.TempDir() // without this machine's processes
	expect(t, n.foreignBGP(), OK)
	write(t, n.Root, "/proc/42/comm", "bird\n")
	expect(t, n.foreignBGP(), Warn, "bird")
	route := &netlink.Route{Dst: &net.IPNet{IP: net.IPv4(10, 9, 0, 0), Mask: net.CIDRMask(16, 32)}, LinkIndex: link(t, "eth0").Attrs().Index,
		Protocol: unix.RTPROT_BIRD, Scope: unix.RT_SCOPE_LINK}
	if err := netlink.RouteAdd(route); err != nil {
		t.Fatal(err)
	}
	expect(t, n.foreignBGP(), Warn, "10.9.0.0/16", "ip route flush proto bird")
	n.Agent = false
	expect(t, n.foreignBGP(), Warn)
	n.Root = ""
	if err := netlink.LinkSetUp(link(t, "lo")); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:179")
	if err != nil {
		t.Fatal(err)
	}
	expect(t, n.foreignBGP(), Fail, "179", "--bgp-port")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestMTU(t *testing.T) {
	newNamespace(t)
	n := node()
	expect(t, n.mtu(), OK)
	setMTU(t, "eth0", 1400)
	expect(t, n.mtu(), Fail, "1400", "1380", "1480")
	setMTU(t, "vr0", 1380)
	addVeth(t, "cali0", "pod0")
	expect(t, n.mtu(), Warn, "cali0 (1500)", "restart those pods")
	setMTU(t, "cali0", 1380)
	expect(t, n.mtu(), OK, "1 pods")
	n.Tunnel = "vr7"
	expect(t, n.mtu(), OK, "not there yet")
	n.Underlay = ""
	expect(t, n.mtu(), Unknown, "default route", "--underlay")
	err := netlink.RouteAdd(&netlink.Route{LinkIndex: link(t, "eth0").Attrs().Index, Scope: unix.RT_SCOPE_LINK, Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, n.mtu(), OK, "eth0 has 1400")
}

func write(t *testing.T, root, path, text string) {
	t.Helper()
	path = filepath.Join(root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestNetworkManagers(t *testing.T) {
	n := node()
	n.Root = t.TempDir()
	expect(t, n.networkManager(), OK)
	expect(t, n.networkd(), OK)
	write(t, n.Root, "/proc/7/comm", "NetworkManager\n")
	write(t, n.Root, "/proc/8/comm", "systemd-network\n") // as much of the name as the kernel keeps
	expect(t, n.networkManager(), Warn, "unmanaged-devices=interface-name:cali*;interface-name:vr0*")
	expect(t, n.networkd(), Warn, "ManageForeignRoutes=no")
	write(t, n.Root, "/etc/NetworkManager/conf.d/x.conf", "[keyfile]\n# unmanaged-devices=interface-name:cali*\n")
	write(t, n.Root, "/etc/systemd/networkd.conf", "[Network]\n#ManageForeignRoutes=no\n")
	expect(t, n.networkManager(), Warn)
	expect(t, n.networkd(), Warn)
	write(t, n.Root, "/etc/NetworkManager/conf.d/x.conf", "[keyfile]\nunmanaged-devices=interface-name:cali*;interface-name:tunl*\n")
	write(t, n.Root, "/etc/systemd/networkd.conf.d/y.conf", "[Network]\nManageForeignRoutes = no\n")
	expect(t, n.networkManager(), OK)
	expect(t, n.networkd(), OK)
}

func TestCapabilities(t *testing.T) {
	n := node()
	n.Root = t.TempDir()
	for mask, c := range map[string]struct {
		want  Status
		words []string
	}{
		"000001ffffffffff": {OK, []string{"NET_ADMIN", "BPF"}},
		"0000000000203400": {Warn, []string{"have NET_ADMIN", "add BPF"}},
		"0000000000201400": {Fail, []string{"add NET_RAW", "BPF"}},
		"0000000000000000": {Fail, []string{"have none", "run as root"}},
	} {
		write(t, n.Root, "/proc/self/status", "Name:\tx\nCapInh:\t0000000000000000\nCapEff:\t"+mask+"\n")
		expect(t, n.capabilities(), c.want, c.words...)
	}
	write(t, n.Root, "/proc/self/status", "CapEff:\tnonsense\n")
	expect(t, n.capabilities(), Unknown)
}
