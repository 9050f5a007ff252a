package stat

import (
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSummarise(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   Summary
	}{
		{nil, Summary{}},
		{[]float64{3}, Summary{1, 3, 3, 3}},
		{[]float64{5, 1, 9}, Summary{3, 5, 1, 9}},
		{[]float64{4, 1, 2, 8}, Summary{4, 3, 1, 8}},
	} {
		if diff := cmp.Diff(c.want, Summarise(c.values)); diff != "" {
			t.Errorf("%v: %s", c.values, diff)
		}
	}
}

func TestPercentile(t *testing.T) {
	var sorted []float64
	for i := range 200 {
		sorted = append(sorted, float64(i+1))
	}
	for p, want := range map[float64]float64{0: 1, 50: 100, 99: 198, 100: 200} {
		if got := Percentile(sorted, p); got != want {
			t.Errorf("p%v: %v, expected %v", p, got, want)
		}
	}
	if got := Percentile(nil, 50); !math.IsNaN(got) {
		t.Errorf("of nothing: %v", got)
	}
}

func TestRatios(t *testing.T) {
	ours := map[int]float64{1: 6, 2: 9, 3: 1, 4: 5}
	peer := map[int]float64{1: 3, 2: 3, 3: 0, 5: 5}
	if diff := cmp.Diff([]float64{2, 3}, Ratios(ours, peer)); diff != "" {
		t.Error(diff)
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 1234.5: "1234", 99.94: "99.9", 5.678: "5.68", 0.12345: "0.123", math.NaN(): "–"} {
		if got := Number(v); got != want {
			t.Errorf("%v: %q, expected %q", v, got, want)
		}
	}
}
