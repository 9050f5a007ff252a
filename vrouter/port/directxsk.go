package port

import (
	"fmt"

	"github.com/cilium/ebpf/link"
)

// openPodXSK is openPodLink with AF_XDP, on the interface's first queue. slot is its own in steering.sockets,
// frames is how many packets may wait for us.
func openPodXSK(s *steering, index, slot, frames, mtu int, own, pod []byte) (_ *podLink, err error) {
	l := newPodLink(index, own, pod)
	defer func() {
		if err != nil {
			_ = l.close()
		}
	}()
	if l.programs, err = s.attach(index, false); err != nil {
		return nil, err
	}
	// In the driver, which veth has; where it cannot (an MTU too large for it, for one), AF_PACKET is as good.
	at, err := link.AttachXDP(link.XDPOptions{Program: s.redirect, Interface: index, Flags: link.XDPDriverMode})
	if err != nil {
		return nil, fmt.Errorf("attach the XDP program: %w", unwrapErrno(err))
	}
	l.programs = append(l.programs, at)
	if l.xsk, err = openXSK(xskOptions{index: index, mtu: mtu, receive: frames, send: podSendFrames}); err != nil {
		return nil, err
	}
	if err := s.sockets.Put(uint32(slot), uint32(l.xsk.fd)); err != nil {
		return nil, fmt.Errorf("map of AF_XDP sockets: %w", err)
	}
	return l, nil
}
