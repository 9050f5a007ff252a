package port

import "golang.org/x/sys/unix"

// Outer packets that were fragmented on the way are the kernel's to put together: an AF_PACKET socket gets them whole
// when it is of a fanout group, here of one, that asks for it. AF_XDP leaves fragments to that socket. Where the kernel
// refuses, fragments come one by one, and the ladder counts them.

// joinGroup makes the receiving sockets a group, as far as they are not one yet. That is possible only while they receive,
// which they do not on an interface that is down: then the next idle moment tries again. Until then the first queue has
// everything. The caller holds mu.
func (u *Underlay) joinGroup() {
	if u.index == 0 {
		return
	}
	for _, q := range u.all() {
		if q.joined {
			continue
		}
		var err error
		if q == u {
			u.group, err = startFanout(u.recv, fanoutMode(len(u.more)+1)|unix.PACKET_FANOUT_FLAG_DEFRAG)
		} else if err = u.group.join(q.recv); err == nil {
			err = hearIPIP(q.recv)
		}
		if err != nil {
			return
		}
		q.joined = true
	}
}

// renewReceiver puts another socket in the place of the receiving one, under its number, where that one cannot be bound
// anew because it is of a group. The caller holds mu.
func (u *Underlay) renewReceiver() error {
	if !u.joined {
		return nil
	}
	if err := replaceSocket(u.recv, u.openReceiver, &u.ring, &u.lost); err != nil {
		return err
	}
	u.joined = false
	return u.bypass.watch(u.recv) // the kernel watches sockets, not numbers
}
