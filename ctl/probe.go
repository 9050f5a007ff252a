package ctl

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/spf13/cobra"

	"margay/vrouter/packet"
)

// probe is the packet that a trace asks about.
type probe struct {
	proto        string
	sport, dport uint16
	size         int
	df           bool
	ttl, tos     uint8
	mark         uint16 // tells a real packet from others; 0 for one that is not sent
}

func (p *probe) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&p.proto, "proto", "icmp", "icmp (an echo request), tcp (a SYN), udp, or a protocol's `number`")
	f.Uint16Var(&p.sport, "sport", 40000, "source `port`, for tcp and udp")
	f.Uint16Var(&p.dport, "dport", 80, "destination `port`, for tcp and udp")
	f.IntVar(&p.size, "size", 84, "`length` of the whole IP packet, in bytes")
	f.BoolVar(&p.df, "df", false, "set \"don't fragment\"")
	f.Uint8Var(&p.ttl, "ttl", 64, "time to live")
	f.Uint8Var(&p.tos, "tos", 0, "type of service `byte`: DSCP and ECN")
}

const (
	ipHeader   = 20 // bytes
	icmpHeader = 8
	udpHeader  = 8
	tcpHeader  = 20
	protoICMP  = 1
	answerTTL  = 64 // Linux's net.ipv4.ip_default_ttl
)

// number returns the protocol, and the length of its header as build writes it.
func (p *probe) number() (proto uint8, header int, err error) {
	switch p.proto {
	case "icmp":
		return protoICMP, icmpHeader, nil
	case "tcp":
		return packet.ProtocolTCP, tcpHeader, nil
	case "udp":
		return packet.ProtocolUDP, udpHeader, nil
	}
	n, err := strconv.ParseUint(p.proto, 10, 8)
	if err != nil {
		return 0, 0, fmt.Errorf("--proto %q: expected icmp, tcp, udp, or a number from 0 to 255", p.proto)
	}
	switch n {
	case protoICMP:
		return protoICMP, icmpHeader, nil
	case packet.ProtocolTCP:
		return packet.ProtocolTCP, tcpHeader, nil
	case packet.ProtocolUDP:
		return packet.ProtocolUDP, udpHeader, nil
	}
	return uint8(n), 0, nil
}

func (p *probe) check() error {
	_, header, err := p.number()
	if err != nil {
		return err
	}
	if least := ipHeader + header; p.size < least || p.size > packet.MaxTotalLen {
		return fmt.Errorf("--size %d: expected %d to %d, the IP header of 20 bytes included", p.size, least, packet.MaxTotalLen)
	}
	if p.ttl == 0 {
		return fmt.Errorf("--ttl 0: expected 1 to 255")
	}
	return nil
}

// build makes the packet, or with answer the one that comes back: an echo reply, a SYN+ACK, the ports swapped. Who
// answers begins with a TTL of its own, and Linux sends echo replies with DF clear, whatever the request had.
func (p *probe) build(src, dst netip.Addr, answer bool) []byte {
	proto, header, _ := p.number() // check was asked
	b := make([]byte, p.size)
	b[0], b[1], b[8], b[9] = 0x45, p.tos, p.ttl, proto
	binary.BigEndian.PutUint16(b[2:], uint16(p.size))
	binary.BigEndian.PutUint16(b[4:], max(p.mark, 1))
	if answer {
		b[8] = answerTTL
	}
	if p.df && !(answer && proto == protoICMP) {
		b[6] = 0x40
	}
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(b[10:], packet.Checksum(b[:ipHeader], 0))
	up := b[ipHeader:]
	sport, dport := p.sport, p.dport
	if answer {
		sport, dport = dport, sport
	}
	checksumAt := 0
	switch proto {
	case protoICMP:
		if !answer {
			up[0] = 8
		}
		binary.BigEndian.PutUint16(up[4:], p.mark)
		checksumAt = 2
	case packet.ProtocolUDP:
		binary.BigEndian.PutUint16(up[4:], uint16(len(up)))
		checksumAt = 6
	case packet.ProtocolTCP:
		binary.BigEndian.PutUint32(up[4:], uint32(p.mark)<<16)
		up[12], up[13] = 5<<4, 0x02
		if answer {
			up[13] = 0x12
		}
		binary.BigEndian.PutUint16(up[14:], 65535)
		checksumAt = 16
	}
	if header == 0 {
		return b
	}
	initial := uint32(0)
	if proto != protoICMP {
		binary.BigEndian.PutUint16(up, sport)
		binary.BigEndian.PutUint16(up[2:], dport)
		initial = packet.PseudoSum(packet.IPv4(b), len(up))
	}
	binary.BigEndian.PutUint16(up[checksumAt:], packet.Checksum(up, initial))
	return b
}
