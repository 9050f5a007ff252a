// Package dump asks the kernel for whole lists over netlink. A table that changes while it is read gives a list that may lack
// entries or hold them twice, and the kernel says so (NLM_F_DUMP_INTR; netlink.ErrDumpInterrupted): on a node pods come and go
// all the time, so such a list is asked for again. A test of the module's root holds everybody to this package.
package dump

import (
	"errors"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tries bounds how often a list is asked for: a dump takes microseconds to milliseconds, so only a table that changes without
// end comes to the last.
const tries = 50

// Here is the handle for the network namespace that the calling thread is in at the time of each call.
var Here = &netlink.Handle{}

// Whole calls list until nothing has changed meanwhile. After 50 interrupted calls it returns the last list with the error
// (netlink.ErrDumpInterrupted or EINTR); any other error is returned at once.
func Whole[T any](list func() ([]T, error)) ([]T, error) {
	var out []T
	var err error
	for range tries {
		out, err = list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return out, err
}

// Links lists the interfaces.
func Links(h *netlink.Handle) ([]netlink.Link, error) { return Whole(h.LinkList) }

// Addrs lists the addresses of link, of all interfaces if it is nil.
func Addrs(h *netlink.Handle, link netlink.Link, family int) ([]netlink.Addr, error) {
	return Whole(func() ([]netlink.Addr, error) { return h.AddrList(link, family) })
}

// Routes lists the main table's routes by link, those of all interfaces if it is nil.
func Routes(h *netlink.Handle, link netlink.Link, family int) ([]netlink.Route, error) {
	return Whole(func() ([]netlink.Route, error) { return h.RouteList(link, family) })
}

// RoutesLike lists the routes that are as filter in what mask (netlink.RT_FILTER_*) names.
func RoutesLike(h *netlink.Handle, family int, filter *netlink.Route, mask uint64) ([]netlink.Route, error) {
	return Whole(func() ([]netlink.Route, error) { return h.RouteListFiltered(family, filter, mask) })
}

// Rules lists the rules that choose a routing table.
func Rules(h *netlink.Handle, family int) ([]netlink.Rule, error) {
	return Whole(func() ([]netlink.Rule, error) { return h.RuleList(family) })
}

// Neighbours lists the neighbours on the interface of that index, on all interfaces if it is 0.
func Neighbours(h *netlink.Handle, index, family int) ([]netlink.Neigh, error) {
	return Whole(func() ([]netlink.Neigh, error) { return h.NeighList(index, family) })
}

// Disciplines lists the queueing disciplines of link, of all interfaces if it is nil.
func Disciplines(h *netlink.Handle, link netlink.Link) ([]netlink.Qdisc, error) {
	return Whole(func() ([]netlink.Qdisc, error) { return h.QdiscList(link) })
}
