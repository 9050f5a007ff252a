package ctl

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"margay/agent/api"
)

// How a capture goes on when a vRouter or an agent is restarted, and how it ends when it cannot be written any more.

const (
	// resumeFor is how long a source that has captured and does not any more is asked again.
	resumeFor = 2 * time.Minute
	// resumePause is the time between two questions.
	resumePause = 250 * time.Millisecond
)

// errWrite is wrapped by the error that what is captured cannot be written.
var errWrite = errors.New("the capture has ended")

// lostPackets are those of one source that found no room: of the capture that runs, and of those before a restart.
type lostPackets struct{ before, now uint64 }

func (l lostPackets) all() uint64 { return l.before + l.now }

// follow captures from one source until ctx is done, and past its restarts. The error is one of take's, or says why the source
// gives nothing, or not any more; nil when ctx is done.
func (s *captureSink) follow(ctx context.Context, src captureSource, req api.CaptureRequest) error {
	began := false
	var silent time.Time // since when it does not capture; zero: it does
	for {
		err := src.capture(ctx, req, func(c api.Captured) error {
			if !began {
				began = true
				s.begin()
			}
			if !silent.IsZero() {
				s.resumed(src.name, time.Since(silent))
				silent = time.Time{}
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
			s.refused()
			return err
		case silent.IsZero():
			silent = time.Now()
			s.fail(fmt.Errorf("%w; it is asked again for %s", err, resumeFor))
		case time.Since(silent) > resumeFor:
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(resumePause):
		}
	}
}

// capturing is a source that asks a node's agent; one that was restarted answers by another certificate, which is looked up.
func (f *fleet) capturing(cmd *cobra.Command, node string) captureSource {
	asked := false
	return captureSource{node, func(ctx context.Context, r api.CaptureRequest, got func(api.Captured) error) error {
		c, err := f.client(node)
		if asked && (f.local == "" || node != f.local) {
			c, err = currentClient(ctx, cmd, node)
		}
		asked = true
		if err != nil {
			return err
		}
		return c.Capture(ctx, r, got)
	}}
}

// resumed notes that a source captures again, and counts from 0 what it loses.
func (s *captureSink) resumed(name string, after time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost[name] = lostPackets{before: s.lost[name].all()}
	fmt.Fprintf(s.errs, "%s captures again; what passed in the %.1f s between is missing\n", name, after.Seconds())
}

// cut takes away what a write that failed has left of a block, so that the file can be read. A pipe has nothing to be taken away.
func (s *captureSink) cut() {
	if f, ok := s.out.(interface{ Truncate(int64) error }); ok && s.pcap != nil {
		_ = f.Truncate(s.pcap.whole)
	}
}
