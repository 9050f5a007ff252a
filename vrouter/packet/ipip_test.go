package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

// Figure 4 of RFC 6040, row by row: what arrives inside, what arrives outside, what leaves.
func TestPopECN(t *testing.T) {
	const drop = -1
	names := map[uint8]string{notECT: "Not-ECT", ect0: "ECT(0)", ect1: "ECT(1)", ce: "CE"}
	columns := []uint8{notECT, ect0, ect1, ce}
	// The combinations with an exclamation mark in the figure, by inner and outer codepoint.
	unused := map[[2]uint8]bool{{notECT, ect0}: true, {notECT, ect1}: true, {ect1, ect0}: true, {ce, ect1}: true}
	for _, row := range []struct {
		inner uint8
		want  [4]int
	}{
		//       outer: Not-ECT ECT(0)  ECT(1)  CE
		{notECT, [4]int{notECT, notECT, notECT, drop}},
		{ect0, [4]int{ect0, ect0, ect1, ce}},
		{ect1, [4]int{ect1, ect1, ect1, ce}},
		{ce, [4]int{ce, ce, ce, ce}},
	} {
		for i, out := range columns {
			t.Run(fmt.Sprintf("%s in %s", names[row.inner], names[out]), func(t *testing.T) {
				// Many identifications, so that the incremental checksum meets its edges.
				for id := 0; id < 1<<16; id += 7 {
					inner := ipv4(0xb8|row.inner, uint16(id), 0, 9, 17, podA, podB, []byte("data"))
					b := ipv4(0x20|out, 1, 0, 64, 4, nodeA, nodeB, inner)
					before := bytes.Clone(b)
					outer, fault := ParseIPv4(b)
					if fault != FaultNone {
						t.Fatal(fault)
					}
					got, fault := PopIPIP(outer)
					if row.want[i] == drop {
						if fault != FaultECN || got != nil || !bytes.Equal(b, before) {
							t.Fatalf("fault %v, want %v and an untouched packet", fault, FaultECN)
						}
						continue
					}
					if fault != FaultNone {
						t.Fatalf("fault %v", fault)
					}
					want := ipv4(0xb8|uint8(row.want[i]), uint16(id), 0, 9, 17, podA, podB, []byte("data"))
					if !bytes.Equal(got, want) {
						t.Fatalf("id %#x\ngot  %x\nwant %x", id, got, want)
					}
					if got := UnusedECN(outer, got); got != unused[[2]uint8{row.inner, out}] {
						t.Fatalf("unused: %v", got)
					}
				}
			})
		}
	}
}

// Section 4.1 of RFC 6040, normal mode: the ingress copies all four codepoints; we copy DSCP with them.
func TestPushHeader(t *testing.T) {
	for tos := range 256 {
		for frag, wantDF := range map[uint16]uint16{0: 0, 0x4000: 0x4000, 0x2000: 0, 0x2005: 0, 0x6000: 0x4000} {
			inner := ipv4(uint8(tos), 7, frag, 3, 17, podA, podB, []byte("payload"))
			buf := append(bytes.Repeat([]byte{0xaa}, 24), inner...)
			buf = append(buf, "behind"...)
			got, fault := PushIPIP(buf, 24, &Outer{Src: nodeA, Dst: nodeB, TTL: 64, ID: 0xbeef})
			if fault != FaultNone {
				t.Fatal(fault)
			}
			want := ipv4(uint8(tos), 0xbeef, wantDF, 64, 4, nodeA, nodeB, inner)
			if !bytes.Equal(got, want) {
				t.Fatalf("TOS %#x, flags %#x\ngot  %x\nwant %x", tos, frag, got, want)
			}
			if &got[0] != &buf[4] || !bytes.Equal(buf[:4], []byte{0xaa, 0xaa, 0xaa, 0xaa}) || string(buf[len(buf)-6:]) != "behind" {
				t.Fatal("wrote outside the header's 20 bytes")
			}
		}
	}
}

// An independent decoder reads what PushIPIP wrote.
func TestPushReadByGopacket(t *testing.T) {
	udp := []byte{0, 1, 0, 2, 0, 12, 0, 0, 'd', 'a', 't', 'a'}
	inner := ipv4(0xb9, 7, 0x4000, 3, 17, podA, podB, udp)
	buf := append(make([]byte, 20), inner...)
	out, fault := PushIPIP(buf, 20, &Outer{Src: nodeA, Dst: nodeB, TTL: 64, ID: 1})
	if fault != FaultNone {
		t.Fatal(fault)
	}
	p := gopacket.NewPacket(out, layers.LayerTypeIPv4, gopacket.Default)
	if p.ErrorLayer() != nil {
		t.Fatal(p.ErrorLayer().Error())
	}
	ls := p.Layers()
	if len(ls) != 4 {
		t.Fatalf("layers %v", ls)
	}
	o, i := ls[0].(*layers.IPv4), ls[1].(*layers.IPv4)
	if o.Protocol != layers.IPProtocolIPv4 || o.TTL != 64 || o.TOS != 0xb9 || o.Flags != layers.IPv4DontFragment || o.Id != 1 ||
		!o.SrcIP.Equal(nodeA[:]) || !o.DstIP.Equal(nodeB[:]) {
		t.Errorf("outer %+v", o)
	}
	if i.TTL != 3 || i.Id != 7 || !i.SrcIP.Equal(podA[:]) || !i.DstIP.Equal(podB[:]) {
		t.Errorf("inner %+v", i)
	}
	if string(p.ApplicationLayer().Payload()) != "data" {
		t.Errorf("payload %q", p.ApplicationLayer().Payload())
	}
}

func TestPushLimits(t *testing.T) {
	o := &Outer{Src: nodeA, Dst: nodeB, TTL: 64}
	for _, c := range []struct {
		name     string
		innerLen int
		off, cut int
		want     Fault
	}{
		{"largest", MaxTotalLen - 20, 20, 0, FaultNone},
		{"one too many", MaxTotalLen - 19, 20, 0, FaultTotalLen},
		{"largest inner packet", MaxTotalLen, 20, 0, FaultTotalLen},
		{"header only", 20, 20, 0, FaultNone},
		{"headroom of 19", 40, 19, 0, FaultShort},
		{"no headroom", 40, 0, 0, FaultShort},
		{"negative offset", 40, -1, 0, FaultShort},
		{"inner packet cut short", 40, 20, 1, FaultShort},
		{"inner header cut short", 20, 20, 1, FaultShort},
	} {
		inner := ipv4(0, 1, 0, 64, 17, podA, podB, make([]byte, c.innerLen-20))
		buf := append(make([]byte, max(c.off, 0)), inner...)
		buf = buf[:len(buf)-c.cut]
		before := bytes.Clone(buf)
		out, fault := PushIPIP(buf, c.off, o)
		if fault != c.want {
			t.Errorf("%s: fault %v, want %v", c.name, fault, c.want)
		}
		if fault != FaultNone && (out != nil || !bytes.Equal(buf, before)) {
			t.Errorf("%s: changed the buffer", c.name)
		}
	}
	if _, fault := PushIPIP(nil, 20, o); fault != FaultShort {
		t.Errorf("empty buffer: %v", fault)
	}
	if _, fault := PushIPIP(make([]byte, 64), 1<<62, o); fault != FaultShort {
		t.Errorf("offset far outside: %v", fault)
	}
}

func TestPopFaults(t *testing.T) {
	inner := ipv4(0, 1, 0, 64, 17, podA, podB, []byte("data"))
	broken := bytes.Clone(inner)
	broken[12] ^= 1
	v6 := bytes.Repeat([]byte{0x60}, 40)
	for _, c := range []struct {
		name  string
		outer []byte
		want  Fault
	}{
		{"good", ipv4(0, 1, 0, 64, 4, nodeA, nodeB, inner), FaultNone},
		{"protocol 17", ipv4(0, 1, 0, 64, 17, nodeA, nodeB, inner), FaultProtocol},
		{"first fragment", ipv4(0, 1, 0x2000, 64, 4, nodeA, nodeB, inner), FaultFragment},
		{"last fragment", ipv4(0, 1, 5, 64, 4, nodeA, nodeB, inner), FaultFragment},
		{"nothing inside", ipv4(0, 1, 0, 64, 4, nodeA, nodeB, nil), FaultShort},
		{"IPv6 inside", ipv4(0, 1, 0, 64, 4, nodeA, nodeB, v6), FaultVersion},
		{"inner cut short", ipv4(0, 1, 0, 64, 4, nodeA, nodeB, inner[:23]), FaultTotalLen},
		{"inner checksum", ipv4(0, 1, 0, 64, 4, nodeA, nodeB, broken), FaultChecksum},
	} {
		outer, fault := ParseIPv4(c.outer)
		if fault != FaultNone {
			t.Fatal(fault)
		}
		got, fault := PopIPIP(outer)
		if fault != c.want {
			t.Errorf("%s: fault %v, want %v", c.name, fault, c.want)
		}
		if fault == FaultNone && !bytes.Equal(got, inner) {
			t.Errorf("%s: got %x", c.name, got)
		}
	}
}

// Options in the outer header are skipped, and bytes behind the inner packet are not part of it.
func TestPopOptionsAndTrailer(t *testing.T) {
	inner := ipv4(0, 1, 0, 64, 17, podA, podB, []byte("data"))
	b := ipv4(0, 1, 0, 64, 4, nodeA, nodeB, append(append([]byte{1, 1, 1, 0}, inner...), 0xee, 0xee))
	b[0] = 0x46
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], ^naiveSum(b[:24], 0))
	outer, fault := ParseIPv4(b)
	if fault != FaultNone {
		t.Fatal(fault)
	}
	if got, fault := PopIPIP(outer); fault != FaultNone || !bytes.Equal(got, inner) {
		t.Errorf("fault %v, got %x", fault, got)
	}
}

func TestNoAllocations(t *testing.T) {
	inner := ipv4(1, 1, 0x4000, 64, 17, podA, podB, make([]byte, 1400))
	buf := append(make([]byte, 20), inner...)
	o := &Outer{Src: nodeA, Dst: nodeB, TTL: 64}
	tcp := superTCP(9000, 0x18, nil)
	udp := superUDP(9000)
	scratch := make([]byte, 2048)
	var bytesOut int
	emit := func(b []byte) { bytesOut += len(b) }
	for name, f := range map[string]func(){
		"push, parse, pop": func() {
			out, _ := PushIPIP(buf, 20, o)
			out[1] |= ce // as a congested router does; the checksum follows
			out[10], out[11] = 0, 0
			binary.BigEndian.PutUint16(out[10:], Checksum(out[:20], 0))
			p, f1 := ParseIPv4(out)
			in, f2 := PopIPIP(p)
			if f1|f2 != FaultNone || !in.Src().Is4() || !in.Dst().Is4() {
				t.Fatal(f1, f2)
			}
		},
		"decrement TTL": func() { DecrementTTL(IPv4(buf[20:])); buf[28] = 64; fixHeader(buf[20:]) },
		"segment TCP":   func() { SegmentTCP(tcp, 1400, scratch, emit) },
		"segment UDP":   func() { SegmentUDP(udp, 1400, scratch, emit) },
		"complete":      func() { CompleteChecksum(buf[20:], 20, 6) },
	} {
		if n := testing.AllocsPerRun(200, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func fixHeader(b []byte) {
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], ^naiveSum(b[:20], 0))
}
