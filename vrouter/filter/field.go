package filter

import "strings"

// bases are the headers whose bytes can be asked for.
var bases = map[string]uint8{"ip": baseIP, "ip6": baseIP6, "tcp": protoTCP, "udp": protoUDP, "icmp": 1, "sctp": protoSCTP}

// offsets are names for places in a header, and constants for what is found there.
var (
	offsets   = map[string]uint32{"tcpflags": 13, "icmptype": 0, "icmpcode": 1}
	constants = map[string]uint32{
		"tcp-fin": 1, "tcp-syn": 2, "tcp-rst": 4, "tcp-push": 8, "tcp-ack": 16, "tcp-urg": 32, "tcp-ece": 64, "tcp-cwr": 128,
		"icmp-echoreply": 0, "icmp-unreach": 3, "icmp-redirect": 5, "icmp-echo": 8, "icmp-timxceed": 11, "icmp-paramprob": 12,
	}
	operators = map[string]operator{"=": equal, "==": equal, "!=": unequal, "<": less, "<=": lessEqual, ">": greater, ">=": greaterEqual}
)

// field is base [ offset : size ] [& mask] operator number.
func (p *parser) field() (*node, error) {
	base, ok := bases[p.peek()]
	if !ok {
		return nil, p.fail("expected ip, ip6, tcp, udp, icmp or sctp before [")
	}
	p.next += 2
	f := &field{base: base, size: 1, mask: ^uint32(0)}
	if off, named := offsets[p.peek()]; named {
		f.off = int(off)
		p.next++
	} else {
		off, err := p.number(65535)
		if err != nil {
			return nil, err
		}
		f.off = int(off)
	}
	if p.accept(":") {
		size, err := p.number(4)
		if err != nil {
			return nil, err
		}
		if size != 1 && size != 2 && size != 4 {
			p.next--
			return nil, p.fail("expected a size of 1, 2 or 4 bytes")
		}
		f.size = int(size)
	}
	if !p.accept("]") {
		return nil, p.fail("expected ]")
	}
	if p.accept("&") {
		mask, err := p.constant()
		if err != nil {
			return nil, err
		}
		f.mask = mask
	}
	var err error
	if f.op, err = p.operator(); err != nil {
		return nil, err
	}
	f.n, err = p.constant()
	return &node{kind: kindField, field: f}, err
}

func (p *parser) operator() (operator, error) {
	op, ok := operators[p.peek()]
	if !ok {
		return 0, p.fail("expected one of = != < <= > >=")
	}
	p.next++
	return op, nil
}

// constant is a number or a name for one, or several in parentheses joined by |.
func (p *parser) constant() (uint32, error) {
	if p.accept("(") {
		var all uint32
		for {
			c, err := p.constant1()
			if err != nil {
				return 0, err
			}
			all |= c
			if p.accept(")") {
				return all, nil
			}
			if !p.accept("|") {
				return 0, p.fail("expected | or )")
			}
		}
	}
	return p.constant1()
}

func (p *parser) constant1() (uint32, error) {
	if c, ok := constants[strings.TrimSpace(p.peek())]; ok {
		p.next++
		return c, nil
	}
	return p.number(1<<32 - 1)
}
