package fib

import (
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"sync/atomic"
)

// trie6 is the IPv6 table as workers read it: a root for the first 16 bits, and below it nodes for 4 bits each. Of the
// levels between only those exist where prefixes differ or end: a node says which bits all addresses below it begin
// with, and what becomes of the others that the way to it leads here (they are under the same shorter prefix, its
// fallback). A lookup takes as many steps as there are such nodes on the way, a few in a cluster whose blocks differ in
// a few bits.
//
// What makes changes safe is as in trie4, and that a node's first bits, and the bits of the cell that leads to it, stay
// what they are: to put a node on the way to another one, the lower is copied. Readers that have come to the old one
// are under what was true when they came.
type trie6 struct {
	root     []uint32
	nodes    []node6
	hops     []uint64 // of type Hop. hops[0] says that there is no route
	gateways []Addr6  // of the hops, one group after the other; the first is the zero address, for hops without one

	// The writer's own.
	used   int // of nodes
	known  int
	joined int
	index  map[NextHop]uint32 // into hops[1:known]
	live   bool               // readers may see it
	stored func()             // as in trie4
}

// node6 is a node: what the addresses below it begin with, and a cell for each value of the 4 bits that follow.
type node6 struct {
	key      Addr6  // no bits are set from level on
	level    uint32 // a multiple of 4, from 16
	fallback uint32 // the leaf of the addresses that lead here and do not begin with key
	cells    [nodeLen6]uint32
}

// The bits of a cell, as in trie4, with 8 bits of length.
const (
	cellLength6 = 23
	cellHop6    = 1<<cellLength6 - 1

	rootBits6 = 16
	nodeBits6 = 4
	nodeLen6  = 1 << nodeBits6

	// mostNodes6 is what one prefix may need: one that leads to it, one where it ends, the copy of one below it.
	mostNodes6  = 3
	spareNodes6 = 64 * mostNodes6
)

func newTrie6() *trie6 {
	return &trie6{
		root:     make([]uint32, 1<<rootBits6),
		nodes:    make([]node6, spareNodes6),
		hops:     make([]uint64, spareHops),
		gateways: make([]Addr6, spareMembers),
		known:    1,
		joined:   1,
		index:    make(map[NextHop]uint32),
	}
}

// nibble returns the 4 bits of a from level on.
func (a Addr6) nibble(level uint32) uint32 {
	if level < 64 {
		return uint32(a.Hi>>(60-level)) & (nodeLen6 - 1)
	}
	return uint32(a.Lo>>(124-level)) & (nodeLen6 - 1)
}

// common returns how many bits a and b have in common.
func (a Addr6) common(b Addr6) int {
	if x := a.Hi ^ b.Hi; x != 0 {
		return bits.LeadingZeros64(x)
	}
	return 64 + bits.LeadingZeros64(a.Lo^b.Lo)
}

// first returns the first n bits of a, and zeros behind them.
func (a Addr6) first(n uint32) Addr6 {
	if n <= 64 {
		return Addr6{Hi: a.Hi &^ (1<<(64-n) - 1)}
	}
	return Addr6{a.Hi, a.Lo &^ (1<<(128-n) - 1)}
}

// below reports whether a begins with n's key.
func (n *node6) below(a Addr6) bool {
	hi, lo := a.Hi^n.key.Hi, a.Lo^n.key.Lo
	if n.level <= 64 {
		return hi>>(64-n.level) == 0
	}
	return hi|lo>>(128-n.level) == 0
}

// next returns the cell that n has for a: a leaf, or the next node.
func (n *node6) next(a Addr6) uint32 {
	if !n.below(a) {
		return atomic.LoadUint32(&n.fallback)
	}
	return atomic.LoadUint32(&n.cells[a.nibble(n.level)])
}

func (f *trie6) lookup(a Addr6) Hop {
	c := atomic.LoadUint32(&f.root[a.Hi>>(64-rootBits6)])
	for c >= cellNode {
		c = f.nodes[c&^cellNode].next(a)
	}
	return Hop(atomic.LoadUint64(&f.hops[c&cellHop6]))
}

// lookups looks up at most stride addresses: all of them one step, then those that are not done the next.
func (f *trie6) lookups(dst []Addr6, hops []Hop) {
	var (
		cells [stride]uint32
		open  [stride]uint8 // the addresses that have come to a node
		left  int
	)
	for i := range dst {
		c := atomic.LoadUint32(&f.root[dst[i].Hi>>(64-rootBits6)])
		cells[i%stride] = c
		open[left%stride] = uint8(i)
		left += int(c >> 31)
	}
	for left > 0 {
		now := left
		left = 0
		for _, i := range open[:now] {
			c := f.nodes[cells[i%stride]&^cellNode].next(dst[i])
			cells[i%stride] = c
			open[left%stride] = i
			left += int(c >> 31)
		}
	}
	for i := range dst {
		hops[i] = Hop(atomic.LoadUint64(&f.hops[cells[i%stride]&cellHop6]))
	}
}

// set writes one cell: at once, where a reader may see it.
func (f *trie6) set(cell *uint32, value uint32) {
	if !f.live {
		*cell = value
		return
	}
	atomic.StoreUint32(cell, value)
	if f.stored != nil {
		f.stored()
	}
}

// newNode returns a node for the addresses that begin with the first bits of a, all of whose cells say leaf. There is
// room for it.
func (f *trie6) newNode(a Addr6, level, leaf uint32) (*node6, uint32) {
	i := f.used
	f.used++
	n := &f.nodes[i]
	n.key, n.level, n.fallback = a.first(level), level, leaf
	for i := range n.cells {
		n.cells[i] = leaf // no reader looks here before a cell says so
	}
	return n, uint32(cellNode | i)
}

// span returns the cells that p covers, where it ends, and makes the nodes that it takes to have such cells; false when
// there is no room for them. What any address has is as before.
func (f *trie6) span(p netip.Prefix) ([]uint32, bool) {
	// Room first: making it moves the nodes.
	if f.used+mostNodes6 > len(f.nodes) && !f.moreNodes() {
		return nil, false
	}
	a, length := Addr6Of(p.Addr()), uint32(p.Bits())
	at := a.Hi >> (64 - rootBits6)
	if length <= rootBits6 {
		return f.root[at : at+1<<(rootBits6-length)], true
	}
	cell := &f.root[at]
	end := (length - 1) / nodeBits6 * nodeBits6 // the level of the node that p ends in
	for {
		if *cell < cellNode {
			_, c := f.newNode(a, end, *cell)
			f.set(cell, c)
		}
		n := &f.nodes[*cell&^cellNode]
		// The way to n and the way to p part, or p ends, before n does.
		if level := min(uint32(a.common(n.key))/nodeBits6*nodeBits6, end); level < n.level {
			f.put(cell, n, a, level)
			n = &f.nodes[*cell&^cellNode]
		}
		i := a.nibble(n.level)
		if n.level == end {
			return n.cells[i : i+1<<(end+nodeBits6-length)], true
		}
		cell = &n.cells[i]
	}
}

// put makes a node on the way to n, on a level above n's where cell leads to it.
func (f *trie6) put(cell *uint32, n *node6, a Addr6, level uint32) {
	upper, up := f.newNode(a, level, n.fallback)
	// n's fallback is now for fewer addresses. Who has come to n by the old way still asks it for all.
	lower, low := f.newNode(n.key, n.level, n.fallback)
	lower.cells = n.cells
	upper.cells[n.key.nibble(level)] = low
	f.set(cell, up)
}

// paint gives value to the leaves at or below cells whose prefix has a length from least to most.
func (f *trie6) paint(cells []uint32, least, most int, value uint32) {
	for i := range cells {
		if cells[i] >= cellNode {
			n := &f.nodes[cells[i]&^cellNode]
			f.paintLeaf(&n.fallback, least, most, value)
			f.paint(n.cells[:], least, most, value)
		} else {
			f.paintLeaf(&cells[i], least, most, value)
		}
	}
}

func (f *trie6) paintLeaf(leaf *uint32, least, most int, value uint32) {
	if n := int(*leaf >> cellLength6); n >= least && n <= most {
		f.set(leaf, value)
	}
}

func leaf6(bits int, hop uint32) uint32 { return uint32(bits)<<cellLength6 | hop }

// insert adds or replaces the route for p; false when there is no room, and then nothing that a reader can tell has
// changed.
func (f *trie6) insert(p netip.Prefix, n NextHop) bool {
	i, ok := f.hop(n)
	if !ok {
		return false
	}
	cells, ok := f.span(p)
	if !ok {
		return false
	}
	f.paint(cells, 0, p.Bits(), leaf6(p.Bits(), i))
	return true
}

// remove takes the route for p away, below which parent, the next shorter one with the next hop n, comes to light; the
// zero prefix when there is none.
func (f *trie6) remove(p, parent netip.Prefix, n NextHop) bool {
	var value uint32
	if parent.IsValid() {
		i, ok := f.hop(n)
		if !ok {
			return false
		}
		value = leaf6(parent.Bits(), i)
	}
	cells, ok := f.span(p)
	if !ok {
		return false
	}
	f.paint(cells, p.Bits(), p.Bits(), value)
	return true
}

// hop returns the index of n, which it adds to hops where it is new; false when there is no room.
func (f *trie6) hop(n NextHop) (uint32, bool) {
	if i, ok := f.index[n]; ok {
		return i, true
	}
	gateways := n.Gateways()
	if f.known == len(f.hops) || f.joined+len(gateways) > len(f.gateways) {
		if f.live {
			return 0, false
		}
		f.hops = enlarge(f.hops, f.known, f.known/2+spareHops)
		f.gateways = enlarge(f.gateways, f.joined, f.joined/2+spareMembers)
	}
	h := hopFound | hop6 | Hop(n.Kind)<<hopKindShift | Hop(len(gateways))<<hopCountShift
	if len(gateways) > 0 {
		h |= Hop(f.joined)
	}
	if len(gateways) > 1 {
		h |= hopGroup
	}
	for _, a := range gateways {
		f.gateways[f.joined] = Addr6Of(a) // no reader looks here before a hop says so
		f.joined++
	}
	i := uint32(f.known)
	f.known++
	f.hops[i] = uint64(h) // nor here before a cell does
	f.index[n] = i
	return i, true
}

// moreNodes makes room, which is possible only as long as no reader holds the array.
func (f *trie6) moreNodes() bool {
	if f.live {
		return false
	}
	f.nodes = enlarge(f.nodes, f.used, f.used/2+spareNodes6)
	return true
}

// ready makes room for what may come while readers hold the trie.
func (f *trie6) ready() {
	if f.used+f.used/8+mostNodes6 > len(f.nodes) {
		f.moreNodes()
	}
	if f.known+f.known/8 >= len(f.hops) {
		f.hops = enlarge(f.hops, f.known, f.known/2+spareHops)
	}
	if f.joined+f.joined/8+MaxGateways > len(f.gateways) {
		f.gateways = enlarge(f.gateways, f.joined, f.joined/2+spareMembers)
	}
	f.live = true
}

// clone returns a copy that is the writer's own.
func (f *trie6) clone() *trie6 {
	c := *f
	c.live = false
	c.root = slices.Clone(f.root)
	c.nodes = enlarge(f.nodes, f.used, len(f.nodes)-f.used)
	c.hops, c.gateways = slices.Clone(f.hops), slices.Clone(f.gateways)
	c.index = maps.Clone(f.index)
	return &c
}

// bytes returns the memory that the trie takes, in bytes.
func (f *trie6) bytes() int {
	const (
		node   = 16 + 8 + nodeLen6*4
		perHop = 8 + 56 // the hop, and its place in index
	)
	return len(f.root)*4 + f.used*node + f.known*perHop + f.joined*16
}

// choose returns the gateway of the group h that flow takes, as a hop of its own.
func (f *trie6) choose(h Hop, flow uint32) Hop {
	first := uint32(h)
	best, most := first, uint64(0)
	for i, m := range f.gateways[first:][:h.count()] {
		if w := weight(flow, m.Hi*0x9e3779b97f4a7c15^m.Lo); i == 0 || w > most {
			best, most = first+uint32(i), w
		}
	}
	return h&(hopFound|hop6|0xff<<hopKindShift) | 1<<hopCountShift | Hop(best)
}
