package node

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"margay/internal/dump"
	"margay/test/space"
)

// Watch makes Balance look for what the kernel has lost in another namespace too.
func (n *Node) Watch(s *space.Space) { n.watched = append(n.watched, s) }

// losses are the packets that the kernel says it has lost in the node's namespace, its pods' and those that are watched: at
// interfaces (a full backlog shows at a veth's), and in packet and raw sockets, the vRouter's and the test's own.
func (n *Node) losses(t testing.TB) map[string]uint64 {
	t.Helper()
	all := map[string]uint64{}
	for i, s := range append([]*space.Space{n.Space}, n.watched...) {
		where := fmt.Sprintf("namespace %d: ", i)
		s.Do(t, func() error {
			return errors.Join(linkLosses(where, all), packetSocketLosses(where, all), rawSocketLosses(where, all))
		})
	}
	for what, packets := range all {
		if packets == 0 {
			delete(all, what)
		}
	}
	return all
}

func linkLosses(where string, all map[string]uint64) error {
	links, err := dump.Links(dump.Here)
	if err != nil {
		return err
	}
	for _, l := range links {
		s := l.Attrs().Statistics
		if s == nil {
			return fmt.Errorf("%s has no statistics", l.Attrs().Name)
		}
		name := where + l.Attrs().Name
		all[name+" receiving"] = s.RxDropped + s.RxErrors + s.RxMissedErrors + s.RxFifoErrors
		all[name+" sending"] = s.TxDropped + s.TxErrors + s.TxFifoErrors
	}
	return nil
}

// Of linux/packet_diag.h and linux/sock_diag.h.
const (
	packetShowMemory = 0x10 // PACKET_SHOW_MEMINFO
	packetMemory     = 6    // PACKET_DIAG_MEMINFO
	memoryDrops      = 8    // SK_MEMINFO_DROPS
	packetDiagLength = 16   // of struct packet_diag_msg
)

// packetSocketLosses asks for all AF_PACKET sockets of the caller's namespace: what a full buffer or ring has cost each.
func packetSocketLosses(where string, all map[string]uint64) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	const length = unix.NLMSG_HDRLEN + 20
	request := make([]byte, length)
	binary.NativeEndian.PutUint32(request, length)
	binary.NativeEndian.PutUint16(request[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	request[unix.NLMSG_HDRLEN] = unix.AF_PACKET
	binary.NativeEndian.PutUint32(request[unix.NLMSG_HDRLEN+8:], packetShowMemory)
	if err := unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("ask for the packet sockets: %w", err)
	}
	b := make([]byte, 1<<16)
	for {
		size, _, err := unix.Recvfrom(fd, b, 0)
		if err != nil {
			return fmt.Errorf("ask for the packet sockets: %w", err)
		}
		for rest := b[:size]; len(rest) >= unix.NLMSG_HDRLEN; {
			length := int(binary.NativeEndian.Uint32(rest))
			if length < unix.NLMSG_HDRLEN || length > len(rest) {
				return errors.New("an answer about packet sockets that is cut off")
			}
			message := rest[unix.NLMSG_HDRLEN:length]
			switch binary.NativeEndian.Uint16(rest[4:]) {
			case unix.NLMSG_DONE:
				return nil
			case unix.NLMSG_ERROR:
				return fmt.Errorf("ask for the packet sockets (packet_diag): %w", unix.Errno(-int32(binary.NativeEndian.Uint32(message))))
			}
			if len(message) < packetDiagLength {
				return errors.New("an answer about packet sockets that is too short")
			}
			inode := binary.NativeEndian.Uint32(message[4:])
			drops, err := dropsOf(message[packetDiagLength:])
			if err != nil {
				return err
			}
			all[fmt.Sprintf("%spacket socket %d", where, inode)] = uint64(drops)
			rest = rest[min((length+3)&^3, len(rest)):]
		}
	}
}

// dropsOf finds a socket's drops among its attributes.
func dropsOf(attributes []byte) (uint32, error) {
	for len(attributes) >= unix.SizeofRtAttr {
		length := int(binary.NativeEndian.Uint16(attributes))
		if length < unix.SizeofRtAttr || length > len(attributes) {
			break
		}
		value := attributes[unix.SizeofRtAttr:length]
		if binary.NativeEndian.Uint16(attributes[2:]) == packetMemory && len(value) >= 4*(memoryDrops+1) {
			return binary.NativeEndian.Uint32(value[4*memoryDrops:]), nil
		}
		attributes = attributes[min((length+3)&^3, len(attributes)):]
	}
	return 0, errors.New("a packet socket without its drops")
}

// rawSocketLosses reads what the raw sockets of the caller's namespace have lost: the last column.
func rawSocketLosses(where string, all map[string]uint64) error {
	f, err := os.Open("/proc/thread-self/net/raw")
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Scan() // the columns' names
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			continue
		}
		drops, err := strconv.ParseUint(fields[len(fields)-1], 10, 64)
		if err != nil {
			return fmt.Errorf("/proc/net/raw: %q: %w", lines.Text(), err)
		}
		all[where+"raw socket "+fields[0]] = drops
	}
	return lines.Err()
}
