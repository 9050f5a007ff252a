package ipam

import (
	"encoding/json"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// calicoBlock is a /29 as Calico writes one, with fields that this version does not know.
const calicoBlock = `{"cidr":"10.244.40.128/29","affinity":"host:n1","allocations":[0,null,1,2,null,null,null,null],
"unallocated":[4,5,6,7,1],"attributes":[
 {"handle_id":"ipip-tunnel-addr-n1","secondary":{"node":"n1","type":"ipipTunnelAddress"}},
 {"handle_id":"k8s-pod-network.abc","secondary":{"namespace":"default","node":"n1","pod":"web-0","timestamp":"2026-11-23 09:11:33.03 +0000 UTC"},"alternate":{"a":"b"}},
 {"handle_id":"k8s-pod-network.old","secondary":{},"releasedAt":"2026-11-23T09:11:33Z"}],
"sequenceNumber":1795425093042315661,"sequenceNumberForAllocation":{"0":1795425093042315656,"2":1795425093042315658,"3":1795425093042315659},
"deleted":false,"affinityClaimTime":"2026-11-23T09:00:00Z"}`

func TestBlockRoundTrip(t *testing.T) {
	b, err := decodeBlock([]byte(calicoBlock))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.encode()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(asJSON(t, []byte(calicoBlock)), asJSON(t, raw)); d != "" {
		t.Error(d)
	}
	// One in, one out: what is not understood stays where it was.
	if a, ok := b.assign(attribute{handle: "h", hasHandle: true}); !ok || a != netip.MustParseAddr("10.244.40.132") {
		t.Errorf("assigned %v, expected the head of the free list", a)
	}
	if got, err := b.releaseHandle("k8s-pod-network.abc"); err != nil || len(got) != 1 || got[0] != netip.MustParseAddr("10.244.40.130") {
		t.Errorf("released %v, %v", got, err)
	}
	if !slices.Equal(b.unallocated, []int{5, 6, 7, 1, 2}) {
		t.Errorf("free list %v: expected the released one at its end", b.unallocated)
	}
	if got, err := b.releaseHandle("k8s-pod-network.old"); err != nil || len(got) != 0 {
		t.Errorf("an address that is cooling down was released again: %v, %v", got, err)
	}
	raw, err = b.encode()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"releasedAt":"2026-11-23T09:11:33Z"`, `"affinityClaimTime":"2026-11-23T09:00:00Z"`, `"4":1795425093042315661`,
		`"allocations":[0,null,null,1,2,null,null,null]`} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("%s is missing in %s", want, raw)
		}
	}
}

func asJSON(t *testing.T, raw []byte) any {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(string(raw)))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

// A release that comes too late, for an address that was given to somebody else since, is refused.
func TestReleaseCarriesTheSequence(t *testing.T) {
	b := newBlock(netip.MustParsePrefix("10.0.0.0/32"), "host:n1", 100)
	a, _ := b.assign(attribute{handle: "first", hasHandle: true})
	b.sequence++
	if err := b.release(a, 100); err != nil {
		t.Fatal(err)
	}
	b.sequence++
	if _, ok := b.assign(attribute{handle: "second", hasHandle: true}); !ok {
		t.Fatal("the released address cannot be assigned")
	}
	if err := b.release(a, 100); err == nil || !strings.Contains(err.Error(), "sequence number 100: expected 102") {
		t.Errorf("late release: %v", err)
	}
	if got := b.held("second"); len(got) != 1 {
		t.Errorf("second holds %v", got)
	}
	if err := b.release(a, 102); err != nil {
		t.Error(err)
	}
	if err := b.release(a, 102); err == nil {
		t.Error("a free address was released")
	}
}

// naive is the block's twin: who holds what, and a queue.
type naive struct {
	owner map[netip.Addr]string
	queue []netip.Addr
}

func TestBlockAgainstTwin(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cidr := rapid.SampledFrom([]netip.Prefix{netip.MustParsePrefix("10.1.2.248/29"), netip.MustParsePrefix("10.1.254.0/23"),
			netip.MustParsePrefix("fd00::fffc/126"), netip.MustParsePrefix("10.0.0.7/32")}).Draw(t, "cidr")
		b := newBlock(cidr, "host:n", 7)
		twin := naive{owner: map[netip.Addr]string{}}
		for a := cidr.Addr(); cidr.Contains(a); a = a.Next() {
			twin.queue = append(twin.queue, a)
		}
		handles := rapid.SampledFrom([]string{"a", "b", "c", "d"})
		t.Repeat(map[string]func(*rapid.T){
			"assign": func(t *rapid.T) {
				h := handles.Draw(t, "handle")
				got, ok := b.assign(attribute{handle: h, hasHandle: true, secondary: map[string]string{"x": h}})
				if ok != (len(twin.queue) > 0) || (ok && got != twin.queue[0]) {
					t.Fatalf("assigned %v, %v", got, ok)
				}
				if ok {
					twin.owner[got], twin.queue = h, twin.queue[1:]
				}
			},
			"assignAddr": func(t *rapid.T) {
				h, n := handles.Draw(t, "handle"), rapid.IntRange(0, blockSize(cidr)-1).Draw(t, "ordinal")
				a := b.addr(n)
				if b.ordinal(a) != n || !cidr.Contains(a) {
					t.Fatalf("ordinal %d is %s is %d", n, a, b.ordinal(a))
				}
				at := slices.Index(twin.queue, a)
				if ok := b.assignAddr(a, attribute{handle: h, hasHandle: true}); ok != (at >= 0) {
					t.Fatalf("%s: assigned %v", a, ok)
				}
				if at >= 0 {
					twin.owner[a], twin.queue = h, slices.Delete(slices.Clone(twin.queue), at, at+1)
				}
			},
			"release": func(t *rapid.T) {
				h := handles.Draw(t, "handle")
				before := b.clone()
				got, err := b.releaseHandle(h)
				if err != nil {
					t.Fatal(err)
				}
				var want []netip.Addr
				for a, owner := range twin.owner {
					if owner == h {
						want = append(want, a)
					}
				}
				slices.SortFunc(want, netip.Addr.Compare)
				if !slices.Equal(got, want) {
					t.Fatalf("released %v, expected %v", got, want)
				}
				if !slices.Equal(before.held(h), want) {
					t.Fatalf("the clone changed with the block")
				}
				maps.DeleteFunc(twin.owner, func(_ netip.Addr, owner string) bool { return owner == h })
				twin.queue = append(slices.Clone(twin.queue), want...)
			},
			"store": func(t *rapid.T) {
				raw, err := b.encode()
				if err != nil {
					t.Fatal(err)
				}
				again, err := decodeBlock(raw)
				if err != nil {
					t.Fatalf("%v: %s", err, raw)
				}
				b = again
				b.sequence++
			},
			"": func(t *rapid.T) {
				if b.inUse() != len(twin.owner) || len(b.given) != len(twin.owner) {
					t.Fatalf("%d in use, %d sequences, expected %d", b.inUse(), len(b.given), len(twin.owner))
				}
				for _, h := range []string{"a", "b", "c", "d"} {
					for _, a := range b.held(h) {
						if twin.owner[a] != h {
							t.Fatalf("%s is held by %s, expected %s", a, h, twin.owner[a])
						}
					}
				}
				if len(b.attributes) > len(twin.owner) {
					t.Fatalf("%d attributes for %d addresses", len(b.attributes), len(twin.owner))
				}
			},
		})
	})
}

func TestDecodeBlockRefuses(t *testing.T) {
	replace := func(old, new string) string {
		if !strings.Contains(calicoBlock, old) {
			t.Fatalf("%s is not in the sample", old)
		}
		return strings.Replace(calicoBlock, old, new, 1)
	}
	for _, tt := range []struct{ text, want string }{
		{"", "expected a block"},
		{"null", "cidr"},
		{"[]", "expected a block"},
		{replace("10.244.40.128/29", "10.244.40.129/29"), "cidr"},
		{replace("10.244.40.128/29", "0.0.0.0/0"), "cidr"},
		{replace("10.244.40.128/29", "10.244.40.128/28"), "allocations: expected 16 entries"},
		{replace("[0,null,1,2", "[0,null,1,3"), "allocations[3]"},
		{replace("[0,null,1,2", "[-1,null,1,2"), "allocations[0]"},
		{replace("[4,5,6,7,1]", "[4,5,6,7,7]"), "unallocated"},
		{replace("[4,5,6,7,1]", "[4,5,6,7]"), "1 is missing"},
		{replace("[4,5,6,7,1]", "[4,5,6,7,1,0]"), "unallocated"},
		{replace("[4,5,6,7,1]", "[4,5,6,7,99]"), "unallocated"},
		{replace(`{"0":`, `{"x":`), "sequenceNumberForAllocation"},
		{replace(`{"0":`, `{"8":`), "sequenceNumberForAllocation"},
		{replace(`"secondary":{},`, `"secondary":7,`), "attributes[2]"},
	} {
		if _, err := decodeBlock([]byte(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v, expected %q", tt.text, err, tt.want)
		}
	}
}

// Whatever decodes can be worked on, and what was worked on can be stored and read again.
func FuzzDecodeBlock(f *testing.F) {
	f.Add([]byte(calicoBlock))
	f.Add([]byte(`{"cidr":"fd00::/128","allocations":[null],"unallocated":[0]}`))
	f.Add([]byte(`{"cidr":"10.0.0.0/32","allocations":[0],"unallocated":null,"attributes":[{"HANDLE_ID":"x","y":1}],"Deleted":true}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := decodeBlock(data)
		if err != nil {
			return
		}
		was := b.inUse()
		a, ok := b.assign(attribute{handle: "fuzz\x00owner", hasHandle: true})
		if ok {
			if got, err := b.releaseHandle("fuzz\x00owner"); err != nil || !slices.Contains(got, a) {
				t.Fatalf("assigned %s, released %v, %v", a, got, err)
			}
		}
		if b.inUse() > was {
			t.Fatalf("%d in use, before %d", b.inUse(), was)
		}
		raw, err := b.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeBlock(raw); err != nil {
			t.Fatalf("%v: %s", err, raw)
		}
	})
}

func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"block":{"10.244.40.128/26":1},"deleted":false,"x":[]}`))
	f.Add([]byte(`{"state":"confirmed","deleted":false,"type":"host"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if h, err := decodeHandle(data); err == nil {
			raw, err := h.encode()
			if err != nil {
				t.Fatal(err)
			}
			if again, err := decodeHandle(raw); err != nil || !maps.Equal(again.blocks, h.blocks) {
				t.Fatalf("%v: %s", err, raw)
			}
		}
		if a, err := decodeAffinity(data); err == nil {
			raw, err := a.encode()
			if err != nil {
				t.Fatal(err)
			}
			if again, err := decodeAffinity(raw); err != nil || again.state != a.state || again.deleted != a.deleted {
				t.Fatalf("%v: %s", err, raw)
			}
		}
	})
}

func TestKeys(t *testing.T) {
	v4, v6 := netip.MustParsePrefix("10.244.40.128/26"), netip.MustParsePrefix("fd00:1::40/122")
	for got, want := range map[string]string{
		blockKey(v4):          "/calico/ipam/v2/assignment/ipv4/block/10.244.40.128-26",
		blockKey(v6):          "/calico/ipam/v2/assignment/ipv6/block/fd00:1::40-122",
		affinityKey("n1", v4): "/calico/ipam/v2/host/n1/ipv4/block/10.244.40.128-26",
		handleKey("net.abc"):  "/calico/ipam/v2/handle/net.abc",
	} {
		if got != want {
			t.Errorf("%s: expected %s", got, want)
		}
	}
	if p, err := parseKeyCIDR("10.244.40.128-26"); err != nil || p != v4 {
		t.Errorf("%v, %v", p, err)
	}
	for _, bad := range []string{"", "10.244.40.129-26", "10.244.40.128", "x-26", "fd00---122", "10.0.0.0-8-8"} {
		if p, err := parseKeyCIDR(bad); err == nil {
			t.Errorf("%q became %s", bad, p)
		}
	}
	for _, bad := range []string{"", "a/b", "a b", "a\n", strings.Repeat("x", 600)} {
		if validateHandle(bad) == nil {
			t.Errorf("handle %q was accepted", bad)
		}
	}
}

// The walk visits all blocks of the pool, each once, and in another order on each node.
func TestWalk(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pool := netip.PrefixFrom(netip.MustParseAddr("10.240.0.0"), rapid.IntRange(16, 26).Draw(t, "pool"))
		bits := rapid.IntRange(max(20, pool.Bits()), 28).Draw(t, "block")
		got := map[netip.Prefix]bool{}
		w := newWalk(pool, bits, rapid.String().Draw(t, "node"))
		for p, ok := w.next(); ok; p, ok = w.next() {
			if got[p] || p != p.Masked() || p.Bits() != bits || !pool.Contains(p.Addr()) {
				t.Fatalf("%s: twice, or no block of %s", p, pool)
			}
			got[p] = true
		}
		if want := 1 << (bits - pool.Bits()); len(got) != want {
			t.Fatalf("%d blocks, expected %d", len(got), want)
		}
	})
}
