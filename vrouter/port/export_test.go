package port

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// OpenSplitUnderlay is OpenOffloadUnderlay where the kernel allows no BPF.
func OpenSplitUnderlay() (*Underlay, error) {
	return openOffloadUnderlay(func() (*retag, error) { return nil, explainBPF("load the BPF program", unix.EPERM) })
}

// Resolved reports whether packets to the destination leave by AF_PACKET, and superpackets whole.
func (u *Underlay) Resolved(to netip.Addr) (frames, whole bool) {
	a := to.As4()
	h := u.frames.resolver.table.Load().find(binary.BigEndian.Uint32(a[:]))
	return h != nil && !h.raw, h != nil && h.whole
}

// OpenPortsWith is OpenPorts with other drivers for the offloads.
var OpenPortsWith = openPorts
