package port

import (
	"encoding/binary"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// hop is how to reach one destination of the underlay; immutable once published, but for used.
type hop struct {
	to uint32 // the destination, its first octet in the highest bits
	// raw says that the kernel has to do it: there is no MAC address yet, or the route leads elsewhere.
	raw bool
	// whole says that superpackets may go whole: the program of retag.go is on the interface.
	whole    bool
	ethernet [ethernetHeader]byte
	address  unix.RawSockaddrLinklayer
	used     atomic.Bool // since the last look; set by Send
}

// newHop returns the hop by way of the neighbour with the address remote, on the interface index with the address own.
func newHop(to uint32, index int, own, remote []byte, whole bool) *hop {
	h := &hop{to: to, whole: whole}
	copy(h.ethernet[:6], remote)
	copy(h.ethernet[6:12], own)
	binary.BigEndian.PutUint16(h.ethernet[12:], unix.ETH_P_IP)
	h.address = unix.RawSockaddrLinklayer{Family: unix.AF_PACKET, Protocol: htons(unix.ETH_P_IP), Ifindex: int32(index),
		Halen: 6}
	copy(h.address.Addr[:], remote)
	return h
}

// same reports whether two hops lead the same way.
func (h *hop) same(o *hop) bool {
	return h.to == o.to && h.raw == o.raw && h.whole == o.whole && h.ethernet == o.ethernet && h.address == o.address
}

// hops is a set of destinations sorted by address; immutable.
type hops []*hop

// find returns the hop to the destination, or nil. It is written out because it must not allocate.
func (t hops) find(to uint32) *hop {
	low, high := 0, len(t)
	for low < high {
		if mid := int(uint(low+high) >> 1); t[mid].to < to {
			low = mid + 1
		} else {
			high = mid
		}
	}
	if low < len(t) && t[low].to == to {
		return t[low]
	}
	return nil
}

func (t hops) sort() {
	slices.SortFunc(t, func(a, b *hop) int {
		if a.to < b.to {
			return -1
		}
		return 1
	})
}
