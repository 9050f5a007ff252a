package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync/atomic"
	"time"

	"margay/bench/traffic"
)

// child is a generator or a sink.
type child struct {
	*daemon
	board *traffic.Board
	key   string
}

// startChild starts this program as generator or sink in a space.
func (b *Bed) startChild(ctx context.Context, s *Space, args ...string) (_ *child, err error) {
	board, file, err := traffic.NewBoard()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	cmd := exec.Command(b.options.Self, args...)
	cmd.Env = append(os.Environ(), "GOGC=off")
	cmd.ExtraFiles = []*os.File{file}
	d := &daemon{cmd: cmd, ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &d.output, &d.output
	if err := s.Start(cmd); err != nil {
		return nil, errors.Join(err, board.Close())
	}
	go func() {
		_ = cmd.Wait() // its output tells
		close(d.ended)
	}()
	c := &child{daemon: d, board: board}
	err = d.await(ctx, args[0], func() error {
		if board.Live.Load() == 0 {
			return errors.New("not ready")
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, c.stop())
	}
	return c, nil
}

func (c *child) stop() error {
	// It has nothing to tidy up.
	_ = c.cmd.Process.Kill()
	<-c.ended
	return c.board.Close()
}

// StopTraffic ends generator and sink.
func (b *Bed) StopTraffic() error {
	var errs []error
	for _, c := range []**child{&b.source, &b.sink} {
		if *c != nil {
			errs = append(errs, (*c).stop())
			*c = nil
		}
	}
	return errors.Join(errs...)
}

// Load is a stream of UDP packets.
type Load struct {
	Profile traffic.Profile
	Flows   int
	Rate    uint64        // packets per second, 0: as fast as the generator can
	Warm    time.Duration // before the window
	Window  time.Duration
}

// Blast is what became of a load.
type Blast struct {
	Offered   float64 // packets per second in the window, sent
	Received  float64 // packets per second in the window, whole at the sink
	BitRate   float64 // of the IP packets received, inner ones, in bit/s
	Sent, Got uint64  // packets, all in all
	Loss      float64 // 1 - Got/Sent
	Bad       uint64  // packets received with a wrong checksum
	Missed    uint64  // packets that the sink itself lost: the measurement is void
	Verified  bool    // false: encrypted, or for another reason counted only
	Plain     bool    // the generator has no AF_XDP and sent by AF_PACKET
	CPU       CPU     // in the window
}

// Blast sends a load through the bed.
func (b *Bed) Blast(ctx context.Context, l Load) (Blast, error) {
	if err := b.startTraffic(ctx, l); err != nil {
		return Blast{}, err
	}
	gen, sink := b.source.board, b.sink.board
	before := read(gen, sink)
	gen.Rate.Store(l.Rate)
	gen.Run.Store(1)
	err := begin(ctx, &gen.Packets, l.Warm)
	var from, to counts
	var meter *Meter
	if err == nil {
		meter, err = StartMeter(b.source.cmd.Process.Pid, b.sink.cmd.Process.Pid, b.PIDs()...)
	}
	began := time.Now()
	from = read(gen, sink)
	if err == nil {
		err = window(ctx, &gen.Packets, from.sent, l.Window)
	}
	to = read(gen, sink)
	took := time.Since(began).Seconds()
	var cpu CPU
	if err == nil {
		cpu, err = meter.Stop()
	}
	gen.Run.Store(0)
	if err != nil {
		return Blast{}, err
	}
	after, err := b.drain(ctx)
	if err != nil {
		return Blast{}, err
	}
	out := Blast{
		Offered:  float64(to.sent-from.sent) / took,
		Received: float64(to.got-from.got) / took,
		BitRate:  8 * float64(to.bytes-from.bytes) / took,
		Sent:     after.sent - before.sent,
		Got:      after.got - before.got,
		Bad:      after.bad - before.bad,
		Missed:   after.missed - before.missed,
		Verified: after.sealed == before.sealed,
		Plain:    gen.Plain.Load() == 1,
		CPU:      cpu,
	}
	out.CPU.Sent, out.CPU.Received = to.sent-from.sent, to.got-from.got
	if out.Sent > 0 {
		out.Loss = 1 - float64(out.Got)/float64(out.Sent)
	}
	select {
	case <-b.source.ended:
		return out, fmt.Errorf("generator ended: %s", b.source.output.String())
	case <-b.sink.ended:
		return out, fmt.Errorf("sink ended: %s", b.sink.output.String())
	default:
	}
	if out.Got > out.Sent {
		return out, fmt.Errorf("%d packets of %d arrived: some came twice", out.Got, out.Sent)
	}
	return out, nil
}

// startTraffic sees to it that generator and sink run, the generator with the load's packets.
func (b *Bed) startTraffic(ctx context.Context, l Load) (err error) {
	if l.Flows < 1 {
		l.Flows = 1
	}
	if b.sink == nil {
		space := b.wire
		if b.Shape != Edge {
			space = b.pods[1]
		}
		if b.sink, err = b.startChild(ctx, space, "sink", "--device", "eth0"); err != nil {
			return err
		}
	}
	f := b.frame(l.Profile, l.Flows)
	key := fmt.Sprint(f)
	if b.source != nil && b.source.key == key {
		return nil
	}
	if b.source != nil {
		if err := b.source.stop(); err != nil {
			return err
		}
		b.source = nil
	}
	b.source, err = b.startChild(ctx, b.pods[0], "generator", "--device", "eth0",
		"--source-mac", f.SourceMAC.String(), "--destination-mac", f.DestinationMAC.String(),
		"--source", f.Source.String(), "--destination", f.Destination.String(),
		"--flows", strconv.Itoa(f.Flows), "--profile", string(f.Profile))
	if err == nil {
		b.source.key = key
	}
	return err
}

// counts is one look at the boards.
type counts struct{ sent, got, bytes, bad, sealed, missed uint64 }

func read(gen, sink *traffic.Board) counts {
	c := counts{
		sent: gen.Packets.Load(), bytes: sink.Bytes.Load(), bad: sink.Bad.Load(), sealed: sink.Sealed.Load(),
		missed: sink.Missed.Load(),
	}
	c.got = sink.Packets.Load() + c.sealed
	return c
}

// drain waits until the generator has stopped, and then until the sink has looked into an empty ring for longer than the kernel
// keeps a block that is not full. Both tell by themselves how far they are: on a busy machine a time would say nothing.
func (b *Bed) drain(ctx context.Context) (counts, error) {
	const empty = 25 // looks, a millisecond and more apart
	gen, sink := b.source.board, b.sink.board
	advance := func(idle *atomic.Uint64, by uint64) error {
		for from, limit := idle.Load(), time.Now().Add(patience); idle.Load() < from+by; {
			if time.Now().After(limit) {
				return errors.New("generator or sink: does not come to rest")
			}
			if err := wait(ctx, time.Millisecond); err != nil {
				return err
			}
		}
		return nil
	}
	if err := advance(&gen.Idle, 3); err != nil {
		return counts{}, err
	}
	for last := read(gen, sink); ; {
		if err := advance(&sink.Idle, empty); err != nil {
			return counts{}, err
		}
		now := read(gen, sink)
		if now == last {
			return now, nil
		}
		last = now
	}
}

// begin waits until a count moves, and then for the time to warm up.
func begin(ctx context.Context, count *atomic.Uint64, warm time.Duration) error {
	if err := window(ctx, count, count.Load(), 0); err != nil {
		return err
	}
	return wait(ctx, warm)
}

// window waits for d, and then, if a count is still what it was, until it moves: a machine that is busy with other things makes
// a slow measurement, not a wrong one.
func window(ctx context.Context, count *atomic.Uint64, was uint64, d time.Duration) error {
	if err := wait(ctx, d); err != nil {
		return err
	}
	for limit := time.Now().Add(patience); count.Load() == was; {
		if time.Now().After(limit) {
			return fmt.Errorf("nothing was carried in %v", patience)
		}
		if err := wait(ctx, time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// wait sleeps for d, or until ctx ends.
func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
