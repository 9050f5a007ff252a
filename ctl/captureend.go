package ctl

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"margay/agent/api"
	"margay/datastore"
)

// How a capture goes on when a vRouter or an agent is restarted, and how it ends when it cannot be written any more.

const (
	// resumeFor is how long a source that has captured and does not any more is asked again.
	resumeFor = 2 * time.Minute
	// The time between two questions, which grows: those of thousands of sources keep a processor busy.
	resumePause    = 250 * time.Millisecond
	resumeMaxPause = 4 * time.Second
)

// errWrite is wrapped by the error that what is captured cannot be written.
var errWrite = errors.New("the capture has ended")

// lostPackets are those of one source that found no room: of the capture that runs, and of those before a restart.
type lostPackets struct{ before, now uint64 }

func (l lostPackets) all() uint64 { return l.before + l.now }

// follow captures from one source until ctx is done, and past its restarts. The error is one of take's, or says why the source
// gives nothing, or not any more; nil when ctx is done.
func (s *captureSink) follow(ctx context.Context, src captureSource, req api.CaptureRequest) error {
	began, lost := false, false // lost: it has been said that the datastore does not tell where it is
	var silent time.Time        // since when it does not capture; zero: it does
	for {
		err := src.capture(ctx, req, func(c api.Captured) error {
			if !began {
				began = true
				s.begin()
			}
			if !silent.IsZero() {
				s.resumed(src.name, time.Since(silent))
				silent, lost = time.Time{}, false
			}
			return s.take(src.name, c)
		})
		switch {
		case errors.Is(err, errEnough), errors.Is(err, errWrite):
			return err
		case ctx.Err() != nil:
			return nil
		case err == nil:
			err = fmt.Errorf("%s: the capture has ended", src.name)
		}
		switch {
		case !began:
			s.refused(err)
			return err
		case silent.IsZero():
			silent = time.Now()
			s.fail(fmt.Errorf("%w; it is asked again for %s", err, resumeFor))
		case time.Since(silent) > resumeFor:
			return err
		case errors.Is(err, datastore.ErrUnreachable) && !lost:
			lost = true
			s.fail(err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(min(max(resumePause, time.Since(silent)/4), resumeMaxPause)):
		}
	}
}

// capturing is a source that asks a node's agent; one that was restarted answers by another certificate, which is looked up. One
// that says nothing for agentTimeout has not begun. starts holds those that have not.
func (f *fleet) capturing(node string, starts chan struct{}) captureSource {
	asked := false
	return captureSource{node, func(ctx context.Context, r api.CaptureRequest, got func(api.Captured) error) error {
		if !asked {
			asked = true
			return f.capture(ctx, node, r, got, starts)
		}
		unknown := f.directory.refresh(ctx)
		return whereUnknown(f.capture(ctx, node, r, got, starts), unknown)
	}}
}

// capture captures from one node's agent.
func (f *fleet) capture(ctx context.Context, node string, r api.CaptureRequest, got func(api.Captured) error, starts chan struct{}) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case starts <- struct{}{}:
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	late := time.AfterFunc(agentTimeout, func() { cancel(tooLate(node)) })
	started := sync.OnceFunc(func() { late.Stop(); <-starts })
	defer started()
	c, err := f.client(node)
	if err != nil {
		return err
	}
	err = c.Capture(ctx, r, func(line api.Captured) error {
		started()
		return got(line)
	})
	if cause := context.Cause(ctx); errors.Is(cause, api.ErrUnreachable) {
		return cause
	}
	return err
}

// roomFor refuses more connections than this process may open.
func roomFor(nodes int) error {
	const others = 64 // files that are open besides
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("how many files this process may open: %w", err)
	}
	if need := uint64(nodes + others); need > limit.Cur {
		return fmt.Errorf("a capture of %d nodes needs as many connections, and this process may open %d files: name a pod or a node, or raise the limit (ulimit -n %d)",
			nodes, limit.Cur, need)
	}
	return nil
}

// resumed notes that a source captures again, and counts from 0 what it loses.
func (s *captureSink) resumed(name string, after time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost[name] = lostPackets{before: s.lost[name].all()}
	s.again = append(s.again, fmt.Sprintf("%s captures again; what passed in the %.1f s between is missing", name, after.Seconds()))
}

// cut takes away what a write that failed has left of a block, so that the file can be read. A pipe has nothing to be taken away.
func (s *captureSink) cut() {
	if f, ok := s.out.(interface{ Truncate(int64) error }); ok && s.pcap != nil {
		_ = f.Truncate(s.pcap.whole)
	}
}
