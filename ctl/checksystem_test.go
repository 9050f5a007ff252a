package ctl

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"margay/check"
	"margay/vrouter/port"
)

func TestDriversAsResults(t *testing.T) {
	missing := &port.Missing{What: "TUN device", Err: unix.EPERM, Do: "run as root"}
	got := drivers([]port.Probe{
		{Name: "a", Needed: true, For: "vr0"},
		{Name: "b", Needed: true, For: "vr0", Err: missing},
		{Name: "c", For: "speed", Err: errors.Join(errors.New("one"), errors.New("two"))},
	})
	want := []check.Result{
		{Name: "a", Status: check.OK, Found: "for vr0"},
		{Name: "b", Status: check.Fail, Found: "TUN device: operation not permitted", Do: "run as root"},
		{Name: "c", Status: check.Warn, Found: "one; two", Do: "without it there is no speed"},
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%+v, want %+v", got[i], want[i])
		}
	}
	var b strings.Builder
	if err := printChecks(&b, got); err != nil {
		t.Fatal(err)
	}
	const text = `OK       a  for vr0
FAIL     b  TUN device: operation not permitted
            -> run as root
WARN     c  one; two
            -> without it there is no speed

1 ok, 1 warnings, 1 failures, 0 unknown
`
	if b.String() != text {
		t.Errorf("got\n%s", b.String())
	}
}
