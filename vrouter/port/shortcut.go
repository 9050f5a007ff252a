package port

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"margay/vrouter"
)

// shortcut is the part of the kernel's in `direct` with IOTC: programs that forward plain packets whose outcome the
// vRouter knows beforehand, and the maps in which it tells them. What is not plain, or not known, they leave alone: it
// comes to the vRouter as without them.
//
// A prefix that is owned leads to a way, a way to a hop. A hop that a way leads to is never changed: a change is made in
// another one, and then the way is turned, by one store of a word; the one before is used again when no program can be
// reading it any more. So a packet goes the old way or the new one, never a third.
//
// Ways and hops 0 lead nowhere: packets for them are the vRouter's.
type shortcut struct {
	ways, hops, rules, counts *ebpf.Map
	arrival                   *ebpf.Program // TCX ingress of the underlay
	note                      *ebpf.Program // TCX egress of vr0

	turn   []uint32 // ways, as memory
	store  []tcHop  // hops, as memory
	rule   *tcRules // rules, as memory
	memory [][]byte

	freeWays, freeHops numbers
}

// tcHop is what the programs do with a packet: struct, and its layout, are shared with them. Addresses are in network
// order.
type tcHop struct {
	_        [2]byte
	ethernet [ethernetHeader]byte // of the frame that leaves
	gateway  uint32               // the outer destination
	source   uint32               // the outer source
	index    uint32               // of the interface that it leaves by
	mtu      uint32               // of the packet inside, in bytes
	flags    uint32
	tosKeep  uint32 // what the outer TOS has of the inner one
	tosSet   uint32 // and what beside it
	used     uint32 // the programs set it, whoever wants to know clears it
	id       uint32 // identifications given to what may be fragmented, the programs'
	offset   uint32 // what the identification of other packets is more than the inner one
	_        [8]byte
}

// Offsets into tcHop, in bytes.
const (
	hopEthernet = 0 // with the two bytes before it
	hopGateway  = 16
	hopSource   = 20
	hopIndex    = 24
	hopMTU      = 28
	hopFlags    = 32
	hopTOSKeep  = 36
	hopTOSSet   = 40
	hopUsed     = 44
	hopID       = 48
	hopOffset   = 52
)

// The flags of a hop.
const (
	hopSend  = 1 << iota // packets may go there
	hopNode              // a node of the cluster, whose packets may come
	hopPod               // a pod of this node
	hopLocal             // and its address is this node's by its route too, so that other nodes may send to it
	hopPeer              // it may be handed to the pod's side of the interface at once
	hopClamp             // what TCP connections announce has to be lowered, which is the vRouter's
)

// tcRules are what holds for all packets. Shared with the programs, as tcHop is.
type tcRules struct {
	off     uint32 // everything is the vRouter's
	arrive  uint32 // what comes from other nodes may be forwarded
	address uint32 // this node's, in network order
	uniform uint32 // a packet takes its DSCP out of the tunnel
}

// Offsets into tcRules, in bytes.
const (
	ruleOff     = 0
	ruleArrive  = 4
	ruleAddress = 8
	ruleUniform = 12
)

// What the programs count: places in counts.
const (
	countEncap = iota
	countDecap
	countLocal
	countFailed // begun, and then the kernel had no memory
	countPlaces
)

const (
	maxWays = 1 << 14
	maxHops = 1 << 15
	// numberRest is how long a number that is free is not used again. A program runs for microseconds.
	numberRest = time.Second
	// idGap is how many identifications programs that still read the hop before may give meanwhile.
	idGap = 1 << 10
)

// numbers gives out numbers from 1 to below limit.
type numbers struct {
	next, limit uint32
	freed       []freedNumber // the oldest first
}

type freedNumber struct {
	number uint32
	at     time.Time
}

// take returns a number that nobody has, 0 when there is none.
func (n *numbers) take(now time.Time) uint32 {
	if len(n.freed) > 0 && now.Sub(n.freed[0].at) >= numberRest {
		number := n.freed[0].number
		n.freed = n.freed[1:]
		return number
	}
	if n.next+1 >= n.limit {
		return 0
	}
	n.next++
	return n.next
}

func (n *numbers) give(number uint32, now time.Time) {
	if number != 0 {
		n.freed = append(n.freed, freedNumber{number, now})
	}
}

// used returns how many numbers somebody has.
func (n *numbers) used() int { return int(n.next) - len(n.freed) }

// newShortcut makes the maps; the programs are loaded by whoever has the other maps they need.
func newShortcut() (_ *shortcut, err error) {
	s := &shortcut{freeWays: numbers{limit: maxWays}, freeHops: numbers{limit: maxHops}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	array := func(name string, value, entries uint32) *ebpf.Map {
		if err != nil {
			return nil
		}
		var m *ebpf.Map
		m, err = ebpf.NewMap(&ebpf.MapSpec{Name: name, Type: ebpf.Array, KeySize: 4, ValueSize: value, MaxEntries: entries, Flags: unix.BPF_F_MMAPABLE})
		return m
	}
	// Values take multiples of eight bytes.
	s.ways = array("margay_ways", 8, maxWays)
	s.hops = array("margay_hops", uint32(unsafe.Sizeof(tcHop{})), maxHops)
	s.rules = array("margay_rules", uint32(unsafe.Sizeof(tcRules{})), 1)
	if err != nil {
		return nil, err
	}
	if s.counts, err = ebpf.NewMap(&ebpf.MapSpec{Name: "margay_counts", Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 16, MaxEntries: countPlaces}); err != nil {
		return nil, err
	}
	for _, m := range []struct {
		of   *ebpf.Map
		size int
		at   func(unsafe.Pointer)
	}{
		{s.ways, maxWays * 8, func(p unsafe.Pointer) { s.turn = unsafe.Slice((*uint32)(p), maxWays*2) }},
		{s.hops, maxHops * int(unsafe.Sizeof(tcHop{})), func(p unsafe.Pointer) { s.store = unsafe.Slice((*tcHop)(p), maxHops) }},
		{s.rules, int(unsafe.Sizeof(tcRules{})), func(p unsafe.Pointer) { s.rule = (*tcRules)(p) }},
	} {
		memory, err := unix.Mmap(m.of.FD(), 0, (m.size+unix.Getpagesize()-1)&^(unix.Getpagesize()-1), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, fmt.Errorf("memory of a BPF map: %w", err)
		}
		s.memory = append(s.memory, memory)
		m.at(unsafe.Pointer(&memory[0]))
	}
	return s, nil
}

func (s *shortcut) close() error {
	var errs []error
	for _, m := range s.memory {
		errs = append(errs, unix.Munmap(m))
	}
	s.memory, s.turn, s.store, s.rule = nil, nil, nil, nil
	return errors.Join(append(errs, closeBPF([]*ebpf.Program{s.arrival, s.note}, []*ebpf.Map{s.ways, s.hops, s.rules, s.counts}))...)
}

// lead makes a way lead to a hop like h, and reports whether it does. Where there is no room it leads nowhere.
func (s *shortcut) lead(way uint32, h tcHop, now time.Time) bool {
	old := s.turn[2*way]
	was := &s.store[old]
	if old != 0 && was.same(&h) {
		return true
	}
	next := s.freeHops.take(now)
	if next != 0 {
		h.used, h.id = atomic.LoadUint32(&was.used), atomic.LoadUint32(&was.id)+idGap
		if old == 0 {
			h.id = rand.Uint32() // not where every other way, worker and node begins
		}
		s.store[next] = h
	}
	atomic.StoreUint32(&s.turn[2*way], next)
	s.freeHops.give(old, now)
	return next != 0
}

// same reports whether two hops lead the same way.
func (h *tcHop) same(o *tcHop) bool {
	return h.ethernet == o.ethernet && h.gateway == o.gateway && h.source == o.source && h.index == o.index && h.mtu == o.mtu &&
		h.flags == o.flags && h.tosKeep == o.tosKeep && h.tosSet == o.tosSet && h.offset == o.offset
}

// newWay returns a way that leads nowhere yet, 0 when there is no room.
func (s *shortcut) newWay(now time.Time) uint32 { return s.freeWays.take(now) }

// freeWay gives a way back, that no prefix has any more.
func (s *shortcut) freeWay(way uint32, now time.Time) {
	if way == 0 {
		return
	}
	old := s.turn[2*way]
	atomic.StoreUint32(&s.turn[2*way], 0)
	s.freeHops.give(old, now)
	s.freeWays.give(way, now)
}

// takeUsed reports whether packets have gone by a way since the last time it was asked.
func (s *shortcut) takeUsed(way uint32) bool {
	h := &s.store[atomic.LoadUint32(&s.turn[2*way])]
	return atomic.LoadUint32(&h.used) != 0 && atomic.SwapUint32(&h.used, 0) != 0
}

// count adds up what the processors have counted in one place.
func (s *shortcut) count(place uint32) (sum vrouter.Counter) {
	var each [][2]uint64
	if s.counts.Lookup(place, &each) != nil {
		return vrouter.Counter{}
	}
	for _, c := range each {
		sum.Packets += c[0]
		sum.Bytes += c[1]
	}
	return sum
}
