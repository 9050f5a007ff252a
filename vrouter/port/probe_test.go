package port_test

import (
	"runtime"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
	"margay/vrouter/port"
)

// Probing finds what is there, and leaves no device behind.
func TestProbeAll(t *testing.T) {
	// The thread is left locked: it ends with the test's goroutine, and the namespace with it.
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	for _, p := range port.ProbeAll() {
		switch {
		case p.Err == nil:
		case p.Needed:
			t.Errorf("%s: %v", p.Name, p.Err)
		default:
			t.Logf("%s, which is for %s: %v", p.Name, p.For, p.Err)
			if port.MissingOf(p.Err) == nil {
				t.Errorf("%s: %T: expected a Missing", p.Name, p.Err)
			}
		}
	}
	links, err := dump.Links(dump.Here)
	if err != nil || len(links) != 1 {
		t.Errorf("left behind: %v, %v", links, err)
	}
}

// Without a capability every probe says so, and what to do.
func TestProbeAllWithoutCapabilities(t *testing.T) {
	runtime.LockOSThread() // as above: the thread's capabilities go with it
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var none [2]unix.CapUserData
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
		t.Fatal(err)
	}
	for _, p := range port.ProbeAll() {
		if m := port.MissingOf(p.Err); m == nil || m.Do == "" || m.What == "" {
			t.Errorf("%s: %v: expected a Missing", p.Name, p.Err)
		}
	}
}
