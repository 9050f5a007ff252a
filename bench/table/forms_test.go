package table

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"margay/vrouter/fib"
)

func newForms(tb testing.TB, prefixes []netip.Prefix) *Forms {
	tb.Helper()
	f, err := NewForms(prefixes)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := f.Close(); err != nil {
			tb.Error(err)
		}
	})
	return f
}

// BenchmarkLookup is random lookups in the real table, in batches of 64, in every form: ns/op is nanoseconds per lookup.
func BenchmarkLookup(b *testing.B) {
	prefixes := real(b)
	dst := Addresses(prefixes, 1<<20)
	for _, f := range newForms(b, prefixes).All {
		b.Run("form="+f.Name, func(b *testing.B) {
			b.ReportAllocs()
			f.LookupBatches(dst, b.N)
		})
	}
}

// TestFormsAgree keeps the comparison honest: every form gives the same answers.
func TestFormsAgree(t *testing.T) {
	prefixes := real(t)
	all := newForms(t, prefixes).All
	rnd := rand.New(rand.NewPCG(5, 6))
	dst := Addresses(prefixes, 1<<16)
	for i := range dst {
		if i%2 == 0 {
			dst[i] = rnd.Uint32()
		}
	}
	want, got := make([]fib.Hop, len(dst)), make([]fib.Hop, len(dst))
	at := slices.IndexFunc(all, func(f Form) bool { return f.Name == Ours })
	all[at].Batch(dst, want)
	for _, f := range all {
		f.Batch(dst, got)
		if !slices.EqualFunc(got, want, func(a, b fib.Hop) bool { return a == b || f.Name == Peer && a.Gateway() == b.Gateway() }) {
			t.Errorf("%s differs", f.Name)
		}
	}
}

// BenchmarkLookup6 is BenchmarkLookup for IPv6: the real table, and a cluster's blocks.
func BenchmarkLookup6(b *testing.B) {
	for name, prefixes := range tables6(b) {
		all, err := NewForms6(prefixes)
		if err != nil {
			b.Fatal(err)
		}
		dst := Addresses6(prefixes, 1<<18)
		for _, f := range all {
			b.Run("table="+name+"/form="+f.Name, func(b *testing.B) {
				b.ReportAllocs()
				f.LookupBatches(dst, b.N)
			})
		}
	}
}

func tables6(tb testing.TB) map[string][]netip.Prefix {
	tb.Helper()
	full, err := Real6()
	if err != nil {
		tb.Fatal(err)
	}
	return map[string][]netip.Prefix{"real": full, "cluster": Cluster6(1000)}
}

func TestForms6Agree(t *testing.T) {
	for name, prefixes := range tables6(t) {
		all, err := NewForms6(prefixes)
		if err != nil {
			t.Fatal(err)
		}
		dst := Addresses6(prefixes, 1<<16)
		for i := range dst {
			if i%4 == 0 {
				dst[i].Hi ^= 1 << (i % 48) // often outside
			}
		}
		gateways, first := make([]fib.Addr6, len(dst)), []fib.Addr6(nil)
		for _, f := range all {
			f.Gateways(dst, gateways)
			if first == nil {
				first = slices.Clone(gateways)
			}
			if !slices.Equal(first, gateways) {
				t.Errorf("%s: %s differs from %s", name, f.Name, all[0].Name)
			}
		}
	}
}

// BenchmarkUpdate is one route's update of the full table while a reader looks up at full speed: ns/op is nanoseconds
// per update.
func BenchmarkUpdate(b *testing.B) {
	prefixes := real(b)
	for _, readers := range []int{0, 1} {
		for _, batch := range []int{1, 64} {
			b.Run(fmt.Sprintf("readers=%d/batch=%d", readers, batch), func(b *testing.B) {
				u, err := NewUpdates(prefixes, readers)
				if err != nil {
					b.Fatal(err)
				}
				defer u.Close()
				b.ResetTimer()
				if err := u.Run(b.N, batch); err != nil {
					b.Fatal(err)
				}
			})
		}
	}
}

// BenchmarkLoad is the full table into an empty one: the time, and the memory that it keeps (live-MB).
func BenchmarkLoad(b *testing.B) {
	prefixes := real(b)
	for range b.N {
		took, kept, err := Load(prefixes)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(took.Nanoseconds()), "ns/load")
		b.ReportMetric(float64(kept)/1e6, "live-MB")
	}
}
