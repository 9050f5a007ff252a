package server

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// inNetns runs fn on a thread of its own that has entered the network namespace ns. Whatever fn opens stays in that
// namespace; fn must start no goroutines. If the thread cannot return to where it came from, it is thrown away:
// the runtime ends a thread whose goroutine exits while locked to it.
func inNetns(ns *os.File, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		defer home.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		err = fn()
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// checkNetns refuses a file that is no network namespace, or that is our own: plumbing a "pod" there would take the
// node's default route away.
func checkNetns(ns *os.File) error {
	kind, err := unix.IoctlRetInt(int(ns.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		return fmt.Errorf("expected a network namespace, got another kind of file")
	}
	theirs, err := ns.Stat()
	if err != nil {
		return err
	}
	// Not /proc/self: that is the main thread, which may be the one that is in a pod just now.
	ours, err := os.Stat("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	if os.SameFile(theirs, ours) {
		return fmt.Errorf("expected the container's, got the node's own")
	}
	return nil
}
