package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"margay/agent/api"
	"margay/datastore"
)

// How many agents are asked: where they answer, how many at a time, and what is said meanwhile.

const (
	// agentTimeout bounds one question to one agent: a node that is dead must not hold up the others for long.
	agentTimeout = 6 * time.Second
	// atOnce is how many nodes are asked at the same time: as many handshakes as one processor makes in a fraction of
	// agentTimeout, and few files to what a process may open.
	atOnce = 128
	// directoryPause is the least time between two looks at where the agents are. Those of thousands of nodes take the datastore
	// time, and one that does not answer takes its clients': directoryShare times what a look takes has to pass before the next.
	directoryPause    = time.Second
	directoryShare    = 50
	directoryMaxPause = 10 * time.Second
)

// directory is where the agents answer. One that is restarted has a new certificate, so the datastore is asked again when an
// agent has not answered, for all nodes together.
type directory struct {
	read func(context.Context) (map[string]api.Endpoint, string, error)

	reading sync.Mutex // one reads, and the others wait for what it finds
	next    time.Time  // when it may be read again
	err     error      // of the last time

	mu        sync.Mutex
	endpoints map[string]api.Endpoint
	token     string
}

// newDirectory reads one out of an open datastore; later the datastore is opened anew.
func newDirectory(ctx context.Context, cmd *cobra.Command, s *datastore.Store) (*directory, error) {
	d := &directory{read: func(ctx context.Context) (map[string]api.Endpoint, string, error) {
		s, err := openStore(ctx, cmd)
		if err != nil {
			return nil, "", err
		}
		defer s.Close()
		return readDirectory(ctx, s)
	}}
	var err error
	d.endpoints, d.token, err = readDirectory(ctx, s)
	d.next = time.Now().Add(directoryPause)
	return d, err
}

func readDirectory(ctx context.Context, s *datastore.Store) (map[string]api.Endpoint, string, error) {
	kvs, _, err := s.List(ctx, api.DiagNodes)
	if err != nil {
		return nil, "", err
	}
	endpoints := make(map[string]api.Endpoint, len(kvs))
	for _, kv := range kvs {
		var e api.Endpoint
		if json.Unmarshal(kv.Value, &e) == nil {
			endpoints[strings.TrimPrefix(kv.Key, api.DiagNodes)] = e
		}
	}
	token, err := s.Get(ctx, api.DiagToken)
	if err != nil && !errors.Is(err, datastore.ErrNotFound) {
		return nil, "", err
	}
	return endpoints, strings.TrimSpace(string(token.Value)), nil
}

// refresh reads the directory again, unless it has just been read. Without a datastore what was known stays: an agent that was not
// restarted is where it was. The error is that of the last look.
func (d *directory) refresh(ctx context.Context) error {
	d.reading.Lock()
	defer d.reading.Unlock()
	began := time.Now()
	if began.Before(d.next) {
		return d.err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var (
		endpoints map[string]api.Endpoint
		token     string
	)
	endpoints, token, d.err = d.read(ctx)
	d.next = time.Now().Add(min(max(directoryPause, directoryShare*time.Since(began)), directoryMaxPause))
	if d.err != nil {
		return d.err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.endpoints, d.token = endpoints, token
	return nil
}

// client returns a client for a node's agent.
func (d *directory) client(node string) (*api.Client, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e, ok := d.endpoints[node]
	if !ok || d.token == "" {
		return nil, fmt.Errorf("margay-agent of %s %w: it has never said where (it listens on --diag-port)", node, api.ErrUnreachable)
	}
	return api.NewClient(node, e, d.token), nil
}

// client returns a client for a node's agent.
func (f *fleet) client(node string) (*api.Client, error) {
	if node == f.local && node != "" {
		return api.NewUnixClient(agentSocket()), nil
	}
	return f.directory.client(node)
}

// question asks a node's agent one question, for agentTimeout at most.
func (f *fleet) question(ctx context.Context, node string, ask func(context.Context, *api.Client) error) error {
	c, err := f.client(node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, agentTimeout, tooLate(node))
	defer cancel()
	return explained(ctx, ask(ctx, c))
}

// whereUnknown adds to an agent's failure what keeps the datastore from saying whether it is somewhere else now.
func whereUnknown(failure, unknown error) error {
	if failure == nil || unknown == nil {
		return failure
	}
	return fmt.Errorf("%w; and whether it was restarted is not known: %w", failure, unknown)
}

// tooLate says that an agent has let agentTimeout pass.
func tooLate(node string) error {
	return fmt.Errorf("margay-agent of %s %w within %s", node, api.ErrUnreachable, agentTimeout)
}

// explained returns why ctx is done where that is what has ended a question.
func explained(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// eachNode runs f for all nodes named, atOnce at the same time. When ctx is done it starts no more of them.
func eachNode(ctx context.Context, nodes []string, f func(i int, node string)) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for i, n := range nodes {
		slots <- struct{}{}
		if ctx.Err() != nil {
			break
		}
		wg.Go(func() {
			defer func() { <-slots }()
			f(i, n)
		})
	}
	wg.Wait()
}

// progressPause is how long nothing is said about how far a question to all nodes is.
const progressPause = 3 * time.Second

// progress tells who waits how far a question to many nodes is.
type progress struct {
	mu         sync.Mutex
	asked, bad int
}

// report says how far it is, every progressPause, until the function that it returns is called. Of one node there is nothing to say.
func (p *progress) report(w io.Writer, all int) (stop func()) {
	if all < 2 {
		return func() {}
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(progressPause)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				p.mu.Lock()
				fmt.Fprintf(w, "%d of %d nodes asked, %d of them in vain\n", p.asked, all, p.bad)
				p.mu.Unlock()
			}
		}
	})
	return func() { close(done); wg.Wait() }
}

// add counts one node that has been asked.
func (p *progress) add(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asked++; err != nil {
		p.bad++
	}
}

// most is how many names, or lines of a kind, are shown to somebody who reads them.
const most = 12

// few lists names for a line that somebody reads: not thousands of them.
func few(names []string) string {
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// fewLines prints lines for somebody who reads them, and of what kind the rest is.
func fewLines(w io.Writer, lines []string, rest string) {
	for i, l := range lines {
		if i == most && len(lines) > most+1 { // instead of the last one nothing need be said
			fmt.Fprintf(w, "and %d more %s\n", len(lines)-most, rest)
			return
		}
		fmt.Fprintln(w, l)
	}
}
