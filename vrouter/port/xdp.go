package port

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Verdicts of an XDP program, and what it finds in struct xdp_md (linux/bpf.h), offsets in bytes.
const (
	xdpPass = 2

	xdpData  = 0
	xdpEnd   = 4
	xdpQueue = 16
)

// xdp is a program on an interface that redirects some IPv4 packets to AF_XDP sockets, one for each queue. Everything
// else, and everything that comes to a queue without a socket, goes the kernel's way. The program leaves the interface
// with the process, however that ends.
type xdp struct {
	program *ebpf.Program
	sockets *ebpf.Map
	at      link.Link
	index   int
	native  bool // the driver runs it, not the kernel behind the driver
}

// newXDP loads the program. match is run with R2 at an Ethernet header that an IPv4 header of 20 bytes follows; it may
// use R0, R4 and R5, and jumps to "pass" with what is not for us. queues is how many sockets there can be.
func newXDP(queues int, match asm.Instructions) (_ *xdp, err error) {
	x := &xdp{}
	x.sockets, err = ebpf.NewMap(&ebpf.MapSpec{Name: "margay_xsk", Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: uint32(queues)})
	if err != nil {
		return nil, explainXDP("make the map of AF_XDP sockets", err)
	}
	x.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{Name: "margay_xdp", Type: ebpf.XDP, License: "GPL",
		Instructions: xdpProgram(x.sockets, match)})
	if err != nil {
		return nil, errors.Join(explainXDP("load the XDP program", err), x.sockets.Close())
	}
	return x, nil
}

// explainXDP makes the kernel's answer one line.
func explainXDP(what string, err error) error {
	do := doPacket
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		do = "add the capabilities BPF and NET_ADMIN, or " + doPacket
	case errors.Is(err, unix.EBUSY):
		do = "another XDP program is on the interface: remove that one, or " + doPacket
	case errors.Is(err, ebpf.ErrNotSupported):
		return &Missing{What: what, Err: ebpf.ErrNotSupported, Do: do}
	}
	return &Missing{What: what, Err: unwrapErrno(err), Do: do}
}

// xdpProgram is the program; R6 holds its context.
func xdpProgram(sockets *ebpf.Map, match asm.Instructions) asm.Instructions {
	program := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R2, asm.R6, xdpData, asm.Word),
		asm.LoadMem(asm.R3, asm.R6, xdpEnd, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, ethernetHeader+20),
		asm.JGT.Reg(asm.R4, asm.R3, "pass"),
		asm.LoadMem(asm.R4, asm.R2, 12, asm.Half),
		asm.JNE.Imm(asm.R4, int32(htons(unix.ETH_P_IP)), "pass"),
	}
	program = append(program, match...)
	return append(program,
		asm.LoadMem(asm.R2, asm.R6, xdpQueue, asm.Word),
		asm.LoadMapPtr(asm.R1, sockets.FD()),
		asm.Mov.Imm(asm.R3, xdpPass), // where the queue has no socket
		asm.FnRedirectMap.Call(),
		asm.Return(),
		asm.Mov.Imm(asm.R0, xdpPass).WithSymbol("pass"),
		asm.Return(),
	)
}

// matchIPIP lets whole IP-in-IP packets to the address through that were sent to the interface's own MAC address.
// Fragments of them are the kernel's to put together.
func matchIPIP(mac [6]byte, address [4]byte) asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R4, asm.R2, 0, asm.Word),
		asm.LoadImm(asm.R5, int64(binary.NativeEndian.Uint32(mac[:])), asm.DWord),
		asm.JNE.Reg(asm.R4, asm.R5, "pass"),
		asm.LoadMem(asm.R4, asm.R2, 4, asm.Half),
		asm.JNE.Imm(asm.R4, int32(binary.NativeEndian.Uint16(mac[4:])), "pass"),
		asm.LoadMem(asm.R4, asm.R2, ethernetHeader+9, asm.Byte),
		asm.JNE.Imm(asm.R4, protoIPIP, "pass"),
		asm.LoadMem(asm.R4, asm.R2, ethernetHeader+16, asm.Word),
		asm.LoadImm(asm.R5, int64(binary.NativeEndian.Uint32(address[:])), asm.DWord),
		asm.JNE.Reg(asm.R4, asm.R5, "pass"),
		asm.LoadMem(asm.R4, asm.R2, ethernetHeader+6, asm.Half),
		asm.And.Imm(asm.R4, int32(htons(0x3fff))),
		asm.JNE.Imm(asm.R4, 0, "pass"),
	}
}

// attach puts the program on an interface of the calling thread's namespace: into its driver, or, where that cannot run
// one, behind it.
func (x *xdp) attach(index int) (err error) {
	x.detach()
	for _, flags := range []link.XDPAttachFlags{link.XDPDriverMode, link.XDPGenericMode} {
		var at link.Link
		at, err = link.AttachXDP(link.XDPOptions{Program: x.program, Interface: index, Flags: flags})
		if err == nil {
			x.at, x.index, x.native = at, index, flags == link.XDPDriverMode
			return nil
		}
		if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EPERM) {
			break
		}
	}
	return explainXDP("attach the XDP program", err)
}

// attached reports whether the program is on the interface index now.
func (x *xdp) attached(index int) bool {
	if x.at == nil || x.index != index {
		return false
	}
	info, err := x.at.Info()
	if err != nil {
		return false
	}
	at := info.XDP()
	return at != nil && int(at.Ifindex) == index
}

// set makes a socket receive what comes to its queue.
func (x *xdp) set(queue int, s *xsk) error {
	if err := x.sockets.Put(uint32(queue), uint32(s.fd)); err != nil {
		return fmt.Errorf("put the AF_XDP socket of queue %d into the map: %w", queue, err)
	}
	return nil
}

// detach takes the program off; it cannot fail in a way that matters, see retag.detach.
func (x *xdp) detach() {
	if x.at != nil {
		_ = x.at.Close()
	}
	x.at, x.index = nil, 0
}

func (x *xdp) close() error {
	x.detach()
	return errors.Join(x.program.Close(), x.sockets.Close())
}
