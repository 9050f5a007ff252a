package filter

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// maxDepth bounds nesting, so that no text exhausts the stack.
const maxDepth = 100

// Parse reads a filter; an empty text accepts everything. The error names the place and what was expected there.
func Parse(text string) (*Filter, error) {
	tokens, err := scan(text)
	if err != nil {
		return nil, err
	}
	f := &Filter{text: text}
	if len(tokens) == 0 {
		return f, nil
	}
	p := parser{text: text, tokens: tokens}
	if f.root, err = p.expression(); err != nil {
		return nil, err
	}
	if p.peek() != "" {
		return nil, p.fail("expected and, or, or the end")
	}
	return f, nil
}

type parser struct {
	text   string
	tokens []token
	next   int
	depth  int
	last   *qualifiers // of the primitive before: "port 80 or 443"
}

// qualifiers say what a value means.
type qualifiers struct {
	proto string // "", ip, ip6, tcp, udp, sctp
	side  side
	kind  string // host, net, port, portrange, proto
}

// peek returns the next token's text, "" at the end.
func (p *parser) peek() string {
	if p.next < len(p.tokens) {
		return p.tokens[p.next].text
	}
	return ""
}

func (p *parser) accept(words ...string) bool {
	for _, w := range words {
		if p.peek() == w {
			p.next++
			return true
		}
	}
	return false
}

// fail complains about the next token.
func (p *parser) fail(format string, args ...any) error {
	what := "the end"
	if p.next < len(p.tokens) {
		t := p.tokens[p.next]
		what = fmt.Sprintf("%q at character %d", t.text, t.at+1)
	}
	return fmt.Errorf("filter: %s: %s", what, fmt.Sprintf(format, args...))
}

// expression is terms joined by and and or, which bind alike, from left to right, as in libpcap.
func (p *parser) expression() (*node, error) {
	p.depth++
	defer func() { p.depth-- }()
	if p.depth > maxDepth {
		return nil, p.fail("nested deeper than %d", maxDepth)
	}
	left, err := p.term(false)
	if err != nil {
		return nil, err
	}
	for {
		kind := kindAnd
		switch {
		case p.accept("and", "&&"):
		case p.accept("or", "||"):
			kind = kindOr
		default:
			return left, nil
		}
		right, err := p.term(true)
		if err != nil {
			return nil, err
		}
		left = &node{kind: kind, a: left, b: right}
	}
}

// term is a primitive, a negation or a parenthesis; where follows is set also a bare value, which takes the qualifiers of
// the primitive before it.
func (p *parser) term(follows bool) (*node, error) {
	negations := 0
	for p.accept("not", "!") {
		negations++
	}
	n, err := p.positive(follows)
	if err == nil && negations%2 == 1 {
		n = &node{kind: kindNot, a: n}
	}
	return n, err
}

func (p *parser) positive(follows bool) (*node, error) {
	if p.accept("(") {
		n, err := p.expression()
		if err == nil && !p.accept(")") {
			err = p.fail("expected )")
		}
		return n, err
	}
	switch word := p.peek(); word {
	case "":
		return nil, p.fail("expected a test, such as host 10.244.1.2 or tcp port 80")
	case "less", "greater":
		p.next++
		op := lessEqual
		if word == "greater" {
			op = greaterEqual
		}
		n, err := p.number(1 << 31)
		return &node{kind: kindSize, size: &size{op, n}}, err
	case "len":
		p.next++
		op, err := p.operator()
		if err != nil {
			return nil, err
		}
		n, err := p.number(1<<32 - 1)
		return &node{kind: kindSize, size: &size{op, n}}, err
	}
	if p.next+1 < len(p.tokens) && p.tokens[p.next+1].text == "[" {
		return p.field()
	}
	return p.primitive(follows)
}

// primitive is [protocol] [direction] [kind] value, or a protocol alone.
func (p *parser) primitive(follows bool) (*node, error) {
	var q qualifiers
	start := p.next
	switch p.peek() {
	case "ip", "ip6", "tcp", "udp", "sctp":
		q.proto = p.peek()
		p.next++
	case "icmp":
		p.next++
		return &node{kind: kindProtocol, protocol: &protocol{4, 1}}, nil
	case "icmp6":
		p.next++
		return &node{kind: kindProtocol, protocol: &protocol{6, 58}}, nil
	}
	directed, err := p.direction(&q)
	if err != nil {
		return nil, err
	}
	switch word := p.peek(); word {
	case "host", "net", "port", "portrange", "proto":
		q.kind = word
		p.next++
	default:
		switch {
		case q.proto != "" && !directed:
			return protocolAlone(q.proto), nil
		case p.next == start && follows && p.last != nil && isValue(word):
			q = *p.last
		case directed && q.proto == "" && isValue(word):
			q.kind = "host"
		default:
			return nil, p.fail("expected host, net, port, portrange, proto, a protocol (ip, ip6, tcp, udp, sctp, icmp, icmp6), less, greater, len or not")
		}
	}
	p.last = &q
	return p.values(q)
}

// direction reads src, dst, src or dst, src and dst.
func (p *parser) direction(q *qualifiers) (bool, error) {
	switch {
	case p.accept("src"):
		q.side = source
	case p.accept("dst"):
		q.side = destination
		return true, nil
	default:
		return false, nil
	}
	if p.next+1 < len(p.tokens) && p.tokens[p.next+1].text == "dst" {
		switch p.peek() {
		case "or", "||":
			p.next, q.side = p.next+2, either
		case "and", "&&":
			p.next, q.side = p.next+2, both
		}
	}
	return true, nil
}

// isValue tells a value from a word of the language.
func isValue(word string) bool {
	return word != "" && (word[0] >= '0' && word[0] <= '9' || strings.ContainsRune(word, ':'))
}

func protocolAlone(name string) *node {
	switch name {
	case "ip":
		return &node{kind: kindVersion, version: 4}
	case "ip6":
		return &node{kind: kindVersion, version: 6}
	}
	return &node{kind: kindProtocol, protocol: &protocol{0, protocolNumbers[name]}}
}

var protocolNumbers = map[string]uint8{"icmp": 1, "igmp": 2, "ipip": 4, "tcp": protoTCP, "udp": protoUDP, "gre": 47,
	"esp": 50, "ah": 51, "icmp6": 58, "sctp": protoSCTP}

// values reads one value, or several in parentheses: port (80 or 443).
func (p *parser) values(q qualifiers) (*node, error) {
	if p.peek() != "(" {
		return p.value(q)
	}
	p.next++
	left, err := p.value(q)
	for err == nil && !p.accept(")") {
		kind := kindAnd
		switch {
		case p.accept("and", "&&"):
		case p.accept("or", "||"):
			kind = kindOr
		default:
			return nil, p.fail("expected ), and, or")
		}
		var right *node
		if right, err = p.value(q); err == nil {
			left = &node{kind: kind, a: left, b: right}
		}
	}
	return left, err
}

func (p *parser) value(q qualifiers) (*node, error) {
	switch q.kind {
	case "host":
		return p.host(q)
	case "net":
		return p.network(q)
	case "port", "portrange":
		return p.portRange(q)
	}
	return p.protocolValue(q)
}

func (p *parser) host(q qualifiers) (*node, error) {
	a, err := netip.ParseAddr(p.peek())
	if err != nil || a.Zone() != "" || a.Is4In6() {
		return nil, p.fail("expected an IPv4 or IPv6 address (names are not looked up)")
	}
	return p.prefix(q, netip.PrefixFrom(a, a.BitLen()))
}

func (p *parser) network(q qualifiers) (*node, error) {
	n, err := netip.ParsePrefix(p.peek())
	if err != nil || n.Addr().Is4In6() {
		return nil, p.fail("expected ADDRESS/LENGTH, such as 10.244.1.0/26")
	}
	if n != n.Masked() {
		return nil, p.fail("bits set beyond the length: expected %s", n.Masked())
	}
	return p.prefix(q, n)
}

func (p *parser) prefix(q qualifiers, n netip.Prefix) (*node, error) {
	a := &address{side: q.side, version: 4}
	if n.Addr().Is6() {
		a.version = 6
	}
	switch want := map[string]uint8{"ip": 4, "ip6": 6}[q.proto]; {
	case q.proto != "" && want == 0:
		return nil, p.fail("%s does not go with %s: write %s and %s", q.proto, q.kind, q.proto, q.kind)
	case want != 0 && want != a.version:
		return nil, p.fail("expected an address of %s", q.proto)
	}
	b := n.Addr().AsSlice()
	for i := 0; i < len(b)/4; i++ {
		a.value[i] = binary.BigEndian.Uint32(b[4*i:])
		if bits := min(max(n.Bits()-32*i, 0), 32); bits > 0 {
			a.mask[i] = ^uint32(0) << (32 - bits)
		}
	}
	p.next++
	return &node{kind: kindAddress, address: a}, nil
}

func (p *parser) portRange(q qualifiers) (*node, error) {
	n := &ports{side: q.side}
	switch q.proto {
	case "":
	case "tcp", "udp", "sctp":
		n.protocol = protocolNumbers[q.proto]
	default:
		return nil, p.fail("%s has no ports: expected tcp, udp or sctp", q.proto)
	}
	first, last, isRange := strings.Cut(p.peek(), "-")
	if isRange != (q.kind == "portrange") {
		if isRange {
			return nil, p.fail("expected one port; a range is portrange %s", p.peek())
		}
		last = first // portrange 80 is 80-80, as in libpcap
	}
	if !isRange {
		last = first
	}
	low, err1 := strconv.ParseUint(first, 10, 16)
	high, err2 := strconv.ParseUint(last, 10, 16)
	if err1 != nil || err2 != nil {
		return nil, p.fail("expected a port from 0 to 65535 (names are not looked up)")
	}
	n.first, n.last = uint16(min(low, high)), uint16(max(low, high))
	p.next++
	return &node{kind: kindPorts, ports: n}, nil
}

func (p *parser) protocolValue(q qualifiers) (*node, error) {
	n := &protocol{}
	switch q.proto {
	case "":
	case "ip":
		n.version = 4
	case "ip6":
		n.version = 6
	default:
		return nil, p.fail("%s carries no other protocol: expected ip proto or ip6 proto", q.proto)
	}
	if q.side != either {
		return nil, p.fail("src and dst do not go with proto")
	}
	word := strings.TrimPrefix(p.peek(), `\`) // libpcap wants its own keywords escaped
	number, known := protocolNumbers[word]
	if !known {
		parsed, err := strconv.ParseUint(word, 10, 8)
		if err != nil {
			return nil, p.fail("expected a protocol number from 0 to 255, or tcp, udp, icmp, icmp6, igmp, ipip, gre, esp, ah, sctp")
		}
		number = uint8(parsed)
	}
	n.number = number
	p.next++
	return &node{kind: kindProtocol, protocol: n}, nil
}

// number reads a number of at most most.
func (p *parser) number(most uint64) (uint32, error) {
	n, err := strconv.ParseUint(p.peek(), 0, 32)
	if err != nil || n > most {
		return 0, p.fail("expected a number from 0 to %d", most)
	}
	p.next++
	return uint32(n), nil
}
