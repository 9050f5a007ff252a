package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"margay/test/space"
	"margay/vrouter/packet"
)

var (
	asker    = netip.MustParseAddr("127.0.0.1")
	asked    = netip.MustParseAddr("127.0.0.2")
	stranger = netip.MustParseAddr("127.0.0.3")
	other    = netip.MustParseAddr("127.0.0.4")
)

// request is an echo as it has come to who is asked.
type request struct {
	to      netip.Addr
	id, seq uint16
	length  int // of the IP packet, bytes
	df      bool
}

// answerer is everybody on a loopback device whose kernel answers no echo: told of each request, in turn, it may answer.
type answerer struct {
	t  *testing.T
	fd int
}

// answer sends an ICMP message to the asker, from somebody.
func (a *answerer) answer(from netip.Addr, kind byte, id, seq uint16) {
	b := make([]byte, packet.ICMPHeaderLen)
	b[0] = kind
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], seq)
	binary.BigEndian.PutUint16(b[2:], packet.Checksum(b, 0))
	ip := make([]byte, packet.IPv4MinLen, packet.IPv4MinLen+len(b))
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_ICMP
	copy(ip[12:], from.AsSlice())
	copy(ip[16:], asker.AsSlice())
	if err := unix.Sendto(a.fd, append(ip, b...), 0, &unix.SockaddrInet4{Addr: asker.As4()}); err != nil { // the kernel writes length and checksum
		a.t.Error(err)
	}
}

// listen calls got with each request until the socket is closed for reading.
func (a *answerer) listen(stop context.Context, got func(*answerer, request)) {
	for b := make([]byte, packet.MaxTotalLen); stop.Err() == nil; {
		n, _, err := unix.Recvfrom(a.fd, b, 0)
		if err != nil {
			continue // nothing came
		}
		p, fault := packet.ParseIPv4(b[:n])
		if up := p.Payload(); fault == packet.FaultNone && up[0] == packet.ICMPEcho {
			got(a, request{p.Dst(), binary.BigEndian.Uint16(up[4:]), binary.BigEndian.Uint16(up[6:]), p.TotalLen(), p.DF()})
		}
	}
}

// asking asks in a namespace of its own, where got answers.
func asking(t *testing.T, ctx context.Context, p patience, got func(*answerer, request), echoes ...echo) (r []echoResult, err error) {
	t.Helper()
	s := space.New(t)
	s.Do(t, func() error {
		if err := os.WriteFile("/proc/sys/net/ipv4/icmp_echo_ignore_all", []byte("1"), 0); err != nil {
			return err
		}
		a := &answerer{t: t}
		var openErr error
		if a.fd, openErr = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP); openErr != nil {
			return openErr
		}
		defer unix.Close(a.fd)
		if err := errors.Join(unix.SetsockoptInt(a.fd, unix.IPPROTO_IP, unix.IP_HDRINCL, 1),
			unix.SetsockoptTimeval(a.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20_000})); err != nil {
			return err
		}
		over, stop := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); a.listen(over, got) }()
		r, err = ask(ctx, p, echoes...)
		stop()
		<-done
		return nil
	})
	return r, err
}

// TestAsk: what counts as an answer, and when who asks has heard enough.
func TestAsk(t *testing.T) {
	whole := echo{from: asker, to: asked, size: 1400, df: true, enough: true}
	short := echo{from: asker, to: asked, size: shortEcho}
	plain := echo{from: asker, to: other, size: shortEcho}
	reply := func(a *answerer, r request) { a.answer(r.to, packet.ICMPEchoReply, r.id, r.seq) }
	for name, c := range map[string]struct {
		got      func(*answerer, request)
		echoes   []echo
		answered []bool
		late     bool // the answer to the first is one to the first try, after the second
	}{
		"an answer": {got: reply, answered: []bool{true}},
		"silence":   {got: func(*answerer, request) {}, answered: []bool{false}},
		"another's identifier": {got: func(a *answerer, r request) {
			a.answer(r.to, packet.ICMPEchoReply, r.id+100, r.seq)
		}, answered: []bool{false}},
		"a stranger's answer": {got: func(a *answerer, r request) {
			a.answer(stranger, packet.ICMPEchoReply, r.id, r.seq)
		}, answered: []bool{false}},
		"no answer, but a question": {got: func(a *answerer, r request) {
			if r.to == asked {
				a.answer(r.to, packet.ICMPUnreachable, r.id, r.seq)
			}
		}, answered: []bool{false}},
		"an answer to what has not been asked yet": {got: func(a *answerer, r request) {
			a.answer(r.to, packet.ICMPEchoReply, r.id, r.seq+1)
		}, answered: []bool{false}},
		"a late answer": {got: func(a *answerer, r request) {
			if r.seq == 1 {
				a.answer(r.to, packet.ICMPEchoReply, r.id, 0)
			}
		}, answered: []bool{true}, late: true},
		"only the others answer": {got: func(a *answerer, r request) {
			if r.length == shortEcho {
				reply(a, r)
			}
		}, echoes: []echo{whole, short, plain}, answered: []bool{false, true, true}},
		"the last one's answer is enough": {got: func(a *answerer, r request) {
			if r.to == other && r.seq == 1 {
				reply(a, r)
			}
		}, echoes: []echo{whole, short, {from: asker, to: other, size: 1400, enough: true}}, answered: []bool{false, false, true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if c.echoes == nil {
				c.echoes = []echo{whole}
			}
			p := echoPatience
			if !slices.Contains(c.answered, true) { // a busy machine has nothing to be late with
				p = patience{each: 50 * time.Millisecond, last: 150 * time.Millisecond}
			}
			var first request
			began := time.Now()
			r, err := asking(t, t.Context(), p, func(a *answerer, r request) {
				if first.length == 0 {
					first = r
				}
				c.got(a, r)
			}, c.echoes...)
			if err != nil || len(r) != len(c.answered) {
				t.Fatalf("%v, %v", r, err)
			}
			enough := false
			for i, want := range c.answered {
				if r[i].answered != want || r[i].err != nil {
					t.Errorf("echo %d: %+v: expected answered: %v", i, r[i], want)
				}
				enough = enough || want && c.echoes[i].enough
			}
			if c.late && r[0].after < p.each {
				t.Errorf("answered after %s: expected at least %s", r[0].after, p.each)
			}
			if took := time.Since(began); !enough && took < (echoTries-1)*p.each+p.last {
				t.Errorf("gave up after %s", took)
			}
			if first.to != asked || first.length != 1400 || !first.df || first.seq != 0 {
				t.Errorf("the first request was %+v", first)
			}
		})
	}
	t.Run("who asks has gone", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithCancel(t.Context())
		if _, err := asking(t, ctx, echoPatience, func(*answerer, request) { cancel() }, whole); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
	})
	t.Run("an address that is not there", func(t *testing.T) {
		t.Parallel()
		if _, err := asking(t, t.Context(), echoPatience, reply, echo{from: netip.MustParseAddr("192.0.2.1"), to: asked, size: shortEcho}); err == nil {
			t.Error("no error")
		}
	})
}
