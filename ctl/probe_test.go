package ctl

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

var (
	probeSrc = netip.MustParseAddr("10.244.1.2")
	probeDst = netip.MustParseAddr("10.244.2.5")
)

// TestProbesAreValid has gopacket decode each kind, and computes the checksums anew with it.
func TestProbesAreValid(t *testing.T) {
	for _, proto := range []string{"icmp", "tcp", "udp", "1", "6", "17", "47"} {
		for _, answer := range []bool{false, true} {
			p := probe{proto: proto, sport: 1234, dport: 80, size: 101, df: true, ttl: 7, tos: 0xb9}
			if err := p.check(); err != nil {
				t.Fatal(err)
			}
			b := p.build(probeSrc, probeDst, answer)
			if len(b) != 101 {
				t.Fatalf("%s: %d bytes", proto, len(b))
			}
			pkt := gopacket.NewPacket(b, layers.LayerTypeIPv4, gopacket.Default)
			if fail := pkt.ErrorLayer(); fail != nil && proto != "47" {
				t.Fatalf("%s: %v", proto, fail.Error())
			}
			ip := pkt.NetworkLayer().(*layers.IPv4)
			ttl, df := uint8(7), layers.IPv4DontFragment
			if answer {
				ttl = 64
			}
			if answer && (proto == "icmp" || proto == "1") {
				df = 0
			}
			if ip.TTL != ttl || ip.TOS != 0xb9 || ip.Flags != df || ip.SrcIP.String() != probeSrc.String() {
				t.Errorf("%s: %+v", proto, ip)
			}
			stack := []gopacket.SerializableLayer{ip}
			switch l := pkt.TransportLayer().(type) {
			case *layers.TCP:
				if l.SYN != true || l.ACK != answer || (l.DstPort == 80) == answer {
					t.Errorf("%s: %+v", proto, l)
				}
				_ = l.SetNetworkLayerForChecksum(ip)
				stack = append(stack, l, gopacket.Payload(l.Payload))
			case *layers.UDP:
				_ = l.SetNetworkLayerForChecksum(ip)
				stack = append(stack, l, gopacket.Payload(l.Payload))
			default:
				if l, ok := pkt.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4); ok {
					stack = append(stack, l, gopacket.Payload(l.Payload))
				} else {
					continue
				}
			}
			again := gopacket.NewSerializeBuffer()
			if err := gopacket.SerializeLayers(again, gopacket.SerializeOptions{ComputeChecksums: true}, stack...); err != nil {
				t.Fatal(err)
			}
			if string(again.Bytes()) != string(b) {
				t.Errorf("%s: % x: with gopacket's checksums % x", proto, b[:44], again.Bytes()[:44])
			}
		}
	}
}

func TestProbeRefuses(t *testing.T) {
	for want, p := range map[string]probe{
		"--proto":         {proto: "tcpp", size: 84, ttl: 1},
		"--size 39":       {proto: "tcp", size: 39, ttl: 1},
		"expected 40 to":  {proto: "6", size: 0, ttl: 1},
		"--size 65536":    {proto: "udp", size: 65536, ttl: 1},
		"--ttl 0":         {proto: "udp", size: 100},
		"from 0 to 255":   {proto: "256", size: 84, ttl: 1},
		"expected 28 to ": {proto: "icmp", size: 27, ttl: 1},
	} {
		if err := p.check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v: expected %q", p, err, want)
		}
	}
}

func TestDescribe(t *testing.T) {
	build := func(proto string, size int) []byte {
		p := probe{proto: proto, sport: 1234, dport: 80, size: size, df: true, ttl: 7}
		return p.build(probeSrc, probeDst, false)
	}
	outer := build("4", 20+60)
	copy(outer[20:], build("tcp", 60))
	for want, b := range map[string][]byte{
		"10.244.1.2 > 10.244.2.5: ICMP echo request id 0 seq 0, length 84, ttl 7, DF":                               build("icmp", 84),
		"10.244.1.2:1234 > 10.244.2.5:80: TCP SYN seq 0 ack 0 win 65535, length 60, ttl 7, DF":                      build("tcp", 60),
		"10.244.1.2:1234 > 10.244.2.5:80: UDP, length 28, ttl 7, DF":                                                build("udp", 28),
		"IP-in-IP, length 80, ttl 7, DF: 10.244.1.2:1234 > 10.244.2.5:80: TCP SYN seq 0 ack 0 win 65535, length 60": outer,
		"protocol 47": build("47", 30),
		"empty":       nil,
		"IPv4, cut":   {0x45, 0},
		"IPv6, cut":   {0x60},
		"no IP":       {0x10, 2, 3},
	} {
		if got := describe(b, len(b)); !strings.Contains(got, want) {
			t.Errorf("%q: expected %q in it", got, want)
		}
	}
}

// FuzzDescribe: whatever a packet holds, it is described.
func FuzzDescribe(f *testing.F) {
	p := probe{proto: "tcp", size: 60, ttl: 1}
	f.Add(p.build(probeSrc, probeDst, false))
	f.Add([]byte{0x4f, 0, 0, 1, 2, 3, 4, 5, 6, 4, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 0x45})
	f.Add([]byte{0x60})
	f.Fuzz(func(t *testing.T, b []byte) {
		if describe(b, len(b)) == "" {
			t.Fatal("no word")
		}
	})
}
