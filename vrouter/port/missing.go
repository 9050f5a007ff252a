package port

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Missing is the error for a capability or a kernel feature that this machine does not give us.
type Missing struct {
	What string // what was being opened
	Do   string // what the operator can do about it
	Err  error
}

// Error says in one line what is missing and what to do.
func (m *Missing) Error() string { return fmt.Sprintf("%s: %v: %s", m.What, m.Err, m.Do) }

// Unwrap returns the kernel's error.
func (m *Missing) Unwrap() error { return m.Err }

// MissingOf returns the Missing that err is or wraps, nil if there is none.
func MissingOf(err error) *Missing {
	var m *Missing
	if errors.As(err, &m) {
		return m
	}
	return nil
}

const needPrivilege = "run as root, or with the capabilities NET_ADMIN and NET_RAW"

// explainSocket makes a refusal of the kernel a Missing.
func explainSocket(what string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return &Missing{What: what, Do: needPrivilege, Err: err}
	case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EPROTONOSUPPORT):
		return &Missing{What: what, Do: "a kernel with CONFIG_PACKET is needed (modprobe af_packet)", Err: err}
	}
	return fmt.Errorf("%s: %w", what, err)
}
