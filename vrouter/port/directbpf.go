package port

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// steering is the BPF side of a Direct: programs at each pod's interface that decide, packet by packet, who handles what
// the pod sends. The vRouter owns a packet when it can bring it to its destination itself: that is what the map owned
// says, by longest prefix. All else is the kernel's, as if there were no vRouter at the interface.
//
// The map flows remembers what the kernel delivers to pods. Its answers are the kernel's too, although their destination
// may be owned: a service's connection, for one, is between two pods to the vRouter and has been rewritten by the kernel,
// which wants to see both directions.
//
// The map taken opens the gate of an interface. Programs and socket are put in place first, which takes the kernel
// milliseconds, and then change hands between one packet and the next.
//
// The programs go with the process. Then all is the kernel's, and what needs the vRouter ends at vr0.
type steering struct {
	owned, flows, taken *ebpf.Map
	claim               *ebpf.Program // TCX ingress: marks what the vRouter owns, and keeps it from the kernel
	filter              *ebpf.Program // socket filter: what is marked
	record              *ebpf.Program // TCX egress: writes flows
	prefixes            map[netip.Prefix]owning

	// With AF_XDP only.
	sockets  *ebpf.Map     // by the slot that taken gives an interface
	redirect *ebpf.Program // XDP: what claim does with AF_PACKET

	shortcut *shortcut // with IOTC only
}

// ownership says why a prefix is owned.
type ownership uint8

const (
	ownedRoute     ownership = 1 << iota // a tunnel leads to it
	ownedPod                             // a pod whose interface we have
	ownedException                       // a route within a tunnel's that leads elsewhere: packet by packet it is the vRouter's to say
)

// owning is why a prefix is owned, and the ways to it in the shortcut: for a route and for a pod, 0 where there is none.
type owning struct {
	why   ownership
	route uint32
	pod   uint32
}

// way returns the one that holds: a pod of this node comes before a route.
func (o owning) way() uint32 {
	if o.why&ownedPod != 0 {
		return o.pod
	}
	return o.route
}

const (
	// maxOwned is the number of prefixes that can be owned: tunnels' blocks, and pods. Memory is taken as they come.
	maxOwned = 1 << 20
	// maxFlows is the number of flows that are remembered; the one not seen for longest goes first.
	maxFlows = 1 << 16
	// maxTaken is the number of interfaces that can be taken.
	maxTaken = 1 << 14
)

// newSteering loads maps and programs, and attaches one for a moment to the loopback device of the calling thread's
// namespace, so that what is missing is known at start.
func newSteering(io string) (_ *steering, err error) {
	s := &steering{prefixes: make(map[netip.Prefix]owning)}
	defer func() {
		if err != nil {
			err = errors.Join(explainSteering(err, io), s.close())
		}
	}()
	if s.owned, err = ebpf.NewMap(&ebpf.MapSpec{Name: "margay_owned", Type: ebpf.LPMTrie, KeySize: 8, ValueSize: 4,
		MaxEntries: maxOwned, Flags: unix.BPF_F_NO_PREALLOC}); err != nil {
		return nil, err
	}
	if s.flows, err = ebpf.NewMap(&ebpf.MapSpec{Name: "margay_flows", Type: ebpf.LRUHash, KeySize: 16, ValueSize: 4,
		MaxEntries: maxFlows}); err != nil {
		return nil, err
	}
	if s.taken, err = ebpf.NewMap(&ebpf.MapSpec{Name: "margay_taken", Type: ebpf.Hash, KeySize: 4, ValueSize: 8,
		MaxEntries: maxTaken, Flags: unix.BPF_F_NO_PREALLOC}); err != nil {
		return nil, err
	}
	load := func(name string, kind ebpf.ProgramType, program asm.Instructions) *ebpf.Program {
		if err != nil {
			return nil
		}
		var p *ebpf.Program
		p, err = ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: kind, License: "GPL", Instructions: program})
		return p
	}
	if io == IOXDP {
		s.sockets, err = ebpf.NewMap(&ebpf.MapSpec{Name: "margay_pods", Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: maxTaken})
		if err == nil {
			s.redirect = load("margay_redirect", ebpf.XDP, s.classify(asm.FnXdpLoadBytes, xdpIndex, s.toSocket(), returns(xdpPass)))
		}
	}
	if io == IOTC && err == nil {
		s.shortcut, err = newShortcut()
	}
	s.filter = load("margay_filter", ebpf.SocketFilter, marked())
	s.record = load("margay_record", ebpf.SchedCLS, s.recorder())
	if err == nil {
		owned := claimed()
		if s.shortcut != nil {
			owned = append(s.shortcut.depart(), owned...)
		}
		s.claim = load("margay_claim", ebpf.SchedCLS, s.classify(asm.FnSkbLoadBytes, skbIndex, owned, returns(tcxNext)))
	}
	if s.shortcut != nil {
		s.shortcut.arrival = load("margay_arrive", ebpf.SchedCLS, s.shortcut.arrive(s))
		s.shortcut.note = load("margay_note", ebpf.SchedCLS, s.shortcut.noter(s))
	}
	if err != nil {
		return nil, err
	}
	probe, err := s.attach(loopbackIndex, true)
	if err != nil {
		return nil, err
	}
	return s, closeLinks(probe)
}

// explainSteering makes the kernel's answer a Missing. What tc and xdp need beside the rest may be all that it lacks.
func explainSteering(err error, io string) error {
	what, do := "BPF for --attach direct", "choose --attach veth"
	if io != IOPacket {
		what, do = what+" --io "+io, doPacket+", or --attach veth"
	}
	switch {
	case errors.Is(err, unix.EPERM):
		return &Missing{What: what, Err: unix.EPERM, Do: "add the capabilities BPF and NET_ADMIN, or choose --attach veth"}
	case errors.Is(err, ebpf.ErrNotSupported):
		return &Missing{What: what + " (TCX, Linux 6.6)", Err: ebpf.ErrNotSupported, Do: do}
	}
	return &Missing{What: what + " (TCX, Linux 6.6)", Err: unwrapErrno(err), Do: do}
}

// attach puts the TCX programs onto an interface of the calling thread's namespace: the one that records, and the one
// that claims.
func (s *steering) attach(index int, claiming bool) ([]link.Link, error) {
	var links []link.Link
	for _, at := range []struct {
		program *ebpf.Program
		where   ebpf.AttachType
	}{{s.record, ebpf.AttachTCXEgress}, {s.claim, ebpf.AttachTCXIngress}} {
		if at.program == s.claim && !claiming {
			continue
		}
		l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: at.program, Attach: at.where, Anchor: link.Head()})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("attach the BPF program: %w", err), closeLinks(links))
		}
		links = append(links, l)
	}
	return links, nil
}

// take opens or closes the gate of the interface index, whose pod has the address. slot is where its AF_XDP socket, if it
// has one, is in sockets.
func (s *steering) take(index, slot int, pod netip.Addr, on bool) error {
	var err error
	if on {
		address := pod.As4()
		err = s.taken.Put(uint32(index), append(binary.NativeEndian.AppendUint32(nil, uint32(slot)), address[:]...))
	} else if err = s.taken.Delete(uint32(index)); errors.Is(err, ebpf.ErrKeyNotExist) {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("map of interfaces: %w", err)
	}
	return nil
}

func closeLinks(links []link.Link) error {
	var errs []error
	for _, l := range links {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// own adds a reason why a prefix is owned, or takes it away. way is the one that the shortcut has for that reason.
func (s *steering) own(p netip.Prefix, why ownership, on bool, way uint32) error {
	if !p.Addr().Is4() {
		return nil
	}
	had := s.prefixes[p]
	has := had
	has.why &^= why
	if on {
		has.why |= why
	}
	switch why {
	case ownedPod:
		has.pod = way
	case ownedRoute:
		has.route = way
	}
	key := make([]byte, 8)
	binary.NativeEndian.PutUint32(key, uint32(p.Bits()))
	copy(key[4:], p.Addr().AsSlice())
	switch {
	case has == had:
		return nil
	case has.why == 0:
		delete(s.prefixes, p)
		if err := s.owned.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("map of owned prefixes: %s: %w", p, err)
		}
		return nil
	}
	s.prefixes[p] = has
	if had.why != 0 && had.way() == has.way() {
		return nil
	}
	if err := s.owned.Put(key, has.way()); err != nil {
		if had.why == 0 {
			delete(s.prefixes, p)
		} else {
			s.prefixes[p] = had
		}
		return fmt.Errorf("map of owned prefixes: %s: %w", p, err)
	}
	return nil
}

func (s *steering) close() error {
	var errs []error
	if s.shortcut != nil {
		errs = append(errs, s.shortcut.close())
	}
	return errors.Join(append(errs, closeBPF([]*ebpf.Program{s.filter, s.claim, s.record, s.redirect}, []*ebpf.Map{s.owned, s.flows, s.taken, s.sockets}))...)
}

// closeBPF closes what there is of programs and maps.
func closeBPF(programs []*ebpf.Program, maps []*ebpf.Map) error {
	var errs []error
	for _, p := range programs {
		if p != nil {
			errs = append(errs, p.Close())
		}
	}
	for _, m := range maps {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	return errors.Join(errs...)
}

// Where the programs keep a packet's headers: distances from the frame pointer, such that all fields are aligned. The
// last 16 bytes are the key of a flow: addresses, ports, protocol.
const (
	stackFrame    = -42
	stackType     = stackFrame + 12
	stackIP       = stackFrame + ethernetHeader
	stackFragment = stackIP + 6
	stackProtocol = stackIP + 9
	stackFlow     = stackIP + 12
	stackSource   = stackFlow
	stackTarget   = stackFlow + 4
	stackPorts    = stackFlow + 8
	stackFlowEnd  = stackFlow + 12
	stackPrefix   = -56 // the key of owned: length, address
	stackReverse  = -64 // the key of a flow's other direction, up to -48
	stackValue    = -72

	headersLen = ethernetHeader + 20
)

// loadBytes copies n bytes of the packet in R6 to the stack, or goes to label.
func loadBytes(load asm.BuiltinFunc, from, to, n int32, label string) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, from),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, to),
		asm.Mov.Imm(asm.R4, n),
		load.Call(),
		asm.JNE.Imm(asm.R0, 0, label),
	}
}

// loadHeaders copies the Ethernet and IPv4 headers to the stack and the protocol into R7; what is no plain IPv4 packet
// for this host, or has one of the fragment bits, goes to label.
func loadHeaders(load asm.BuiltinFunc, fragment uint16, label string) asm.Instructions {
	return append(loadBytes(load, 0, stackFrame, headersLen, label),
		asm.LoadMem(asm.R0, asm.RFP, stackType, asm.Half),
		asm.JNE.Imm(asm.R0, int32(htons(unix.ETH_P_IP)), label),
		asm.LoadMem(asm.R0, asm.RFP, stackFrame, asm.Byte),
		asm.And.Imm(asm.R0, 1), // a group address
		asm.JNE.Imm(asm.R0, 0, label),
		asm.LoadMem(asm.R0, asm.RFP, stackIP, asm.Byte),
		asm.JNE.Imm(asm.R0, 0x45, label), // IPv4 without options
		asm.LoadMem(asm.R0, asm.RFP, stackFragment, asm.Half),
		asm.And.Imm(asm.R0, int32(htons(fragment))),
		asm.JNE.Imm(asm.R0, 0, label),
		asm.LoadMem(asm.R7, asm.RFP, stackProtocol, asm.Byte),
	)
}

// The fields of the fragment word (RFC 791), and the protocols whose ports a connection tracker may rewrite.
const (
	moreFragments  = 0x2000
	fragmentOffset = 0x1fff
)

var portProtocols = []int32{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP, unix.IPPROTO_UDPLITE}

// The types of ICMP messages about other packets (RFC 792).
var icmpErrors = []int32{3, 4, 5, 11, 12}

func lookup(m *ebpf.Map, key int32) asm.Instructions {
	return asm.Instructions{
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, key),
		asm.FnMapLookupElem.Call(),
	}
}

func returns(verdict int32) asm.Instructions {
	return asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()}
}

// classify is the program, whatever its type, that goes to owned or to kernel. load is its type's way to read the packet,
// index where its context has the interface; R6 holds the context. At owned R0 points to what taken says, R8 has what
// owned says, and R7 the protocol.
func (s *steering) classify(load asm.BuiltinFunc, index int16, owned, kernel asm.Instructions) asm.Instructions {
	program := append(asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}, loadHeaders(load, moreFragments|fragmentOffset, "kernel")...)
	program = append(program, asm.JEq.Imm(asm.R7, unix.IPPROTO_ICMP, "icmp"))
	for _, p := range portProtocols {
		program = append(program, asm.JEq.Imm(asm.R7, p, "ports"))
	}
	program = append(program, asm.Ja.Label("route"))

	// An ICMP error may be about a connection that the kernel has rewritten.
	icmp := loadBytes(load, headersLen, stackPorts, 1, "kernel")
	icmp[0] = icmp[0].WithSymbol("icmp")
	program = append(append(program, icmp...), asm.LoadMem(asm.R0, asm.RFP, stackPorts, asm.Byte))
	for _, t := range icmpErrors {
		program = append(program, asm.JEq.Imm(asm.R0, t, "kernel"))
	}
	program = append(program, asm.Ja.Label("route"))

	ports := loadBytes(load, headersLen, stackPorts, 4, "kernel")
	ports[0] = ports[0].WithSymbol("ports")
	program = append(append(program, ports...), asm.StoreMem(asm.RFP, stackFlowEnd, asm.R7, asm.Word))
	program = append(append(program, lookup(s.flows, stackFlow)...), asm.JNE.Imm(asm.R0, 0, "kernel"))

	program = append(program,
		asm.Mov.Imm(asm.R0, 32).WithSymbol("route"),
		asm.StoreMem(asm.RFP, stackPrefix, asm.R0, asm.Word),
		asm.LoadMem(asm.R0, asm.RFP, stackTarget, asm.Word),
		asm.StoreMem(asm.RFP, stackPrefix+4, asm.R0, asm.Word),
	)
	program = append(append(program, lookup(s.owned, stackPrefix)...), asm.JEq.Imm(asm.R0, 0, "kernel"))
	program = append(program,
		asm.LoadMem(asm.R8, asm.R0, 0, asm.Word),
		asm.LoadMem(asm.R0, asm.R6, index, asm.Word),
		asm.StoreMem(asm.RFP, stackPrefix, asm.R0, asm.Word),
	)
	program = append(append(program, lookup(s.taken, stackPrefix)...), asm.JEq.Imm(asm.R0, 0, "kernel"))
	kernel[0] = kernel[0].WithSymbol("kernel")
	return append(append(program, owned...), kernel...)
}

// claimed is what becomes of a packet that the vRouter owns: it is marked for the socket filter of the vRouter's AF_PACKET
// socket, which comes after this program, and the kernel's stack leaves alone what is for another host.
func claimed() asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6).WithSymbol("claim"),
		asm.Mov.Imm(asm.R2, unix.PACKET_OTHERHOST),
		asm.FnSkbChangeType.Call(),
		asm.Mov.Imm(asm.R0, retagMark),
		asm.StoreMem(asm.R6, skbMark, asm.R0, asm.Word),
		asm.Mov.Imm(asm.R0, tcxPass),
		asm.Return(),
	}
}

// marked is the socket filter: it takes what is claimed, and nothing else.
func marked() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R1, asm.R1, skbMark, asm.Word),
		asm.Mov.Imm(asm.R0, 0),
		asm.JNE.Imm(asm.R1, retagMark, "other"),
		asm.Mov.Imm(asm.R0, 0x40000),
		asm.Return().WithSymbol("other"),
	}
}

// toSocket redirects to the AF_XDP socket of the interface, which is bound to the first queue; what comes by others, and to
// an interface without a socket, is the kernel's.
func (s *steering) toSocket() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R1, asm.R6, xdpQueue, asm.Word),
		asm.JNE.Imm(asm.R1, 0, "kernel"),
		asm.LoadMem(asm.R2, asm.R0, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, s.sockets.FD()),
		asm.Mov.Imm(asm.R3, xdpPass),
		asm.FnRedirectMap.Call(),
		asm.Return(),
	}
}

// xdpIndex is the offset of ingress_ifindex in struct xdp_md, in bytes.
const xdpIndex = 12

// recorder is the program at the interface's egress: it puts the other direction of what the kernel delivers into flows.
// What the vRouter delivers carries its mark.
func (s *steering) recorder() asm.Instructions {
	program := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R0, asm.R6, skbMark, asm.Word),
		asm.JEq.Imm(asm.R0, retagMark, "next"),
	}
	program = append(program, loadHeaders(asm.FnSkbLoadBytes, fragmentOffset, "next")...)
	for _, p := range portProtocols {
		program = append(program, asm.JEq.Imm(asm.R7, p, "ports"))
	}
	program = append(program, asm.Ja.Label("next"))
	ports := loadBytes(asm.FnSkbLoadBytes, headersLen, stackPorts, 4, "next")
	ports[0] = ports[0].WithSymbol("ports")
	return append(append(program, ports...), s.recordFlow()...)
}

// recordFlow is the end of a program that puts the other direction of the flow on its stack into flows.
func (s *steering) recordFlow() asm.Instructions {
	var program asm.Instructions
	for _, move := range []struct {
		from, to int16
		size     asm.Size
	}{{stackTarget, stackReverse, asm.Word}, {stackSource, stackReverse + 4, asm.Word},
		{stackPorts + 2, stackReverse + 8, asm.Half}, {stackPorts, stackReverse + 10, asm.Half}} {
		program = append(program, asm.LoadMem(asm.R0, asm.RFP, move.from, move.size), asm.StoreMem(asm.RFP, move.to, asm.R0, move.size))
	}
	program = append(program, asm.StoreMem(asm.RFP, stackReverse+12, asm.R7, asm.Word))
	// One that is there already only has to be looked at to stay.
	program = append(append(program, lookup(s.flows, stackReverse)...), asm.JNE.Imm(asm.R0, 0, "next"))
	return append(program,
		asm.Mov.Imm(asm.R0, 1),
		asm.StoreMem(asm.RFP, stackValue, asm.R0, asm.Word),
		asm.LoadMapPtr(asm.R1, s.flows.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, stackReverse),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, stackValue),
		asm.Mov.Imm(asm.R4, 0), // BPF_ANY
		asm.FnMapUpdateElem.Call(),
		asm.Mov.Imm(asm.R0, tcxNext).WithSymbol("next"),
		asm.Return(),
	)
}
