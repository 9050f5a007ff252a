package report

import (
	"image/color"
	"path/filepath"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"

	"margay/bench/rig"
	"margay/bench/stat"
	"margay/bench/suite"
)

// The colours of ours and of the peers.
var (
	oursColour = color.NRGBA{R: 0xd9, G: 0x7a, B: 0x2b, A: 0xff}
	peerColour = color.NRGBA{R: 0x5b, G: 0x7f, B: 0xa6, A: 0xff}
)

// plots draws a bar chart of each scenario's main metric and, where there is one, of its CPU time, as SVG and as PNG; it returns
// the names of the files.
func (r *Report) plots(dir string) (files []string, err error) {
	j := judgement{r.Outcome}
	for _, s := range r.scenarios {
		for i, m := range s.Metrics {
			name := plotName(s, i)
			if name == "" {
				continue
			}
			all := j.find(s.Name, m.Name, func(p string) bool { return p != rig.KindWire })
			if len(all) == 0 {
				continue
			}
			p, err := chart(s, m, all)
			if err != nil {
				return nil, err
			}
			for _, form := range plotForms {
				if err := p.Save(vg.Length(len(all)+2)*2*vg.Centimeter, 9*vg.Centimeter, filepath.Join(dir, name+form)); err != nil {
					return nil, err
				}
				files = append(files, name+form)
			}
		}
	}
	return files, nil
}

var plotForms = []string{".svg", ".png"}

// plotName is what the plot of a scenario's metric is called, without its form; metrics that have none: "".
func plotName(s suite.Scenario, metric int) string {
	switch {
	case metric == 0:
		return s.Name
	case s.Metrics[metric].Name == "cpu":
		return s.Name + ".cpu"
	}
	return ""
}

// plotNames are the files that a scenario's plots would be in.
func plotNames(s suite.Scenario) (names []string) {
	for i := range s.Metrics {
		for _, form := range plotForms {
			if name := plotName(s, i); name != "" {
				names = append(names, name+form)
			}
		}
	}
	return names
}

// chart draws the medians as bars and the spread as lines over them.
func chart(s suite.Scenario, m suite.Metric, all []suite.Series) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = s.Title
	p.Y.Label.Text = m.Name + ", " + m.Unit
	if m.Lower {
		p.Y.Label.Text += " (less is better)"
	}
	p.Y.Min = 0
	names := make([]string, len(all))
	var bars spreads
	for i, one := range all {
		bar, err := plotter.NewBarChart(plotter.Values{one.Summary.Median}, 1*vg.Centimeter)
		if err != nil {
			return nil, err
		}
		bar.XMin, bar.LineStyle.Width, bar.Color = float64(i), 0, peerColour
		if isOurs(s, one.Path) {
			bar.Color = oursColour
		}
		p.Add(bar)
		names[i] = one.Path
		bars = append(bars, one.Summary)
		p.Y.Max = max(p.Y.Max, 1.05*one.Summary.Max)
	}
	errors, err := plotter.NewYErrorBars(bars)
	if err != nil {
		return nil, err
	}
	p.Add(errors)
	p.NominalX(names...)
	p.X.Tick.Label.Rotation, p.X.Tick.Label.XAlign, p.X.Tick.Label.YAlign = 0.5, -0.9, -0.6
	return p, nil
}

func isOurs(s suite.Scenario, path string) bool {
	if s.Peer != "" {
		return path != s.Peer
	}
	return isPath(func(p rig.Path) bool { return p.Kind == rig.KindVRouter })(path) || s.Measure == nil
}

// spreads are the summaries of bars that stand side by side.
type spreads []stat.Summary

func (s spreads) Len() int                { return len(s) }
func (s spreads) XY(i int) (x, y float64) { return float64(i), s[i].Median }
func (s spreads) YError(i int) (low, high float64) {
	return s[i].Median - s[i].Min, s[i].Max - s[i].Median
}
