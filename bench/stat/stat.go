// Package stat summarises what a benchmark has measured: medians with their spread. It is pure.
package stat

import (
	"fmt"
	"maps"
	"math"
	"slices"
)

// Summary is what is told of a series: its median, and the least and the most.
type Summary struct {
	N      int     `json:"n"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// Summarise returns the summary of a series; of an empty one, zeroes.
func Summarise(values []float64) Summary {
	if len(values) == 0 {
		return Summary{}
	}
	sorted := slices.Sorted(slices.Values(values))
	return Summary{N: len(sorted), Median: middle(sorted), Min: sorted[0], Max: sorted[len(sorted)-1]}
}

func middle(sorted []float64) float64 {
	n := len(sorted)
	if n%2 == 1 {
		return sorted[n/2]
	}
	return (sorted[n/2-1] + sorted[n/2]) / 2
}

// Percentile returns the value below which p percent of a sorted series lie (nearest rank); NaN of an empty one.
func Percentile(sorted []float64, p float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	rank := int(math.Ceil(p / 100 * float64(len(sorted))))
	return sorted[min(max(rank, 1), len(sorted))-1]
}

// Ratios divides a series by its peer's, round by round: what two measurements of the same round share, such as a busy
// machine, falls out. Rounds that only one of them has are left out, and so are those whose peer measured nothing.
func Ratios(ours, peer map[int]float64) []float64 {
	var out []float64
	for _, round := range slices.Sorted(maps.Keys(ours)) {
		if p, ok := peer[round]; ok && p != 0 {
			out = append(out, ours[round]/p)
		}
	}
	return out
}

// Number writes a figure with three significant digits, and with none behind the point from 100 on.
func Number(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return "–"
	case a >= 100 || a == 0:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 1:
		return fmt.Sprintf("%.2f", v)
	default:
		return fmt.Sprintf("%.3f", v)
	}
}
