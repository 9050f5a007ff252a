package rig

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"margay/bench/stat"
)

// rrPort is the UDP port of the responder, rrSize the payload of request and response in bytes.
const (
	rrPort = 9011
	rrSize = 64
)

// rrPatience is after how long a response counts as lost.
const rrPatience = 200 * time.Millisecond

// RoundTrip is what a request/response measurement found.
type RoundTrip struct {
	N        int
	Lost     int
	P50, P99 time.Duration
}

// RoundTrips sends one request at a time from the first pod to the second, for the given time, and waits for its response. Both
// ends block in the kernel, on threads of their own.
func (b *Bed) RoundTrips(ctx context.Context, d time.Duration) (RoundTrip, error) {
	if len(b.pods) < 2 {
		return RoundTrip{}, errors.New("request/response: expected a bed with two pods")
	}
	var server int
	err := b.pods[1].Do(func() (err error) {
		server, err = udpSocket()
		if err == nil {
			err = unix.Bind(server, &unix.SockaddrInet4{Port: rrPort})
		}
		return err
	})
	if err != nil {
		return RoundTrip{}, err
	}
	var done atomic.Bool
	answered := make(chan error, 1)
	go func() {
		answered <- b.pods[1].Do(func() error { return respond(server, &done) })
	}()
	var out RoundTrip
	err = b.pods[0].Do(func() error {
		client, err := udpSocket()
		if err != nil {
			return err
		}
		defer unix.Close(client)
		if err := unix.Connect(client, &unix.SockaddrInet4{Port: rrPort, Addr: b.target().As4()}); err != nil {
			return err
		}
		out, err = request(ctx, client, d)
		return err
	})
	done.Store(true)
	return out, errors.Join(err, <-answered, unix.Close(server))
}

// udpSocket returns a blocking socket whose reads time out.
func udpSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	t := unix.NsecToTimeval(rrPatience.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &t); err != nil {
		return 0, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

func passing(err error) bool { return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) }

// respond sends back what comes until done.
func respond(fd int, done *atomic.Bool) error {
	for buf := make([]byte, 2048); !done.Load(); {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if passing(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("responder: %w", err)
		}
		if err := unix.Sendto(fd, buf[:n], 0, from); err != nil {
			return fmt.Errorf("responder: %w", err)
		}
	}
	return nil
}

func request(ctx context.Context, fd int, d time.Duration) (out RoundTrip, err error) {
	var took []float64
	message, buf := make([]byte, rrSize), make([]byte, 2048)
	for began := time.Now(); time.Since(began) < d && ctx.Err() == nil; {
		out.N++
		binary.BigEndian.PutUint64(message, uint64(out.N)) // so that a late response is told from the one awaited
		sent := time.Now()
		if _, err := unix.Write(fd, message); err != nil {
			return out, fmt.Errorf("request: %w", err)
		}
		for {
			n, err := unix.Read(fd, buf)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if errors.Is(err, unix.EAGAIN) {
				out.Lost++
				break
			}
			if err != nil {
				return out, fmt.Errorf("response: %w", err)
			}
			if n == rrSize && binary.BigEndian.Uint64(buf) == uint64(out.N) {
				took = append(took, float64(time.Since(sent)))
				break
			}
		}
	}
	if err := ctx.Err(); err != nil {
		return out, err
	}
	if len(took) == 0 {
		return out, fmt.Errorf("none of %d requests was answered", out.N)
	}
	slices.Sort(took)
	out.P50, out.P99 = time.Duration(stat.Percentile(took, 50)), time.Duration(stat.Percentile(took, 99))
	return out, nil
}
