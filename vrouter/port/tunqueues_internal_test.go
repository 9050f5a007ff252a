package port

import (
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// TestFlowHashSpreads: flows that differ in the last byte of an address, or in a port, come to every queue, about as many to
// each, and both directions of a flow to the same one.
func TestFlowHashSpreads(t *testing.T) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, License: "GPL", Instructions: flowHash()})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	hash := func(protocol byte, source, target [4]byte, from, to uint16) uint32 {
		t.Helper()
		b := make([]byte, ethernetHeader+20+8)
		binary.BigEndian.PutUint16(b[12:], unix.ETH_P_IP)
		ip := b[ethernetHeader:]
		ip[0], ip[9] = 0x45, protocol
		copy(ip[12:], source[:])
		copy(ip[16:], target[:])
		binary.BigEndian.PutUint16(ip[20:], from)
		binary.BigEndian.PutUint16(ip[22:], to)
		h, err := p.Run(&ebpf.RunOptions{Data: b})
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	const flows = 256
	for name, flow := range map[string]func(i byte) (there, back uint32){
		"pods of the other node": func(i byte) (uint32, uint32) {
			a, b := [4]byte{10, 244, 1, 1}, [4]byte{10, 244, 2, i}
			return hash(unix.IPPROTO_ICMP, a, b, 0, 0), hash(unix.IPPROTO_ICMP, b, a, 0, 0)
		},
		"pods of this node": func(i byte) (uint32, uint32) {
			a, b := [4]byte{10, 244, 1, i}, [4]byte{10, 244, 2, 1}
			return hash(unix.IPPROTO_TCP, a, b, 40000, 80), hash(unix.IPPROTO_TCP, b, a, 80, 40000)
		},
		"ports": func(i byte) (uint32, uint32) {
			a, b, from := [4]byte{10, 244, 1, 1}, [4]byte{10, 244, 2, 1}, 40000+2*uint16(i) // Linux connects from even ones
			return hash(unix.IPPROTO_UDP, a, b, from, 80), hash(unix.IPPROTO_UDP, b, a, 80, from)
		},
	} {
		for _, queues := range []uint32{2, 3, 4, 8} {
			count := make([]int, queues)
			for i := range flows {
				there, back := flow(byte(i))
				if there%queues != back%queues {
					t.Fatalf("%s: the directions of flow %d come by queues %d and %d of %d", name, i, there%queues, back%queues, queues)
				}
				count[there%queues]++
			}
			for q, n := range count {
				if mean := flows / int(queues); n < mean/2 || n > 2*mean {
					t.Errorf("%s: %d of %d flows come by queue %d of %d", name, n, flows, q, queues)
				}
			}
		}
	}
}
