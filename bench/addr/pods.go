package addr

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"margay/bench/stat"
	"margay/lab"
)

// Pods measures how long it takes until so many new pods on each node are attached, all nodes at once, and every pod has
// had an answer from every other. It does so rounds times, each in a lab of its own.
func Pods(ctx context.Context, nodes, pods, rounds int, binDir string) (Row, error) {
	var total, attach []float64
	for i := range rounds {
		t, a, err := podsOnce(ctx, labName(fmt.Sprint("p", i)), nodes, pods, binDir)
		if err != nil {
			return Row{}, err
		}
		total, attach = append(total, t.Seconds()), append(attach, a.Seconds())
	}
	what := fmt.Sprintf("%d nodes × %d pods at once, attached (%s s) and all %d pairs reached", nodes, pods,
		stat.Number(stat.Summarise(attach).Median), nodes*pods*(nodes*pods-1))
	return Row{What: what, Unit: "s", Ours: stat.Summarise(total), AtLeast: 15, Aim: 5}.judge(), nil
}

func podsOnce(ctx context.Context, name string, nodes, pods int, binDir string) (total, attach time.Duration, err error) {
	l, err := lab.Host{}.Up(ctx, lab.Options{Name: name, Nodes: nodes, BinDir: binDir})
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, lab.Host{}.Down(name, nil)) }()
	st, err := l.Status()
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	var wg sync.WaitGroup
	errs := make([]error, nodes)
	for i, n := range st.Nodes {
		wg.Go(func() { _, errs[i] = l.AddPods(ctx, n.Name, pods) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return 0, 0, err
	}
	attach = time.Since(began)
	reach, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	lost, err := l.Unreachable(reach)
	if err == nil && len(lost) > 0 {
		err = fmt.Errorf("%d pairs have no connection after a minute, among them: %s", len(lost), lost[0])
	}
	return time.Since(began), attach, err
}
