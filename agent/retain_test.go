package agent

import (
	"bytes"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func poolAt(name, cidr string) Pool {
	return Pool{Name: name, CIDR: netip.MustParsePrefix(cidr), BlockSize: 26, IPIPMode: "Always", NATOutgoing: true}
}

// cidrs are the pools' prefixes, as one word each.
func cidrs(pools []Pool) string {
	var out []string
	for _, p := range pools {
		out = append(out, p.CIDR.String())
	}
	return strings.Join(out, " ")
}

func TestRetainer(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state", "pools.json")
	var log bytes.Buffer
	fresh := func() *retainer { return newRetainer(file, slog.New(slog.NewTextHandler(&log, nil))) }
	r := fresh()
	whole, small, other := poolAt("p", "10.1.0.0/16"), poolAt("p", "10.1.0.0/18"), poolAt("q", "10.2.0.0/16")
	low, high := netip.MustParseAddr("10.1.1.1"), netip.MustParseAddr("10.1.200.1")
	for _, step := range []struct {
		what    string
		restart bool
		pools   []Pool
		pods    []netip.Addr
		blind   bool
		want    string
		said    int // warnings
	}{
		{what: "two pools", pools: []Pool{whole, other}, pods: []netip.Addr{low, high}, want: "10.1.0.0/16 10.2.0.0/16"},
		{what: "one is deleted, one unused", pods: []netip.Addr{low, high}, want: "10.1.0.0/16", said: 1},
		{what: "said once", pods: []netip.Addr{low, high}, want: "10.1.0.0/16", said: 1},
		{what: "after a restart", restart: true, pods: []netip.Addr{low, high}, want: "10.1.0.0/16", said: 2},
		{what: "made again smaller", pools: []Pool{small}, pods: []netip.Addr{low, high}, want: "10.1.0.0/18 10.1.128.0/17", said: 3},
		{what: "the pod outside goes", pools: []Pool{small}, pods: []netip.Addr{low}, want: "10.1.0.0/18", said: 3},
		{what: "made again as it was", pools: []Pool{whole}, pods: []netip.Addr{low}, want: "10.1.0.0/16", said: 3},
		{what: "unreadable", pods: []netip.Addr{low}, blind: true, want: "10.1.0.0/16", said: 3},
		{what: "readable, and gone", pods: []netip.Addr{low}, want: "10.1.0.0/16", said: 4},
		{what: "nobody lives in it", want: "", said: 4},
		{what: "a restart does not bring it back", restart: true, pods: []netip.Addr{low}, want: "", said: 4},
	} {
		if step.restart {
			r = fresh()
		}
		got := r.look(step.pools, step.pods, step.blind)
		if cidrs(got) != step.want || strings.Count(log.String(), "IPPool was deleted") != step.said {
			t.Errorf("%s: %q, expected %q; %d warnings expected in\n%s", step.what, cidrs(got), step.want, step.said, log.String())
		}
		for _, p := range got {
			if p.BlockSize != 26 || p.IPIPMode != "Always" || !p.NATOutgoing {
				t.Errorf("%s: %+v is not as the pool was", step.what, p)
			}
		}
	}
}

// TestRetainerWithoutItsFile: one that cannot be read is said, and written anew.
func TestRetainerWithoutItsFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pools.json")
	for _, bad := range []string{"", "{", `[{"CIDR":"10.0.0.1/8"}]`, `[{"Name":"none"}]`, `[{"CIDR":"x"}]`} {
		if err := os.WriteFile(file, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		r := newRetainer(file, slog.New(slog.NewTextHandler(&log, nil)))
		if got := r.look([]Pool{poolAt("p", "10.1.0.0/16")}, nil, false); cidrs(got) != "10.1.0.0/16" || strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), file) {
			t.Errorf("%s: %v\n%s", bad, got, log.String())
		}
		if again := newRetainer(file, slog.New(slog.DiscardHandler)); len(again.inForce) != 1 {
			t.Errorf("%s: not written anew: %+v", bad, again.inForce)
		}
	}
}

// TestWithout compares the prefixes that are left of a prefix with every address of it.
func TestWithout(t *testing.T) {
	prefix := rapid.Custom(func(t *rapid.T) netip.Prefix {
		a := netip.AddrFrom4([4]byte{10, 0, 0, rapid.Byte().Draw(t, "address")})
		return netip.PrefixFrom(a, rapid.IntRange(23, 32).Draw(t, "bits")).Masked()
	})
	rapid.Check(t, func(t *rapid.T) {
		p := prefix.Draw(t, "prefix")
		var pools []Pool
		for _, c := range rapid.SliceOfN(prefix, 0, 4).Draw(t, "pools") {
			pools = append(pools, Pool{CIDR: c})
		}
		parts := without(p, pools)
		for a := netip.MustParseAddr("10.0.0.0"); a.As4()[2] < 2; a = a.Next() {
			want := p.Contains(a) && !slices.ContainsFunc(pools, func(o Pool) bool { return o.CIDR.Contains(a) })
			times := 0
			for _, part := range parts {
				if part != part.Masked() {
					t.Fatalf("%s has host bits", part)
				}
				if part.Contains(a) {
					times++
				}
			}
			if want != (times == 1) || times > 1 {
				t.Fatalf("%s is in %d of %v", a, times, parts)
			}
		}
	})
}

func FuzzDecodePools(f *testing.F) {
	f.Add([]byte(`[{"Name":"p","CIDR":"10.1.0.0/16","BlockSize":26,"IPIPMode":"Always","NATOutgoing":true,"DisableBGPExport":false,"Unsupported":""}]`))
	f.Add([]byte(`[{"CIDR":"fd00::/64"},{"CIDR":""}]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		pools, err := decodePools(raw)
		if err != nil {
			return
		}
		for _, p := range pools {
			without(p.CIDR, []Pool{{CIDR: netip.PrefixFrom(p.CIDR.Addr(), p.CIDR.Addr().BitLen())}})
		}
	})
}
