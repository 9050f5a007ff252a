package port

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"margay/vrouter/packet"
)

// More of the stack of directbpf.go, for the programs of the shortcut. From the underlay two IPv4 headers are read, of
// which the inner one lies where it does for a pod's packet. What is written lies in one piece from stackOutFrame on,
// with an outer header, or from stackOutPod on, without.
const (
	stackOuter    = stackIP - 20
	stackKey      = -76 // of ways and hops
	stackTotal    = -80 // length of the inner packet
	stackSegments = -84 // that it stands for
	stackOutInner = -96 // as much of the inner header as changes: 12 bytes
	stackOutIP    = stackOutInner - 20
	stackOutFrame = stackOutIP - ethernetHeader
	stackOutPod   = stackOutInner - ethernetHeader
	innerHead     = 12
)

const (
	roomMAC     = 1      // BPF_ADJ_ROOM_MAC
	fixedGSO    = 1      // BPF_F_ADJ_ROOM_FIXED_GSO
	encapIPv4   = 1 << 1 // BPF_F_ADJ_ROOM_ENCAP_L3_IPV4
	keepSum     = 1 << 5 // BPF_F_ADJ_ROOM_NO_CSUM_RESET: what the device says of the checksum inside stays true
	bpfFetch    = 1      // BPF_FETCH
	dontFrag    = 0x4000
	outerTTL    = 64
	tcpFlagsAt  = 13
	tcpFlagSYN  = 2
	tcpLengthAt = 12
)

// depart is the program at a pod's interface from where classify says that the packet is owned: what is not forwarded
// here goes to claim. R0 points to what taken says, R8 has the way.
func (s *shortcut) depart() asm.Instructions {
	program := asm.Instructions{
		asm.LoadMem(asm.R1, asm.R6, skbVLAN, asm.Word),
		asm.JNE.Imm(asm.R1, 0, "kernel"),
		asm.LoadMem(asm.R9, asm.R0, 4, asm.Word), // the pod's address
		asm.LoadMapValue(asm.R1, s.rules.FD(), ruleOff),
		asm.LoadMem(asm.R1, asm.R1, 0, asm.Word),
		asm.JNE.Imm(asm.R1, 0, "claim"),
		asm.LoadMem(asm.R1, asm.R6, skbType, asm.Word),
		asm.JNE.Imm(asm.R1, unix.PACKET_HOST, "claim"),
		asm.LoadMem(asm.R1, asm.RFP, stackSource, asm.Word),
		asm.JNE.Reg(asm.R1, asm.R9, "claim"),
		asm.JEq.Imm(asm.R7, protoIPIP, "claim"),
		asm.JEq.Imm(asm.R7, packet.ProtocolIPv6, "claim"),
	}
	program = append(program, s.hopOf(asm.R8, "claim")...)
	program = append(program,
		asm.Mov.Reg(asm.R8, asm.R0),
		asm.LoadMem(asm.R1, asm.R8, hopFlags, asm.Word),
		asm.And.Imm(asm.R1, hopSend),
		asm.JEq.Imm(asm.R1, 0, "claim"),
		asm.LoadMem(asm.R1, asm.R6, skbLen, asm.Word),
		asm.Sub.Imm(asm.R1, ethernetHeader),
	)
	program = append(program, whole(stackIP, "claim")...)
	program = append(program, lives("claim")...)
	program = append(program, fits(headersLen, "claim")...)
	program = append(program,
		asm.LoadMem(asm.R1, asm.R8, hopFlags, asm.Word),
		asm.And.Imm(asm.R1, hopClamp),
		asm.JEq.Imm(asm.R1, 0, "clamped"),
		asm.JNE.Imm(asm.R7, unix.IPPROTO_TCP, "clamped"),
	)
	program = append(program, loadBytes(asm.FnSkbLoadBytes, headersLen+tcpFlagsAt, stackKey, 1, "claim")...)
	program = append(program,
		asm.LoadMem(asm.R1, asm.RFP, stackKey, asm.Byte),
		asm.And.Imm(asm.R1, tcpFlagSYN),
		asm.JNE.Imm(asm.R1, 0, "claim"),
		asm.LoadMem(asm.R1, asm.R8, hopFlags, asm.Word).WithSymbol("clamped"),
		asm.And.Imm(asm.R1, hopPod),
		asm.JNE.Imm(asm.R1, 0, "pod"),
	)
	program = append(program, s.encap()...)
	toPod := s.toPod(countLocal)
	toPod[0] = toPod[0].WithSymbol("pod")
	return append(append(program, toPod...), s.failed()...)
}

// encap puts the packet into the tunnel to the hop in R8, as the ladder of package vrouter does.
func (s *shortcut) encap() asm.Instructions {
	program := adjustRoom(20, fixedGSO|encapIPv4|keepSum, "claim")
	for i := int16(0); i < 16; i += 4 {
		program = append(program, copyWord(asm.R8, hopEthernet+i, asm.RFP, stackOutFrame-2+i)...)
	}
	program = append(program, s.innerOut()...)
	program = append(program,
		asm.Mov.Imm(asm.R1, 0x45),
		asm.StoreMem(asm.RFP, stackOutIP, asm.R1, asm.Byte),
		asm.LoadMem(asm.R1, asm.RFP, stackIP+1, asm.Byte),
		asm.LoadMem(asm.R2, asm.R8, hopTOSKeep, asm.Word),
		asm.And.Reg(asm.R1, asm.R2),
		asm.LoadMem(asm.R2, asm.R8, hopTOSSet, asm.Word),
		asm.Or.Reg(asm.R1, asm.R2),
		asm.StoreMem(asm.RFP, stackOutIP+1, asm.R1, asm.Byte),
		asm.LoadMem(asm.R1, asm.RFP, stackTotal, asm.Word),
		asm.Add.Imm(asm.R1, 20),
		asm.HostTo(asm.BE, asm.R1, asm.Half),
		asm.StoreMem(asm.RFP, stackOutIP+2, asm.R1, asm.Half),
		asm.LoadMem(asm.R3, asm.RFP, stackFragment, asm.Half),
		asm.And.Imm(asm.R3, int32(htons(dontFrag))),
		asm.StoreMem(asm.RFP, stackOutIP+6, asm.R3, asm.Half),
		asm.JEq.Imm(asm.R3, 0, "may be fragmented"),
		asm.LoadMem(asm.R1, asm.RFP, stackIP+4, asm.Half),
		asm.HostTo(asm.BE, asm.R1, asm.Half),
		asm.LoadMem(asm.R2, asm.R8, hopOffset, asm.Word),
		asm.Add.Reg(asm.R1, asm.R2),
		asm.Ja.Label("identification"),
		// Each segment will count the identification up.
		asm.LoadMem(asm.R1, asm.RFP, stackSegments, asm.Word).WithSymbol("may be fragmented"),
		asm.Mov.Reg(asm.R2, asm.R8),
		fetchAdd(asm.R2, asm.R1, hopID),
		asm.HostTo(asm.BE, asm.R1, asm.Half).WithSymbol("identification"),
		asm.StoreMem(asm.RFP, stackOutIP+4, asm.R1, asm.Half),
		asm.Mov.Imm(asm.R1, outerTTL),
		asm.StoreMem(asm.RFP, stackOutIP+8, asm.R1, asm.Byte),
		asm.Mov.Imm(asm.R1, protoIPIP),
		asm.StoreMem(asm.RFP, stackOutIP+9, asm.R1, asm.Byte),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.RFP, stackOutIP+10, asm.R1, asm.Half),
	)
	program = append(program, copyWord(asm.R8, hopSource, asm.RFP, stackOutIP+12)...)
	program = append(program, copyWord(asm.R8, hopGateway, asm.RFP, stackOutIP+16)...)
	program = append(program, headerSum(stackOutIP)...)
	program = append(program,
		asm.Xor.Imm(asm.R1, 0xffff),
		asm.StoreMem(asm.RFP, stackOutIP+10, asm.R1, asm.Half),
	)
	program = append(program, storeBytes(stackOutFrame, ethernetHeader+20+innerHead)...)
	program = append(program, s.countPacket(countEncap, 20)...)
	program = append(program, useHop()...)
	return append(program,
		asm.LoadMem(asm.R1, asm.R8, hopIndex, asm.Word),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return(),
	)
}

// fetchAdd adds src to the word at dst and at, and leaves in src what was there before.
func fetchAdd(dst, src asm.Register, at int16) asm.Instruction {
	op := asm.FetchAdd.Mem(dst, src, asm.Word, at)
	// The library writes this field as it is here, and leaves out what the kernel expects in it: BPF_FETCH, without which src
	// stays as it is.
	op.Constant = bpfFetch
	return op
}

// toPod sends the packet to the pod that the hop in R8 is.
func (s *shortcut) toPod(place int32) asm.Instructions {
	var program asm.Instructions
	for i := int16(0); i < 16; i += 4 {
		program = append(program, copyWord(asm.R8, hopEthernet+i, asm.RFP, stackOutPod-2+i)...)
	}
	program = append(program, s.innerOut()...)
	program = append(program, storeBytes(stackOutPod, ethernetHeader+innerHead)...)
	program = append(program, s.countPacket(place, 0)...)
	return append(program,
		asm.LoadMem(asm.R1, asm.R8, hopFlags, asm.Word),
		asm.And.Imm(asm.R1, hopPeer),
		asm.JNE.Imm(asm.R1, 0, "peer"),
		// The program at the interface's egress takes it for ours by its mark.
		asm.Mov.Imm(asm.R1, retagMark),
		asm.StoreMem(asm.R6, skbMark, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, asm.R8, hopIndex, asm.Word),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return(),
		asm.LoadMem(asm.R1, asm.R8, hopIndex, asm.Word).WithSymbol("peer"),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirectPeer.Call(),
		asm.Return(),
	)
}

// failed is where a packet ends whose header could not be written.
func (s *shortcut) failed() asm.Instructions {
	drop := s.countPacket(countFailed, 0)
	drop[0] = drop[0].WithSymbol("failed")
	return append(drop, returns(tcxDrop)...)
}

// arrive is the program at the underlay's ingress: it takes plain packets for pods out of the tunnel. All else goes on, to
// the vRouter's socket for one.
func (s *shortcut) arrive(t *steering) asm.Instructions {
	program := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R1, asm.R6, skbProtocol, asm.Word),
		asm.JNE.Imm(asm.R1, int32(htons(unix.ETH_P_IP)), "next"),
		asm.LoadMem(asm.R1, asm.R6, skbType, asm.Word),
		asm.JNE.Imm(asm.R1, unix.PACKET_HOST, "next"),
		asm.LoadMem(asm.R1, asm.R6, skbVLAN, asm.Word),
		asm.JNE.Imm(asm.R1, 0, "next"),
		asm.LoadMapValue(asm.R9, s.rules.FD(), 0),
		asm.LoadMem(asm.R1, asm.R9, ruleArrive, asm.Word),
		asm.JEq.Imm(asm.R1, 0, "next"),
		asm.LoadMem(asm.R1, asm.R9, ruleOff, asm.Word),
		asm.JNE.Imm(asm.R1, 0, "next"),
	}
	program = append(program, loadBytes(asm.FnSkbLoadBytes, ethernetHeader, stackOuter, 44, "next")...)
	program = append(program,
		asm.LoadMem(asm.R1, asm.RFP, stackOuter+9, asm.Byte),
		asm.JNE.Imm(asm.R1, protoIPIP, "next"),
		asm.LoadMem(asm.R1, asm.RFP, stackOuter+16, asm.Word),
		asm.LoadMem(asm.R2, asm.R9, ruleAddress, asm.Word),
		asm.JNE.Reg(asm.R1, asm.R2, "next"),
		asm.LoadMem(asm.R7, asm.RFP, stackProtocol, asm.Byte),
	)
	for _, header := range []int16{stackOuter, stackIP} {
		program = append(program,
			asm.LoadMem(asm.R1, asm.RFP, header, asm.Byte),
			asm.JNE.Imm(asm.R1, 0x45, "next"),
			asm.LoadMem(asm.R1, asm.RFP, header+6, asm.Half),
			asm.And.Imm(asm.R1, int32(htons(moreFragments|fragmentOffset))),
			asm.JNE.Imm(asm.R1, 0, "next"),
			asm.LoadMem(asm.R1, asm.R6, skbLen, asm.Word),
			asm.Sub.Imm(asm.R1, ethernetHeader+int32(header)-stackOuter),
		)
		program = append(program, whole(header, "next")...)
	}
	program = append(program, lives("next")...)
	program = append(program,
		// Nothing about ECN has to be changed (RFC 6040, 4.2), nor about DSCP (RFC 2983, 3.1).
		asm.LoadMem(asm.R1, asm.RFP, stackOuter+1, asm.Byte),
		asm.LoadMem(asm.R2, asm.RFP, stackIP+1, asm.Byte),
		asm.Xor.Reg(asm.R2, asm.R1),
		asm.Mov.Reg(asm.R3, asm.R2),
		asm.And.Imm(asm.R3, 3),
		asm.JEq.Imm(asm.R3, 0, "ecn"),
		asm.And.Imm(asm.R1, 3),
		asm.JNE.Imm(asm.R1, 0, "next"),
		asm.And.Imm(asm.R2, 0xfc).WithSymbol("ecn"),
		asm.JEq.Imm(asm.R2, 0, "dscp"),
		asm.LoadMem(asm.R1, asm.R9, ruleUniform, asm.Word),
		asm.JNE.Imm(asm.R1, 0, "next"),

		asm.JEq.Imm(asm.R7, protoIPIP, "next").WithSymbol("dscp"),
		asm.JEq.Imm(asm.R7, packet.ProtocolIPv6, "next"),
		asm.JEq.Imm(asm.R7, unix.IPPROTO_ICMP, "icmp"),
	)
	for _, p := range portProtocols {
		program = append(program, asm.JEq.Imm(asm.R7, p, "ports"))
	}
	program = append(program, asm.Ja.Label("source"),
		asm.LoadMem(asm.R0, asm.RFP, stackPorts, asm.Byte).WithSymbol("icmp"))
	for _, t := range icmpErrors {
		program = append(program, asm.JEq.Imm(asm.R0, t, "next"))
	}
	program = append(program, asm.Ja.Label("source"),
		asm.StoreMem(asm.RFP, stackFlowEnd, asm.R7, asm.Word).WithSymbol("ports"))
	program = append(append(program, lookup(t.flows, stackFlow)...), asm.JNE.Imm(asm.R0, 0, "next"))

	// The way back to the source leads to the node that has sent it.
	source := s.wayTo(t, stackSource, "next")
	source[0] = source[0].WithSymbol("source")
	program = append(program, source...)
	program = append(program,
		asm.LoadMem(asm.R1, asm.R0, hopFlags, asm.Word),
		asm.And.Imm(asm.R1, hopNode),
		asm.JEq.Imm(asm.R1, 0, "next"),
		asm.LoadMem(asm.R1, asm.R0, hopGateway, asm.Word),
		asm.LoadMem(asm.R2, asm.RFP, stackOuter+12, asm.Word),
		asm.JNE.Reg(asm.R1, asm.R2, "next"),
	)
	program = append(program, s.wayTo(t, stackTarget, "next")...)
	program = append(program,
		asm.Mov.Reg(asm.R8, asm.R0),
		asm.LoadMem(asm.R1, asm.R8, hopFlags, asm.Word),
		asm.And.Imm(asm.R1, hopLocal),
		asm.JEq.Imm(asm.R1, 0, "next"),
	)
	program = append(program, fits(headersLen+20, "next")...)
	program = append(program, adjustRoom(-20, fixedGSO|keepSum, "next")...)
	program = append(append(program, s.toPod(countDecap)...), s.failed()...)
	return append(program, asm.Mov.Imm(asm.R0, tcxNext).WithSymbol("next"), asm.Return())
}

// noter is the program at vr0's egress, which has no link-layer header: what the kernel sends there of a pod's, it has
// maybe rewritten, and what comes back has to come back to it.
func (s *shortcut) noter(t *steering) asm.Instructions {
	program := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R1, asm.R6, skbProtocol, asm.Word),
		asm.JNE.Imm(asm.R1, int32(htons(unix.ETH_P_IP)), "next"),
	}
	program = append(program, loadBytes(asm.FnSkbLoadBytes, 0, stackIP, 24, "next")...)
	program = append(program,
		asm.LoadMem(asm.R1, asm.RFP, stackIP, asm.Byte),
		asm.JNE.Imm(asm.R1, 0x45, "next"), // with options the ports are elsewhere: they come by the vRouter either way
		asm.LoadMem(asm.R1, asm.RFP, stackFragment, asm.Half),
		asm.And.Imm(asm.R1, int32(htons(fragmentOffset))),
		asm.JNE.Imm(asm.R1, 0, "next"),
		asm.LoadMem(asm.R7, asm.RFP, stackProtocol, asm.Byte),
	)
	for _, p := range portProtocols {
		program = append(program, asm.JEq.Imm(asm.R7, p, "ports"))
	}
	program = append(program, asm.Ja.Label("next"))
	ports := s.wayTo(t, stackSource, "next")
	ports[0] = ports[0].WithSymbol("ports")
	program = append(program, ports...)
	program = append(program,
		asm.LoadMem(asm.R1, asm.R0, hopFlags, asm.Word),
		asm.And.Imm(asm.R1, hopPod),
		asm.JEq.Imm(asm.R1, 0, "next"),
	)
	return append(program, t.recordFlow()...)
}

// wayTo looks up the hop of the address at a place on the stack: R0 points to it then. Without one it goes to label.
func (s *shortcut) wayTo(t *steering, address int16, label string) asm.Instructions {
	program := asm.Instructions{
		asm.Mov.Imm(asm.R0, 32),
		asm.StoreMem(asm.RFP, stackPrefix, asm.R0, asm.Word),
	}
	program = append(program, copyWord(asm.RFP, address, asm.RFP, stackPrefix+4)...)
	program = append(append(program, lookup(t.owned, stackPrefix)...),
		asm.JEq.Imm(asm.R0, 0, label),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
	)
	return append(program, s.hopOf(asm.R1, label)...)
}

// hopOf looks up the hop that a way leads to: R0 points to it then.
func (s *shortcut) hopOf(way asm.Register, label string) asm.Instructions {
	program := asm.Instructions{
		asm.JEq.Imm(way, 0, label),
		asm.StoreMem(asm.RFP, stackKey, way, asm.Word),
	}
	for _, m := range []*ebpf.Map{s.ways, s.hops} {
		program = append(append(program, lookup(m, stackKey)...), asm.JEq.Imm(asm.R0, 0, label))
		if m == s.ways {
			program = append(program,
				asm.LoadMem(asm.R1, asm.R0, 0, asm.Word),
				asm.StoreMem(asm.RFP, stackKey, asm.R1, asm.Word),
			)
		}
	}
	return program
}

// whole goes to label unless the IPv4 header at a place on the stack has the total length in R1, and a checksum that is
// right. The length goes to stackTotal.
func whole(header int16, label string) asm.Instructions {
	return append(append(asm.Instructions{
		asm.LoadMem(asm.R2, asm.RFP, header+2, asm.Half),
		asm.HostTo(asm.BE, asm.R2, asm.Half),
		asm.JNE.Reg(asm.R1, asm.R2, label),
		asm.StoreMem(asm.RFP, stackTotal, asm.R1, asm.Word),
	}, headerSum(header)...), asm.JNE.Imm(asm.R1, 0xffff, label))
}

// headerSum puts the ones' complement sum of the 20 bytes at a place on the stack into R1 (RFC 1071).
func headerSum(header int16) asm.Instructions {
	program := asm.Instructions{asm.LoadMem(asm.R1, asm.RFP, header, asm.Word)}
	for i := int16(4); i < 20; i += 4 {
		program = append(program, asm.LoadMem(asm.R2, asm.RFP, header+i, asm.Word), asm.Add.Reg(asm.R1, asm.R2))
	}
	program = append(program,
		asm.Mov.Reg(asm.R2, asm.R1),
		asm.RSh.Imm(asm.R2, 32),
		asm.Mov.Reg32(asm.R1, asm.R1),
		asm.Add.Reg(asm.R1, asm.R2),
	)
	for range 3 {
		program = append(program,
			asm.Mov.Reg(asm.R2, asm.R1),
			asm.RSh.Imm(asm.R2, 16),
			asm.And.Imm(asm.R1, 0xffff),
			asm.Add.Reg(asm.R1, asm.R2),
		)
	}
	return program
}

// lives goes to label when the inner packet's time to live ends here.
func lives(label string) asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R1, asm.RFP, stackIP+8, asm.Byte),
		asm.JLE.Imm(asm.R1, 1, label),
	}
}

// fits goes to label unless the inner packet, or each segment that it stands for, fits the hop in R8. transport is where
// the transport header is in the frame. The number of segments goes to stackSegments.
func fits(transport int32, label string) asm.Instructions {
	program := asm.Instructions{
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreMem(asm.RFP, stackSegments, asm.R1, asm.Word),
		asm.LoadMem(asm.R4, asm.RFP, stackTotal, asm.Word),
		asm.LoadMem(asm.R2, asm.R6, skbGSOSize, asm.Word),
		asm.JEq.Imm(asm.R2, 0, "room"),
		asm.Mov.Imm(asm.R3, 20+8),
		asm.JEq.Imm(asm.R7, unix.IPPROTO_UDP, "super"),
		asm.JNE.Imm(asm.R7, unix.IPPROTO_TCP, label),
	}
	program = append(program, loadBytes(asm.FnSkbLoadBytes, transport+tcpLengthAt, stackKey, 1, label)...)
	return append(program,
		asm.LoadMem(asm.R3, asm.RFP, stackKey, asm.Byte),
		asm.RSh.Imm(asm.R3, 4),
		asm.LSh.Imm(asm.R3, 2),
		asm.Add.Imm(asm.R3, 20),
		// R3 is the length of the headers.
		asm.LoadMem(asm.R2, asm.R6, skbGSOSize, asm.Word).WithSymbol("super"),
		asm.LoadMem(asm.R1, asm.RFP, stackTotal, asm.Word),
		asm.JGE.Reg(asm.R3, asm.R1, label),
		asm.Sub.Reg(asm.R1, asm.R3),
		asm.Mov.Reg(asm.R4, asm.R3),
		asm.Add.Reg(asm.R4, asm.R2),
		asm.Add.Reg(asm.R1, asm.R2),
		asm.Sub.Imm(asm.R1, 1),
		asm.Div.Reg(asm.R1, asm.R2),
		asm.StoreMem(asm.RFP, stackSegments, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, asm.R8, hopMTU, asm.Word).WithSymbol("room"),
		asm.JGT.Reg(asm.R4, asm.R1, label),
	)
}

// innerOut writes what changes of the inner header: one off the time to live, and the checksum (RFC 1624).
func (s *shortcut) innerOut() asm.Instructions {
	program := append(copyWord(asm.RFP, stackIP, asm.RFP, stackOutInner), copyWord(asm.RFP, stackIP+4, asm.RFP, stackOutInner+4)...)
	return append(program,
		asm.LoadMem(asm.R1, asm.RFP, stackIP+8, asm.Byte),
		asm.Sub.Imm(asm.R1, 1),
		asm.StoreMem(asm.RFP, stackOutInner+8, asm.R1, asm.Byte),
		asm.LoadMem(asm.R1, asm.RFP, stackProtocol, asm.Byte),
		asm.StoreMem(asm.RFP, stackOutInner+9, asm.R1, asm.Byte),
		asm.LoadMem(asm.R1, asm.RFP, stackIP+10, asm.Half),
		asm.Add.Imm(asm.R1, int32(htons(0x0100))),
		asm.Mov.Reg(asm.R2, asm.R1),
		asm.Add.Imm(asm.R2, 1),
		asm.RSh.Imm(asm.R2, 16), // 1 when the sum is 0xffff or more
		asm.Add.Reg(asm.R1, asm.R2),
		asm.StoreMem(asm.RFP, stackOutInner+10, asm.R1, asm.Half),
	)
}

// useHop notes that a packet has gone by the hop in R8. It writes no more often than somebody asks.
func useHop() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R1, asm.R8, hopUsed, asm.Word),
		asm.JNE.Imm(asm.R1, 0, "noted"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreMem(asm.R8, hopUsed, asm.R1, asm.Word),
		asm.Mov.Imm(asm.R1, 0).WithSymbol("noted"),
	}
}

// countPacket counts the packet in one place of the processor's own, with so many bytes more than the inner one has.
func (s *shortcut) countPacket(place, more int32) asm.Instructions {
	done := "counted " + string(rune('a'+place))
	program := asm.Instructions{
		asm.Mov.Imm(asm.R1, place),
		asm.StoreMem(asm.RFP, stackKey, asm.R1, asm.Word),
	}
	program = append(append(program, lookup(s.counts, stackKey)...),
		asm.JEq.Imm(asm.R0, 0, done),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.LoadMem(asm.R2, asm.RFP, stackSegments, asm.Word),
		asm.Add.Reg(asm.R1, asm.R2),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.R0, 8, asm.DWord),
		asm.LoadMem(asm.R2, asm.RFP, stackTotal, asm.Word),
		asm.Add.Reg(asm.R1, asm.R2),
		asm.Add.Imm(asm.R1, more),
		asm.StoreMem(asm.R0, 8, asm.R1, asm.DWord),
	)
	return append(program, asm.Mov.Imm(asm.R0, 0).WithSymbol(done))
}

// copyWord copies four bytes by way of R1.
func copyWord(from asm.Register, at int16, to asm.Register, where int16) asm.Instructions {
	return asm.Instructions{asm.LoadMem(asm.R1, from, at, asm.Word), asm.StoreMem(to, where, asm.R1, asm.Word)}
}

// adjustRoom makes room behind the Ethernet header, or takes it away, or goes to label, with the packet as it was.
func adjustRoom(by, flags int32, label string) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, by),
		asm.Mov.Imm(asm.R3, roomMAC),
		asm.Mov.Imm(asm.R4, flags),
		asm.FnSkbAdjustRoom.Call(),
		asm.JNE.Imm(asm.R0, 0, label),
	}
}

// storeBytes writes n bytes of the stack to the packet's front.
func storeBytes(from, n int32) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, 0),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, from),
		asm.Mov.Imm(asm.R4, n),
		asm.Mov.Imm(asm.R5, 0),
		asm.FnSkbStoreBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, "failed"),
	}
}
