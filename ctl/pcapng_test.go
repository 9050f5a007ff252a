package ctl

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"margay/agent/api"
)

// tshark returns its fields of a file, a line for each packet.
func tshark(t *testing.T, file string, fields ...string) string {
	t.Helper()
	args := []string{"-r", file, "-T", "fields"}
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	var errs bytes.Buffer
	cmd := exec.Command("tshark", args...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark: %v\n%s", err, errs.String())
	}
	return string(out)
}

// TestPcapngIsWhatTsharkReads writes packets of all verdicts, cut and whole, and reads them with tshark.
func TestPcapngIsWhatTsharkReads(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.pcapng")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newPcapng(f)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Unix(1700000000, 123456789)
	tcp := probe{proto: "tcp", sport: 1234, dport: 80, size: 61, ttl: 7}
	whole := tcp.build(probeSrc, probeDst, false)
	for i, c := range []api.Captured{
		{Time: at, Port: "vr0", Packet: whole, Length: 61, Forwarded: true, Gateway: netip.MustParseAddr("198.18.0.2"), Sent: 1},
		{Time: at.Add(time.Millisecond), Port: "eth0", Packet: whole[:30], Length: 61, Reason: "no_route"},
		{Time: at.Add(2 * time.Millisecond), Port: "vr0", Packet: whole, Length: 61, Forwarded: true, Direction: "decap", Sent: 3, SegmentSize: 20, PartialSum: true},
	} {
		if err := p.packet("n1/"+c.Port, c.Time, c.Packet, c.Length, verdictText(c)); err != nil {
			t.Fatalf("packet %d: %v", i, err)
		}
	}
	if err := errors.Join(p.lost("n1/vr0", at, 7), f.Close()); err != nil {
		t.Fatal(err)
	}
	got := tshark(t, file, "frame.interface_name", "frame.time_epoch", "frame.len", "frame.cap_len", "ip.dst", "frame.comment")
	want := "n1/vr0\t1700000000.123456789\t61\t61\t10.244.2.5\tforwarded in IP-in-IP to 198.18.0.2\n" +
		"n1/eth0\t1700000000.124456789\t61\t30\t10.244.2.5\tdropped: no_route\n" +
		"n1/vr0\t1700000000.125456789\t61\t61\t10.244.2.5\tforwarded, the outer header taken off, as 3 packets; a superpacket of segments of 20 bytes; checksum to be completed\n"
	if got != want {
		t.Errorf("tshark reads\n%s\nexpected\n%s", got, want)
	}
}

// fakeSource gives lines, and then waits for the end like a vRouter where nothing happens.
func fakeSource(name string, lines ...api.Captured) captureSource {
	return captureSource{name, func(ctx context.Context, _ api.CaptureRequest, got func(api.Captured) error) error {
		if err := got(api.Captured{}); err != nil {
			return err
		}
		for _, l := range lines {
			if err := got(l); err != nil {
				return err
			}
		}
		<-ctx.Done()
		return ctx.Err()
	}}
}

func collectAll(t *testing.T, o captureOptions, ctx context.Context, sources ...captureSource) (out, errs string, err error) {
	t.Helper()
	var w, e bytes.Buffer
	s := &captureSink{o: &o, out: &w, errs: &e, many: len(sources) > 1, lost: map[string]lostPackets{}}
	err = s.collect(ctx, sources, api.CaptureRequest{})
	if finish := s.finish(); finish != nil {
		t.Error(finish)
	}
	return w.String(), e.String(), err
}

// TestCaptureIsInOrderOfTime: whoever tells of its packets first. Those that have waited are written while the capture runs.
func TestCaptureIsInOrderOfTime(t *testing.T) {
	icmp := probe{proto: "icmp", size: 84, ttl: 7}
	start := time.Now()
	at := func(ms int) api.Captured {
		return api.Captured{Time: start.Add(time.Duration(ms) * time.Millisecond), Port: fmt.Sprint(ms), Packet: icmp.build(probeSrc, probeDst, false), Length: 84}
	}
	n1, n2 := fakeSource("n1", at(3), at(1), at(5)), fakeSource("n2", at(4), at(0), at(2))
	r, w := io.Pipe()
	defer r.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		s := &captureSink{o: &captureOptions{}, out: w, errs: io.Discard, many: true, lost: map[string]lostPackets{}}
		err := s.collect(ctx, []captureSource{n1, n2}, api.CaptureRequest{})
		ended <- errors.Join(err, s.finish())
	}()
	lines := bufio.NewScanner(r)
	for i := range 6 {
		if !lines.Scan() {
			t.Fatal(lines.Err())
		}
		if want := fmt.Sprintf("/%d 10.244.1.2", i); !strings.Contains(lines.Text(), want) {
			t.Errorf("line %d: %s: expected %q", i, lines.Text(), want)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestCaptureEnds(t *testing.T) {
	icmp := probe{proto: "icmp", size: 84, ttl: 7}
	line := api.Captured{Time: time.Now(), Port: "vr0", Packet: icmp.build(probeSrc, probeDst, false), Length: 84, Reason: "no_route"}

	// After enough packets, of all sources together.
	out, errs, err := collectAll(t, captureOptions{count: 3}, t.Context(), fakeSource("n1", line, line), fakeSource("n2", line, line))
	if err != nil || strings.Count(out, "\n") != 3 || !strings.Contains(errs, "3 packets captured") {
		t.Errorf("%v, %s, %s", err, out, errs)
	}
	if !strings.Contains(out, "/vr0 10.244.1.2 > 10.244.2.5: ICMP echo request id 0 seq 0, length 84, ttl 7 [dropped: no_route]") {
		t.Error(out)
	}

	// When told to.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, errs, err = collectAll(t, captureOptions{}, ctx, fakeSource("n1", api.Captured{Lost: 5}))
	if err != nil || !strings.Contains(errs, "n1: 5 packets were lost") || !strings.Contains(errs, "capturing; stop with Ctrl-C") {
		t.Errorf("%v, %s", err, errs)
	}

	// One node that fails is said, and the others go on.
	bad := captureSource{"n2", func(context.Context, api.CaptureRequest, func(api.Captured) error) error {
		return errors.New("margay-agent of n2 does not answer")
	}}
	out, errs, err = collectAll(t, captureOptions{count: 1}, t.Context(), bad, fakeSource("n1", line))
	if exit := (ExitError{}); !errors.As(err, &exit) && err != nil {
		t.Errorf("%v", err)
	}
	if !strings.Contains(out, "n1/vr0") {
		t.Errorf("%s, %s", out, errs)
	}
	_, errs, err = collectAll(t, captureOptions{}, t.Context(), bad)
	if exit := (ExitError{}); !errors.As(err, &exit) || !strings.Contains(errs, "n2 does not answer") {
		t.Errorf("%v, %s", err, errs)
	}
}
