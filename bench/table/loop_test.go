package table

import (
	"fmt"
	"net/netip"
	"testing"
)

// real returns the full table.
func real(tb testing.TB) []netip.Prefix {
	tb.Helper()
	prefixes, err := Real()
	if err != nil {
		tb.Fatal(err)
	}
	return prefixes
}

func newLoop(tb testing.TB, prefixes []netip.Prefix) *Loop {
	tb.Helper()
	l, err := NewLoop(prefixes)
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

// BenchmarkLoop is the forwarding loop alone, encapsulating: ns/op is nanoseconds per packet.
func BenchmarkLoop(b *testing.B) {
	for _, size := range []int{1, 10_000, FullTable} {
		b.Run(fmt.Sprintf("routes=%d", size), func(b *testing.B) {
			prefixes := Some(min(size, 10_000))
			if size > 10_000 {
				prefixes = real(b)
			}
			l := newLoop(b, prefixes)
			b.ReportAllocs()
			b.ResetTimer()
			if err := l.Run(b.N); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// TestLoop keeps the benchmark from rotting: every packet has to come through, and nothing may be allocated on the way.
func TestLoop(t *testing.T) {
	for _, prefixes := range [][]netip.Prefix{Some(1), Some(10_000), real(t)} {
		const n = 100_000
		l := newLoop(t, prefixes)
		if err := l.Run(n); err != nil {
			t.Errorf("%d routes: %v", len(prefixes), err)
		}
		allocated := testing.AllocsPerRun(3, func() {
			if err := l.Run(n); err != nil {
				t.Error(err)
			}
		})
		if allocated != 0 {
			t.Errorf("%d routes: %v allocations in %d packets", len(prefixes), allocated, n)
		}
	}
}
