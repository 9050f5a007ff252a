package port_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"margay/vrouter/port"
)

// TestOpenPorts: what is asked for is opened or refused; auto falls back, and says why.
func TestOpenPorts(t *testing.T) {
	missing := &port.Missing{What: "offloads", Err: unix.EINVAL, Do: "choose another"}
	busy := &port.Missing{What: "device vr0", Err: unix.EBUSY, Do: "stop that one"}
	fails := func(err error) func(string) (port.Device, error) {
		return func(string) (port.Device, error) { return nil, err }
	}
	openVeth := func(name string) (port.Device, error) { return port.OpenVeth(name) }
	noUnderlay := func() (*port.Underlay, error) { return nil, missing }
	refused := errors.New("refused")
	s := newSpace(t)
	for _, test := range []struct {
		attach    string
		underlay  func() (*port.Underlay, error)
		veth, tun func(string) (port.Device, error)
		before    error
		want      string
		why       string
		err       error
	}{
		{port.AttachTUN, port.OpenOffloadUnderlay, openVeth, openTUN, nil, port.AttachTUN, "asked for", nil},
		{port.AttachVeth, port.OpenOffloadUnderlay, openVeth, openTUN, nil, port.AttachVeth, "asked for", nil},
		{port.AttachTUNPlain, noUnderlay, fails(missing), fails(missing), nil, port.AttachTUNPlain, "asked for", nil},
		{port.AttachAuto, port.OpenOffloadUnderlay, openVeth, openTUN, nil, port.AttachVeth, "auto: this kernel has what it needs", nil},
		{port.AttachAuto, port.OpenOffloadUnderlay, fails(missing), openTUN, nil, port.AttachTUN, "auto: not veth: offloads: invalid argument", nil},
		{port.AttachAuto, port.OpenOffloadUnderlay, fails(missing), fails(missing), nil, port.AttachTUNPlain, "auto: not tun: offloads: invalid argument", nil},
		{port.AttachAuto, noUnderlay, openVeth, openTUN, nil, port.AttachTUNPlain, "auto: not tun: offloads: invalid argument", nil},
		{port.AttachAuto, port.OpenOffloadUnderlay, fails(busy), openTUN, nil, "", "", unix.EBUSY},
		{port.AttachTUN, noUnderlay, openVeth, openTUN, nil, "", "", unix.EINVAL},
		{port.AttachTUN, port.OpenOffloadUnderlay, openVeth, fails(missing), nil, "", "", unix.EINVAL},
		{port.AttachVeth, port.OpenOffloadUnderlay, fails(missing), openTUN, nil, "", "", unix.EINVAL},
		{port.AttachAuto, port.OpenOffloadUnderlay, openVeth, openTUN, refused, "", "", refused},
	} {
		s.do(t, func() error {
			ports, err := port.OpenPortsWith(port.Options{Attach: test.attach, IO: port.IOPacket, Name: "vr0"},
				func() error { return test.before }, test.underlay, test.veth, test.tun)
			if test.err != nil {
				if !errors.Is(err, test.err) {
					t.Errorf("%s: %v: expected %v", test.attach, err, test.err)
				}
				return nil
			}
			if err != nil {
				return err
			}
			if ports.Attach != test.want || !strings.Contains(ports.Why, test.why) || !strings.Contains(ports.String(), " by "+test.want+", packet ("+ports.Why) {
				t.Errorf("%s: %s, expected %s, because %s", test.attach, ports, test.want, test.why)
			}
			ports.Stop()
			return ports.Close()
		})
	}
}

// TestOptions: what cannot be is refused, and the error names the option and what it may be.
func TestOptions(t *testing.T) {
	good := port.Options{Attach: port.AttachAuto, IO: port.IOPacket, Name: "vr0"}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*port.Options){
		`--attach "tap": expected one of auto`:                         func(o *port.Options) { o.Attach = "tap" },
		`--io "dpdk": expected one of packet`:                          func(o *port.Options) { o.IO = "dpdk" },
		`--io xdp: not with --attach tun-plain`:                        func(o *port.Options) { o.Attach, o.IO = port.AttachTUNPlain, port.IOXDP },
		`--tun "a/b": expected an interface name`:                      func(o *port.Options) { o.Name = "a/b" },
		`--busy-poll -1: expected 0 to 1000000`:                        func(o *port.Options) { o.BusyPoll, o.IO = -1, port.IOXDP },
		`--xdp-frames 3000: expected a power of two from 128 to 65536`: func(o *port.Options) { o.Frames = 3000 },
		`--xdp-frames 64: expected a power of two`:                     func(o *port.Options) { o.Frames = 64 },
		`--io tc: not with --attach veth: expected --attach direct`:    func(o *port.Options) { o.Attach, o.IO = port.AttachVeth, port.IOTC },
		`--queues -1: expected 1 to 256`:                               func(o *port.Options) { o.Queues = -1 },
		`--queues 257: expected 1 to 256`:                              func(o *port.Options) { o.Queues = 257 },
		`--threads-per-queue 3: expected 1 or 2`:                       func(o *port.Options) { o.Threads = 3 },
		`--spin -1: expected 0 to 1000000`:                             func(o *port.Options) { o.Spin = -1 },
		`--busy-poll 10: it is for --io xdp`:                           func(o *port.Options) { o.BusyPoll = 10 },
	} {
		o := good
		change(&o)
		if err := o.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v: expected %s", o, err, want)
		}
	}
}

// TestSwitchTUN: one persistent device serves both drivers in turn, each with its own offloads.
func TestSwitchTUN(t *testing.T) {
	s := newSpace(t)
	s.do(t, func() error {
		for _, d := range []driver{whole, plain, whole, plain} {
			tun, err := d.device("eth0") // the name that ethtool below asks for
			if err != nil {
				return err
			}
			on, err := ethtoolGet(ethtoolGetTSO)
			if err != nil {
				return err
			}
			if on != 0 != (d.name == whole.name) {
				return fmt.Errorf("%s: TSO is %d", d.name, on)
			}
			if err := tun.Close(); err != nil {
				return err
			}
		}
		return nil
	})
}
