package agent

import (
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"margay/agent/api"
	"margay/test/space"
)

// TestReassemblyIsCounted: fragments that overlap, which the kernel throws away (RFC 5722, which it follows for IPv4 too).
func TestReassemblyIsCounted(t *testing.T) {
	count := func() (packets uint64) {
		all := ipLayerDrops()
		if i := slices.IndexFunc(all, func(c api.Counter) bool { return c.Reason == "ip_reassembly" }); i >= 0 {
			packets = all[i].Packets
		}
		return packets
	}
	space.New(t).Do(t, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		to := [4]byte{127, 0, 0, 1}
		before := count()
		for _, fragment := range []uint16{0x2000, 0x2001} { // more follow; the second begins eight bytes behind the first
			b := make([]byte, 20+16)
			b[0], b[8], b[9] = 0x45, 64, 4
			binary.BigEndian.PutUint16(b[4:], 7)
			binary.BigEndian.PutUint16(b[6:], fragment)
			copy(b[12:], to[:])
			copy(b[16:], to[:])
			if err := unix.Sendto(fd, b, 0, &unix.SockaddrInet4{Addr: to}); err != nil {
				return err
			}
		}
		for deadline := time.Now().Add(time.Minute); count() == before; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Errorf("no loss is counted: %+v", ipLayerDrops())
				break
			}
		}
		return nil
	})
}
