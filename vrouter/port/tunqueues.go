package port

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// A TUN device of several queues is several TUNs, one for each queue, of which the first has what is the device's as a
// whole. Each is received from and sent on by threads of its own.
//
// Which queue a packet comes by is the kernel's choice: by a hash of the flow, the same for both directions, unless
// something of the flow was written to another queue, which is then the flow's for some seconds. AF_PACKET's fanout
// (fanout.go) chooses by the same hash, looks into IP-in-IP for it, and so both directions of a flow have the same number
// (a test), and a flow stays where it is. Where other hands choose what we write by which queue, as a device's own queues
// do that AF_XDP reads, a BPF program keeps flows in place instead.

// tunOptions say what TUN device to open.
type tunOptions struct {
	name     string
	queues   int
	offloads bool
	steered  bool // by the program below, not by what is written
}

// newTUN returns a TUN with its queues, none of them open.
func newTUN(o tunOptions) *TUN {
	queue := func(lead *TUN) *TUN {
		t := &TUN{vr0: vr0{name: o.name}, fd: -1, held: -1, multi: o.queues > 1, steered: o.steered, lead: lead}
		if t.open = t.openPlain; o.offloads {
			t.open, t.vnet = t.openOffload, vnetHeader
		}
		return t
	}
	first := queue(nil)
	for range o.queues - 1 {
		first.more = append(first.more, queue(first))
	}
	return first
}

// all returns the queues, this one first.
func (t *TUN) all() []*TUN { return append([]*TUN{t}, t.more...) }

// queues implements Device.
func (t *TUN) queues() []reader { return readers(t.all()) }

func readers[P reader](list []P) []reader {
	all := make([]reader, len(list))
	for i, p := range list {
		all[i] = p
	}
	return all
}

// steer sets who chooses the queue of a packet, which the device remembers from process to process.
func (t *TUN) steer() error {
	if !t.multi {
		return nil
	}
	program := -1 // the kernel
	if t.steered {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "margay_queue", Type: ebpf.SocketFilter, License: "GPL",
			Instructions: flowHash()})
		if err != nil {
			return &Missing{What: "BPF for the queues of " + t.name, Err: unwrapErrno(err), Do: "add the capability BPF, or choose --queues 1"}
		}
		defer p.Close() // the device keeps it
		program = p.FD()
	}
	if err := unix.IoctlSetPointerInt(t.fd, unix.TUNSETSTEERINGEBPF, program); err != nil {
		return fmt.Errorf("choice of queues: %w", err)
	}
	return nil
}

// flowHash is the program of a TUN device that returns a hash of an IPv4 packet's addresses, protocol and, of TCP and UDP that
// is no fragment, ports, the same for both directions. R6 holds the packet, R7 its protocol, R8 what is hashed.
func flowHash() asm.Instructions {
	const (
		ip    = -24 // of the IP header, from the frame pointer
		ports = -32
	)
	program := append(asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}, loadBytes(asm.FnSkbLoadBytes, 0, ip, 20, "other")...)
	program = append(program,
		asm.LoadMem(asm.R7, asm.RFP, ip+9, asm.Byte),
		asm.LoadMem(asm.R8, asm.RFP, ip+12, asm.Word),
		asm.LoadMem(asm.R0, asm.RFP, ip+16, asm.Word),
		asm.Xor.Reg(asm.R8, asm.R0),
		asm.Xor.Reg(asm.R8, asm.R7),
		asm.LoadMem(asm.R0, asm.RFP, ip, asm.Byte),
		asm.JNE.Imm(asm.R0, 0x45, "hash"), // no IPv4, or with options
		asm.LoadMem(asm.R0, asm.RFP, ip+6, asm.Half),
		asm.And.Imm(asm.R0, int32(htons(moreFragments|fragmentOffset))),
		asm.JNE.Imm(asm.R0, 0, "hash"),
		asm.JEq.Imm(asm.R7, unix.IPPROTO_TCP, "ports"),
		asm.JNE.Imm(asm.R7, unix.IPPROTO_UDP, "hash"),
	)
	load := loadBytes(asm.FnSkbLoadBytes, 20, ports, 4, "hash")
	load[0] = load[0].WithSymbol("ports")
	program = append(program, load...)
	program = append(program,
		asm.LoadMem(asm.R0, asm.RFP, ports, asm.Half),
		asm.LoadMem(asm.R1, asm.RFP, ports+2, asm.Half),
		asm.Xor.Reg(asm.R0, asm.R1),
		asm.LSh.Imm(asm.R0, 8),
		asm.Xor.Reg(asm.R8, asm.R0),
	)
	// The device takes the rest of a division by the number of queues, mostly the lowest bits, and pods of a block differ in
	// the highest: so each bit has to change every other one (the finalizer of MurmurHash3).
	mix := asm.Instructions{asm.Mov.Reg32(asm.R0, asm.R8)}
	for _, round := range []struct{ shift, multiplier int32 }{{16, -0x7a143595}, {13, -0x3d4d51cb}} {
		mix = append(mix,
			asm.RSh.Imm32(asm.R0, round.shift),
			asm.Xor.Reg32(asm.R8, asm.R0),
			asm.Mul.Imm32(asm.R8, round.multiplier),
			asm.Mov.Reg32(asm.R0, asm.R8),
		)
	}
	mix[0] = mix[0].WithSymbol("hash")
	return append(append(program, mix...),
		asm.RSh.Imm32(asm.R0, 16),
		asm.Xor.Reg32(asm.R0, asm.R8),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("other"),
		asm.Return(),
	)
}
