package dump

import (
	"errors"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestWhole: an interruption is asked away, another error is not, and there is an end to it.
func TestWhole(t *testing.T) {
	for _, c := range []struct {
		name        string
		interrupted int
		err         error
		calls       int
	}{
		{"whole at once", 0, nil, 1},
		{"whole the third time", 2, nil, 3},
		{"interrupted for ever", 1 << 30, netlink.ErrDumpInterrupted, tries},
		{"another error", 1, unix.EPERM, 2},
	} {
		calls := 0
		got, err := Whole(func() ([]int, error) {
			calls++
			if calls <= c.interrupted {
				return []int{1}, netlink.ErrDumpInterrupted
			}
			return []int{1, 2}, c.err
		})
		if !errors.Is(err, c.err) || calls != c.calls || (c.err == nil && len(got) != 2) {
			t.Errorf("%s: %v, %v after %d calls", c.name, got, err, calls)
		}
	}
}

// TestLinksWhileTheyChange lists the interfaces of a namespace in which interfaces come and go: the kernel interrupts raw lists,
// and ours are whole: the interfaces that stay are in each of them, once.
func TestLinksWhileTheyChange(t *testing.T) {
	const stay = 50 // pairs: more than one message's worth, so that a change can fall between two
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil { // the thread is never unlocked and ends with the test
		t.Fatal("network namespace:", err)
	}
	h, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	pair := func(name string) netlink.Link {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		v := netlink.NewVeth(attrs)
		v.PeerName = name + "-peer"
		return v
	}
	for i := range stay {
		if err := h.LinkAdd(pair("stay" + string(rune('a'+i/26)) + string(rune('a'+i%26)))); err != nil {
			t.Fatal(err)
		}
	}
	changer, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	defer changer.Close()
	var stop atomic.Bool
	done := make(chan error, 1)
	go func() {
		for !stop.Load() {
			err := changer.LinkAdd(pair("comes"))
			if err == nil {
				err = changer.LinkDel(pair("comes"))
			}
			if err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	defer func() {
		stop.Store(true)
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	interrupted := 0
	for range 300 {
		if _, err := h.LinkList(); errors.Is(err, netlink.ErrDumpInterrupted) {
			interrupted++
		}
		links, err := Links(h)
		if err != nil {
			t.Fatal(err)
		}
		seen := 0
		for _, l := range links {
			if strings.HasPrefix(l.Attrs().Name, "stay") {
				seen++
			}
		}
		if seen != 2*stay {
			t.Fatalf("%d of %d interfaces that stay", seen, 2*stay)
		}
	}
	t.Log(interrupted, "of 300 raw lists were interrupted")
}
