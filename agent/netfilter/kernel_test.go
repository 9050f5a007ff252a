package netfilter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/test/space"
	"margay/vrouter/packet"
)

// The tests hold the evaluation against the kernel: a router's rules are loaded by nft or iptables, a real packet is sent
// through it, and what the evaluation has said beforehand must come true.

// bed is two ends with a router between them.
type bed struct {
	left, router, right *space.Space
	send, receive       int // raw sockets: of the left end, and the right one's packet socket
	id                  uint16
}

var (
	leftAddr  = netip.MustParseAddr("10.1.0.2")
	rightAddr = netip.MustParseAddr("10.2.0.2")
)

func newBed(t *testing.T) *bed {
	t.Helper()
	b := &bed{left: space.New(t), router: space.New(t), right: space.New(t)}
	b.router.Do(t, func() error {
		for name, peer := range map[string]*space.Space{"in0": b.left, "out0": b.right} {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = name
			v := netlink.NewVeth(attrs)
			v.PeerName, v.PeerNamespace = "eth0", netlink.NsFd(int(peer.Handle))
			if err := netlink.LinkAdd(v); err != nil {
				return err
			}
		}
		return errors.Join(space.BeRouter(), space.Address("in0", "10.1.0.1/24"), space.Address("out0", "10.2.0.1/24"))
	})
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	for s, at := range map[*space.Space]struct{ cidr, gateway string }{b.left: {"10.1.0.2/24", "10.1.0.1"}, b.right: {"10.2.0.2/24", "10.2.0.1"}} {
		s.Do(t, func() error {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			if err := errors.Join(netlink.LinkSetHardwareAddr(link, mac), space.Address("eth0", at.cidr)); err != nil {
				return err
			}
			return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(at.gateway)})
		})
	}
	b.router.Do(t, func() error {
		return errors.Join(space.Neighbour("in0", leftAddr, mac), space.Neighbour("out0", rightAddr, mac))
	})
	b.left.Do(t, func() (err error) {
		b.send, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	b.right.Do(t, func() (err error) {
		if b.receive, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_IP))); err != nil {
			return err
		}
		return unix.SetsockoptTimeval(b.receive, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20_000})
	})
	t.Cleanup(func() {
		if err := errors.Join(unix.Close(b.send), unix.Close(b.receive)); err != nil {
			t.Error(err)
		}
	})
	return b
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// arrives sends a packet from the left end and reports whether it comes out on the right. A packet of another kind, which every
// ruleset of these tests lets pass, follows it: when that one has come, the first will not come any more.
func (b *bed) arrives(t *testing.T, p []byte) bool {
	t.Helper()
	b.id += 2
	for i, q := range [][]byte{p, build(protoMarker, 0, 0, 28)} {
		binary.BigEndian.PutUint16(q[4:], b.id+uint16(i))
		if err := unix.Sendto(b.send, q, 0, &unix.SockaddrInet4{Addr: packet.IPv4(q).Dst().As4()}); err != nil {
			t.Fatal(err)
		}
	}
	buf, found := make([]byte, 4096), false
	for limit := time.Now().Add(60 * time.Second); time.Now().Before(limit); {
		n, _, err := unix.Recvfrom(b.receive, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		got, fault := packet.ParseIPv4(buf[:n])
		switch {
		case fault != packet.FaultNone:
		case got.ID() == b.id && got.Protocol() == p[9]:
			found = true
		case got.ID() == b.id+1 && got.Protocol() == protoMarker:
			return found
		}
	}
	t.Fatal("the packet that all rules let pass did not come")
	return false
}

const protoMarker = 253 // for experiments (RFC 3692)

func build(proto byte, sport, dport uint16, size int) []byte {
	b := make([]byte, size)
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(size))
	copy(b[12:], leftAddr.AsSlice())
	copy(b[16:], rightAddr.AsSlice())
	up := b[20:]
	switch proto {
	case packet.ProtocolTCP:
		up[12], up[13] = 5<<4, 2
	case packet.ProtocolUDP:
		binary.BigEndian.PutUint16(up[4:], uint16(len(up)))
	case unix.IPPROTO_ICMP:
		up[0] = 8
		binary.BigEndian.PutUint16(up[2:], packet.Checksum(up, 0))
		return b
	default:
		return b
	}
	binary.BigEndian.PutUint16(up, sport)
	binary.BigEndian.PutUint16(up[2:], dport)
	sum := packet.Checksum(up, packet.PseudoSum(packet.IPv4(b), len(up)))
	binary.BigEndian.PutUint16(up[map[byte]int{packet.ProtocolTCP: 16, packet.ProtocolUDP: 6}[proto]:], sum)
	return b
}

// judge evaluates the three hooks of a forwarded packet, in the router.
func (b *bed) judge(t *testing.T, p []byte) (out Outcome) {
	t.Helper()
	b.router.Do(t, func() error {
		rs, err := Load()
		if err != nil {
			return err
		}
		link := func(name string) Link {
			l, err := netlink.LinkByName(name)
			if err != nil {
				t.Error(err)
				return Link{}
			}
			return Link{Name: name, Index: l.Attrs().Index, Type: unix.ARPHRD_ETHER, Group: l.Attrs().Group}
		}
		pkt := &Packet{IP: append([]byte{}, p...), In: link("in0"), State: StateNew, AddrType: func(a netip.Addr) (int, error) {
			if a == leftAddr || a == rightAddr {
				return unix.RTN_UNICAST, nil
			}
			return unix.RTN_LOCAL, nil
		}}
		for _, h := range []Hook{Ingress, Prerouting, Forward, Postrouting, Egress} {
			if h == Forward {
				packet.DecrementTTL(packet.IPv4(pkt.IP))
				pkt.Out = link("out0")
			}
			if h == Postrouting {
				pkt.In = Link{}
			}
			got := rs.Hook(h, pkt)
			if got.Verdict == Drop {
				out = got
				return nil
			}
			if got.Verdict == CannotTell && out.Verdict == Pass {
				out = got
			}
		}
		return nil
	})
	return out
}

// run runs a command in the router.
func (b *bed) run(t *testing.T, stdin, name string, args ...string) {
	t.Helper()
	b.router.Do(t, func() error {
		cmd := exec.Command(name, args...)
		cmd.Stdin = strings.NewReader(stdin)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
		}
		return nil
	})
}

const protoUDP = packet.ProtocolUDP

var (
	udp  = build(protoUDP, 40000, 80, 84)
	tcp  = build(packet.ProtocolTCP, 40000, 443, 40)
	icmp = build(unix.IPPROTO_ICMP, 0, 0, 84)
	long = build(protoUDP, 40000, 80, 1400)
)

var rulesets = []struct {
	name, rules string
	verdicts    string // for udp, tcp, icmp, long: + passes, - dropped, ? cannot tell
}{
	{"none", "", "++++"},
	{"a rule for everything", `table ip t { chain c { type filter hook forward priority 0; ip protocol != 253 drop; }; }`, "----"},
	{"policy, and what it accepts", `table inet t { chain c { type filter hook forward priority 0; policy drop; ip protocol { 17, 253 } accept; }; }`, "+--+"},
	{"reject", `table inet t { chain c { type filter hook forward priority 0; udp dport 80 reject; }; }`, "-++-"},
	{"port ranges and sets", `table inet t { set s { type inet_service; flags interval; elements = { 50-79, 81-90, 400-500 }; }
		chain c { type filter hook forward priority 0; tcp dport @s drop; udp dport @s drop; }; }`, "+-++"},
	{"interval borders", `table inet t { set s { type ipv4_addr; flags interval; elements = { 10.2.0.0-10.2.0.1, 10.2.0.3-10.2.0.255 }; }
		chain c { type filter hook forward priority 0; ip daddr @s drop; }; }`, "++++"},
	{"interval hit", `table inet t { set s { type ipv4_addr; flags interval; elements = { 10.2.0.2/31 }; }
		chain c { type filter hook forward priority 0; ip daddr @s meta l4proto 6 drop; }; }`, "+-++"},
	{"concatenation", `table ip t { set s { type ifname . ipv4_addr . inet_service; elements = { "in0" . 10.1.0.2 . 443, "out0" . 10.1.0.2 . 80 }; }
		chain c { type filter hook prerouting priority 0; iifname . ip saddr . tcp dport @s drop; iifname . ip saddr . udp dport @s drop; }; }`, "+-++"},
	{"concatenated ranges", `table ip t { set s { type ipv4_addr . inet_service; flags interval; elements = { 10.1.0.0/24 . 60-90, 10.9.0.0/16 . 443 }; }
		chain c { type filter hook forward priority 0; ip saddr . udp dport @s drop; ip saddr . tcp dport @s drop; }; }`, "-++-"},
	{"verdict map", `table ip t { chain no { drop; }
		chain c { type filter hook forward priority 0; ip protocol vmap { udp : accept, tcp : jump no, icmp : continue }; ip protocol icmp drop; }; }`, "+--+"},
	{"jump, return and goto", `table ip t { chain a { udp dport 80 return; ip protocol tcp drop; }
		chain b { ip protocol icmp return; accept; }
		chain c { type filter hook forward priority 0; policy drop; jump a; ip protocol 253 accept; goto b; }; }`, "+--+"},
	{"interfaces", `table ip t { chain c { type filter hook forward priority 0; iifname "in*" oif "out0" udp sport 40000 drop; iifname "out0" drop; }; }`, "-++-"},
	{"marks", `table ip t { chain p { type filter hook prerouting priority -150; tcp dport 443 meta mark set 0x12; }
		chain c { type filter hook forward priority 0; meta mark & 0x10 == 0x10 drop; }; }`, "+-++"},
	{"priorities", `table ip late { chain c { type filter hook forward priority 10; ip protocol 17 drop; }; }
		table ip early { chain c { type filter hook forward priority -10; ip protocol 17 accept; }; }`, "-++-"},
	{"length and TTL", `table ip t { chain c { type filter hook forward priority 0; meta length > 1000 drop; ip ttl 64 drop; ip ttl 63 ip protocol icmp drop; }; }`, "++--"},
	{"new connections", `table ip t { chain c { type filter hook forward priority 0; ct state established,related accept; ct state new udp dport 80 drop; ct state invalid drop; }; }`, "-++-"},
	{"before the tracker", `table ip t { chain c { type filter hook prerouting priority -300; ct state new drop; ip protocol icmp ct state invalid drop; }; }`, "++-+"},
	{"not tracked", `table ip t { chain p { type filter hook prerouting priority -300; tcp dport 443 notrack; }
		chain c { type filter hook forward priority 0; ct state untracked drop; }; }`, "+-++"},
	{"flags", `table ip t { chain c { type filter hook forward priority 0; tcp flags syn / syn,ack drop; }; }`, "+-++"},
	{"icmp types", `table ip t { chain c { type filter hook forward priority 0; icmp type echo-request drop; }; }`, "++-+"},
	{"the kind of an address", `table ip t { chain c { type filter hook prerouting priority 0; fib daddr type local drop; fib daddr type unicast ip protocol udp drop; }; }`, "-++-"},
	{"ingress", `table netdev t { chain c { type filter hook ingress device "in0" priority 0; ip protocol tcp drop; }; }`, "+-++"},
	{"egress of another interface", `table netdev t { chain c { type filter hook egress device "in0" priority 0; ip protocol tcp drop; }; }`, "++++"},
	{"egress", `table netdev t { chain c { type filter hook egress device "out0" priority 0; ip protocol tcp drop; }; }`, "+-++"},
	{"switched off", `table ip t { flags dormant; chain c { type filter hook forward priority 0; drop; }; }`, "++++"},
	{"empty set", `table ip t { set s { type ipv4_addr; }
		chain c { type filter hook forward priority 0; ip saddr @s drop; ip protocol tcp ip saddr != @s drop; }; }`, "+-++"},
	{"not in a set", `table ip t { chain c { type filter hook forward priority 0; udp dport != { 80, 81 } drop; tcp dport != { 80, 81 } drop; }; }`, "+-++"},
	{"catch all", `table ip t { map m { type inet_service : verdict; elements = { 80 : accept, * : drop }; }
		chain c { type filter hook forward priority 0; udp dport vmap @m; tcp dport vmap @m; }; }`, "+-++"},
	{"dscp", `table ip t { chain c { type filter hook forward priority 0; ip dscp cs0 ip protocol tcp drop; ip dscp 10 drop; }; }`, "+-++"},
	{"a limit may be over", `table ip t { chain c { type filter hook forward priority 0; udp dport 80 limit rate 1000/second accept; udp dport 80 drop; tcp dport 443 limit rate over 1000/second drop; }; }`, "??+?"},
	{"whatever a limit says", `table ip t { chain c { type filter hook forward priority 0; ip protocol tcp limit rate 1/second drop; ip protocol tcp drop; }; }`, "+-++"},
	{"a limit that only logs", `table ip t { chain c { type filter hook forward priority 0; limit rate 5/minute counter; }; }`, "++++"},
	{"random", `table ip t { chain no { ip protocol tcp drop; }
		chain c { type filter hook forward priority 0; numgen random mod 2 vmap { 0 : jump no, 1 : accept }; }; }`, "????"},
	{"hardware address", `table ip t { chain c { type filter hook forward priority 0; udp dport 80 ether saddr 02:00:00:00:00:07 drop; }; }`, "?++?"},
	{"source rewritten", `table ip t { chain c { type nat hook postrouting priority 100; oifname "out0" ip protocol tcp masquerade; }
		chain d { type filter hook postrouting priority 200; ip protocol 17 drop; }; }`, "-++-"},
}

func TestVerdictsAreTheKernels(t *testing.T) {
	b := newBed(t)
	for _, c := range rulesets {
		t.Run(c.name, func(t *testing.T) {
			b.run(t, "flush ruleset\n"+c.rules, "nft", "-f", "-")
			b.hold(t, c.verdicts)
		})
	}
}

func TestIptablesVerdictsAreTheKernels(t *testing.T) {
	b := newBed(t)
	for _, c := range []struct{ rules, verdicts string }{
		{"-A FORWARD -p udp --dport 80 -j DROP", "-++-"},
		{"-A FORWARD -p tcp -m multiport --dports 80,400:500 -j REJECT", "+-++"},
		{"-A FORWARD -p icmp --icmp-type echo-request -m comment --comment pings -j DROP", "++-+"},
		{"-A FORWARD -m conntrack --ctstate NEW -p tcp --syn -j DROP", "+-++"},
		{"-A FORWARD -m conntrack --ctstate INVALID -j DROP", "++++"},
		{"-A FORWARD ! -i in0 -j DROP\n-A FORWARD -s 10.1.0.0/25 -d 10.2.0.0/30 -p icmp -j DROP", "++-+"},
		{"-A FORWARD -m addrtype --dst-type LOCAL -j DROP\n-A FORWARD -m addrtype ! --dst-type LOCAL -p tcp -j DROP", "+-++"},
		{"-A FORWARD -p tcp -j MARK --set-mark 5\n-A FORWARD -m mark --mark 0x5/0xff -j DROP", "+-++"},
		{"-N own\n-A FORWARD -j own\n-A own -p udp -j RETURN\n-A own -p tcp -g own2\n-A FORWARD -p tcp -j ACCEPT\n-N own2\n-A own2 -p tcp --dport 1:400 -j DROP", "++++"},
		{"-P FORWARD DROP\n-A FORWARD -p 253 -j ACCEPT\n-A FORWARD -i in+ -p icmp -j ACCEPT", "--+-"},
		{"-A FORWARD -p udp -m length --length 1000:2000 -j DROP", "?++?"},
		{"-A FORWARD -p udp -m statistic --mode random --probability 0.5 -j DROP", "?++?"},
	} {
		t.Run(c.rules, func(t *testing.T) {
			b.run(t, "flush ruleset\n", "nft", "-f", "-")
			var late []string
			for line := range strings.Lines(c.rules) {
				if strings.HasPrefix(line, "-N") {
					b.run(t, "", "iptables-nft", strings.Fields(line)...)
				} else {
					late = append(late, line)
				}
			}
			for _, line := range late {
				b.run(t, "", "iptables-nft", strings.Fields(line)...)
			}
			b.hold(t, c.verdicts)
		})
	}
}

// hold compares what is said, what was expected and what becomes of real packets.
func (b *bed) hold(t *testing.T, verdicts string) {
	t.Helper()
	for i, p := range [][]byte{udp, tcp, icmp, long} {
		out := b.judge(t, p)
		if said := "+-?"[out.Verdict]; said != verdicts[i] {
			t.Errorf("packet %d of udp, tcp, icmp, long: %c (%+v), expected %c", i, said, out, verdicts[i])
		}
		if out.Verdict != Pass && (out.Where == "" || out.Fix == "" || out.Verdict == CannotTell && out.Why == "") {
			t.Errorf("packet %d: it does not say where, why and what would mend it: %+v", i, out)
		}
		if arrived := b.arrives(t, p); out.Verdict != CannotTell && arrived != (out.Verdict == Pass) {
			t.Errorf("packet %d: %+v, and it arrives: %v", i, out, arrived)
		}
	}
}

// TestOldIptables: its tables are only looked at for whether they may refuse something.
func TestOldIptables(t *testing.T) {
	b := newBed(t)
	b.run(t, "", "iptables-legacy", "-t", "filter", "-S")
	if out := b.judge(t, udp); out.Verdict != Pass {
		t.Errorf("a table without rules: %+v", out)
	}
	b.run(t, "", "iptables-legacy", "-A", "FORWARD", "-p", "tcp", "-j", "REJECT")
	if out := b.judge(t, udp); out.Verdict != CannotTell || !strings.Contains(out.Why, "iptables-legacy") {
		t.Errorf("a table that rejects something: %+v", out)
	}
}

// TestDestinationRewritten follows a destination that is rewritten.
func TestDestinationRewritten(t *testing.T) {
	b := newBed(t)
	b.run(t, `table ip t { chain c { type nat hook prerouting priority -100; ip daddr 10.1.0.1 udp dport 80 dnat to 10.2.0.2:8080; }; }`, "nft", "-f", "-")
	p := append([]byte{}, udp...)
	copy(p[16:], netip.MustParseAddr("10.1.0.1").AsSlice())
	b.router.Do(t, func() error {
		rs, err := Load()
		if err != nil {
			return err
		}
		pkt := &Packet{IP: p, In: Link{Name: "in0", Index: 2}, State: StateNew}
		out := rs.Hook(Prerouting, pkt)
		if out.Verdict != Pass || out.Destination != rightAddr || packet.IPv4(p).Dst() != rightAddr || binary.BigEndian.Uint16(p[22:]) != 8080 || out.Rewriter == "" {
			t.Errorf("%+v, %x", out, p)
		}
		if _, fault := packet.ParseIPv4(p); fault != packet.FaultNone {
			t.Error(fault)
		}
		pkt.State = StateEstablished
		if out := rs.Hook(Prerouting, pkt); out.Destination.IsValid() {
			t.Error("only a connection's first packet is asked about")
		}
		return nil
	})
}
