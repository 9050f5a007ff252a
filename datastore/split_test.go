package datastore

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// The parts of a range lie one behind the other and make it up.
func TestSplitIsWhole(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := NewIPPool("p")
		parts := 1 << rapid.IntRange(1, 6).Draw(t, "power")
		if rapid.Bool().Draw(t, "IPv6") {
			raw := rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "address")
			raw[0] = 0xfd
			p.Spec.CIDR = netip.PrefixFrom(netip.AddrFrom16([16]byte(raw)), rapid.IntRange(8, 122).Draw(t, "bits")).Masked().String()
		} else {
			raw := rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "address")
			raw[0] = 10
			p.Spec.CIDR = netip.PrefixFrom(netip.AddrFrom4([4]byte(raw)), rapid.IntRange(8, 26).Draw(t, "bits")).Masked().String()
		}
		p.Default()
		whole := netip.MustParsePrefix(p.Spec.CIDR)
		got, err := p.split(parts)
		if err != nil {
			if !strings.Contains(err.Error(), "too small") || 1<<min(30, p.Spec.BlockSize-whole.Bits()) >= parts {
				t.Fatal(err)
			}
			return
		}
		next := whole.Addr()
		for _, part := range got {
			if part.Addr() != next || part != part.Masked() || !whole.Contains(part.Addr()) || 1<<(part.Bits()-whole.Bits()) != parts {
				t.Fatalf("%s in %d: %v", whole, parts, got)
			}
			next = lastOf(part).Next()
		}
		if lastOf(got[parts-1]) != lastOf(whole) {
			t.Fatalf("%s in %d: %v", whole, parts, got)
		}
	})
}

// lastOf is the last address of a prefix, bit by bit.
func lastOf(p netip.Prefix) netip.Addr {
	raw := p.Addr().AsSlice()
	for i := p.Bits(); i < len(raw)*8; i++ {
		raw[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(raw)
	return a
}

func TestSplitPool(t *testing.T) {
	s, ctx := openStore(t), t.Context()
	if _, err := s.Create(ctx, IPPools.Key("p"), []byte(`{"kind":"IPPool","apiVersion":"projectcalico.org/v3","metadata":{"name":"p","uid":"old","labels":{"a":"b"}},`+
		`"spec":{"cidr":"10.244.0.0/16","ipipMode":"Always","natOutgoing":true,"blockSize":26,"nodeSelector":"rack == '1'","disabled":true,"ofTomorrow":7}}`)); err != nil {
		t.Fatal(err)
	}
	if _, err := SplitPool(ctx, s, "p", 4); !errors.Is(err, ErrNotLocked) {
		t.Errorf("not locked: %v", err)
	}
	info, ready := NewClusterInformation("default"), false
	info.Spec.DatastoreReady = &ready
	if err := CreateResource(ctx, s, info); err != nil {
		t.Fatal(err)
	}
	for parts, want := range map[int]string{1: "power of two", 3: "power of two", 128: "from 2 to 64"} {
		if _, err := SplitPool(ctx, s, "p", parts); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%d parts: %v", parts, err)
		}
	}
	got, err := SplitPool(ctx, s, "p", 4)
	if err != nil || len(got) != 4 {
		t.Fatal(got, err)
	}
	pools, _, err := ListResources[IPPool](ctx, s)
	var have []string
	for _, p := range pools {
		have = append(have, p.Metadata.Name+" "+p.Spec.CIDR)
		if !p.Spec.NATOutgoing || p.Spec.NodeSelector != "rack == '1'" || p.Spec.Disabled || p.Metadata.Labels["a"] != "b" || p.Metadata.UID == "old" || p.Metadata.UID == "" {
			t.Errorf("%+v", p)
		}
		if kv, err := s.Get(ctx, IPPools.Key(p.Metadata.Name)); err != nil || !strings.Contains(string(kv.Value), `"ofTomorrow":7`) {
			t.Errorf("a field of a newer version is lost: %s, %v", kv.Value, err)
		}
	}
	want := []string{"split-p-0 10.244.0.0/18", "split-p-1 10.244.64.0/18", "split-p-2 10.244.128.0/18", "split-p-3 10.244.192.0/18"}
	if err != nil || !slices.Equal(have, want) {
		t.Errorf("%v, %v, expected %v", have, err, want)
	}
	// Where a part's name is taken, nothing happens.
	if err := CreateResource(ctx, s, &IPPool{Header: IPPools.header("split-split-p-0-1"), Spec: IPPoolSpec{CIDR: "10.245.0.0/16"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := SplitPool(ctx, s, "split-p-0", 2); !errors.Is(err, ErrExists) {
		t.Errorf("a name that is taken: %v", err)
	}
	if _, err := GetResource[IPPool](ctx, s, "split-p-0"); err != nil {
		t.Errorf("after a refusal: %v", err)
	}
	if p, err := FindPool(ctx, s, "", "10.244.64.0/18"); err != nil || p.Metadata.Name != "split-p-1" {
		t.Errorf("by CIDR: %+v, %v", p, err)
	}
	if _, err := FindPool(ctx, s, "", "10.244.64.0/19"); !errors.Is(err, ErrNotFound) {
		t.Errorf("by a CIDR that is none: %v", err)
	}
}
