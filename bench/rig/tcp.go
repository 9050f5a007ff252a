package rig

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// Bulk is what a TCP measurement found.
type Bulk struct {
	BitRate float64 // payload read by the receivers, in bit/s
	Bytes   uint64  // in the window
	CPU     CPU     // in the window; Source and Sink are the two ends
}

// TCP sends as much as flows TCP connections can, from the first pod to the second.
func (b *Bed) TCP(ctx context.Context, flows int, warm, length time.Duration) (_ Bulk, err error) {
	if len(b.pods) < 2 {
		return Bulk{}, errors.New("TCP: expected a bed with two pods")
	}
	if err := b.StopTraffic(); err != nil {
		return Bulk{}, err
	}
	to, err := b.startChild(ctx, b.pods[1], "bulk-receiver")
	if err != nil {
		return Bulk{}, err
	}
	defer func() { err = errors.Join(err, to.stop()) }()
	from, err := b.startChild(ctx, b.pods[0], "bulk-sender", "--destination", b.target().String(), "--flows", strconv.Itoa(flows))
	if err != nil {
		return Bulk{}, err
	}
	defer func() { err = errors.Join(err, from.stop()) }()
	from.board.Run.Store(1)
	if err := begin(ctx, &to.board.Bytes, warm); err != nil {
		return Bulk{}, fmt.Errorf("TCP: %w", err)
	}
	meter, err := StartMeter(from.cmd.Process.Pid, to.cmd.Process.Pid, b.PIDs()...)
	if err != nil {
		return Bulk{}, err
	}
	began, before := time.Now(), to.board.Bytes.Load()
	err = window(ctx, &to.board.Bytes, before, length)
	bytes, took := to.board.Bytes.Load()-before, time.Since(began)
	cpu, meterErr := meter.Stop()
	if err := errors.Join(err, meterErr); err != nil {
		return Bulk{}, err
	}
	select {
	case <-from.ended:
		return Bulk{}, fmt.Errorf("TCP sender ended: %s", from.output.String())
	case <-to.ended:
		return Bulk{}, fmt.Errorf("TCP receiver ended: %s", to.output.String())
	default:
	}
	return Bulk{BitRate: 8 * float64(bytes) / took.Seconds(), Bytes: bytes, CPU: cpu}, nil
}
