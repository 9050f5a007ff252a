package agent

import (
	"bytes"
	"encoding/binary"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/net/bpf"

	"margay/agent/api"
	"margay/vrouter/packet"
)

// probeOf builds a probe of 60 bytes.
func probeOf(proto byte, src, dst string) packet.IPv4 {
	b := make([]byte, 60)
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[2:], 60)
	binary.BigEndian.PutUint16(b[4:], 4711)
	copy(b[12:], netip.MustParseAddr(src).AsSlice())
	copy(b[16:], netip.MustParseAddr(dst).AsSlice())
	up := b[20:]
	switch proto {
	case 1:
		up[0] = 8
		binary.BigEndian.PutUint16(up[4:], 4711)
	default:
		binary.BigEndian.PutUint16(up, 40000)
		binary.BigEndian.PutUint16(up[2:], 80)
		binary.BigEndian.PutUint32(up[4:], 7_000_000)
	}
	return seal(b)
}

func seal(b []byte) packet.IPv4 {
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], packet.Checksum(b[:20], 0))
	return b
}

// around puts a packet, or a quotation, behind an IPv4 header.
func around(proto byte, src, dst string, payload ...byte) packet.IPv4 {
	b := make([]byte, 20, 20+len(payload))
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
	binary.BigEndian.PutUint16(b[4:], 9)
	copy(b[12:], netip.MustParseAddr(src).AsSlice())
	copy(b[16:], netip.MustParseAddr(dst).AsSlice())
	return seal(append(b, payload...))
}

func TestSight(t *testing.T) {
	const a, b, n1, n2 = "10.0.0.1", "10.0.0.2", "192.0.2.1", "192.0.2.2"
	icmp, tcp, udp := probeOf(1, a, b), probeOf(packet.ProtocolTCP, a, b), probeOf(packet.ProtocolUDP, a, b)
	answer := func(p packet.IPv4, change func(up []byte)) packet.IPv4 {
		q := packet.IPv4(bytes.Clone(p))
		binary.BigEndian.PutUint16(q[4:], 1)
		copy(q[12:], p[16:20])
		copy(q[16:], p[12:16])
		change(q[20:])
		return seal(q)
	}
	swap := func(up []byte) { up[0], up[1], up[2], up[3] = up[2], up[3], up[0], up[1] }
	acks := func(n uint32) func([]byte) {
		return func(up []byte) { swap(up); binary.BigEndian.PutUint32(up[8:], 7_000_000+n) }
	}
	echo := answer(icmp, func(up []byte) { up[0] = 0 })
	needFrag := around(1, n2, a, append([]byte{3, 4, 0, 0, 0, 0, 0x05, 0x78}, icmp[:28]...)...)
	for _, c := range []struct {
		name   string
		of, is packet.IPv4
		what   string // empty: nothing to us
		outer  bool
	}{
		{"the probe", icmp, icmp, api.SawProbe, false},
		{"in IP-in-IP", icmp, around(packet.ProtocolIPIP, n1, n2, icmp...), api.SawProbe, true},
		{"another protocol with the mark", icmp, udp, "", false},
		{"an echo", icmp, echo, api.SawAnswer, false},
		{"an echo in IP-in-IP", icmp, around(packet.ProtocolIPIP, n2, n1, echo...), api.SawAnswer, true},
		{"another's echo", icmp, answer(icmp, func(up []byte) { up[0], up[5] = 0, up[5]+1 }), "", false},
		{"SYN+ACK", tcp, answer(tcp, acks(1)), api.SawAnswer, false},
		{"RST, of data too", tcp, answer(tcp, acks(21)), api.SawAnswer, false},
		{"of more than was sent", tcp, answer(tcp, acks(22)), "", false},
		{"an old acknowledgement", tcp, answer(tcp, acks(0)), "", false},
		{"another port", tcp, answer(tcp, func(up []byte) { acks(1)(up); up[1]++ }), "", false},
		{"a UDP answer", udp, answer(udp, swap), api.SawAnswer, false},
		{"fragmentation needed", icmp, needFrag, api.SawError, false},
		{"about IP-in-IP", icmp, around(1, n2, n1, append([]byte{3, 4, 0, 0, 0, 0, 0x05, 0x78}, around(packet.ProtocolIPIP, n1, n2, icmp...)...)...), api.SawError, false},
		{"about something else", tcp, needFrag, "", false},
	} {
		s, ok := sight(c.is, c.of)
		if ok != (c.what != "") || ok && (s.What != c.what || (s.Outer != "") != c.outer) {
			t.Errorf("%s: %t, %+v", c.name, ok, s)
		}
		if ok && !accepts(t, c.of, c.is) {
			t.Errorf("%s: the socket's filter keeps it away", c.name)
		}
	}
	if s, _ := sight(needFrag, icmp); s.MTU != 1400 || s.From.String() != n2 {
		t.Errorf("%+v", s)
	}
	if accepts(t, icmp, around(packet.ProtocolUDP, a, b, make([]byte, 40)...)) {
		t.Error("the filter lets everything through")
	}
}

// accepts runs a probe's filter as the kernel would.
func accepts(t testing.TB, of, b packet.IPv4) bool {
	t.Helper()
	filter, err := probeFilter(of)
	if err != nil {
		t.Fatal(err)
	}
	raw := make([]bpf.RawInstruction, 0, len(filter))
	for _, f := range filter {
		raw = append(raw, bpf.RawInstruction{Op: f.Code, Jt: f.Jt, Jf: f.Jf, K: f.K})
	}
	program, whole := bpf.Disassemble(raw)
	if !whole {
		t.Fatal("the filter has instructions that are none")
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	n, err := vm.Run(b)
	return err == nil && n > 0
}

// FuzzSight: whatever passes an interface while a probe is watched for.
func FuzzSight(f *testing.F) {
	p := probeOf(1, "10.0.0.1", "10.0.0.2")
	f.Add([]byte(p), []byte(p))
	f.Add([]byte(around(packet.ProtocolIPIP, "192.0.2.1", "192.0.2.2", p...)), []byte(probeOf(packet.ProtocolTCP, "10.0.0.1", "10.0.0.2")))
	f.Add([]byte(around(1, "192.0.2.1", "192.0.2.2", append([]byte{3, 4, 0, 0, 0, 0, 5, 78}, p...)...)), []byte(p))
	f.Fuzz(func(t *testing.T, b, of []byte) {
		q, err := probePacket(of)
		if err != nil {
			return
		}
		if _, err := probeFilter(q); err != nil {
			t.Fatal(err)
		}
		if s, ok := sight(b, q); ok && s.What == "" {
			t.Errorf("a sighting of nothing: %+v", s)
		}
	})
}

// FuzzDiagnostics: what the network may ask of an agent. One that is still starting answers everything with an error, and
// everything that is decoded before is.
func FuzzDiagnostics(f *testing.F) {
	f.Add("POST", api.TracePath, []byte(`{"entry":"pod","packet":"RQAAHA==","state":"established"}`))
	f.Add("POST", api.ProbePath, []byte(`{"packet":"RQAAHA==","watch":true,"inside":["10.0.0.1"]}`))
	f.Add("POST", api.ProbePath, []byte(`{"packet":"RQAAPBJnAABAAQAACgAAAQoAAAI=","entry":"host"}`))
	f.Add("GET", api.DropsPath+"?since=18446744073709551615", []byte{})
	f.Add("GET", api.CapturePath+"?outer=true&snaplen=-1&filter=tcp", []byte{})
	f.Add("GET", api.CapturePath+"?outer=x&snaplen=9999999999999999999", []byte{})
	f.Fuzz(func(t *testing.T, method, target string, body []byte) {
		u, err := http.NewRequest(method, "http://agent"+target, bytes.NewReader(body))
		if err != nil || !strings.HasPrefix(target, "/v1/") || u.URL.Path == api.StatusPath {
			return
		}
		a := &Agent{log: slog.New(slog.NewTextHandler(io.Discard, nil))}
		mux := http.NewServeMux()
		a.handleDiagnostics(mux)
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, u)
		drops := u.URL.Path == api.DropsPath // says that it is starting, in its answer
		if w.Code < 300 && !drops {
			t.Errorf("%s %s: %d: an agent that is still starting has answered", method, target, w.Code)
		}
		if w.Body.Len() == 0 && w.Code >= 400 && method != http.MethodHead {
			t.Errorf("%s %s: %d without a word", method, target, w.Code)
		}
	})
}
