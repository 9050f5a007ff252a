package cluster

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// seen is one IPv4 packet on a wire; Inner* are set for protocol 4.
type seen struct {
	proto              byte
	src, dst           netip.Addr
	innerSrc, innerDst netip.Addr
	outgoing           bool
}

// tap records the IPv4 packets of one interface, in both directions.
type tap struct {
	mu      sync.Mutex
	packets []seen
	far     bool // at the other end of the wire: what arrives there is outgoing here
	stop    chan struct{}
	done    chan struct{}
}

// onWire records what the i-th node sends and receives on the underlay, at the bridge's end of its wire: no tap on the
// node's own end sees what AF_XDP sends and receives.
func onWire(t *testing.T, i int) *tap {
	t.Helper()
	return startTap(t, labName+"-underlay", fmt.Sprintf("n%d", i), &tap{far: true})
}

// tapOn records the packets of an interface in a namespace.
func tapOn(t *testing.T, ns, ifname string) *tap {
	t.Helper()
	return startTap(t, ns, ifname, &tap{})
}

func startTap(t *testing.T, ns, ifname string, p *tap) *tap {
	t.Helper()
	p.stop, p.done = make(chan struct{}), make(chan struct{})
	var fd int
	inNetns(t, ns, func() (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
			return err
		}
		index, err := ifindex(fd, ifname)
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: everything, Ifindex: index})
	})
	go p.read(fd)
	t.Cleanup(func() { p.close() })
	return p
}

// In network byte order. A packet socket that is bound to one protocol does not see what leaves.
const (
	everything = uint16(unix.ETH_P_ALL) << 8
	onlyIPv4   = uint16(unix.ETH_P_IP) >> 8
)

func ifindex(fd int, name string) (int, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
		return 0, err
	}
	return int(req.Uint32()), nil
}

func (p *tap) read(fd int) {
	defer close(p.done)
	defer unix.Close(fd)
	buf := make([]byte, 65536)
	for {
		patience := 50 // milliseconds
		select {
		case <-p.stop:
			patience = 0 // what is in the queue was on the wire
		default:
		}
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, patience)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n == 0 && patience == 0 {
			return
		}
		if n == 0 {
			continue
		}
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if !ok || ll.Protocol != onlyIPv4 || n < 20 {
			continue
		}
		s := seen{proto: buf[9], src: addr4(buf[12:]), dst: addr4(buf[16:]), outgoing: (ll.Pkttype == unix.PACKET_OUTGOING) != p.far}
		if s.proto == unix.IPPROTO_IPIP && n >= 40 {
			s.innerSrc, s.innerDst = addr4(buf[32:]), addr4(buf[36:])
		}
		p.mu.Lock()
		p.packets = append(p.packets, s)
		p.mu.Unlock()
	}
}

func addr4(b []byte) netip.Addr { return netip.AddrFrom4([4]byte(b[:4])) }

// close ends the capture; what was on the wire until now is in it.
func (p *tap) close() {
	select {
	case <-p.stop:
	default:
		close(p.stop)
	}
	<-p.done
}

// all stops the capture and returns what was seen.
func (p *tap) all() []seen {
	p.close()
	return p.packets
}

// count returns how many packets so far satisfy f.
func (p *tap) count(f func(seen) bool) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, s := range p.packets {
		if f(s) {
			n++
		}
	}
	return n
}

// stream sends numbered datagrams at a rate from one namespace to another and finds the gaps.
type stream struct {
	sent, received map[uint32]time.Time
	mu             sync.Mutex
	stop, done     chan struct{}
	closing, idle  chan struct{}
	rx             int
}

// startStream sends a datagram every interval from one pod to another until finish is called.
func startStream(t *testing.T, from, to labPod, interval time.Duration) *stream {
	t.Helper()
	s := &stream{sent: map[uint32]time.Time{}, received: map[uint32]time.Time{}, stop: make(chan struct{}), done: make(chan struct{}),
		closing: make(chan struct{}), idle: make(chan struct{})}
	dst := ip(t, to.Address)
	var tx int
	inNetns(t, to.Netns, func() (err error) { s.rx, err = udpSocket(); return err })
	inNetns(t, from.Netns, func() (err error) { tx, err = udpSocket(); return err })
	bound, err := unix.Getsockname(s.rx)
	if err != nil {
		t.Fatal(err)
	}
	target := &unix.SockaddrInet4{Port: bound.(*unix.SockaddrInet4).Port, Addr: dst.As4()}
	go s.receive()
	go s.send(tx, target, interval)
	return s
}

func udpSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err != nil {
		return 0, err
	}
	return fd, unix.Bind(fd, &unix.SockaddrInet4{})
}

// burst is how many datagrams a stream sends at once after a pause that was not its own.
const burst = 64

func (s *stream) send(fd int, to unix.Sockaddr, interval time.Duration) {
	defer close(s.done)
	defer unix.Close(fd)
	var b [64]byte
	next := time.Now()
	for n := uint32(0); ; {
		select {
		case <-s.stop:
			return
		case <-time.After(time.Until(next)):
		}
		// Catching up keeps the rate when the machine was busy, but in bursts that every queue on the way can hold.
		if oldest := time.Now().Add(-burst * interval); next.Before(oldest) {
			next = oldest
		}
		for ; !next.After(time.Now()); next = next.Add(interval) {
			binary.BigEndian.PutUint32(b[:], n)
			s.mu.Lock()
			s.sent[n] = time.Now()
			s.mu.Unlock()
			n++
			_ = unix.Sendto(fd, b[:], 0, to) // a refusal shows as a gap
		}
	}
}

func (s *stream) receive() {
	defer close(s.idle)
	defer unix.Close(s.rx)
	var b [64]byte
	for {
		select {
		case <-s.closing:
			return
		default:
		}
		fds := []unix.PollFd{{Fd: int32(s.rx), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, 100); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		n, _, err := unix.Recvfrom(s.rx, b[:], unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n < 4 {
			return
		}
		s.mu.Lock()
		s.received[binary.BigEndian.Uint32(b[:])] = time.Now()
		s.mu.Unlock()
	}
}

// missing returns what was sent before the moment given and has not arrived.
func (s *stream) missing(before time.Time) (lost []time.Time, total int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n, at := range s.sent {
		if at.After(before) {
			continue
		}
		total++
		if _, ok := s.received[n]; !ok {
			lost = append(lost, at)
		}
	}
	return lost, total
}

// firstAfter returns when the first datagram after the moment given arrived; the zero time if none has.
func (s *stream) firstAfter(moment time.Time) (first time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, at := range s.received {
		if at.After(moment) && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// finish stops sending, waits for what is under way and returns the losses.
func (s *stream) finish(t *testing.T) (lost []time.Time, total int) {
	t.Helper()
	close(s.stop)
	<-s.done
	deadline := time.Now().Add(10 * time.Second)
	for {
		if lost, total = s.missing(time.Now()); len(lost) == 0 || time.Now().After(deadline) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	close(s.closing)
	<-s.idle
	return lost, total
}
