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
	noTUN := func(string) (*port.TUN, error) { return nil, missing }
	noUnderlay := func() (*port.Underlay, error) { return nil, missing }
	refused := errors.New("refused")
	s := newSpace(t)
	for _, test := range []struct {
		attach   string
		underlay func() (*port.Underlay, error)
		tun      func(string) (*port.TUN, error)
		before   error
		want     string
		why      string
		err      error
	}{
		{port.AttachTUN, port.OpenOffloadUnderlay, port.OpenOffloadTUN, nil, port.AttachTUN, "asked for", nil},
		{port.AttachTUNPlain, noUnderlay, noTUN, nil, port.AttachTUNPlain, "asked for", nil},
		{port.AttachAuto, port.OpenOffloadUnderlay, port.OpenOffloadTUN, nil, port.AttachTUN, "this kernel has", nil},
		{port.AttachAuto, noUnderlay, port.OpenOffloadTUN, nil, port.AttachTUNPlain, "offloads: invalid argument", nil},
		{port.AttachAuto, port.OpenOffloadUnderlay, noTUN, nil, port.AttachTUNPlain, "offloads: invalid argument", nil},
		{port.AttachTUN, noUnderlay, port.OpenOffloadTUN, nil, "", "", unix.EINVAL},
		{port.AttachTUN, port.OpenOffloadUnderlay, noTUN, nil, "", "", unix.EINVAL},
		{port.AttachAuto, port.OpenOffloadUnderlay, port.OpenOffloadTUN, refused, "", "", refused},
	} {
		s.do(t, func() error {
			ports, err := port.OpenPortsWith(test.attach, port.IOPacket, "vr0", func() error { return test.before }, test.underlay, test.tun)
			if test.err != nil {
				if !errors.Is(err, test.err) {
					t.Errorf("%s: %v: expected %v", test.attach, err, test.err)
				}
				return nil
			}
			if err != nil {
				return err
			}
			if ports.Attach != test.want || !strings.Contains(ports.Why, test.why) || !strings.Contains(ports.String(), test.want+" (") {
				t.Errorf("%s: %s, expected %s, because %s", test.attach, ports, test.want, test.why)
			}
			ports.Stop()
			return ports.Close()
		})
	}
	if err := port.CheckAttach("tap"); err == nil {
		t.Error("tap was taken")
	}
}

// TestSwitchTUN: one persistent device serves both drivers in turn, each with its own offloads.
func TestSwitchTUN(t *testing.T) {
	s := newSpace(t)
	s.do(t, func() error {
		for _, d := range []driver{whole, plain, whole, plain} {
			tun, err := d.tun("eth0") // the name that ethtool below asks for
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
