package traffic

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// headersLen is the length in bytes of what a frame is given anew before each use: the Ethernet, the IP and the UDP header. The
// kernel uses the memory of frames again, and a router has written into it meanwhile.
const headersLen = 42

// valueLen is the length of an entry of the frames' map in bytes, a multiple of eight.
const valueLen = 48

// liveFrames is BPF_F_TEST_XDP_LIVE_FRAMES (linux/bpf.h): the program's verdict is carried out.
const liveFrames = 1 << 1

// xdpBurst is the number of packets of one call. Each ends with a wait for the kernel's readers (RCU) of some 20 ms.
const xdpBurst = 1 << 16

// XDPGenerator sends frames on a veth by having the kernel run an XDP program over and over that redirects them there. There is
// no system call and no socket buffer for a packet, so it reaches several times what Generator does. The other end of the
// veth has to have GRO on, or an XDP program of its own: without either a veth takes no such frames. It is for full speed only:
// calls are long. Needs Linux 5.18.
type XDPGenerator struct {
	board   *Board
	mu      sync.Mutex // held from looking at count to telling the board
	program *ebpf.Program
	frames  *ebpf.Map // by number: how much to cut off the longest frame, and the headers
	count   *ebpf.Map // packets sent, at 0
	options ebpf.RunOptions
}

// NewXDPGenerator loads its program for a device of the calling thread's network namespace.
func NewXDPGenerator(device string, f Frame, b *Board) (_ *XDPGenerator, err error) {
	link, frames, err := prepare(device, f)
	if err != nil {
		return nil, err
	}
	g := &XDPGenerator{board: b}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.Close())
		}
	}()
	longest := slices.MaxFunc(frames, func(a, b []byte) int { return len(a) - len(b) })
	if g.frames, err = ebpf.NewMap(&ebpf.MapSpec{Name: "frames", Type: ebpf.Array, KeySize: 4, ValueSize: valueLen,
		MaxEntries: uint32(len(frames))}); err != nil {
		return nil, fmt.Errorf("BPF map: %w", err)
	}
	for i, frame := range frames {
		value := binary.NativeEndian.AppendUint32(nil, uint32(len(frame)-len(longest)))
		value = append(append(value, frame[:headersLen]...), make([]byte, valueLen-4-headersLen)...)
		if err := g.frames.Put(uint32(i), value); err != nil {
			return nil, fmt.Errorf("BPF map: %w", err)
		}
	}
	if g.count, err = ebpf.NewMap(&ebpf.MapSpec{Name: "count", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}); err != nil {
		return nil, fmt.Errorf("BPF map: %w", err)
	}
	g.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{Name: "margay_bench", Type: ebpf.XDP, License: "GPL",
		Instructions: redirect(g.frames, g.count, len(frames), link.Index)})
	if err != nil {
		return nil, fmt.Errorf("load the XDP program: %w", err)
	}
	g.options = ebpf.RunOptions{Data: longest, Flags: liveFrames}
	return g, nil
}

// Close frees the program and its maps.
func (g *XDPGenerator) Close() error {
	return errors.Join(g.program.Close(), g.frames.Close(), g.count.Close())
}

// Run sends while the board says so, and returns only with an error.
func (g *XDPGenerator) Run() error {
	failed := make(chan error, 1)
	go func() { failed <- g.watch() }()
	go func() {
		failed <- pace(g.board, xdpBurst, time.Millisecond, func(packets int) (uint64, error) {
			g.options.Repeat = uint32(packets)
			if _, err := g.program.Run(&g.options); err != nil {
				return 0, fmt.Errorf("run the XDP program: %w", err)
			}
			return uint64(packets), g.tell() // before the board can say that the generator is at rest
		})
	}()
	return <-failed
}

// watch keeps the board up to date while a call goes on, by the program's own count: a call that a signal interrupts is made
// again, so that nobody else knows how many packets there were.
func (g *XDPGenerator) watch() error {
	for {
		if err := g.tell(); err != nil {
			return err
		}
		sleep(500 * time.Microsecond)
	}
}

// tell puts the program's count on the board.
func (g *XDPGenerator) tell() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var sent uint64
	if err := g.count.Lookup(uint32(0), &sent); err != nil {
		return fmt.Errorf("BPF map: %w", err)
	}
	g.board.Packets.Store(sent)
	return nil
}

// redirect is the program: it makes a frame of the list, a random one, out of what it gets, which is the longest of them as sent
// or used before, and sends it out of the interface.
func redirect(frames, count *ebpf.Map, n, index int) asm.Instructions {
	const (
		contextData, contextEnd = 0, 4 // offsets into struct xdp_md
		drop                    = 1    // XDP_DROP
	)
	program := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),

		asm.FnGetPrandomU32.Call(),
		asm.Mod.Imm32(asm.R0, int32(n)),
		asm.StoreMem(asm.RFP, -4, asm.R0, asm.Word),
		asm.LoadMapPtr(asm.R1, frames.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "drop"),
		asm.Mov.Reg(asm.R7, asm.R0),

		asm.LoadMem(asm.R2, asm.R7, 0, asm.Word),
		asm.JEq.Imm(asm.R2, 0, "headers"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.FnXdpAdjustTail.Call(),
		asm.JNE.Imm(asm.R0, 0, "drop"),

		asm.LoadMem(asm.R1, asm.R6, contextData, asm.Word).WithSymbol("headers"),
		asm.LoadMem(asm.R2, asm.R6, contextEnd, asm.Word),
		asm.Mov.Reg(asm.R3, asm.R1),
		asm.Add.Imm(asm.R3, headersLen),
		asm.JGT.Reg(asm.R3, asm.R2, "drop"),
	}
	for at := int16(0); at < headersLen; at += 2 {
		program = append(program, asm.LoadMem(asm.R4, asm.R7, 4+at, asm.Half), asm.StoreMem(asm.R1, at, asm.R4, asm.Half))
	}
	return append(program,
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, count.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "drop"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),

		asm.Mov.Imm(asm.R1, int32(index)),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return(),

		asm.Mov.Imm(asm.R0, drop).WithSymbol("drop"),
		asm.Return(),
	)
}
