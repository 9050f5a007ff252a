package port

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// retagMark is the mark of the packets that the program below may touch: ours. It takes the mark away again, so that
// nobody behind it sees one.
const retagMark = 0x6d677279

// Offsets into struct __sk_buff (linux/bpf.h), in bytes.
const (
	skbLen      = 0
	skbType     = 4 // pkt_type
	skbMark     = 8
	skbProtocol = 16
	skbVLAN     = 20 // vlan_present
	skbIndex    = 40 // ifindex
	skbGSOSize  = 176
)

// Verdicts of a TCX program.
const (
	tcxNext = -1
	tcxPass = 0
	tcxDrop = 2
)

// retag tells the kernel that an IP-in-IP superpacket of ours is one. A virtio-net header cannot say it: the kernel
// takes such a packet for a plain TCP superpacket with an odd header, and would refuse to split it. So the outer header
// is taken away and put back as an encapsulation, at the underlay's tc egress; the bytes stay the ones we wrote.
type retag struct {
	program *ebpf.Program
	at      link.Link // on the interface index
	index   int
}

// loopbackIndex is the index of every namespace's loopback device.
const loopbackIndex = 1

// newRetag loads the program, and attaches it for a moment to the loopback device of the calling thread's namespace,
// so that what is missing is known at start.
func newRetag() (*retag, error) {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "margay_retag", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: retagProgram()})
	if err != nil {
		return nil, explainBPF("load the BPF program", err)
	}
	r := &retag{program: program}
	if err := r.attach(loopbackIndex); err != nil {
		return nil, errors.Join(explainBPF("attach the BPF program (TCX, Linux 6.6)", err), program.Close())
	}
	r.detach()
	return r, nil
}

// explainBPF makes the kernel's answer, which can be a verifier's log of many lines, one line.
func explainBPF(what string, err error) error {
	do := "superpackets to other nodes are split by the vRouter, which costs time"
	switch {
	case errors.Is(err, unix.EPERM):
		return &Missing{What: what, Err: unix.EPERM, Do: "add the capability BPF; without it " + do}
	case errors.Is(err, ebpf.ErrNotSupported):
		return &Missing{What: what, Err: ebpf.ErrNotSupported, Do: "without it " + do}
	}
	return &Missing{What: what, Err: unwrapErrno(err), Do: "without it " + do}
}

// attach moves the program to another interface of the calling thread's namespace. It comes before other programs
// there, so that those see well-formed packets.
func (r *retag) attach(index int) error {
	r.detach()
	at, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: r.program, Attach: ebpf.AttachTCXEgress, Anchor: link.Head()})
	if err != nil {
		return fmt.Errorf("attach the BPF program: %w", err)
	}
	r.at, r.index = at, index
	return nil
}

// attached reports whether the program is on the interface index now. The kernel takes it off an interface that goes,
// and the index may come back with another one.
func (r *retag) attached(index int) bool {
	return r.at != nil && r.index == index && tcxAttached(r.at, index)
}

// tcxAttached reports whether a link is to the interface index now.
func tcxAttached(l link.Link, index int) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	tcx := info.TCX()
	return tcx != nil && int(tcx.Ifindex) == index
}

// detach is attach's undoing. It cannot fail in a way that matters: the link goes with its descriptor.
func (r *retag) detach() {
	if r.at != nil {
		_ = r.at.Close()
	}
	r.at, r.index = nil, 0
}

func (r *retag) close() error {
	r.detach()
	return r.program.Close()
}

// retagProgram is the program, instruction by instruction; R6 holds the packet.
func retagProgram() asm.Instructions {
	const (
		outerLen = 20
		buffer   = -24 // of the outer header, from the frame pointer

		protocolField = buffer + 9
	)
	program := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R0, asm.R6, skbMark, asm.Word),
		asm.JNE.Imm(asm.R0, retagMark, "next"),
		asm.Mov.Imm(asm.R0, 0),
		asm.StoreMem(asm.R6, skbMark, asm.R0, asm.Word),
		asm.LoadMem(asm.R0, asm.R6, skbGSOSize, asm.Word),
		asm.JEq.Imm(asm.R0, 0, "next"),
		// Save the outer header.
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, ethernetHeader),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, buffer),
		asm.Mov.Imm(asm.R4, outerLen),
		asm.FnSkbLoadBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, "drop"),
		asm.LoadMem(asm.R0, asm.RFP, protocolField, asm.Byte),
		asm.JNE.Imm(asm.R0, protoIPIP, "next"),
	}
	program = append(program, adjustRoom(-outerLen, fixedGSO, "drop")...)
	program = append(program, adjustRoom(outerLen, fixedGSO|encapIPv4, "drop")...)
	return append(program,
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, ethernetHeader),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, buffer),
		asm.Mov.Imm(asm.R4, outerLen),
		asm.Mov.Imm(asm.R5, 0),
		asm.FnSkbStoreBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, "drop"),
		asm.Mov.Imm(asm.R0, tcxNext).WithSymbol("next"),
		asm.Return(),
		asm.Mov.Imm(asm.R0, tcxDrop).WithSymbol("drop"),
		asm.Return(),
	)
}
