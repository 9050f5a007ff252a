package port

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// openTwinSocket opens the AF_PACKET socket, deaf until it is bound, and unless it is the first queue's until it is of the
// group.
func (v *Veth) openTwinSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	for _, o := range []struct {
		name          string
		option, value int
	}{
		{"PACKET_VNET_HDR", unix.PACKET_VNET_HDR, 1},
		{"PACKET_IGNORE_OUTGOING (Linux 4.20)", unix.PACKET_IGNORE_OUTGOING, 1},
	} {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, o.option, o.value); err != nil {
			return -1, errors.Join(fmt.Errorf("%s: %w", o.name, err), unix.Close(fd))
		}
	}
	if err := errors.Join(enlarge(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF), enlarge(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF)); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	if v.lead != nil {
		if err := deafen(fd); err != nil {
			return -1, errors.Join(err, unix.Close(fd))
		}
	}
	return fd, nil
}

// bind binds the queues' sockets to the twin. The first has everything until the others are of the group.
func (v *Veth) bind(index int) error {
	for _, q := range v.all() {
		if err := q.renew(); err != nil {
			return err
		}
		if err := unix.Bind(q.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: index}); err != nil {
			return fmt.Errorf("bind: %w", err)
		}
	}
	if len(v.more) == 0 {
		return nil
	}
	var err error
	if v.group, err = startFanout(v.fd, fanoutMode(len(v.more)+1)); err != nil {
		return err
	}
	v.joined = true
	for _, q := range v.more {
		if err := errors.Join(v.group.join(q.fd), hearAll(q.fd)); err != nil {
			return err
		}
		q.joined = true
	}
	return nil
}

// renew puts another socket in the place of one that is of a group, under its number: that one cannot be bound anew.
func (v *Veth) renew() error {
	if !v.joined {
		return nil
	}
	if err := replaceSocket(v.fd, v.openTwinSocket, &v.ring, &v.lost); err != nil {
		return err
	}
	v.joined = false
	return v.bypass.watch(v.fd) // the kernel watches sockets, not numbers
}

// bound reports whether all queues receive on the interface index, and each what the group leaves to it.
func (v *Veth) bound(index int) bool {
	for _, q := range v.all() {
		if !boundTo(q.fd, index) || q.joined != (len(v.more) > 0) {
			return false
		}
	}
	return true
}
