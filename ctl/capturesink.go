package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"margay/agent/api"
)

const (
	// captureHold is how long a packet waits for earlier ones, which another worker or node has yet to tell of.
	captureHold = 200 * time.Millisecond
	// captureHeld is how many wait at most.
	captureHeld = 1 << 14
)

// captureSink writes what all sources give, in the order of time.
type captureSink struct {
	o    *captureOptions
	out  io.Writer
	errs io.Writer
	many bool

	mu    sync.Mutex
	pcap  *pcapng // nil: text
	held  []heldPacket
	count int   // of the packets taken, written or held
	err   error // of writing: nothing is written any more
	lost  map[string]uint64
	// The sources that run, and those of which nothing is known yet.
	began, waiting int
	failed         bool
}

// heldPacket is one that is not written yet.
type heldPacket struct {
	source  string
	arrived time.Time
	api.Captured
}

// errEnough ends a capture that has what was asked for.
var errEnough = errors.New("enough")

// collect captures from all sources at once, until ctx is done or there is enough. A source that fails is said, and the
// others go on; the error then is that something is missing.
func (s *captureSink) collect(ctx context.Context, sources []captureSource, req api.CaptureRequest) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.waiting = len(sources)
	var all, writer sync.WaitGroup
	writer.Go(func() { s.write(ctx, cancel) })
	for _, src := range sources {
		all.Go(func() {
			began := false
			err := src.capture(ctx, req, func(c api.Captured) error {
				if !began {
					began = true
					s.begin()
				}
				return s.take(src.name, c)
			})
			switch {
			case errors.Is(err, errEnough):
				cancel()
			case err != nil && ctx.Err() == nil:
				s.fail(err, !began)
			}
		})
	}
	all.Wait()
	cancel()
	writer.Wait()
	if s.failed {
		return ExitError{1}
	}
	return nil
}

// write writes what has waited long enough until ctx is done, which it makes it when nothing can be written.
func (s *captureSink) write(ctx context.Context, cancel func()) {
	tick := time.NewTicker(captureHold / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			s.mu.Lock()
			err := s.release(func(p heldPacket) bool { return now.Sub(p.arrived) >= captureHold })
			s.mu.Unlock()
			if err != nil {
				cancel()
				return
			}
		}
	}
}

// begin notes a source that runs, and fail one that does not, or not any more. Once nothing is waited for, it is said that the
// capture runs.
func (s *captureSink) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.began++
	s.answered()
}

func (s *captureSink) fail(err error, atOnce bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = true
	fmt.Fprintln(s.errs, err)
	if atOnce {
		s.answered()
	}
}

func (s *captureSink) answered() {
	if s.waiting--; s.waiting == 0 && s.began > 0 {
		fmt.Fprintln(s.errs, "capturing; stop with Ctrl-C")
	}
}

// take takes one packet, or how many were lost.
func (s *captureSink) take(name string, c api.Captured) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.Packet == nil && c.Length == 0 {
		s.lost[name] = max(s.lost[name], c.Lost)
		return nil
	}
	if s.o.count > 0 && s.count >= s.o.count {
		return errEnough
	}
	s.count++
	s.held = append(s.held, heldPacket{name, time.Now(), c})
	if s.count == s.o.count {
		return errEnough
	}
	if len(s.held) < captureHeld {
		return nil
	}
	written := 0
	if s.release(func(heldPacket) bool { written++; return written <= captureHeld/2 }) != nil {
		return errEnough // finish says it
	}
	return nil
}

// release writes held packets, the earliest first, up to one that is not ripe. The caller holds mu.
func (s *captureSink) release(ripe func(heldPacket) bool) error {
	slices.SortStableFunc(s.held, func(a, b heldPacket) int { return a.Time.Compare(b.Time) })
	n := 0
	for ; n < len(s.held) && s.err == nil && ripe(s.held[n]); n++ {
		s.err = s.put(s.held[n])
	}
	s.held = slices.Delete(s.held, 0, n)
	return s.err
}

// put writes one packet.
func (s *captureSink) put(p heldPacket) error {
	port := p.source + "/" + p.Port
	if s.pcap != nil {
		return s.pcap.packet(port, p.Time, p.Packet, p.Length, verdictText(p.Captured))
	}
	if !s.many {
		port = p.Port
	}
	_, err := fmt.Fprintf(s.out, "%s %s %s [%s]\n", p.Time.Local().Format("15:04:05.000000"), port, describe(p.Packet, p.Length), verdictText(p.Captured))
	return err
}

// finish writes what was lost, and says it.
func (s *captureSink) finish() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	errs := []error{s.release(func(heldPacket) bool { return true })}
	for _, name := range sortedKeys(s.lost) {
		n := s.lost[name]
		if n > 0 {
			fmt.Fprintf(s.errs, "%s: %d packets were lost for want of room\n", name, n)
		}
		if s.pcap == nil {
			continue
		}
		for port := range s.pcap.interfaces {
			if strings.HasPrefix(port, name+"/") { // the loss is the node's: it stands with one of its ports
				errs = append(errs, s.pcap.lost(port, time.Now(), n))
				break
			}
		}
	}
	fmt.Fprintf(s.errs, "%d packets captured\n", s.count)
	return errors.Join(errs...)
}
