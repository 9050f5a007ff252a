package traffic

import (
	"encoding/binary"
	"fmt"
	"net"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	blockSize  = 1 << 18
	blockCount = 64
	frameSize  = 1 << 11
	// retire is after how many milliseconds the kernel hands over a block that is not full.
	retire = 8
	// vnetLen is the length of struct virtio_net_hdr in bytes.
	vnetLen = 10
)

// Sink takes packets out of an AF_PACKET ring (TPACKET_V3) of a device.
type Sink struct {
	fd    int
	ring  []byte
	board *Board
}

// NewSink opens the device of the calling thread's network namespace.
func NewSink(device string, b *Board) (_ *Sink, err error) {
	link, err := net.InterfaceByName(device)
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", device, err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V3); err != nil {
		return nil, fmt.Errorf("TPACKET_V3: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return nil, fmt.Errorf("PACKET_IGNORE_OUTGOING: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return nil, fmt.Errorf("PACKET_VNET_HDR: %w", err)
	}
	err = unix.SetsockoptTpacketReq3(fd, unix.SOL_PACKET, unix.PACKET_RX_RING, &unix.TpacketReq3{
		Block_size: blockSize, Block_nr: blockCount, Frame_size: frameSize, Frame_nr: blockSize / frameSize * blockCount,
		Retire_blk_tov: retire,
	})
	if err != nil {
		return nil, fmt.Errorf("PACKET_RX_RING: %w", err)
	}
	ring, err := unix.Mmap(fd, 0, blockSize*blockCount, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map the ring: %w", err)
	}
	// Only now: a socket that is bound before its ring stands would queue packets that nobody reads.
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: link.Index, Protocol: htons(unix.ETH_P_IP)}); err != nil {
		_ = unix.Munmap(ring)
		return nil, fmt.Errorf("bind to %s: %w", device, err)
	}
	return &Sink{fd: fd, ring: ring, board: b}, nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// Run counts what arrives, and returns only with an error. It looks after the ring every millisecond instead of being
// woken: so its cost depends on the packets and not on how they come.
func (s *Sink) Run() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	s.board.Live.Store(1)
	asked := time.Now()
	for at := 0; ; {
		block := s.ring[at*blockSize : (at+1)*blockSize]
		header := (*unix.TpacketBlockDesc)(unsafe.Pointer(&block[0]))
		desc := (*unix.TpacketHdrV1)(unsafe.Pointer(&header.Hdr[0]))
		status := (*uint32)(unsafe.Pointer(&desc.Block_status))
		if atomic.LoadUint32(status)&unix.TP_STATUS_USER == 0 {
			if time.Since(asked) > 50*time.Millisecond {
				if err := s.missed(); err != nil {
					return err
				}
				asked = time.Now()
			}
			s.board.Idle.Add(1)
			sleep(time.Millisecond)
			continue
		}
		s.block(block, int(desc.Offset_to_first_pkt), int(desc.Num_pkts))
		atomic.StoreUint32(status, unix.TP_STATUS_KERNEL)
		at = (at + 1) % blockCount
	}
}

// block counts the packets of one block.
func (s *Sink) block(block []byte, offset, packets int) {
	var counts [sealed + 1]uint64
	var bytes uint64
	for range packets {
		h := (*unix.Tpacket3Hdr)(unsafe.Pointer(&block[offset]))
		ip := block[offset+int(h.Net) : offset+int(h.Mac)+int(h.Snaplen)]
		// The virtio-net header is before the Ethernet header.
		if vnet := block[offset+int(h.Mac)-vnetLen:]; vnet[1] == unix.VIRTIO_NET_HDR_GSO_UDP_L4 {
			n, size := judgeMerged(ip, int(binary.NativeEndian.Uint16(vnet[4:])))
			if n > 0 {
				counts[whole] += uint64(n)
			} else {
				counts[bad]++
			}
			bytes += uint64(size)
		} else {
			v, size := judge(ip)
			counts[v]++
			bytes += uint64(size)
		}
		offset += int(h.Next_offset)
	}
	s.board.Packets.Add(counts[whole])
	s.board.Bytes.Add(bytes)
	s.board.Bad.Add(counts[bad])
	s.board.Sealed.Add(counts[sealed])
	s.board.Other.Add(counts[other])
}

// missed asks what the kernel could not put into the ring; asking sets its counter to 0.
func (s *Sink) missed() error {
	stats, err := unix.GetsockoptTpacketStatsV3(s.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return fmt.Errorf("PACKET_STATISTICS: %w", err)
	}
	s.board.Missed.Add(uint64(stats.Drops))
	return nil
}
