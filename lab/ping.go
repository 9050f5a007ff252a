package lab

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	icmpEchoReply   = 0  // RFC 792
	icmpEchoRequest = 8  // RFC 792
	icmpFilter      = 1  // ICMP_FILTER of linux/icmp.h, at level SOL_RAW
	pingInFlight    = 32 // echo requests sent before answers are read
	pingers         = 16 // namespaces probed at the same time
	pingPatience    = 250 * time.Millisecond
)

// endpoint is one end of the reachability check: a pod's namespace and address.
type endpoint struct {
	name string
	addr netip.Addr
}

// unreachable is a pair that did not get through.
type unreachable struct{ from, to endpoint }

func (u unreachable) String() string {
	return fmt.Sprintf("%s (%s) does not reach %s (%s)", u.from.name, u.from.addr, u.to.name, u.to.addr)
}

// reachAll sends an echo request from every endpoint to every other, again and again until each was answered or ctx is
// over. It returns the pairs without an answer.
func reachAll(ctx context.Context, all []endpoint) ([]unreachable, error) {
	var (
		mu   sync.Mutex
		lost []unreachable
	)
	// An end of ctx is no error: whoever was not asked by then counts as lost.
	err := inParallel(context.WithoutCancel(ctx), pingers, all, func(_ context.Context, from endpoint) error {
		missing, err := reachFrom(ctx, from, all)
		mu.Lock()
		defer mu.Unlock()
		for _, to := range missing {
			lost = append(lost, unreachable{from, to})
		}
		return err
	})
	slices.SortFunc(lost, func(a, b unreachable) int {
		return cmp.Or(a.from.addr.Compare(b.from.addr), a.to.addr.Compare(b.to.addr))
	})
	return lost, err
}

// reachFrom probes from one namespace, and returns who did not answer.
func reachFrom(ctx context.Context, from endpoint, all []endpoint) ([]endpoint, error) {
	var conn net.PacketConn
	err := within(netnsPath(from.name), func() (err error) {
		conn, err = net.ListenPacket("ip4:icmp", "0.0.0.0")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from.name, err)
	}
	defer conn.Close()
	if err := onlyEchoReplies(conn); err != nil {
		return nil, fmt.Errorf("%s: %w", from.name, err)
	}
	left := map[netip.Addr]endpoint{}
	for _, to := range all {
		if to != from {
			left[to.addr] = to
		}
	}
	for seq := uint16(1); len(left) > 0 && ctx.Err() == nil; seq++ {
		if err := probeRound(ctx, conn, left, seq); err != nil {
			return nil, fmt.Errorf("%s: %w", from.name, err)
		}
	}
	missing := make([]endpoint, 0, len(left))
	for _, to := range left {
		missing = append(missing, to)
	}
	return missing, nil
}

// probeRound sends one request to each that is left, a few at a time, and takes out of left who answers.
func probeRound(ctx context.Context, conn net.PacketConn, left map[netip.Addr]endpoint, seq uint16) error {
	targets := make([]netip.Addr, 0, len(left))
	for a := range left {
		targets = append(targets, a)
	}
	for len(targets) > 0 && ctx.Err() == nil {
		batch := targets[:min(pingInFlight, len(targets))]
		targets = targets[len(batch):]
		waiting := map[netip.Addr]bool{}
		for _, a := range batch {
			// An error here is what is being tested (no route yet, say): the next round tries again.
			if _, err := conn.WriteTo(echoRequest(seq), &net.IPAddr{IP: a.AsSlice()}); err == nil {
				waiting[a] = true
			}
		}
		if len(waiting) == 0 {
			pause(ctx, pingPatience)
		}
		if err := collect(conn, left, waiting); err != nil {
			return err
		}
	}
	return nil
}

// collect reads answers until all that are waited for came, or patience is over.
func collect(conn net.PacketConn, left map[netip.Addr]endpoint, waiting map[netip.Addr]bool) error {
	if err := conn.SetReadDeadline(time.Now().Add(pingPatience)); err != nil {
		return err
	}
	var buf [1500]byte
	for len(waiting) > 0 {
		n, peer, err := conn.ReadFrom(buf[:])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
		ip, ok := peer.(*net.IPAddr)
		if !ok || n < 8 || buf[0] != icmpEchoReply || binary.BigEndian.Uint16(buf[4:]) != echoID() {
			continue
		}
		if a, ok := netip.AddrFromSlice(ip.IP.To4()); ok {
			delete(left, a)
			delete(waiting, a)
		}
	}
	return nil
}

func echoID() uint16 { return uint16(os.Getpid()) }

// echoRequest is an ICMP echo request (RFC 792) with our process id as identifier.
func echoRequest(seq uint16) []byte {
	p := make([]byte, 8+len(echoPayload))
	p[0] = icmpEchoRequest
	binary.BigEndian.PutUint16(p[4:], echoID())
	binary.BigEndian.PutUint16(p[6:], seq)
	copy(p[8:], echoPayload)
	var sum uint32
	for i := 0; i < len(p); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(p[2:], ^uint16(sum))
	return p
}

const echoPayload = "margay lab" // of even length, for the checksum

// onlyEchoReplies keeps the requests that others send to us out of the socket's queue.
func onlyEchoReplies(conn net.PacketConn) error {
	raw, err := conn.(*net.IPConn).SyscallConn()
	if err != nil {
		return err
	}
	var opt error
	err = raw.Control(func(fd uintptr) {
		opt = unix.SetsockoptInt(int(fd), unix.SOL_RAW, icmpFilter, ^(1 << icmpEchoReply))
	})
	return errors.Join(err, opt)
}

// describe says in a few lines who does not reach whom.
func describe(lost []unreachable) string {
	const shown = 6
	var b strings.Builder
	for i, u := range lost {
		if i == shown {
			fmt.Fprintf(&b, "\n  and %d more", len(lost)-shown)
			break
		}
		fmt.Fprintf(&b, "\n  %s", u)
	}
	return b.String()
}

// pause waits, unless ctx ends first.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
