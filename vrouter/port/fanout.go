package port

import (
	"fmt"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// fanout is a group of AF_PACKET sockets on one interface, each packet of which comes to one of them. A socket that is of a
// group can be bound to no other interface.
type fanout struct {
	id   int // of the namespace; the kernel has chosen it, so that two vRouters never share one
	mode int // type and flags, which are the same for all of a group
}

// fanoutMode is how a group of so many sockets chooses among them. By flow, and by the hash of tunqueues.go, of what is in
// the tunnel; among one there is no choice, and the CPU's number costs least.
func fanoutMode(sockets int) int {
	if sockets > 1 {
		return unix.PACKET_FANOUT_HASH
	}
	return unix.PACKET_FANOUT_CPU
}

// startFanout makes the socket fd the first of a group. It has to be bound to an interface that is up. The group has a hook
// of its own for packets, which has to be told again that what we send is not wanted back.
func startFanout(fd, mode int) (fanout, error) {
	var err error
	for _, ignore := range []int{unix.PACKET_FANOUT_FLAG_IGNORE_OUTGOING, 0} { // the flag is of Linux 5.7
		g := fanout{mode: mode | ignore}
		if err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_FANOUT, (g.mode|unix.PACKET_FANOUT_FLAG_UNIQUEID)<<16); err != nil {
			continue
		}
		group, err := unix.GetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_FANOUT)
		if err != nil {
			return g, fmt.Errorf("PACKET_FANOUT: %w", err)
		}
		g.id = group & 0xffff
		return g, nil
	}
	return fanout{}, fmt.Errorf("PACKET_FANOUT: %w", err)
}

// join makes another socket, bound to the same interface, one of the group.
func (g fanout) join(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_FANOUT, g.mode<<16|g.id); err != nil {
		return fmt.Errorf("PACKET_FANOUT: %w", err)
	}
	return nil
}

// deafen keeps everything from a socket that is bound and not yet of its group: it would get all that the others get too.
func deafen(fd int) error { return attach(fd, bpf.RetConstant{Val: 0}) }

// hearAll is deafen's undoing for a socket that wants everything.
func hearAll(fd int) error { return attach(fd, bpf.RetConstant{Val: 0x40000}) }
