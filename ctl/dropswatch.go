package ctl

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"margay/agent/api"
)

// drops --watch: each node is asked apart from the others, so that one that is silent holds up nobody's lines.

const (
	// doubtfulAtOnce is how many nodes that did not answer the last time are asked at the same time, apart from those that did.
	doubtfulAtOnce = 16
	// perNode is the time that one node takes margayctl: thousands are asked more seldom than --interval says.
	perNode = time.Millisecond
	// problemPause is how long problems are gathered before they are said: of thousands at once only the first.
	problemPause = 500 * time.Millisecond
)

// dropsWatch is one drops --watch.
type dropsWatch struct {
	o         *dropsOptions
	f         *fleet
	only      netip.Addr
	out, errs io.Writer
	every     time.Duration
	slots     chan struct{} // of the nodes that answer
	doubtful  chan struct{} // of those that do not
	far       progress

	mu       sync.Mutex // of what follows, and of out and errs
	waiting  int        // nodes that have not been asked yet
	problems []string   // of nodes that do not answer any more, not said yet
	again    []string   // nodes that answer again, not said yet
	err      error      // of printing
}

// watchedNode is what is known of a node.
type watchedNode struct {
	name   string
	since  uint64            // its last sample
	kernel map[string]uint64 // the kernel's counters; nil: it has not answered yet
	state  watchedState
}

// watchedState is what a node's last answer was like. A state that lasts is said once, whatever its words.
type watchedState int

const (
	answersWhole watchedState = iota
	vrouterMissing
	agentMissing
)

// follow prints what is dropped from now on, until ctx is done, which is how it is meant to end.
func (o *dropsOptions) follow(ctx context.Context, cmd *cobra.Command, f *fleet, nodes []string, only netip.Addr) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := &dropsWatch{o: o, f: f, only: only, out: cmd.OutOrStdout(), errs: cmd.ErrOrStderr(), waiting: len(nodes),
		every: max(o.every, time.Duration(len(nodes))*perNode), slots: make(chan struct{}, atOnce), doubtful: make(chan struct{}, doubtfulAtOnce)}
	var all sync.WaitGroup
	stop := sync.OnceFunc(w.far.report(lockedWriter{&w.mu, w.errs}, len(nodes)))
	defer stop()
	for _, name := range nodes {
		all.Go(func() {
			w.watch(ctx, &watchedNode{name: name})
			cancel() // or it is done already
		})
	}
	all.Go(func() {
		tick := time.NewTicker(problemPause)
		defer tick.Stop()
		for said := false; ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			w.say()
			if !said && w.allAsked() {
				said = true
				stop()
				fmt.Fprintf(w.errs, "watching %s; stop with Ctrl-C\n", few(nodes))
			}
		}
	})
	all.Wait()
	w.say()
	return w.err
}

// lockedWriter lets several write, a call at a time.
type lockedWriter struct {
	mu *sync.Mutex
	io.Writer
}

// Write implements io.Writer.
func (w lockedWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.Writer.Write(b)
}

// watch asks one node again and again until ctx is done, or nothing can be printed any more.
func (w *dropsWatch) watch(ctx context.Context, n *watchedNode) {
	for first := true; ; first = false {
		slots := w.slots
		if n.state == agentMissing {
			slots = w.doubtful
		}
		select {
		case <-ctx.Done():
			return
		case slots <- struct{}{}:
		}
		d, err := w.f.drops(ctx, n.name, n.since)
		<-slots
		if err != nil {
			err = whereUnknown(err, w.f.directory.refresh(ctx))
		}
		if ctx.Err() != nil || !w.take(n, d, err, first) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(w.every):
		}
	}
}

// take notes what has become of a question. It is false when nothing can be printed any more.
func (w *dropsWatch) take(n *watchedNode, d api.Drops, err error, first bool) bool {
	state, problem := answersWhole, ""
	switch {
	case err != nil:
		state, problem = agentMissing, err.Error()
	case d.VRouter != "":
		state, problem = vrouterMissing, d.VRouter
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if first {
		w.waiting--
		w.far.add(err)
	}
	if state != n.state {
		n.state = state
		if problem != "" {
			w.problems = append(w.problems, n.name+": "+problem)
		} else {
			w.again = append(w.again, n.name)
		}
	}
	if err == nil && w.err == nil {
		w.err = w.news(n, d)
	}
	return w.err == nil
}

func (w *dropsWatch) allAsked() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.waiting == 0
}

// say says what has happened to the nodes.
func (w *dropsWatch) say() {
	w.mu.Lock()
	defer w.mu.Unlock()
	fewLines(w.errs, w.problems, "nodes cannot be asked")
	if len(w.again) == 1 {
		fmt.Fprintf(w.errs, "%s: answers again\n", w.again[0])
	} else if len(w.again) > 1 {
		fmt.Fprintf(w.errs, "%s: answer again\n", few(w.again))
	}
	w.problems, w.again = nil, nil
}

// news prints the samples that are new, and the kernel's counters that have moved; of the first answer nothing.
func (w *dropsWatch) news(n *watchedNode, d api.Drops) error {
	o, first := w.o, n.kernel == nil
	for _, s := range d.Samples {
		n.since = s.Number
		if first || !concerns(s.Packet, w.only) || o.reason != "" && s.Reason != o.reason {
			continue
		}
		sample := sampleFrom(d.Node, s)
		if o.output == "json" {
			if err := json.NewEncoder(w.out).Encode(sample); err != nil {
				return err
			}
			continue
		}
		if _, err := fmt.Fprintf(w.out, "%s %s %s: %s\n", s.Time.Local().Format("15:04:05.000"), d.Node, s.Reason, sample.Decoded); err != nil {
			return err
		}
	}
	before := n.kernel
	n.kernel = map[string]uint64{}
	for _, c := range d.Counters {
		if c.By != "kernel" {
			continue
		}
		n.kernel[c.Reason] = c.Packets
		if first || c.Packets <= before[c.Reason] || w.only.IsValid() || !o.shows(c.Reason) {
			continue
		}
		if o.output == "json" {
			if err := json.NewEncoder(w.out).Encode(kernelDrops{d.Node, time.Now(), c.By, c.Reason, c.Packets - before[c.Reason]}); err != nil {
				return err
			}
			continue
		}
		if _, err := fmt.Fprintf(w.out, "%s %s %s: %d more, by the kernel\n", time.Now().Format("15:04:05.000"), d.Node, c.Reason, c.Packets-before[c.Reason]); err != nil {
			return err
		}
	}
	return nil
}
