package port

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// namespace is the network namespace that a port was opened in.
type namespace struct{ fd int }

// thisNamespace returns the calling thread's.
func thisNamespace() (*namespace, error) {
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	return &namespace{fd}, nil
}

// enter brings the calling thread into the namespace, and reports whether it was in another one, which takes
// CAP_SYS_ADMIN to leave. Only tests open ports in other namespaces than the process's.
func (n *namespace) enter() (switched bool, err error) {
	var here, there unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/thread-self/ns/net", &here), unix.Fstat(n.fd, &there)); err != nil {
		return false, fmt.Errorf("network namespace: %w", err)
	}
	if here.Ino == there.Ino && here.Dev == there.Dev {
		return false, nil
	}
	if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
		return false, fmt.Errorf("enter network namespace: %w", err)
	}
	return true, nil
}

func (n *namespace) close() error { return unix.Close(n.fd) }
