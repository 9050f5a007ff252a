package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"margay/agent/api"
	"margay/vrouter/packet"
)

// What lies between two nodes can only be asked by sending. A trace sends no packet of a pod's; it has the node whose packet it
// is ping the other one, from tunnel address to tunnel address, so by IP-in-IP, as long as the traced packet and with its DF.

const (
	echoTries = 3
	maxEchoes = 8  // traces that ask so at a time
	shortEcho = 28 // bytes: the IP header, and ICMP's without data
)

// patience is how long an answer is waited for: after each try but the last, and after that one.
type patience struct{ each, last time.Duration }

// echoPatience is long at the end: a busy node answers late, and a doubt would be wrong.
var echoPatience = patience{each: 700 * time.Millisecond, last: 2 * time.Second}

// echo is one question to another node.
type echo struct {
	from, to netip.Addr
	device   string // it must go by this one; empty for any
	size     int    // of the whole IP packet, bytes
	df       bool
	enough   bool // once it is answered, nothing more has to be asked
}

// echoResult says how an echo fared.
type echoResult struct {
	answered bool
	after    time.Duration
	err      error // of sending, the last
}

// askFabric asks whether the next node, to which the packet has been sent, answers what is like the packet. Silence is a doubt: it may
// as well be the echo that is filtered somewhere.
func (t *tracer) askFabric(outer bool) {
	const rung = "echo to the next node"
	members := t.cluster.members.all() // in another order each time
	i := slices.IndexFunc(members, func(m Member) bool { return m.Address == t.seg.Next })
	if i < 0 || t.noEcho {
		return
	}
	node := members[i]
	t.mu.Lock()
	self, tunnel := t.underlay.Prefix.Addr(), t.tunnel
	t.mu.Unlock()
	how, device := "plain", ""
	dst := t.pkt.Dst()
	whole := echo{from: self, to: node.Address, size: max(shortEcho, t.pkt.TotalLen()), df: t.pkt.DF(), enough: true}
	if !outer && t.plainAlike(tunnel, node) {
		whole.from, whole.to = tunnel, node.Tunnel
	}
	if outer {
		how, device = "by IP-in-IP", tunnelDevice
		whole.from, whole.to, whole.device, whole.size = tunnel, node.Tunnel, device, max(shortEcho, t.pkt.TotalLen()-ipipOverhead)
		if inner, fault := packet.ParseIPv4(t.pkt.Payload()); fault == packet.FaultNone {
			dst = inner.Dst()
		}
	}
	if !whole.from.IsValid() || !whole.to.IsValid() {
		t.doubt("agent", rung, "fabric_not_asked", fmt.Sprintf("%s or %s has no tunnel address, so nothing can be asked of the network between them", t.cfg.Node, node.Name), "find out with --probe")
		return
	}
	if !t.echoes.begin(maxEchoes) {
		t.doubt("agent", rung, "fabric_not_asked", fmt.Sprintf("%d traces are asking the network already", maxEchoes), "trace again")
		return
	}
	defer t.echoes.end()
	short, plain := whole, whole
	short.size, short.df = shortEcho, false
	plain.from, plain.to, plain.device, plain.size, plain.df = self, node.Address, "", shortEcho, false
	short.enough, plain.enough = false, false
	echoes := []echo{whole, short, plain}
	if whole.to == node.Tunnel && dst != node.Tunnel { // its tunnel address may be what does not answer
		deep := whole
		deep.to = dst
		echoes = append(echoes, deep)
	}
	r, err := ask(t.ctx, echoPatience, echoes...)
	if err != nil {
		t.doubt("agent", rung, "fabric_not_asked", err.Error(), "find out with --probe")
		return
	}
	t.seg.Echo = &api.Echo{From: whole.from, To: whole.to, IPIP: outer, Size: whole.size, DF: whole.df, Answered: r[0].answered}
	if n := len(echoes) - 1; n > 2 && r[n].answered {
		t.seg.Echo.Answered = true
		t.pass("agent", rung, fmt.Sprintf("%d bytes %s to %s, the destination itself, and back in %s; %s does not answer", whole.size, how, dst,
			r[n].after.Round(10*time.Microsecond), whole.to))
		return
	}
	t.fabricSaid(rung, how, node, whole, outer, r)
}

// plainAlike reports whether what this node sends from its tunnel address to the other's goes unencapsulated as the packet, a pod's,
// has gone. Networks there are that carry nothing but nodes' own addresses.
func (t *tracer) plainAlike(tunnel netip.Addr, node Member) bool {
	if !tunnel.IsValid() || !node.Tunnel.IsValid() || t.pkt.Dst() == node.Address {
		return false
	}
	answer, err := t.kernel.askRoute(tunnel, node.Tunnel, "")
	return err == nil && answer.reason == "" && answer.device == t.seg.Via && answer.gateway == t.seg.Next
}

// fabricSaid notes what became of the three echoes: the one like the packet, a short one the same way, and a plain one.
func (t *tracer) fabricSaid(rung, how string, node Member, whole echo, outer bool, r []echoResult) {
	const probe = "; or find out with --probe"
	silence := fmt.Sprintf("none of %d echoes of %d bytes %s came back from %s (%s)", echoTries, whole.size, how, node.Name, whole.to)
	switch {
	case r[0].answered:
		t.pass("agent", rung, fmt.Sprintf("%d bytes %s to %s and back in %s", whole.size, how, whole.to, r[0].after.Round(10*time.Microsecond)))
	case r[0].err != nil:
		t.doubt("agent", rung, "fabric_not_asked", fmt.Sprintf("an echo of %d bytes %s to %s cannot be sent: %v", whole.size, how, whole.to, r[0].err), "find out with --probe")
	case r[1].answered && whole.size > shortEcho:
		t.doubt("agent", rung, "fabric_mtu", fmt.Sprintf("%s, and one of %d bytes did: the network between the nodes seems to lose long packets", silence, shortEcho),
			"set the MTU of the underlay's interfaces to what the network carries, on all nodes"+probe)
	case r[2].answered && outer:
		t.doubt("agent", rung, "fabric_ipip", silence+", and a plain one did: IP-in-IP is filtered between the nodes, or the other does not answer on its tunnel address",
			"let IP protocol 4 pass between the nodes (firewalls, security groups), and ICMP echo to "+whole.to.String()+probe)
	case r[2].answered && whole.to != node.Address:
		t.doubt("agent", rung, "fabric_addresses", silence+", and one from node to node did: the network between them seems not to carry pods' addresses",
			"let packets with pods' addresses pass between the nodes (source and destination checks, security groups), or set ipipMode Always"+probe)
	default:
		t.doubt("agent", rung, "fabric_silent", silence+", nor did a plain one",
			"see whether "+node.Name+" is up and answers ICMP echo, and what lies between"+probe)
	}
}

// ask sends the first of some echoes, and again together with the others as long as it is not answered.
func ask(ctx context.Context, patience patience, echoes ...echo) ([]echoResult, error) {
	type answer struct{ which, try int }
	results := make([]echoResult, len(echoes))
	answers := make(chan answer, len(echoes)*echoTries)
	conns := make([]*net.IPConn, len(echoes))
	id := uint16(rand.Uint32())
	for i, e := range echoes {
		c, err := e.open(ctx)
		if err != nil {
			if i > 0 {
				results[i].err = err
				continue
			}
			return nil, err
		}
		defer c.Close()
		conns[i] = c
		go func() {
			b := make([]byte, 65536)
			for {
				n, from, err := c.ReadFromIP(b)
				if err != nil {
					return // closed
				}
				if a, ok := netip.AddrFromSlice(from.IP); !ok || a.Unmap() != e.to || n < 8 || b[0] != packet.ICMPEchoReply ||
					binary.BigEndian.Uint16(b[4:]) != id+uint16(i) {
					continue
				}
				select {
				case answers <- answer{i, int(binary.BigEndian.Uint16(b[6:]))}:
				default: // more than were asked for
				}
			}
		}()
	}
	var sent [echoTries]time.Time
	for try := range echoTries {
		sent[try] = time.Now()
		for i, c := range conns {
			if c == nil || i > 0 && try == 0 {
				continue
			}
			_, results[i].err = c.WriteToIP(echoes[i].message(id+uint16(i), uint16(try)), &net.IPAddr{IP: echoes[i].to.AsSlice()})
		}
		wait := patience.each
		if try == echoTries-1 {
			wait = patience.last
		}
		for over := time.After(wait); over != nil; {
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-over:
				over = nil
			case a := <-answers:
				if a.try > try {
					continue
				}
				results[a.which] = echoResult{answered: true, after: time.Since(sent[a.try])}
				if echoes[a.which].enough {
					return results, nil
				}
			}
		}
	}
	return results, nil
}

// open makes the socket of an echo.
func (e echo) open(ctx context.Context) (*net.IPConn, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		ctlErr := raw.Control(func(fd uintptr) {
			// DF as asked, whatever path MTU is remembered: that the network has become narrower is to be seen, not avoided.
			mode := unix.IP_PMTUDISC_DONT
			if e.df {
				mode = unix.IP_PMTUDISC_PROBE
			}
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, mode)
			if err == nil && e.device != "" {
				err = unix.BindToDevice(int(fd), e.device)
			}
		})
		return errors.Join(ctlErr, err)
	}}
	c, err := lc.ListenPacket(ctx, "ip4:icmp", e.from.String())
	if err != nil {
		return nil, needsRaw(fmt.Errorf("ping from %s: %w", e.from, err))
	}
	return c.(*net.IPConn), nil
}

// message is the ICMP echo of RFC 792, with zeros as data.
func (e echo) message(id, seq uint16) []byte {
	b := make([]byte, e.size-(shortEcho-packet.ICMPHeaderLen))
	b[0] = packet.ICMPEcho
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], seq)
	binary.BigEndian.PutUint16(b[2:], packet.Checksum(b, 0))
	return b
}
