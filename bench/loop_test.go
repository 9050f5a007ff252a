package bench

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
	"testing"

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

// realTable reads the 901,899 IPv4 prefixes that the bart module ships.
func realTable(tb testing.TB) []netip.Prefix {
	tb.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/gaissmai/bart").Output()
	if err != nil {
		tb.Fatalf("find the bart module: %v", err)
	}
	f, err := os.Open(filepath.Join(strings.TrimSpace(string(out)), "internal/tests/testdata/prefixes.txt.gz"))
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		tb.Fatal(err)
	}
	var table []netip.Prefix
	for sc := bufio.NewScanner(z); sc.Scan(); {
		p, err := netip.ParsePrefix(strings.TrimSpace(sc.Text()))
		if err != nil {
			tb.Fatalf("prefix list: %v", err)
		}
		if p.Addr().Is4() {
			table = append(table, p)
		}
	}
	if len(table) != 901_899 {
		tb.Fatalf("prefix list: expected 901899 IPv4 prefixes, got %d", len(table))
	}
	return table
}

// someTable makes n prefixes of 24 bits.
func someTable(n int) []netip.Prefix {
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
func router(tb testing.TB, table []netip.Prefix) *vrouter.Router {
	tb.Helper()
	r := vrouter.New()
	up := vrouter.Update{Config: &vrouter.Config{NodeAddress: netip.MustParseAddr("198.18.0.1"), Underlay: "eth0", MTU: 1480}}
	up.Set = routesOf(table)
	if err := r.Update(up); err != nil {
		tb.Fatal(err)
	}
	return r
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

// BenchmarkLoop is the forwarding loop alone, encapsulating: ns/op is nanoseconds per packet.
func BenchmarkLoop(b *testing.B) {
	for _, size := range []int{1, 10_000, 901_899} {
		b.Run(fmt.Sprintf("routes=%d", size), func(b *testing.B) {
			table := someTable(min(size, 10_000))
			if size > 10_000 {
				table = realTable(b)
			}
			r := router(b, table)
			in, out := &source{packets: packets(table, 1<<16)}, &sink{}
			w := r.NewWorker(vrouter.Encap, in, out)
			b.ReportAllocs()
			b.ResetTimer()
			in.left = b.N
			if err := w.Run(); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			if out.sent != b.N {
				b.Fatalf("%d of %d packets came through: %v", out.sent, b.N, r.Counters())
			}
		})
	}
}

// TestBenchmarksRun keeps the benchmarks from rotting: each must run and forward every packet.
func TestBenchmarksRun(t *testing.T) {
	for _, table := range [][]netip.Prefix{someTable(1), someTable(10_000), realTable(t)} {
		const n = 100_000
		r := router(t, table)
		in, out := &source{packets: packets(table, 1<<10), left: n}, &sink{}
		if err := r.NewWorker(vrouter.Encap, in, out).Run(); err != nil {
			t.Fatal(err)
		}
		if out.sent != n {
			t.Errorf("%d routes: %d of %d packets came through: %v", len(table), out.sent, n, r.Counters())
		}
	}
}
