package rpc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"margay/vrouter"
	"margay/vrouter/packet"
	"margay/vrouter/port"
)

// udp is a minimal UDP packet of no checksum.
func udp(src, dst string) []byte {
	b := make([]byte, 28)
	b[0], b[3], b[8], b[9] = 0x45, 28, 64, 17
	copy(b[12:], netip.MustParseAddr(src).AsSlice())
	copy(b[16:], netip.MustParseAddr(dst).AsSlice())
	binary.BigEndian.PutUint16(b[10:], packet.Checksum(b[:20], 0))
	return b
}

// programmed is a port that is never used, with programs that forward what has more than ten hops to live.
type programmed struct{ vrouter.SwitchPort }

func (programmed) HasPrograms() bool        { return true }
func (programmed) Carried() vrouter.Carried { return vrouter.Carried{} }

func (programmed) LeavesAlone(_ vrouter.Direction, b []byte) (string, bool) {
	if ttl := packet.IPv4(b).TTL(); ttl > 10 {
		return "", ttl > 100
	}
	return "it is old", false
}

// configured returns a vRouter that serves, with a configuration, a node and routes to it, and a client of its.
func configured(t *testing.T) (*vrouter.Router, *Client, context.Context) {
	t.Helper()
	router := vrouter.New()
	socket := filepath.Join(t.TempDir(), "vrouter.sock")
	start(t, router, socket)
	c, ctx := dial(t, socket), within(t)
	if err := c.Update(ctx, Update{Config: &config, AddNodes: []netip.Addr{gateway}, Set: routes}); err != nil {
		t.Fatal(err)
	}
	return router, c, ctx
}

// TestTraceTellsTheCarrier: a trace says whether a worker forwards a packet, and why it does where programs forward others.
func TestTraceTellsTheCarrier(t *testing.T) {
	router, c, ctx := configured(t)
	ask := func(d Direction, ttl byte) string {
		t.Helper()
		p := udp("10.244.1.1", "10.244.2.1")
		p[8] = ttl
		traced, err := c.Trace(ctx, d, p)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%t %s%d %t", traced.ByTC, traced.LeftAlone, traced.Handover, traced.Steers)
	}
	if got := ask(Decap, 64); got != "false 0 false" {
		t.Errorf("without programs: %s", got)
	}
	router.NewSwitch(programmed{})
	for _, e := range []struct {
		d    Direction
		ttl  byte
		want string
	}{{Decap, 64, "true 1 false"}, {Decap, 200, "true 2 false"}, {Decap, 10, "false it is old0 false"}, {Encap, 64, "false 0 false"}} {
		if got := ask(e.d, e.ttl); got != e.want {
			t.Errorf("%v, TTL %d: %s, expected %s", e.d, e.ttl, got, e.want)
		}
	}
}

// TestDiagnostics asks a vRouter that runs on ports in memory for all that explains it.
func TestDiagnostics(t *testing.T) {
	router, c, ctx := configured(t)
	in, out := port.NewMem("vr0", 8), port.NewMem("eth0", 8)
	worker := router.NewWorker(vrouter.Encap, in, out)
	done := make(chan error, 1)
	go func() { done <- worker.Run() }()
	t.Cleanup(func() {
		in.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})

	enough := errors.New("enough")
	var captured []CapturedPacket
	err := c.Capture(ctx, CaptureOptions{Filter: "udp and not dst 10.244.9.9"}, func(packets []CapturedPacket, lost uint64) error {
		if captured == nil { // it runs
			captured = []CapturedPacket{}
			for _, dst := range []string{"10.244.2.1", "10.244.9.9", "10.244.4.1"} {
				in.Inject(udp("10.244.1.1", dst), vrouter.Offload{})
			}
			return nil
		}
		if captured = append(captured, packets...); len(captured) == 2 {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) {
		t.Fatal(err)
	}
	if p := captured[0]; !p.Forwarded || p.Gateway != gateway || p.Port != "vr0" || p.Direction != "encap" || p.Length != 28 || p.Sent != 1 {
		t.Errorf("forwarded: %+v", p)
	}
	if p := captured[1]; p.Forwarded || p.Reason != "blackhole" {
		t.Errorf("dropped: %+v", p)
	}
	if err := c.Capture(ctx, CaptureOptions{Filter: "port x"}, nil); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "expected a port") {
		t.Errorf("bad filter: %v", err)
	}

	flows, samples, err := c.Drops(ctx, 0)
	if err != nil || len(flows) != 2 || len(samples) != 2 {
		t.Fatalf("%+v, %+v, %v", flows, samples, err)
	}
	if flows[0].Source.String() != "10.244.1.1" || flows[0].Packets != 1 || samples[0].Length != 28 || len(samples[0].Packet) != 28 {
		t.Errorf("%+v, %+v", flows, samples)
	}
	if _, later, err := c.Drops(ctx, samples[1].Number); err != nil || len(later) != 0 {
		t.Errorf("%+v, %v", later, err)
	}

	traced, err := c.Trace(ctx, Encap, udp("10.244.1.1", "10.244.2.1"))
	if err != nil || !traced.Forwarded || traced.Route != routes[1] || traced.Back != routes[0] || len(traced.Packet) != 48 || len(traced.Rungs) == 0 {
		t.Errorf("%+v, %v", traced, err)
	}
	traced, err = c.Trace(ctx, Encap, udp("10.244.1.1", "10.244.9.9"))
	if err != nil || traced.Forwarded || traced.Reason != "no_route" || traced.Route.Prefix.IsValid() {
		t.Errorf("%+v, %v", traced, err)
	}
	if _, err := c.Trace(ctx, Encap, nil); !errors.Is(err, ErrRefused) {
		t.Errorf("empty packet: %v", err)
	}
}
