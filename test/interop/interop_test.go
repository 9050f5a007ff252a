//go:build interop

package interop

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"margay/test/node"
	"margay/test/space"
	"margay/vrouter"
	"margay/vrouter/port"
)

// The node is our side, the peer the machine with the real tunl0. The guest knows the addresses too.
var (
	nodeAddress = netip.MustParseAddr("198.18.0.1")
	peerAddress = netip.MustParseAddr("198.18.0.2")
	pod         = netip.MustParseAddr("10.244.1.5")
	fragPod     = netip.MustParseAddr("10.244.1.7") // the peer fragments the outer packets that it sends here
	peerPod     = netip.MustParseAddr("10.244.2.5")
)

// side is ours: a node with two pods.
type side struct {
	*node.Node
	pods map[netip.Addr]*space.Space
	wire *wire
}

func newSide(t *testing.T, dir string, driver port.Options) *side {
	t.Helper()
	s := space.New(t)
	n := &side{pods: map[netip.Addr]*space.Space{}}
	s.Do(t, space.BeRouter)
	s.Do(t, func() (err error) {
		n.wire, err = newWire(t, dir)
		return err
	})
	pfx := netip.MustParsePrefix
	n.Node = node.Start(t, s, node.Config{
		Driver:  driver,
		Options: vrouter.Options{ICMPRate: vrouter.DefaultICMPRate},
		Update: vrouter.Update{
			Config:   &vrouter.Config{NodeAddress: nodeAddress, Underlay: "eth0", MTU: 1480},
			AddNodes: []netip.Addr{peerAddress},
			Set: []vrouter.Route{
				{Prefix: pfx("10.244.1.0/26"), NextHop: vrouter.NextHop{Kind: vrouter.KindLocal}},
				{Prefix: pfx("10.244.2.0/26"), NextHop: vrouter.NextHop{Kind: vrouter.KindTunnel, Gateway: peerAddress}},
			},
		},
		Routes: func() error { return space.Route("10.244.2.0/26", "vr0") },
	})
	for _, a := range []netip.Addr{pod, fragPod} {
		n.pods[a] = n.AddPod(t, node.Pod{Address: a, MTU: 1480})
	}
	return n
}

// dialUDP returns a socket of one of our pods to the echo on the machine, which reports the type of service of what
// comes.
func (n *side) dialUDP(t *testing.T, from netip.Addr) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	n.pods[from].Do(t, func() (err error) {
		conn, err = net.DialUDP("udp4", &net.UDPAddr{IP: from.AsSlice()}, &net.UDPAddr{IP: peerPod.AsSlice(), Port: 7})
		if err == nil {
			err = setsockopt(conn, unix.IP_RECVTOS, 1)
		}
		return err
	})
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func setsockopt(conn *net.UDPConn, option, value int) (err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, option, value) })
	return errors.Join(controlErr, err)
}

// echo sends one datagram and returns the type of service with which it came to the machine, and that of the answer. It waits
// for as long as a machine without KVM may take.
func echo(conn *net.UDPConn, size int) (there, back byte, err error) {
	return echoIn(conn, size, 60*time.Second)
}

// moment is for an answer that is to be asked for again, or must not come.
const moment = 5 * time.Second

// echoIn is echo with a limit.
func echoIn(conn *net.UDPConn, size int, limit time.Duration) (there, back byte, err error) {
	want := make([]byte, size)
	if _, err := rand.Read(want); err != nil {
		return 0, 0, err
	}
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return 0, 0, err
	}
	if _, err := conn.Write(want); err != nil {
		return 0, 0, err
	}
	b, oob := make([]byte, 65536), make([]byte, 64)
	for {
		got, m, _, _, err := conn.ReadMsgUDP(b, oob)
		if err != nil {
			return 0, 0, err
		}
		if got == 0 || !bytes.Equal(b[1:got], want) {
			continue // the answer to an earlier one
		}
		messages, err := unix.ParseSocketControlMessage(oob[:m])
		if err != nil || len(messages) != 1 || len(messages[0].Data) == 0 {
			return 0, 0, fmt.Errorf("control messages %v: %w", messages, err)
		}
		return b[0], messages[0].Data[0], nil
	}
}

// TestKernel runs the same against each driver; the machine is started for each.
func TestKernel(t *testing.T) {
	node.OnEach(t, node.Drivers, withKernel)
}

func withKernel(t *testing.T, driver port.Options) {
	dir, err := os.MkdirTemp("", "margay-interop") // a short name: it holds unix sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	n := newSide(t, dir, driver)
	startMachine(t, dir)
	conn := n.dialUDP(t, pod)
	for deadline := time.Now().Add(60 * time.Second); ; {
		if _, _, err := echoIn(conn, 1, moment); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the machine does not answer: %v; %v", err, n.Counters())
		}
	}
	n.UntilCarried(t, func() {
		if _, _, err := echo(conn, 1); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("ping", func(t *testing.T) { ping(t, n) })
	t.Run("UDP of every size", func(t *testing.T) { everySize(t, n, conn) })
	t.Run("TCP", func(t *testing.T) { bulk(t, n) })
	t.Run("ECN and DSCP", func(t *testing.T) { marks(t, n, conn) })
	t.Run("fragments of the outer packet", func(t *testing.T) { outerFragments(t, n) })
	t.Run("decoded", func(t *testing.T) { decoded(t, n) })
	for name, packets := range n.Counters() {
		if strings.HasPrefix(name, "drop_") && name != "drop_ecn_illegal" {
			t.Errorf("%s: %d", name, packets)
		}
	}
	n.NoLosses(t)
}

func ping(t *testing.T, n *side) {
	n.pods[pod].Do(t, func() error {
		for _, size := range []string{"0", "56", "1452", "1453", "8000"} {
			out, err := exec.Command("ping", "-n", "-c", "3", "-i", "0.05", "-W", "20", "-M", "dont", "-s", size, peerPod.String()).CombinedOutput()
			if err != nil || !strings.Contains(string(out), " 0% packet loss") {
				t.Errorf("%s bytes: %v\n%s", size, err, out)
			}
		}
		return nil
	})
}

// everySize goes by single bytes about the boundaries: one packet, the tunnel's MTU, two fragments.
func everySize(t *testing.T, n *side, conn *net.UDPConn) {
	if err := setsockopt(conn, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT); err != nil {
		t.Fatal(err)
	}
	sizes := []int{1, 2, 18, 512, 8000, 20000}
	for _, about := range []int{1452, 1452 + 1456, 1472} {
		for size := about - 12; size <= about+12; size++ {
			sizes = append(sizes, size)
		}
	}
	for _, size := range sizes {
		if _, _, err := echo(conn, size); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	// With DF the tunnel's MTU is the limit, and the node's kernel says so.
	if err := setsockopt(conn, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO); err != nil {
		t.Fatal(err)
	}
	for size := 1440; size <= 1464; size++ {
		_, _, err := echo(conn, size)
		if size <= 1451 && err != nil || size > 1452 && !errors.Is(err, unix.EMSGSIZE) { // the answer is a byte longer
			t.Errorf("%d bytes, DF: %v", size, err)
		}
	}
}

// bulk sends TCP there and back and compares it.
func bulk(t *testing.T, n *side) {
	want := make([]byte, 8<<20)
	if _, err := rand.Read(want); err != nil {
		t.Fatal(err)
	}
	var conn *net.TCPConn
	n.pods[pod].Do(t, func() (err error) {
		conn, err = net.DialTCP("tcp4", &net.TCPAddr{IP: pod.AsSlice()}, &net.TCPAddr{IP: peerPod.AsSlice(), Port: 7})
		return err
	})
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(want)
		sent <- errors.Join(err, conn.CloseWrite())
	}()
	began := time.Now()
	got, err := io.ReadAll(conn)
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes came back, not the %d that were sent", len(got), len(want))
	}
	t.Logf("%d MiB there and back in %v", len(want)>>20, time.Since(began).Round(time.Millisecond))
}

// marks sends with every ECN codepoint, and lets the wire mark congestion on the outer header, one way and the other:
// RFC 6040, figure 4.
func marks(t *testing.T, n *side, conn *net.UDPConn) {
	defer n.wire.bent(nil)
	if err := setsockopt(conn, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT); err != nil {
		t.Fatal(err)
	}
	for _, tos := range []byte{0, 1, 2, 3, 0xb8, 0xb9, 0xba, 0xbb} {
		if err := setsockopt(conn, unix.IP_TOS, int(tos)); err != nil {
			t.Fatal(err)
		}
		n.wire.bent(nil)
		if there, back, err := echo(conn, 100); err != nil || there != tos || back != tos {
			t.Errorf("type of service %#x: came as %#x, answered with %#x, %v", tos, there, back, err)
		}
		if tos&3 == 0 {
			continue // not ECN-capable: nobody marks it
		}
		for _, toMachine := range []bool{true, false} {
			n.wire.bent(func(to bool, frame []byte) bool {
				if to == toMachine {
					markCE(frame)
				}
				return true
			})
			there, back, err := echo(conn, 100)
			wantThere, wantBack := tos, tos|3
			if toMachine {
				wantThere = tos | 3 // and so it answers
			}
			if err != nil || there != wantThere || back != wantBack {
				t.Errorf("type of service %#x, marked toward the machine: %v: came as %#x, answered with %#x, %v", tos, toMachine, there, back, err)
			}
		}
	}
	// A mark on what is not ECN-capable is to be dropped, by us as by the kernel.
	if err := setsockopt(conn, unix.IP_TOS, 0); err != nil {
		t.Fatal(err)
	}
	before := n.Counters()["drop_ecn_illegal"]
	n.wire.bent(func(to bool, frame []byte) bool {
		if !to {
			markCE(frame)
		}
		return true
	})
	if _, _, err := echoIn(conn, 100, moment); !errors.Is(err, os.ErrDeadlineExceeded) || n.Counters()["drop_ecn_illegal"] != before+1 {
		t.Errorf("a mark on what is not ECN-capable: %v, counted %d", err, n.Counters()["drop_ecn_illegal"]-before)
	}
}

// markCE marks congestion on the header of an IP-in-IP packet in a frame.
func markCE(frame []byte) {
	if len(frame) < 34 || frame[12] != 8 || frame[13] != 0 || frame[23] != 4 {
		return
	}
	ip := frame[14:34]
	ip[1] |= 3
	ip[10], ip[11] = 0, 0
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
}

// outerFragments: the machine's other tunnel cuts the outer packets to pieces, which the node's kernel puts together
// again for us.
func outerFragments(t *testing.T, n *side) {
	conn := n.dialUDP(t, fragPod)
	if err := setsockopt(conn, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{100, 1451, 1452, 2000, 4000, 8000} {
		if _, _, err := echo(conn, size); err != nil {
			t.Errorf("%d bytes: %v; %v", size, err, n.Counters())
		}
	}
}

// decoded has tshark look at everything that went over the wire.
func decoded(t *testing.T, n *side) {
	file := filepath.Join(t.TempDir(), "wire.pcap")
	n.wire.mu.Lock()
	err := os.WriteFile(file, n.wire.pcap.Bytes(), 0o644)
	n.wire.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	count := func(filter string) (int, string) {
		out, err := exec.Command("tshark", "-n", "-r", file, "-o", "ip.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE",
			"-Y", filter).Output()
		if err != nil {
			t.Fatalf("tshark %s: %v", filter, err)
		}
		return bytes.Count(out, []byte("\n")), string(out[:min(len(out), 2000)])
	}
	if all, _ := count("ip.proto == 4"); all < 1000 {
		t.Errorf("only %d IP-in-IP packets", all)
	} else {
		t.Logf("%d IP-in-IP packets", all)
	}
	// A TCP checksum of 0xffff for 0x0000, which is as good (RFC 1624, 3), is how Linux finishes one packet in 65,536.
	if bad, lines := count("(_ws.malformed || ip.checksum.status == 0 || tcp.checksum.status == 0 || udp.checksum.status == 0 || icmp.checksum.status == 0 || _ws.expert.severity == error) && !tcp.checksum.ffff"); bad > 0 {
		t.Errorf("tshark complains about %d:\n%s", bad, lines)
	}
}
