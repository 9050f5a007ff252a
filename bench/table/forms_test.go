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
	for _, f := range all {
		switch f.Name {
		case Ours:
			f.Batch(dst, want)
		case Peer: // it comes before ours, and gives only the next hop's kind
			continue
		default:
			f.Batch(dst, got)
			if !slices.Equal(got, want) {
				t.Errorf("%s differs", f.Name)
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
