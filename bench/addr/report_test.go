package addr

import (
	"bytes"
	"strings"
	"testing"

	"margay/bench/stat"
)

func TestVerdicts(t *testing.T) {
	series := func(v float64) stat.Summary { return stat.Summarise([]float64{v - 1, v, v + 1}) }
	var rows []Row
	for _, tt := range []struct {
		ours, peer float64
		want       string
	}{{10, 10, "aim reached"}, {15, 10, "reached"}, {21, 10, "missed"}, {1, 0, "aim reached"}, {2, 0, "reached"}, {3, 0, "missed"}} {
		r := Row{What: "x", Unit: "ms", Ours: series(tt.ours), AtLeast: 2, Aim: 1.1, PeerIs: "peer"}
		if tt.peer > 0 {
			r.Peer = series(tt.peer)
		}
		if r = r.judge(); r.Verdict != tt.want {
			t.Errorf("%v beside %v: %s, expected %s", tt.ours, tt.peer, r.Verdict, tt.want)
		}
		rows = append(rows, r)
	}
	var out bytes.Buffer
	if err := Print(&out, rows); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"10.0 (9.00 to 11.0) ms", "peer: 10.0 (9.00 to 11.0) ms 1.50 ≤ 2.00 × ≤ 1.10 × reached", "– – ≤ 2.00 ms ≤ 1.10 ms reached"} {
		if !strings.Contains(strings.Join(strings.Fields(out.String()), " "), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
}
