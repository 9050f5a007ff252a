package filter

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// expressions are the language as docs/trace.md describes it.
var expressions = []string{
	"ip", "ip6", "tcp", "udp", "icmp", "icmp6", "sctp", "proto 4", "ip proto 17", "ip6 proto 6", `ip proto \tcp`, "proto 47",
	"host 10.244.1.5", "src host 10.244.1.5", "dst host 10.244.2.5", "src 10.244.1.5",
	"src and dst host 10.244.1.5", "src or dst host 10.244.2.5", "host fd00::5", "dst host fd00::6", "ip host 10.244.1.5", "ip6 host fd00::5",
	"net 10.244.1.0/26", "src net 10.244.0.0/16", "dst net 0.0.0.0/0", "net fd00::/64", "ip6 net fd00::/9", "net 10.244.1.5/32",
	"port 80", "src port 80", "dst port 53", "tcp port 80", "udp port 53", "udp src port 53", "sctp port 80", "src and dst port 80",
	"portrange 50-100", "tcp portrange 80-90", "portrange 90-80", "udp dst portrange 1-53",
	"less 60", "greater 60", "len = 60", "len > 100", "len <= 40", "len != 40",
	"tcp[tcpflags] & (tcp-syn|tcp-ack) = tcp-syn", "tcp[13] & 2 != 0", "tcp[tcpflags] & tcp-rst != 0", "icmp[icmptype] = icmp-echo",
	"icmp[icmptype] != icmp-echo", "ip[8] < 5", "ip[6:2] & 0x1fff != 0", "ip[0] & 0xf != 5", "ip6[7] = 64", "udp[4:2] > 20", "tcp[4:4] > 1000",
	"tcp and port 80", "tcp or udp and port 53", "not tcp", "not port 80", "! host 10.244.1.5", "not tcp and not udp", "not not tcp",
	"(tcp or udp) and port 80", "tcp or (udp and port 53)", "port 80 or 53", "host 10.244.1.5 and not 10.244.2.5", "port (80 or 53)",
	"src host (10.244.1.5 or 10.244.2.5)", "tcp && port 80 || icmp", "not tcp[13] & 2 != 0", "not ip[100] = 1", "icmp or not ip[60] = 0",
	"host 10.244.1.5 and tcp port 80 and not tcp[tcpflags] & tcp-fin != 0", "net 10.244.1.0/26 and net 10.244.2.0/26", "host ::1 or ::2",
}

// TestAgreesWithLibpcap has tcpdump filter the same packets by the same texts, and by random ones.
func TestAgreesWithLibpcap(t *testing.T) {
	packets := samplePackets(600)
	file := filepath.Join(t.TempDir(), "in.pcap")
	if err := os.WriteFile(file, pcap(packets), 0o644); err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	all := expressions
	for range 80 {
		all = append(all, randomExpression(rnd, 4))
	}
	matched := 0
	for _, text := range all {
		f, err := Parse(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		want := tcpdump(t, file, text)
		for i, b := range packets {
			got := f.Match(b, len(b))
			if got {
				matched++
			}
			if got != want[i] {
				t.Errorf("%q: packet %d (%.60x): we say %v, libpcap %v", text, i, b, got, want[i])
				break
			}
		}
	}
	if matched < 1000 {
		t.Errorf("only %d matches: the packets do not try the filters", matched)
	}
}

// tcpdump returns which packets of the file libpcap lets through. -O, because its optimizer changes the order of tests, and
// with it the answer about packets that end early.
func tcpdump(t *testing.T, file, text string) map[int]bool {
	t.Helper()
	var errs strings.Builder
	cmd := exec.Command("tcpdump", "-O", "-r", file, "-w", "-", text)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	// A filter that can match nothing of this link type is an error to libpcap.
	if err != nil && !strings.Contains(errs.String(), "expression rejects all packets") {
		t.Fatalf("tcpdump %q: %v: %s", text, err, errs.String())
	}
	found := map[int]bool{}
	for out = out[min(24, len(out)):]; len(out) >= 16; {
		found[int(binary.LittleEndian.Uint32(out))] = true // the seconds are the index
		out = out[16+binary.LittleEndian.Uint32(out[8:]):]
	}
	return found
}

// pcap is a file of link type RAW; each packet's time is its index, in seconds.
func pcap(packets [][]byte) []byte {
	out := binary.LittleEndian.AppendUint32(nil, 0xa1b2c3d4)
	out = append(out, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	out = binary.LittleEndian.AppendUint32(out, 65535)
	out = binary.LittleEndian.AppendUint32(out, 101)
	for i, b := range packets {
		for _, n := range []int{i, 0, len(b), len(b)} {
			out = binary.LittleEndian.AppendUint32(out, uint32(n))
		}
		out = append(out, b...)
	}
	return out
}

// samplePackets are packets of all kinds that the expressions speak of: fragments, options, cut ones, and ones with random
// bytes in the headers.
func samplePackets(n int) [][]byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	pick := func(list ...int) int { return list[rnd.IntN(len(list))] }
	packets := make([][]byte, n)
	for i := range packets {
		proto := byte(pick(6, 6, 17, 17, 1, 58, 132, 4, 47))
		upper := make([]byte, pick(0, 4, 8, 20, 40, 200))
		if i == 0 {
			upper = make([]byte, 40)
			proto = 6
		}
		for j := range upper {
			upper[j] = byte(rnd.Uint32())
		}
		if len(upper) >= 4 {
			binary.BigEndian.PutUint16(upper, uint16(pick(80, 53, 443, 90, 1234)))
			binary.BigEndian.PutUint16(upper[2:], uint16(pick(80, 53, 443, 51, 4321)))
		}
		if proto == 1 && len(upper) > 0 {
			upper[0] = byte(pick(0, 3, 8, 11))
		}
		var b []byte
		if rnd.IntN(4) > 0 || i == 0 {
			b = ip4(rnd, pick, proto, upper)
		} else {
			b = ip6(rnd, pick, proto, upper)
		}
		switch {
		case i == 0:
		case rnd.IntN(10) == 0:
			b = b[:1+rnd.IntN(len(b))]
		case rnd.IntN(20) == 0:
			b[rnd.IntN(min(24, len(b)))] = byte(rnd.Uint32())
		}
		packets[i] = b
	}
	return packets
}

func ip4(rnd *rand.Rand, pick func(...int) int, proto byte, upper []byte) []byte {
	options := 4 * pick(0, 0, 0, 1, 5, 10)
	b := make([]byte, 20+options)
	b[0], b[8], b[9] = byte(0x40|len(b)/4), byte(pick(1, 4, 63, 64)), proto
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)+len(upper)))
	binary.BigEndian.PutUint16(b[6:], uint16(pick(0, 0, 0, 0x4000, 0x2000, 100, 0x2001)))
	copy(b[12:], []byte{10, 244, byte(pick(1, 2, 3)), byte(pick(5, 5, 6, 70))})
	copy(b[16:], []byte{10, 244, byte(pick(1, 2, 3)), byte(pick(5, 5, 6, 70))})
	return append(b, upper...)
}

func ip6(_ *rand.Rand, pick func(...int) int, proto byte, upper []byte) []byte {
	b := make([]byte, 40)
	b[0], b[6], b[7] = 0x60, proto, byte(pick(1, 64))
	binary.BigEndian.PutUint16(b[4:], uint16(len(upper)))
	for _, off := range []int{8, 24} {
		b[off], b[off+1], b[off+15] = 0xfd, byte(pick(0, 0, 0x80)), byte(pick(5, 6))
	}
	if pick(0, 0, 0, 1) == 1 {
		b[6] = ip6Fragment
		b = append(b, proto, 0, 0, 1, 0, 0, 0, 9)
	}
	return append(b, upper...)
}

// randomExpression combines what the table has.
func randomExpression(rnd *rand.Rand, depth int) string {
	if depth == 0 || rnd.IntN(3) == 0 {
		return expressions[rnd.IntN(len(expressions))]
	}
	a, b := randomExpression(rnd, depth-1), randomExpression(rnd, depth-1)
	op := []string{"and", "or"}[rnd.IntN(2)]
	switch rnd.IntN(4) {
	case 0:
		return fmt.Sprintf("not (%s) %s %s", a, op, b)
	case 1:
		return fmt.Sprintf("(%s) %s (%s)", a, op, b)
	case 2:
		return fmt.Sprintf("%s %s not (%s)", a, op, b)
	}
	return fmt.Sprintf("%s %s %s", a, op, b)
}
