package cluster

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"margay/vrouter/packet"
)

// Real packets of any kind, from and to the network namespaces of a lab, for who has to know whether one arrives and is answered.
// The kernel makes their IP headers and cuts what is too long, as for a program's; raw sockets see what has passed everything up to
// the transport layer.

// sent is what kind of packet is sent, and from where to where.
type sent struct {
	from, to string // network namespaces; no to: nobody looks whether it arrives
	src, dst netip.Addr
	protocol byte
	size     int // of the whole IP packet, bytes
	df       bool
	ttl, tos int
}

// args are the same for margayctl trace.
func (s sent) args(from, to string) []string {
	args := []string{from, to, "--proto", strconv.Itoa(int(s.protocol)), "--size", strconv.Itoa(s.size), "--ttl", strconv.Itoa(s.ttl), "--tos", strconv.Itoa(s.tos),
		"--sport", "9", "--dport", strconv.Itoa(int(s.port()))}
	if s.df {
		args = append(args, "--df")
	}
	return args
}

// The UDP ports at which every namespace echoes what comes: with DF, and without.
const (
	echoDF    = 7001
	echoPlain = 7002
	protoTest = 253 // RFC 3692: for experiments

	ourSequence = 0x4d47 // of ICMP echoes: ping's and a trace's begin at 0 and 1
)

func (s sent) port() uint16 {
	if s.df {
		return echoDF
	}
	return echoPlain
}

// ear hears what is delivered in one namespace.
type ear struct {
	mu    sync.Mutex
	heard map[heard]bool
}

// heard is a packet that was sent with a number, or the answer to it.
type heard struct {
	protocol byte
	number   uint16
	answer   bool
}

func (e *ear) has(h heard) bool {
	if e == nil {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.heard[h]
}

// ears are those of all namespaces that packets are sent from or to.
type ears struct {
	in   map[string]*ear
	last atomic.Uint32 // the number of the last packet
}

// listenIn puts ears into namespaces until the test ends.
func listenIn(t *testing.T, namespaces ...string) *ears {
	t.Helper()
	all := &ears{in: map[string]*ear{}}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { close(stop) })
	for _, ns := range namespaces {
		e := &ear{heard: map[heard]bool{}}
		all.in[ns] = e
		inNetns(t, ns, func() error {
			for _, protocol := range []int{unix.IPPROTO_ICMP, unix.IPPROTO_TCP, unix.IPPROTO_UDP, protoTest} {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
				if err == nil {
					err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000})
				}
				if err != nil {
					return err
				}
				wg.Go(func() { e.listen(fd, stop) })
			}
			for port, mode := range map[uint16]int{echoDF: unix.IP_PMTUDISC_DO, echoPlain: unix.IP_PMTUDISC_DONT} {
				lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
					ctlErr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, mode) })
					return errors.Join(ctlErr, err)
				}}
				c, err := lc.ListenPacket(t.Context(), "udp4", fmt.Sprintf("0.0.0.0:%d", port))
				if err != nil {
					return err
				}
				t.Cleanup(func() { _ = c.Close() })
				wg.Go(func() { echoes(c) })
			}
			return nil
		})
	}
	return all
}

// echoes answers each datagram by itself until the socket is closed.
func echoes(c net.PacketConn) {
	for b := make([]byte, packet.MaxTotalLen); ; {
		n, from, err := c.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil { // else an ICMP error about an answer
			_, _ = c.WriteTo(b[:n], from) // what the kernel refuses does not come back, which is what is looked at
		}
	}
}

func (e *ear) listen(fd int, stop <-chan struct{}) {
	defer unix.Close(fd)
	for b := make([]byte, packet.MaxTotalLen); ; {
		select {
		case <-stop:
			return
		default:
		}
		n, _, err := unix.Recvfrom(fd, b, 0)
		if err != nil {
			continue // nothing came
		}
		p, fault := packet.ParseIPv4(b[:n])
		if fault != packet.FaultNone || len(p.Payload()) < 8 {
			continue
		}
		h, up := heard{protocol: p.Protocol()}, p.Payload()
		source, destination := binary.BigEndian.Uint16(up), binary.BigEndian.Uint16(up[2:])
		const ack = 0x10
		switch {
		case h.protocol == unix.IPPROTO_ICMP && (up[0] == packet.ICMPEcho || up[0] == packet.ICMPEchoReply) && binary.BigEndian.Uint16(up[6:]) == ourSequence:
			h.number, h.answer = binary.BigEndian.Uint16(up[4:]), up[0] == packet.ICMPEchoReply
		case h.protocol == unix.IPPROTO_TCP && len(up) >= 20:
			if h.number, h.answer = source, up[13]&ack != 0; h.answer {
				h.number = destination
			}
		case h.protocol == unix.IPPROTO_UDP:
			if h.number, h.answer = source, source == echoDF || source == echoPlain; h.answer {
				h.number = destination
			}
		case h.protocol == protoTest:
			h.number = source
		default:
			continue
		}
		e.mu.Lock()
		e.heard[h] = true
		e.mu.Unlock()
	}
}

// send sends one packet, waits until it has arrived (with answered: and been answered), at most for limit, and says what has been
// heard. What the sender's kernel refuses to send does not arrive.
func (e *ears) send(t *testing.T, s sent, answered bool, limit time.Duration) (arrived, answer bool) {
	t.Helper()
	const first = 10_000 // below are ports that others use
	number := uint16(first + e.last.Add(1)%(1<<15))
	inNetns(t, s.from, func() error { return s.write(number) })
	there, back := heard{s.protocol, number, false}, heard{s.protocol, number, true}
	for end := time.Now().Add(limit); ; time.Sleep(2 * time.Millisecond) {
		arrived, answer = e.in[s.to].has(there), e.in[s.from].has(back)
		if answer || arrived && !answered || time.Now().After(end) {
			return arrived || answer, answer
		}
	}
}

// write is the sending itself, in the namespace.
func (s sent) write(number uint16) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(s.protocol))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	mode := unix.IP_PMTUDISC_DONT
	if s.df {
		mode = unix.IP_PMTUDISC_DO
	}
	for option, value := range map[int]int{unix.IP_TTL: s.ttl, unix.IP_TOS: s.tos, unix.IP_MTU_DISCOVER: mode} {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, option, value); err != nil {
			return err
		}
	}
	b := make([]byte, s.size-packet.IPv4MinLen)
	sumAt := -1
	switch s.protocol {
	case unix.IPPROTO_ICMP:
		b[0] = packet.ICMPEcho
		binary.BigEndian.PutUint16(b[4:], number)
		binary.BigEndian.PutUint16(b[6:], ourSequence)
		binary.BigEndian.PutUint16(b[2:], packet.Checksum(b, 0))
	case unix.IPPROTO_TCP:
		b[12], b[13] = 5<<4, 0x02 // SYN
		sumAt = 16
	case unix.IPPROTO_UDP:
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
		sumAt = 6
	default:
		binary.BigEndian.PutUint16(b, number)
	}
	if sumAt > 0 {
		binary.BigEndian.PutUint16(b, number)
		binary.BigEndian.PutUint16(b[2:], s.port())
		pseudo := make([]byte, packet.IPv4MinLen)
		pseudo[0], pseudo[9] = 0x45, s.protocol
		copy(pseudo[12:], s.src.AsSlice())
		copy(pseudo[16:], s.dst.AsSlice())
		binary.BigEndian.PutUint16(b[sumAt:], packet.Checksum(b, packet.PseudoSum(packet.IPv4(pseudo), len(b))))
	}
	_ = unix.Sendto(fd, b, 0, &unix.SockaddrInet4{Addr: s.dst.As4()}) // refused: it does not arrive
	return nil
}
