package netfilter

import (
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"

	"margay/vrouter/packet"
)

// The matches and targets of iptables, which iptables-nft puts into nf_tables as they are. Their layouts are the kernel's
// (include/uapi/linux/netfilter/xt_*.h); numbers are in the host's byte order.

func u16(b []byte, at int) uint16 { return binary.NativeEndian.Uint16(b[at:]) }
func u32(b []byte, at int) uint32 { return binary.NativeEndian.Uint32(b[at:]) }

// matches knows what it can decode: the shortest length of the information, and what it says.
var matches = map[string]struct {
	length int
	test   func(e *evaluation, revision uint32, b []byte) int
}{
	"comment":   {0, func(*evaluation, uint32, []byte) int { return verdictContinue }},
	"tcp":       {12, (*evaluation).matchTCP},
	"udp":       {9, (*evaluation).matchUDP},
	"icmp":      {4, (*evaluation).matchICMP},
	"mark":      {9, (*evaluation).matchMark},
	"multiport": {48, (*evaluation).matchPorts},
	"conntrack": {154, (*evaluation).matchTracker},
	"addrtype":  {8, (*evaluation).matchAddrType},
}

func (e *evaluation) match(a attributes) int {
	name, b := a.text(unix.NFTA_MATCH_NAME), a[unix.NFTA_MATCH_INFO]
	m, ok := matches[name]
	if !ok || len(b) < m.length {
		return e.doubted("iptables' match " + name)
	}
	return m.test(e, a.u32(unix.NFTA_MATCH_REV), b)
}

// transport returns the header behind IP, when the protocol is the one and long enough.
func (e *evaluation) transport(protocol byte, length int) ([]byte, bool) {
	ip := packet.IPv4(e.p.IP)
	b := ip.Payload()
	return b, ip.Protocol() == protocol && ip.FragOffset() == 0 && len(b) >= length
}

func portIn(port uint16, b []byte, at int, inverted bool) bool {
	return (port >= u16(b, at) && port <= u16(b, at+2)) != inverted
}

func (e *evaluation) matchTCP(_ uint32, b []byte) int {
	h, ok := e.transport(packet.ProtocolTCP, 20)
	if !ok {
		return verdictBreak
	}
	if b[8] != 0 { // an option
		return e.doubted("iptables' match tcp with an option")
	}
	inverted := b[11]
	return yes(portIn(binary.BigEndian.Uint16(h), b, 0, inverted&1 != 0) && portIn(binary.BigEndian.Uint16(h[2:]), b, 4, inverted&2 != 0) &&
		(h[13]&b[9] == b[10]) != (inverted&4 != 0))
}

func (e *evaluation) matchUDP(_ uint32, b []byte) int {
	h, ok := e.transport(packet.ProtocolUDP, 8)
	return yes(ok && portIn(binary.BigEndian.Uint16(h), b, 0, b[8]&1 != 0) && portIn(binary.BigEndian.Uint16(h[2:]), b, 4, b[8]&2 != 0))
}

func (e *evaluation) matchICMP(_ uint32, b []byte) int {
	h, ok := e.transport(unix.IPPROTO_ICMP, 4)
	const anyType = 0xff
	return yes(ok && (b[0] == anyType || h[0] == b[0] && h[1] >= b[1] && h[1] <= b[2]) != (b[3]&1 != 0))
}

func (e *evaluation) matchMark(revision uint32, b []byte) int {
	if revision != 1 || e.p.markUnknown {
		return e.doubted("iptables' match mark")
	}
	return yes((e.p.Mark&u32(b, 4) == u32(b, 0)) != (b[8] != 0))
}

// matchPorts is multiport: ports, or ranges where a flag says that the next one is the end.
func (e *evaluation) matchPorts(revision uint32, b []byte) int {
	const list, flags = 2, 32 // where they begin
	h, ok := e.transport(packet.IPv4(e.p.IP).Protocol(), 4)
	if revision != 1 || b[1] > 15 {
		return e.doubted("iptables' match multiport")
	}
	if !ok {
		return verdictBreak
	}
	source, destination := binary.BigEndian.Uint16(h), binary.BigEndian.Uint16(h[2:])
	in := func(port uint16) bool {
		for i := 0; i < int(b[1]); i++ {
			from := u16(b, list+2*i)
			to := from
			if b[flags+i] != 0 && i+1 < int(b[1]) {
				i++
				to = u16(b, list+2*i)
			}
			if port >= from && port <= to {
				return true
			}
		}
		return false
	}
	found := map[byte]bool{0: in(source), 1: in(destination), 2: in(source) || in(destination)}[b[0]]
	return yes(found != (b[47] != 0))
}

// matchTracker is conntrack, asked for states alone.
func (e *evaluation) matchTracker(revision uint32, b []byte) int {
	const aboutState, untracked, dnat, snat = 1, 256, 128, 64 // XT_CONNTRACK_*
	flags, inverted, states := u16(b, 146), u16(b, 148), uint32(u16(b, 150))
	if revision < 2 || flags != aboutState || e.p.State == 0 || states&(dnat|snat) != 0 && (e.p.State != StateNew || e.p.natted) {
		return e.doubted("iptables' match conntrack")
	}
	is := e.p.State
	if is == StateUntracked {
		is = untracked
	}
	return yes((states&is != 0) != (inverted&aboutState != 0))
}

func (e *evaluation) matchAddrType(revision uint32, b []byte) int {
	const invertSource, invertDestination, limits = 1, 2, 12 // XT_ADDRTYPE_*
	flags := u32(b, 4)
	if revision != 1 || flags&limits != 0 || e.p.AddrType == nil {
		return e.doubted("iptables' match addrtype")
	}
	ip := packet.IPv4(e.p.IP)
	fits := true
	for i, addr := range []struct {
		kinds   uint16
		inverts uint32
	}{{u16(b, 0), invertSource}, {u16(b, 2), invertDestination}} {
		if addr.kinds == 0 {
			continue
		}
		at := ip.Src()
		if i == 1 {
			at = ip.Dst()
		}
		kind, err := e.p.AddrType(at)
		if err != nil {
			return e.doubted("iptables' match addrtype: " + err.Error())
		}
		fits = fits && (addr.kinds&(1<<kind) != 0) != (flags&addr.inverts != 0)
	}
	return yes(fits)
}

// harmless targets let the packet go on to the next rule.
var harmless = []string{"LOG", "NFLOG", "TRACE", "CHECKSUM", "TCPMSS", "CLASSIFY", "DSCP", "TOS", "SET", "TTL", "IDLETIMER", "AUDIT"}

func (e *evaluation) target(a attributes) int {
	name, b := a.text(unix.NFTA_TARGET_NAME), a[unix.NFTA_TARGET_INFO]
	switch {
	case slices.Contains(harmless, name):
		return verdictContinue
	case name == "REJECT":
		return verdictDrop
	case name == "MARK" && a.u32(unix.NFTA_TARGET_REV) == 2 && len(b) >= 8:
		if !e.certain || !e.sure {
			e.p.markUnknown = true
		}
		e.p.Mark = e.p.Mark&^u32(b, 4) ^ u32(b, 0)
		return verdictContinue
	case name == "MARK", name == "CONNMARK":
		e.p.markUnknown, e.p.ctMarkUnknown = true, true
		return verdictContinue
	case name == "CT", name == "NOTRACK":
		e.p.State = 0
		return verdictContinue
	case name == "MASQUERADE":
		return e.rewrite(&Outcome{Masqueraded: true}, false, 0)
	}
	e.doubted("iptables' target " + name)
	return verdictOpaque
}
