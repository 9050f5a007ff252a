package rig

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// Space is a named network namespace with a thread of its own that is always inside it.
type Space struct {
	Name string
	run  chan func()
}

// newSpace makes a namespace. iproute2 does it, because it prepares the directory of the names in its own way, and an
// `ip netns` that came after ours would stack its mount over it.
func newSpace(name string) (*Space, error) {
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ip netns add %s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	s := &Space{Name: name, run: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never given back: the thread ends with its goroutine
		h, err := netns.GetFromName(name)
		if err == nil {
			err = netns.Set(h)
			_ = h.Close()
		}
		ready <- err
		for f := range s.run {
			f()
		}
	}()
	if err := <-ready; err != nil {
		close(s.run)
		return nil, fmt.Errorf("enter namespace %s: %w", name, err)
	}
	return s, s.Do(func() error { return linkUp("lo") })
}

// Do runs f on the namespace's thread, one at a time. Sockets that f opens and processes that it starts belong there.
func (s *Space) Do(f func() error) error {
	result := make(chan error)
	s.run <- func() { result <- f() }
	if err := <-result; err != nil {
		return fmt.Errorf("%s: %w", s.Name, err)
	}
	return nil
}

// Start starts a process in the namespace. It is killed when this process dies, however that happens.
func (s *Space) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// The signal comes when the thread ends that started it: the namespace's, which lives as long as the space.
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	return s.Do(cmd.Start)
}

// close removes the namespace's name; the namespace goes when the last process in it has ended.
func (s *Space) close() error {
	close(s.run)
	return netns.DeleteNamed(s.Name)
}

func linkUp(name string, addresses ...string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	for _, text := range addresses {
		a, err := netlink.ParseAddr(text)
		if err != nil {
			return err
		}
		if err := netlink.AddrReplace(link, a); err != nil {
			return fmt.Errorf("address %s on %s: %w", text, name, err)
		}
	}
	return netlink.LinkSetUp(link)
}

func sysctl(key, value string) error {
	return os.WriteFile("/proc/sys/"+strings.ReplaceAll(key, ".", "/"), []byte(value), 0o644)
}
