package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
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
	taken int // of the packets, written or held
	count int // of those written
	lost  map[string]lostPackets
	err   error // of writing: nothing is written any more
	// The sources that run, and those of which nothing is known yet.
	began, waiting int
	failed         bool
	problems       []string // not said yet
	again          []string // sources that capture again, not said yet

	far progress
	// What a writer that hangs has not shown is told without its lock.
	got, shown atomic.Int64
}

// heldPacket is one that is not written yet.
type heldPacket struct {
	source  string
	arrived time.Time
	api.Captured
}

// errEnough ends a capture that has what was asked for.
var errEnough = errors.New("enough")

// collect captures from all sources at once, until ctx is done, there is enough, or what is captured cannot be written. A source
// that fails is said, and the others go on; the error then is that something is missing.
func (s *captureSink) collect(ctx context.Context, sources []captureSource, req api.CaptureRequest) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.waiting = len(sources)
	var all, writer sync.WaitGroup
	stop := sync.OnceFunc(s.far.report(lockedWriter{&s.mu, s.errs}, len(sources)))
	defer stop()
	writer.Go(func() { s.write(ctx, cancel, stop) })
	for _, src := range sources {
		all.Go(func() {
			switch err := s.follow(ctx, src, req); {
			case errors.Is(err, errEnough), errors.Is(err, errWrite):
				cancel(err)
			case err != nil:
				s.fail(err)
			}
		})
	}
	all.Wait()
	cancel(nil)
	writer.Wait()
	if err := context.Cause(ctx); errors.Is(err, errWrite) {
		return err
	}
	if s.failed {
		return ExitError{1}
	}
	return nil
}

// write writes what has waited long enough until ctx is done, which it makes it when nothing can be written. It calls running when
// all sources have been asked.
func (s *captureSink) write(ctx context.Context, cancel context.CancelCauseFunc, running func()) {
	tick := time.NewTicker(captureHold / 4)
	defer tick.Stop()
	for said := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			s.mu.Lock()
			err := s.release(func(p heldPacket) bool { return now.Sub(p.arrived) >= captureHold })
			if now.Sub(said) >= problemPause {
				said = now
				s.say()
			}
			asked := s.waiting == 0
			s.mu.Unlock()
			if err != nil {
				cancel(err)
				return
			}
			if asked {
				running()
			}
		}
	}
}

// begin notes a source that runs, and refused one that does not. Once nothing is waited for, it is said that the capture runs.
func (s *captureSink) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.began++
	s.answered(nil)
}

func (s *captureSink) refused(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answered(err)
}

// fail says that something is missing.
func (s *captureSink) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = true
	s.problems = append(s.problems, err.Error())
}

// say says what has happened to the sources. The caller holds mu.
func (s *captureSink) say() {
	fewLines(s.errs, s.problems, "nodes do not capture")
	fewLines(s.errs, s.again, "nodes capture again")
	s.problems, s.again = nil, nil
}

func (s *captureSink) answered(err error) {
	s.far.add(err)
	if s.waiting--; s.waiting == 0 && s.began > 0 {
		s.say()
		fmt.Fprintln(s.errs, "capturing; stop with Ctrl-C")
	}
}

// take takes one packet, or how many were lost.
func (s *captureSink) take(name string, c api.Captured) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.Packet == nil && c.Length == 0 {
		l := s.lost[name]
		l.now = max(l.now, c.Lost)
		s.lost[name] = l
		return nil
	}
	if s.o.count > 0 && s.taken >= s.o.count {
		return errEnough
	}
	s.taken++
	s.got.Add(1)
	s.held = append(s.held, heldPacket{name, time.Now(), c})
	if s.taken == s.o.count {
		return errEnough
	}
	if len(s.held) < captureHeld {
		return nil
	}
	written := 0
	return s.release(func(heldPacket) bool { written++; return written <= captureHeld/2 })
}

// release writes held packets, the earliest first, up to one that is not ripe. The caller holds mu.
func (s *captureSink) release(ripe func(heldPacket) bool) error {
	slices.SortStableFunc(s.held, func(a, b heldPacket) int { return a.Time.Compare(b.Time) })
	n := 0
	for ; n < len(s.held) && s.err == nil && ripe(s.held[n]); n++ {
		if err := s.put(s.held[n]); err != nil {
			s.err = fmt.Errorf("%w: %w", errWrite, err)
			break
		}
		s.count++
		s.shown.Add(1)
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
	if s.o.output == "json" {
		return writeCapturedLine(s.out, p.source, p.Captured)
	}
	if !s.many {
		port = p.Port
	}
	_, err := fmt.Fprintf(s.out, "%s %s %s [%s]\n", p.Time.Local().Format("15:04:05.000000"), port, describe(p.Packet, p.Length), verdictText(p.Captured))
	return err
}

// finish writes what is held, and says what was lost.
func (s *captureSink) finish() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.say()
	broken := s.err != nil // has been said
	errs := []error{s.release(func(heldPacket) bool { return true })}
	if broken {
		errs = nil
	}
	var losses []string
	for _, name := range sortedKeys(s.lost) {
		n := s.lost[name].all()
		if n > 0 {
			losses = append(losses, fmt.Sprintf("%s: %d packets were lost for want of room", name, n))
		}
		if s.pcap == nil || s.pcap.failed != nil {
			continue
		}
		for port := range s.pcap.interfaces {
			if strings.HasPrefix(port, name+"/") { // the loss is the node's: it stands with one of its ports
				if err := s.pcap.lost(port, time.Now(), n); err != nil {
					errs = append(errs, fmt.Errorf("%w: %w", errWrite, err))
				}
				break
			}
		}
	}
	fewLines(s.errs, losses, "nodes have lost packets")
	fmt.Fprintf(s.errs, "%d packets captured\n", s.count)
	return errors.Join(errs...)
}
