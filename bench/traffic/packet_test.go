package traffic

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

func frame(tb testing.TB, profile Profile, flows int) Frame {
	tb.Helper()
	return Frame{
		SourceMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, DestinationMAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, Flows: flows, Profile: profile,
		Source: netip.MustParseAddr("10.244.1.2"), Destination: netip.MustParseAddr("10.244.2.2"),
	}
}

// TestFrames has gopacket read what the generator sends, and compute its checksums anew.
func TestFrames(t *testing.T) {
	for profile, want := range map[Profile][]int{Small: {46}, IMIX: {46, 46, 46, 46, 46, 46, 46, 576, 576, 576, 576, 1400}} {
		all, err := frame(t, profile, 3).frames()
		if err != nil {
			t.Fatal(err)
		}
		flows := make(map[layers.UDPPort][]int)
		for _, b := range all {
			p := gopacket.NewPacket(b, layers.LayerTypeEthernet, gopacket.Default)
			ip, _ := p.NetworkLayer().(*layers.IPv4)
			udp, _ := p.TransportLayer().(*layers.UDP)
			if ip == nil || udp == nil || udp.DstPort != Port {
				t.Fatalf("%x: %v", b, p.ErrorLayer())
			}
			flows[udp.SrcPort] = append(flows[udp.SrcPort], int(ip.Length))
			if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
				t.Fatal(err)
			}
			again := gopacket.NewSerializeBuffer()
			err := gopacket.SerializeLayers(again, gopacket.SerializeOptions{ComputeChecksums: true, FixLengths: true},
				p.LinkLayer().(*layers.Ethernet), ip, udp, gopacket.Payload(udp.Payload))
			if err != nil {
				t.Fatal(err)
			}
			if got := again.Bytes(); !slices.Equal(got[:len(b)], b) { // gopacket pads to the Ethernet minimum
				t.Errorf("sent %x, gopacket makes %x", b, got)
			}
		}
		if len(flows) != 3 {
			t.Errorf("%s: %d flows, expected 3", profile, len(flows))
		}
		for port, sizes := range flows {
			if slices.Sort(sizes); !slices.Equal(sizes, want) {
				t.Errorf("%s, source port %d: sizes %v, expected %v", profile, port, sizes, want)
			}
		}
	}
	if _, err := frame(t, "large", 1).frames(); err == nil {
		t.Error("an unknown profile was taken")
	}
	if _, err := frame(t, Small, 0).frames(); err == nil {
		t.Error("no flows were taken")
	}
}

// outer puts n bytes of header before a packet, in an IPv4 packet of the protocol.
func outer(protocol byte, header []byte, inner []byte) []byte {
	b := make([]byte, 20, 20+len(header)+len(inner))
	b[0], b[8], b[9] = 0x45, 64, protocol
	b = append(append(b, header...), inner...)
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	return b
}

func vxlanHeaders() []byte {
	h := make([]byte, 8+8+14)
	binary.BigEndian.PutUint16(h[2:], portVXLAN)
	return h
}

func generated(tb testing.TB) []byte {
	tb.Helper()
	all, err := frame(tb, Small, 1).frames()
	if err != nil {
		tb.Fatal(err)
	}
	return all[0][14:]
}

func TestJudge(t *testing.T) {
	plain := generated(t)
	damaged := func(at int) []byte {
		b := slices.Clone(plain)
		b[at] ^= 1
		return b
	}
	unsummed := slices.Clone(plain)
	unsummed[26], unsummed[27] = 0, 0
	wireguard := outer(17, []byte{0, 0, 0xca, 0x6c, 0, 0, 0, 0}, append([]byte{4}, make([]byte, 40)...))
	for name, c := range map[string]struct {
		b    []byte
		want verdict
		size int
	}{
		"plain":                    {plain, whole, 46},
		"padded":                   {append(slices.Clone(plain), 0, 0), whole, 46},
		"in IP-in-IP":              {outer(4, nil, plain), whole, 46},
		"in VXLAN":                 {outer(17, vxlanHeaders(), plain), whole, 46},
		"payload changed":          {damaged(40), bad, 0},
		"destination changed":      {damaged(19), bad, 0},
		"IP checksum changed":      {damaged(11), bad, 0},
		"UDP length changed":       {damaged(25), bad, 0},
		"without a UDP checksum":   {unsummed, bad, 0},
		"cut short":                {plain[:40], bad, 0},
		"changed in IP-in-IP":      {outer(4, nil, damaged(45)), bad, 0},
		"changed in VXLAN":         {outer(17, vxlanHeaders(), damaged(45)), bad, 0},
		"VXLAN with nothing":       {outer(17, vxlanHeaders()[:8], nil), bad, 0},
		"two outer headers":        {outer(4, nil, outer(4, nil, plain)), other, 0},
		"WireGuard data":           {wireguard, sealed, 0},
		"WireGuard handshake":      {outer(17, []byte{0, 0, 0xca, 0x6c, 0, 0, 0, 0}, []byte{1, 0}), other, 0},
		"WireGuard without a byte": {outer(17, []byte{0, 0, 0xca, 0x6c, 0, 0, 0, 0}, nil), other, 0},
		"TCP":                      {outer(6, make([]byte, 20), nil), other, 0},
		"another port":             {outer(17, []byte{0, 1, 0, 1, 0, 8, 0, 0}, nil), other, 0},
		"IPv6":                     {append([]byte{0x60}, make([]byte, 60)...), other, 0},
		"nothing":                  {nil, other, 0},
	} {
		if v, size := judge(c.b); v != c.want || size != c.size {
			t.Errorf("%s: %d, %d bytes: expected %d, %d", name, v, size, c.want, c.size)
		}
	}
}

// superpacket merges packets of the generator that are n times long, the last one with so many bytes of payload.
func superpacket(tb testing.TB, n, last int) []byte {
	tb.Helper()
	b := generated(tb)
	payload := slices.Clone(b[28:])
	for range n - 2 {
		b = append(b, payload...)
	}
	b = append(b, payload[:last]...)
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	binary.BigEndian.PutUint16(b[10:], 0)
	binary.BigEndian.PutUint16(b[10:], ^sum(b[:20], 0))
	return b
}

func TestJudgeMerged(t *testing.T) {
	good := superpacket(t, 5, 18)
	changed := func(at int) []byte {
		b := slices.Clone(good)
		b[at] ^= 1
		return b
	}
	for name, c := range map[string]struct {
		b             []byte
		size          int
		packets, want int
	}{
		"five":                 {good, 18, 5, 5 * 46},
		"padded":               {append(slices.Clone(good), 0), 18, 5, 5 * 46},
		"the last one shorter": {superpacket(t, 3, 4), 18, 3, 2*46 + 32},
		"payload changed":      {changed(50), 18, 0, 0},
		"address changed":      {changed(16), 18, 0, 0},
		"another size":         {good, 17, 0, 0},
		"no size":              {good, 0, 0, 0},
		"cut short":            {good[:60], 18, 0, 0},
		"nothing":              {nil, 18, 0, 0},
	} {
		if packets, bytes := judgeMerged(c.b, c.size); packets != c.packets || bytes != c.want {
			t.Errorf("%s: %d packets, %d bytes: expected %d, %d", name, packets, bytes, c.packets, c.want)
		}
	}
}

// FuzzJudge: whatever arrives, nothing but a generated packet is whole, and nothing panics.
func FuzzJudge(f *testing.F) {
	plain := generated(f)
	f.Add(plain)
	f.Add(outer(4, nil, plain))
	f.Add(outer(17, vxlanHeaders(), plain))
	f.Fuzz(func(t *testing.T, b []byte) {
		if v, size := judge(b); (v == whole) != (size > 0) || size > len(b) {
			t.Errorf("%x: verdict %d, %d bytes", b, v, size)
		}
		if packets, bytes := judgeMerged(b, 18); packets > len(b) || bytes > 29*len(b) {
			t.Errorf("%x: %d packets merged, %d bytes", b, packets, bytes)
		}
	})
}
