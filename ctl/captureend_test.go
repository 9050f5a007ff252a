package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"margay/agent/api"
)

// fullDisk is a file on a disk with so much room left.
type fullDisk struct {
	*os.File
	room int
}

func (d *fullDisk) Write(b []byte) (int, error) {
	if len(b) <= d.room {
		d.room -= len(b)
		return d.File.Write(b)
	}
	n, err := d.File.Write(b[:d.room])
	d.room = 0
	return n, errors.Join(err, &os.PathError{Op: "write", Path: d.Name(), Err: unix.ENOSPC})
}

// TestCaptureToAFullDisk: the capture ends at once, also where another node has nothing to tell, and the file holds the packets
// that were written whole.
func TestCaptureToAFullDisk(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.pcapng")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	line := api.Captured{Time: time.Unix(1700000000, 0), Port: "vr0", Length: 84, Reason: "no_route",
		Packet: (&probe{proto: "icmp", size: 84, ttl: 7}).build(probeSrc, probeDst, false)}
	var errs bytes.Buffer
	s := &captureSink{o: &captureOptions{file: file}, out: &fullDisk{f, 600}, errs: &errs, lost: map[string]lostPackets{}}
	if s.pcap, err = newPcapng(s.out); err != nil {
		t.Fatal(err)
	}
	many := fakeSource("n1", line, line, line, line, line, line)
	err = errors.Join(s.collect(t.Context(), []captureSource{many, fakeSource("n2")}, api.CaptureRequest{}), s.finish())
	if !errors.Is(err, errWrite) || !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), file) {
		t.Errorf("the error is %v", err)
	}
	whole := s.pcap.whole
	if info, err := f.Stat(); err != nil || info.Size() != 600 || whole >= 600 {
		t.Fatalf("%v, %v, %d: the test does not cut a packet", info, err, whole)
	}
	s.cut()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	// tshark fails when a file ends within a packet.
	if got := strings.Count(tshark(t, file, "frame.comment"), "dropped: no_route\n"); got != s.count || got == 0 {
		t.Errorf("%d packets in the file, %d were counted", got, s.count)
	}
}

// TestCaptureAsJSON: each packet is a line, dropped or not, and says what the text does.
func TestCaptureAsJSON(t *testing.T) {
	gateway := netip.MustParseAddr("198.18.0.2")
	sent := (&probe{proto: "icmp", size: 84, ttl: 7}).build(probeSrc, probeDst, false)
	dropped := api.Captured{Time: time.Unix(1700000000, 0), Port: "vr0", Direction: "encap", Length: 84, Reason: "no_route", Packet: sent}
	forwarded := api.Captured{Time: time.Unix(1700000001, 0), Port: "vr0", Direction: "encap", Length: 84, Forwarded: true, Gateway: gateway, Packet: sent}
	out, _, err := collectAll(t, captureOptions{output: "json", count: 2}, t.Context(), fakeSource("n1", dropped, forwarded))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 2 {
		t.Fatalf("%d lines: %s", len(lines), out)
	}
	for i, c := range []api.Captured{dropped, forwarded} {
		var got capturedLine
		if err := json.Unmarshal([]byte(lines[i]), &got); err != nil {
			t.Fatalf("%v: %s", err, lines[i])
		}
		if got.Node != "n1" || got.Port != "vr0" || !got.Time.Equal(c.Time) || got.Direction != "encap" || got.Forwarded != c.Forwarded ||
			got.Reason != c.Reason || got.Length != 84 || !bytes.Equal(got.Packet, sent) || !strings.Contains(got.Decoded, "ICMP echo request") ||
			(got.Gateway != nil) != c.Forwarded || c.Forwarded && *got.Gateway != gateway {
			t.Errorf("%s", lines[i])
		}
	}
}

// TestCaptureGoesOnAfterARestart: a source that captured is asked again, what it lost before and behind is added up, and one that
// does not come back ends its capture.
func TestCaptureGoesOnAfterARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		line := api.Captured{Time: time.Now(), Port: "vr0", Packet: []byte{0x45}, Length: 1}
		asked := 0
		restarted := captureSource{"n1", func(ctx context.Context, _ api.CaptureRequest, got func(api.Captured) error) error {
			switch asked++; asked {
			case 1:
				return errors.Join(got(api.Captured{Lost: 4}), got(line), errors.New("margay-agent of n1 does not answer any more"))
			case 2:
				return errors.New("margay-agent of n1 does not answer")
			case 3:
				return errors.Join(got(api.Captured{Lost: 3}), got(line), errors.New("gone for good"))
			}
			return errors.New("margay-agent of n1 does not answer at all")
		}}
		out, errs, err := collectAll(t, captureOptions{}, t.Context(), restarted)
		if exit := (ExitError{}); !errors.As(err, &exit) || strings.Count(out, "\n") != 2 {
			t.Errorf("%v, %s", err, out)
		}
		for _, want := range []string{"does not answer any more; it is asked again for 2m0s", "n1 captures again; what passed in the 0.5 s between is missing",
			"gone for good", "does not answer at all", "n1: 7 packets were lost", "2 packets captured"} {
			if strings.Count(errs, want) != 1 {
				t.Errorf("%q is not in, once:\n%s", want, errs)
			}
		}
	})
}
