package table

import (
	"bufio"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"margay/vrouter"
	"margay/vrouter/fib"
)

// source is a port that hands out copies of prepared packets, and stops after enough of them.
type source struct {
	packets [][]byte
	left    int
	next    int
}

func (s *source) Recv(batch []*vrouter.Packet) (int, error) {
	if s.left == 0 {
		return 0, vrouter.ErrStopped
	}
	n := min(len(batch), s.left)
	for _, p := range batch[:n] {
		p.Len = copy(p.Buf[p.Off:], s.packets[s.next])
		if s.next++; s.next == len(s.packets) {
			s.next = 0
		}
	}
	s.left -= n
	return n, nil
}

func (s *source) Name() string                { return "source" }
func (s *source) Send([]*vrouter.Packet)      {}
func (s *source) Counters() []vrouter.Counter { return nil }
func (s *source) Stop()                       {}
func (s *source) Close() error                { return nil }

// sink is a port that counts what is sent on it.
type sink struct {
	source
	sent int
}

func (s *sink) Send(batch []*vrouter.Packet) {
	for _, p := range batch {
		p.Sent = 1
	}
	s.sent += len(batch)
}

// FullTable is the number of prefixes that Real returns.
const FullTable = 901_899

// Real reads the FullTable IPv4 prefixes of the Internet that the bart module ships. It asks `go list` where that is, so it
// wants to be called in a checkout.
func Real() ([]netip.Prefix, error) {
	prefixes, err := readPrefixes(netip.Addr.Is4)
	if err == nil && len(prefixes) != FullTable {
		err = fmt.Errorf("the bart module ships %d IPv4 prefixes: expected %d", len(prefixes), FullTable)
	}
	return prefixes, err
}

// readPrefixes reads those of one family from the list that the bart module ships.
func readPrefixes(family func(netip.Addr) bool) ([]netip.Prefix, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/gaissmai/bart").Output()
	if err != nil {
		return nil, fmt.Errorf("find the bart module, whose prefixes these are (stand in the checkout): %w", err)
	}
	f, err := os.Open(filepath.Join(strings.TrimSpace(string(out)), "internal/tests/testdata/prefixes.txt.gz"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	var prefixes []netip.Prefix
	for sc := bufio.NewScanner(z); sc.Scan(); {
		p, err := netip.ParsePrefix(strings.TrimSpace(sc.Text()))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
		if family(p.Addr()) {
			prefixes = append(prefixes, p)
		}
	}
	return prefixes, nil
}

// Some makes n prefixes of 24 bits, 65,536 at most.
func Some(n int) []netip.Prefix {
	table := make([]netip.Prefix, n)
	for i := range table {
		table[i] = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)
	}
	return table
}

// routesOf makes every prefix a tunnel to one of 62,500 nodes.
func routesOf(table []netip.Prefix) []fib.Route {
	routes := make([]fib.Route, len(table))
	for i, p := range table {
		gateway := netip.AddrFrom4([4]byte{198, 18, byte(1 + i%250), byte(1 + i/250%250)})
		routes[i] = fib.Route{Prefix: p, NextHop: fib.NextHop{Kind: fib.KindTunnel, Gateway: gateway}}
	}
	return routes
}

// inside returns a random address inside p.
func inside(rnd *rand.Rand, p netip.Prefix) uint32 {
	return binary.BigEndian.Uint32(p.Addr().AsSlice()) | uint32(rnd.Uint64()&(1<<(32-p.Bits())-1))
}

// router returns a configured router whose every route is a tunnel.
func router(prefixes []netip.Prefix) (*vrouter.Router, error) {
	r := vrouter.New()
	up := vrouter.Update{Config: &vrouter.Config{NodeAddress: netip.MustParseAddr("198.18.0.1"), Underlay: "eth0", MTU: 1480}}
	up.Set = routesOf(prefixes)
	return r, r.Update(up)
}

// packets makes small UDP packets to random addresses inside the table.
func packets(table []netip.Prefix, n int) [][]byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	out := make([][]byte, n)
	for i := range out {
		out[i] = udp(inside(rnd, table[rnd.IntN(len(table))]))
	}
	return out
}

func udp(dst uint32) []byte {
	b := make([]byte, 46)
	b[0], b[3], b[8], b[9] = 0x45, byte(len(b)), 64, 17
	copy(b[12:], []byte{10, 0, 0, 1})
	binary.BigEndian.PutUint32(b[16:], dst)
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
	return b
}

// Loop is the forwarding loop alone, encapsulating: in-memory ports, no system calls, the real ladder and table.
type Loop struct {
	router *vrouter.Router
	worker *vrouter.Worker
	in     *source
	out    *sink
}

// NewLoop returns a loop that has prefixes for its routes, and packets to random addresses in them.
func NewLoop(prefixes []netip.Prefix) (*Loop, error) {
	r, err := router(prefixes)
	if err != nil {
		return nil, err
	}
	in, out := &source{packets: packets(prefixes, 1<<16)}, &sink{}
	return &Loop{router: r, worker: r.NewWorker(vrouter.Encap, in, out), in: in, out: out}, nil
}

// Run forwards n packets. Every one has to come through.
func (l *Loop) Run(n int) error {
	l.in.left, l.out.sent = n, 0
	if err := l.worker.Run(); err != nil {
		return err
	}
	if l.out.sent != n {
		return fmt.Errorf("%d of %d packets came through: %v", l.out.sent, n, l.router.Counters())
	}
	return nil
}
