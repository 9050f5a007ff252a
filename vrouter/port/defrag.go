package port

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Outer packets that were fragmented on the way are the kernel's to put together: an AF_PACKET socket gets them whole
// when it is of a fanout group, here of one, that asks for it. AF_XDP leaves fragments to that socket. Where the kernel
// refuses, fragments come one by one, and the ladder counts them.

// joinDefrag makes the receiving socket a group of its own, if it is not one yet. That is possible only while it
// receives, which it does not on an interface that is down: then the next idle moment tries again. The caller holds mu.
func (u *Underlay) joinDefrag() {
	if u.joined || u.index == 0 {
		return
	}
	// By CPU, because to choose among one costs least so; the group's number is the kernel's choice. The group has a hook
	// of its own for packets, which has to be told again that what we send is not wanted back.
	const group = unix.PACKET_FANOUT_CPU | unix.PACKET_FANOUT_FLAG_DEFRAG | unix.PACKET_FANOUT_FLAG_UNIQUEID
	for _, flags := range []int{group | unix.PACKET_FANOUT_FLAG_IGNORE_OUTGOING, group} { // the flag is of Linux 5.7
		if unix.SetsockoptInt(u.recv, unix.SOL_PACKET, unix.PACKET_FANOUT, flags<<16) == nil {
			u.joined = true
			return
		}
	}
}

// renewReceiver puts another socket in the place of the receiving one, under its number, where that one cannot be bound
// anew because it is of a group. The caller holds mu.
func (u *Underlay) renewReceiver() error {
	if !u.joined {
		return nil
	}
	fd, err := openReceiver()
	if err != nil {
		return err
	}
	if err := u.ring.prepare(fd); err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	u.lost.read(u.recv)
	if err := errors.Join(unix.Dup3(fd, u.recv, unix.O_CLOEXEC), unix.Close(fd)); err != nil {
		return err
	}
	u.joined = false
	if u.bypass != nil {
		return u.bypass.watch(u.recv) // the kernel watches sockets, not numbers
	}
	return nil
}
