package ctl

import "testing"

func TestFew(t *testing.T) {
	names := []string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n"}
	for n, want := range map[int]string{0: "", 2: "a, b", 12: "a, b, c, d, e, f, g, h, i, j, k, l", 14: "a, b, c, d, e, f, g, h, i, j, k, l and 2 more"} {
		if got := few(names[:n]); got != want {
			t.Errorf("%d: %q, expected %q", n, got, want)
		}
	}
}
