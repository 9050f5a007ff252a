package addr

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"margay/bench/stat"
)

// Row is one figure beside its peer of the same run, or beside nothing, and what is wanted of it.
type Row struct {
	What    string       `json:"what"`
	Unit    string       `json:"unit"`
	Ours    stat.Summary `json:"ours"`
	Peer    stat.Summary `json:"peer,omitzero"` // what it is compared with; zero: nothing
	PeerIs  string       `json:"peerIs,omitempty"`
	Ratio   float64      `json:"ratio,omitempty"` // of the medians
	AtLeast float64      `json:"atLeast"`         // a ratio, or without a peer a value, that must not be exceeded
	Aim     float64      `json:"aim"`
	Verdict string       `json:"verdict"` // "aim reached", "reached" or "missed"
}

// judge fills ratio and verdict.
func (r Row) judge() Row {
	got := r.Ours.Median
	if r.Peer.N > 0 && r.Peer.Median > 0 {
		r.Ratio = r.Ours.Median / r.Peer.Median
		got = r.Ratio
	}
	switch {
	case got <= r.Aim:
		r.Verdict = "aim reached"
	case got <= r.AtLeast:
		r.Verdict = "reached"
	default:
		r.Verdict = "missed"
	}
	return r
}

// Print writes rows as a table.
func Print(w io.Writer, rows []Row) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "WHAT\tOURS\tPEER\tRATIO\tAT LEAST\tAIM\tVERDICT")
	for _, r := range rows {
		peer, ratio, unit := "–", "–", " "+r.Unit
		if r.Peer.N > 0 {
			peer = fmt.Sprintf("%s: %s (%s to %s) %s", r.PeerIs, stat.Number(r.Peer.Median), stat.Number(r.Peer.Min), stat.Number(r.Peer.Max), r.Unit)
			ratio, unit = stat.Number(r.Ratio), " ×"
		}
		fmt.Fprintf(t, "%s\t%s (%s to %s) %s\t%s\t%s\t≤ %s%s\t≤ %s%s\t%s\n", r.What, stat.Number(r.Ours.Median), stat.Number(r.Ours.Min),
			stat.Number(r.Ours.Max), r.Unit, peer, ratio, stat.Number(r.AtLeast), unit, stat.Number(r.Aim), unit, r.Verdict)
	}
	return t.Flush()
}

// timed adds how long f took, in milliseconds.
func timed(into *[]float64, f func() error) error {
	at := time.Now()
	if err := f(); err != nil {
		return err
	}
	*into = append(*into, float64(time.Since(at))/float64(time.Millisecond))
	return nil
}
