package rig

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netns"
)

// runDirs is where the beds keep their sockets; below it each run has a directory named like its namespaces.
const runDirs = "/run/margay/bench"

// runName is the beginning of the names of everything that the run of process pid makes.
func runName(pid int) string { return "mgb" + strconv.Itoa(pid) }

var ownedBy = regexp.MustCompile(`^mgb([0-9]+)(-[a-z0-9-]+)?$`)

// Done removes what the beds of this process have shared; all of them are closed.
func Done() error { return os.RemoveAll(filepath.Join(runDirs, runName(os.Getpid()))) }

// Sweep removes what runs that were killed have left: namespaces, directories, sockets of processes that are no more.
// It returns what it removed.
func Sweep() (removed []string, err error) {
	return sweep(func(pid int) bool { return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
}

func sweep(alive func(pid int) bool) (removed []string, err error) {
	var errs []error
	for _, place := range []struct {
		dir    string
		remove func(dir, name string) error
	}{
		{"/run/netns", func(_, name string) error { return netns.DeleteNamed(name) }},
		{runDirs, func(dir, name string) error { return os.RemoveAll(filepath.Join(dir, name)) }},
		{wireguardSockets, func(dir, name string) error { return os.Remove(filepath.Join(dir, name)) }},
	} {
		entries, err := os.ReadDir(place.dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, e := range entries {
			m := ownedBy.FindStringSubmatch(strings.TrimSuffix(e.Name(), ".sock"))
			if m == nil {
				continue
			}
			pid, err := strconv.Atoi(m[1])
			if err != nil || alive(pid) {
				continue
			}
			// Another run may sweep at the same time.
			if err := place.remove(place.dir, e.Name()); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, fmt.Errorf("sweep %s: %w", e.Name(), err))
				continue
			}
			removed = append(removed, filepath.Join(place.dir, e.Name()))
		}
	}
	return removed, errors.Join(errs...)
}
