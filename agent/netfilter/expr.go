package netfilter

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"margay/vrouter/packet"
)

// evaluation is one rule at work on a packet.
type evaluation struct {
	*walk
	chain   *chain
	certain bool // the packet surely comes to this rule
	sure    bool // every test so far has had an answer
	unknown []string

	regs  [64]byte
	known [64]bool
	// why says, of bytes that are not known, what they would be.
	why [64]string
}

// doubted notes that a test has no answer; the rule goes on as if it had matched.
func (e *evaluation) doubted(what string) int {
	e.sure = false
	if !slices.Contains(e.unknown, what) {
		e.unknown = append(e.unknown, what)
	}
	return verdictContinue
}

// run evaluates a rule. verdictContinue and verdictBreak both lead to the next one.
func (e *evaluation) run(exprs []expression) (code int, target string) {
	for _, x := range exprs {
		switch code, target = e.step(x); code {
		case verdictContinue:
		case verdictBreak:
			return
		default:
			return
		}
	}
	return verdictContinue, ""
}

// register returns where a register begins: the four of 16 bytes and the sixteen of 4 share their room.
func register(n uint32) (int, bool) {
	switch {
	case n >= unix.NFT_REG_1 && n <= unix.NFT_REG_4:
		return int(n-unix.NFT_REG_1) * 16, true
	case n >= unix.NFT_REG32_00 && n <= unix.NFT_REG32_15:
		return int(n-unix.NFT_REG32_00) * 4, true
	}
	return 0, false
}

// put writes a value into a register, and zeros up to the next word.
func (e *evaluation) put(reg uint32, value []byte) int {
	at, ok := register(reg)
	if !ok || at+len(value) > len(e.regs) {
		return e.doubted("a register that is none")
	}
	for i := range min((len(value)+3)&^3, len(e.regs)-at) {
		e.regs[at+i], e.known[at+i] = 0, true
	}
	copy(e.regs[at:], value)
	return verdictContinue
}

// puzzle writes a value that cannot be told.
func (e *evaluation) puzzle(reg uint32, length int, what string) int {
	at, ok := register(reg)
	if !ok {
		return e.doubted(what)
	}
	for i := at; i < min(at+max(length, 4), len(e.regs)); i++ {
		e.known[i], e.why[i] = false, what
	}
	return verdictContinue
}

// get reads a register; false, with what is missing, where a byte of it is not known.
func (e *evaluation) get(reg uint32, length int) (value []byte, missing string, ok bool) {
	at, valid := register(reg)
	if !valid || at+length > len(e.regs) {
		return nil, "a register that is none", false
	}
	for i := at; i < at+length; i++ {
		if !e.known[i] {
			return nil, orElse(e.why[i], "what nobody has loaded"), false
		}
	}
	return e.regs[at : at+length], "", true
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

func host32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
func host16(v uint16) []byte { return binary.NativeEndian.AppendUint16(nil, v) }

func yes(b bool) int {
	if b {
		return verdictContinue
	}
	return verdictBreak
}

// step evaluates one expression.
func (e *evaluation) step(x expression) (code int, target string) {
	a := x.attrs
	switch x.name {
	case "counter", "log", "last", "flow_offload", "dup":
		return verdictContinue, ""
	case "immediate":
		return e.immediate(a)
	case "lookup":
		return e.lookup(a)
	case "cmp":
		return e.compare(a), ""
	case "range":
		return e.inRange(a), ""
	case "bitwise":
		return e.bitwise(a), ""
	case "byteorder":
		return e.byteorder(a), ""
	case "meta":
		return e.meta(a), ""
	case "payload":
		return e.payload(a), ""
	case "ct":
		return e.ct(a), ""
	case "fib":
		return e.fib(a), ""
	case "exthdr":
		return e.exthdr(a), ""
	case "notrack":
		e.track(StateUntracked)
		return verdictContinue, ""
	case "objref":
		if a.u32(unix.NFTA_OBJREF_IMM_TYPE) == unix.NFT_OBJECT_COUNTER {
			return verdictContinue, ""
		}
		return e.doubted("an object of quota, limit or another kind"), ""
	case "dynset":
		if len(a) > 0 && !a.has(unix.NFTA_DYNSET_EXPR) && !a.has(dynsetExpressions) {
			return verdictContinue, ""
		}
		return e.doubted("a meter"), ""
	case "limit", "quota", "connlimit":
		return e.doubted(x.name), ""
	case "numgen", "hash", "rt", "socket", "osf", "xfrm", "tunnel":
		return e.puzzle(a.u32(1), 16, x.name), ""
	case "reject":
		return verdictDrop, ""
	case "nat", "masq", "redir":
		return e.translate(x), ""
	case "match":
		return e.match(a), ""
	case "target":
		return e.target(a), ""
	}
	e.doubted("the expression " + x.name)
	return verdictOpaque, ""
}

// dynsetExpressions is NFTA_DYNSET_EXPRESSIONS.
const dynsetExpressions = 10

// verdict reads the attribute of a verdict.
func verdict(data attributes) (code int, target string) {
	v := data.nested(unix.NFTA_DATA_VERDICT)
	code = int(int32(v.u32(unix.NFTA_VERDICT_CODE)))
	switch {
	case code < verdictReturn, code > 0xff && code&0xff != verdictQueue, code == 2, code > verdictQueue && code <= 0xff:
		return verdictOpaque, ""
	case code >= 0 && code&0xff == verdictQueue:
		return verdictOpaque, ""
	}
	return code, v.text(unix.NFTA_VERDICT_CHAIN)
}

func (e *evaluation) immediate(a attributes) (code int, target string) {
	data := a.nested(unix.NFTA_IMMEDIATE_DATA)
	if data.has(unix.NFTA_DATA_VERDICT) {
		if code, target = verdict(data); code == verdictOpaque {
			e.doubted("a program decides (queue)")
		}
		return code, target
	}
	return e.put(a.u32(unix.NFTA_IMMEDIATE_DREG), data[unix.NFTA_DATA_VALUE]), ""
}

func (e *evaluation) compare(a attributes) int {
	want := a.nested(unix.NFTA_CMP_DATA)[unix.NFTA_DATA_VALUE]
	got, missing, ok := e.get(a.u32(unix.NFTA_CMP_SREG), len(want))
	if !ok {
		return e.doubted(missing)
	}
	c := bytes.Compare(got, want)
	switch a.u32(unix.NFTA_CMP_OP) {
	case unix.NFT_CMP_EQ:
		return yes(c == 0)
	case unix.NFT_CMP_NEQ:
		return yes(c != 0)
	case unix.NFT_CMP_LT:
		return yes(c < 0)
	case unix.NFT_CMP_LTE:
		return yes(c <= 0)
	case unix.NFT_CMP_GT:
		return yes(c > 0)
	case unix.NFT_CMP_GTE:
		return yes(c >= 0)
	}
	return e.doubted("a comparison of a new kind")
}

func (e *evaluation) inRange(a attributes) int {
	from := a.nested(unix.NFTA_RANGE_FROM_DATA)[unix.NFTA_DATA_VALUE]
	to := a.nested(unix.NFTA_RANGE_TO_DATA)[unix.NFTA_DATA_VALUE]
	got, missing, ok := e.get(a.u32(unix.NFTA_RANGE_SREG), len(from))
	if !ok {
		return e.doubted(missing)
	}
	inside := bytes.Compare(got, from) >= 0 && bytes.Compare(got, to) <= 0
	return yes(inside == (a.u32(unix.NFTA_RANGE_OP) == unix.NFT_RANGE_EQ))
}

const bitwiseOp = 6 // NFTA_BITWISE_OP

func (e *evaluation) bitwise(a attributes) int {
	length := int(a.u32(unix.NFTA_BITWISE_LEN))
	reg := a.u32(unix.NFTA_BITWISE_DREG)
	got, missing, ok := e.get(a.u32(unix.NFTA_BITWISE_SREG), length)
	mask := a.nested(unix.NFTA_BITWISE_MASK)[unix.NFTA_DATA_VALUE]
	xor := a.nested(unix.NFTA_BITWISE_XOR)[unix.NFTA_DATA_VALUE]
	switch {
	case !ok:
		return e.puzzle(reg, length, missing)
	case a.u32(bitwiseOp) != 0 || len(mask) != length || len(xor) != length:
		return e.puzzle(reg, length, "a shift of bits")
	}
	out := make([]byte, length)
	for i := range out {
		out[i] = got[i]&mask[i] ^ xor[i]
	}
	return e.put(reg, out)
}

func (e *evaluation) byteorder(a attributes) int {
	length, size := int(a.u32(unix.NFTA_BYTEORDER_LEN)), int(a.u32(unix.NFTA_BYTEORDER_SIZE))
	got, missing, ok := e.get(a.u32(unix.NFTA_BYTEORDER_SREG), length)
	if !ok || size == 0 {
		return e.puzzle(a.u32(unix.NFTA_BYTEORDER_DREG), length, missing)
	}
	out := slices.Clone(got)
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		for i := 0; i+size <= length; i += size {
			slices.Reverse(out[i : i+size])
		}
	}
	return e.put(a.u32(unix.NFTA_BYTEORDER_DREG), out)
}

func ifName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func (e *evaluation) meta(a attributes) int {
	key := a.u32(unix.NFTA_META_KEY)
	if a.has(unix.NFTA_META_SREG) {
		return e.setMeta(key, a.u32(unix.NFTA_META_SREG))
	}
	reg, p := a.u32(unix.NFTA_META_DREG), e.p
	link := func(l Link, value []byte) int {
		if l.Index == 0 && key != unix.NFT_META_IIFNAME && key != unix.NFT_META_OIFNAME && key != unix.NFT_META_IIF && key != unix.NFT_META_OIF {
			return verdictBreak // no interface on this side
		}
		return e.put(reg, value)
	}
	switch key {
	case unix.NFT_META_LEN:
		return e.put(reg, host32(uint32(len(p.IP))))
	case unix.NFT_META_PROTOCOL:
		return e.put(reg, binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP))
	case unix.NFT_META_NFPROTO:
		return e.put(reg, []byte{unix.NFPROTO_IPV4})
	case unix.NFT_META_L4PROTO:
		return e.put(reg, []byte{packet.IPv4(p.IP).Protocol()})
	case unix.NFT_META_MARK:
		if p.markUnknown {
			return e.puzzle(reg, 4, "meta mark")
		}
		return e.put(reg, host32(p.Mark))
	case unix.NFT_META_IIF:
		return link(p.In, host32(uint32(p.In.Index)))
	case unix.NFT_META_OIF:
		return link(p.Out, host32(uint32(p.Out.Index)))
	case unix.NFT_META_IIFNAME:
		return link(p.In, ifName(p.In.Name))
	case unix.NFT_META_OIFNAME:
		return link(p.Out, ifName(p.Out.Name))
	case unix.NFT_META_IIFTYPE:
		return link(p.In, host16(p.In.Type))
	case unix.NFT_META_OIFTYPE:
		return link(p.Out, host16(p.Out.Type))
	case unix.NFT_META_IIFGROUP:
		return link(p.In, host32(p.In.Group))
	case unix.NFT_META_OIFGROUP:
		return link(p.Out, host32(p.Out.Group))
	case unix.NFT_META_PKTTYPE:
		return e.put(reg, []byte{unix.PACKET_HOST})
	}
	return e.puzzle(reg, 16, fmt.Sprintf("meta key %d", key))
}

func (e *evaluation) setMeta(key, reg uint32) int {
	if key != unix.NFT_META_MARK {
		return verdictContinue // trace, priority and the like: nobody here asks
	}
	value, _, ok := e.get(reg, 4)
	if !ok || !e.certain || !e.sure {
		e.p.markUnknown = true
		return verdictContinue
	}
	e.p.Mark, e.p.markUnknown = binary.NativeEndian.Uint32(value), false
	return verdictContinue
}

// header returns the bytes from one of the packet's headers on, nil for one that cannot be told, false for none.
func (e *evaluation) header(base uint32) (b []byte, there bool) {
	ip := packet.IPv4(e.p.IP)
	switch base {
	case unix.NFT_PAYLOAD_NETWORK_HEADER:
		return e.p.IP, true
	case unix.NFT_PAYLOAD_TRANSPORT_HEADER:
		return ip.Payload(), ip.FragOffset() == 0
	}
	return nil, true
}

func (e *evaluation) payload(a attributes) int {
	offset, length := int(a.u32(unix.NFTA_PAYLOAD_OFFSET)), int(a.u32(unix.NFTA_PAYLOAD_LEN))
	b, there := e.header(a.u32(unix.NFTA_PAYLOAD_BASE))
	switch {
	case !there:
		return verdictBreak
	case b == nil && a.has(unix.NFTA_PAYLOAD_SREG):
		return verdictContinue // another hardware address
	case b == nil:
		return e.puzzle(a.u32(unix.NFTA_PAYLOAD_DREG), length, "the header below IP, or one inside")
	case offset+length > len(b):
		return verdictBreak
	case !a.has(unix.NFTA_PAYLOAD_SREG):
		return e.put(a.u32(unix.NFTA_PAYLOAD_DREG), b[offset:offset+length])
	}
	value, missing, ok := e.get(a.u32(unix.NFTA_PAYLOAD_SREG), length)
	if !ok || !e.sure || !e.certain {
		return e.doubted("a packet that is rewritten: " + missing)
	}
	copy(b[offset:], value)
	return verdictContinue
}

func (e *evaluation) track(state uint32) {
	if !e.certain || !e.sure {
		state = 0
	}
	e.p.State = state
}

func (e *evaluation) ct(a attributes) int {
	key, reg := a.u32(unix.NFTA_CT_KEY), a.u32(unix.NFTA_CT_DREG)
	if a.has(unix.NFTA_CT_SREG) {
		if key == unix.NFT_CT_MARK {
			value, _, ok := e.get(a.u32(unix.NFTA_CT_SREG), 4)
			if e.p.ctMarkUnknown = !ok || !e.certain || !e.sure; !e.p.ctMarkUnknown {
				e.p.ctMark = binary.NativeEndian.Uint32(value)
			}
		}
		return verdictContinue
	}
	p := e.p
	early := e.base.hook == Ingress || e.base.priority <= trackerPriority && (e.base.hook == Prerouting || e.base.hook == Output)
	switch {
	case early && key == unix.NFT_CT_STATE:
		return e.put(reg, host32(StateInvalid))
	case early, p.State == StateInvalid && key != unix.NFT_CT_STATE, p.State == StateUntracked && key != unix.NFT_CT_STATE:
		return verdictBreak
	case key == unix.NFT_CT_STATE && p.State != 0:
		return e.put(reg, host32(p.State))
	case key == unix.NFT_CT_DIRECTION && p.State != 0:
		return e.put(reg, []byte{map[bool]byte{true: 1}[p.Reply]})
	case key == unix.NFT_CT_MARK && p.State == StateNew && !p.ctMarkUnknown:
		return e.put(reg, host32(p.ctMark))
	case key == unix.NFT_CT_STATUS && p.State == StateNew && !p.natted && e.base.hook != Postrouting:
		return e.put(reg, host32(0))
	case key == unix.NFT_CT_PROTOCOL && p.State != 0:
		return e.put(reg, []byte{packet.IPv4(p.IP).Protocol()})
	case key == unix.NFT_CT_L3PROTOCOL && p.State != 0:
		return e.put(reg, []byte{unix.NFPROTO_IPV4})
	}
	return e.puzzle(reg, 16, "the connection tracker's key "+fmt.Sprint(key))
}

// fib answers what the node's routing knows of an address: its kind. By which interface it is reached is left open.
func (e *evaluation) fib(a attributes) int {
	const addrType, saddr, daddr = unix.NFT_FIB_RESULT_ADDRTYPE, unix.NFTA_FIB_F_SADDR, unix.NFTA_FIB_F_DADDR
	reg, flags := a.u32(unix.NFTA_FIB_DREG), a.u32(unix.NFTA_FIB_FLAGS)
	ip := packet.IPv4(e.p.IP)
	addr := ip.Dst()
	switch {
	case a.u32(unix.NFTA_FIB_RESULT) != addrType, flags&^(saddr|daddr) != 0, e.p.AddrType == nil:
		return e.puzzle(reg, 16, "fib")
	case flags&saddr != 0:
		addr = ip.Src()
	}
	kind, err := e.p.AddrType(addr)
	if err != nil {
		return e.puzzle(reg, 4, "fib: "+err.Error())
	}
	return e.put(reg, host32(uint32(kind)))
}

// exthdr looks for an option, of which the packets that are traced have none.
func (e *evaluation) exthdr(a attributes) int {
	switch {
	case a.has(unix.NFTA_EXTHDR_SREG): // a real packet may have it: what follows is reached or not
		return e.doubted("an option that is rewritten")
	case a.u32(unix.NFTA_EXTHDR_FLAGS)&unix.NFT_EXTHDR_F_PRESENT != 0:
		return e.put(a.u32(unix.NFTA_EXTHDR_DREG), []byte{0})
	}
	return verdictBreak
}

// translate notes a rewritten address; the verdict of all three is to accept.
func (e *evaluation) translate(x expression) int {
	w := &Outcome{}
	dst := x.name == "redir" || x.name == "nat" && x.attrs.u32(unix.NFTA_NAT_TYPE) == unix.NFT_NAT_DNAT
	switch {
	case x.name == "masq":
		w.Masqueraded = true
	case x.name == "nat":
		value, _, ok := e.get(x.attrs.u32(unix.NFTA_NAT_REG_ADDR_MIN), 4)
		if !x.attrs.has(unix.NFTA_NAT_REG_ADDR_MIN) {
			break // only the port
		}
		if !ok || x.attrs.has(unix.NFTA_NAT_REG_ADDR_MAX) && x.attrs.u32(unix.NFTA_NAT_REG_ADDR_MAX) != x.attrs.u32(unix.NFTA_NAT_REG_ADDR_MIN) {
			e.doubted("which address it gets")
			return verdictOpaque
		}
		w.Source = netip.AddrFrom4([4]byte(value))
	default:
		w.Redirected = true
		return e.rewrite(w, x.attrs.has(unix.NFTA_REDIR_REG_PROTO_MIN), x.attrs.u32(unix.NFTA_REDIR_REG_PROTO_MIN))
	}
	if dst {
		w.Destination, w.Source = w.Source, netip.Addr{}
	}
	return e.rewrite(w, x.attrs.has(unix.NFTA_NAT_REG_PROTO_MIN) && dst, x.attrs.u32(unix.NFTA_NAT_REG_PROTO_MIN))
}

// rewrite writes what a translation changes into the packet, and port's register into its destination port.
func (e *evaluation) rewrite(w *Outcome, port bool, reg uint32) int {
	if !e.certain || !e.sure {
		e.doubted("whether its address is rewritten")
		return verdictOpaque
	}
	e.out.Rewriter = e.chain.String()
	e.out.Source, e.out.Destination, e.out.Masqueraded, e.out.Redirected = w.Source, w.Destination, w.Masqueraded, w.Redirected
	ip := packet.IPv4(e.p.IP)
	if w.Destination.IsValid() {
		copy(ip[16:20], w.Destination.AsSlice())
		e.p.natted = true
	}
	if w.Source.IsValid() {
		copy(ip[12:16], w.Source.AsSlice())
	}
	if value, _, ok := e.get(reg, 2); port && ok && len(ip.Payload()) >= 4 {
		copy(ip.Payload()[2:4], value)
	}
	ip[10], ip[11] = 0, 0
	binary.BigEndian.PutUint16(ip[10:], packet.Checksum(ip[:ip.HeaderLen()], 0))
	return verdictAccept
}
