package fib

import (
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"
)

// Forwarding is the IPv4 table as workers read it: flat arrays of numbers, a trie of strides 16, 8 and 8. A cell is
// either a leaf, which holds the answer for all addresses below it (the index of a [Hop], and the length of the prefix
// that put it there), or leads to a node of 256 more cells. A lookup is one, two or three loads and one for the hop,
// and depends on no other, so that a processor works on several of a batch at once.
//
// A worker asks the [Table] for it once per batch. Small transactions change it under the worker's eyes, one cell at a
// time, in an order that gives every lookup the next hop before the transaction or the one after it, never a third.
// Whole resynchronisations make a new one, and the worker sees them at once with its next batch.
//
// What makes that safe without locks: within one Forwarding a node and a hop stay what they are once a reader may have
// seen them, and are never put to another use. Those that nothing leads to any more are left behind when the table is
// made anew, which it is when it runs out of room.
type Forwarding struct {
	cells []uint32 // the root's, then nodeLen for each node; nodes from used on are free
	hops  []uint64 // of type Hop. hops[0] says that there is no route; those from known on are free

	// The writer's own.
	used  int
	known int
	index map[Hop]uint32 // into hops[1:known]
	live  bool           // readers may see it
	// stored, where a test has set it, is called after each change that a reader may see.
	stored func()
}

// The bits of a cell: whether it is a node's number or a leaf, the prefix' length, the index of the hop. The zero cell
// is a leaf without a route.
const (
	cellNode   = 1 << 31
	cellLength = 25 // shift; 6 bits
	cellHop    = 1<<cellLength - 1
	rootShift  = 16
	rootLen    = 1 << rootShift
	nodeShift  = 8
	nodeLen    = 1 << nodeShift
	// rootNodes: nodes have the numbers from here on, so that a node's number says where in cells it is.
	rootNodes = rootLen / nodeLen

	// mostNodes is what one prefix may need; the spares are what a small table has room for.
	mostNodes  = 2
	spareNodes = 16
	spareHops  = 64

	// maxRoutes is the number of IPv4 routes at which cells can tell every node from the others: at most one for each
	// route below a node of the first level. (There are two hops for each node.)
	maxRoutes = 1<<24 - 1<<17
)

// newForwarding returns an empty table, the writer's own until it is published.
func newForwarding() *Forwarding {
	return &Forwarding{
		cells: make([]uint32, (rootNodes+spareNodes)<<nodeShift),
		hops:  make([]uint64, spareHops),
		used:  rootNodes,
		known: 1,
		index: make(map[Hop]uint32),
	}
}

// Lookup returns the next hop of the longest IPv4 prefix that contains the address a, whose first octet is in the
// highest bits. It does not allocate.
func (f *Forwarding) Lookup(a uint32) Hop {
	return Hop(atomic.LoadUint64(&f.hops[f.leaf(a)&cellHop]))
}

// leaf returns the leaf for the address a.
func (f *Forwarding) leaf(a uint32) uint32 {
	c := atomic.LoadUint32(&f.cells[a>>rootShift])
	if c >= cellNode {
		c = atomic.LoadUint32(&f.cells[c<<nodeShift|a>>nodeShift&(nodeLen-1)])
		if c >= cellNode {
			c = atomic.LoadUint32(&f.cells[c<<nodeShift|a&(nodeLen-1)])
		}
	}
	return c
}

// stride is how many lookups LookupBatch does at once: enough for a processor to have its hands full.
const stride = 64

// LookupBatch looks up every address of dst and writes the answers to the front of hops, which is at least as long. It
// is several times as fast as Lookup, because it lets the processor wait for many cells at once: it takes all addresses
// one step, then all of them the next, so that what waits for memory is a load and a store and nothing that follows,
// and it does not branch on the first step, which would be guessed wrong too often.
func (f *Forwarding) LookupBatch(dst []uint32, hops []Hop) {
	for len(dst) > stride {
		f.lookups(dst[:stride], hops[:stride])
		dst, hops = dst[stride:], hops[stride:]
	}
	f.lookups(dst, hops[:len(dst)])
}

// lookups is LookupBatch for at most stride addresses.
func (f *Forwarding) lookups(dst []uint32, hops []Hop) {
	var step [stride]uint32 // the index of each address' next cell, then the cell
	cells := f.cells
	for i, a := range dst {
		c := atomic.LoadUint32(&cells[a>>rootShift])
		// A leaf's next cell is the leaf once more.
		node := uint32(int32(c) >> 31)
		step[i%stride] = (c<<nodeShift|a>>nodeShift&(nodeLen-1))&node | a>>rootShift&^node
	}
	for i := range dst {
		step[i%stride] = atomic.LoadUint32(&cells[step[i%stride]])
	}
	for i, a := range dst {
		c := step[i%stride]
		if c >= cellNode {
			// Few prefixes are longer than 24 bits. It may also be a leaf of the root that has become a node.
			c = f.leaf(a)
		}
		hops[i] = Hop(atomic.LoadUint64(&f.hops[c&cellHop]))
	}
}

// set writes one cell: at once, where a reader may see it.
func (f *Forwarding) set(cell *uint32, value uint32) {
	if !f.live {
		*cell = value
		return
	}
	atomic.StoreUint32(cell, value)
	if f.stored != nil {
		f.stored()
	}
}

// node returns the cells of the node that cell leads to.
func (f *Forwarding) node(cell uint32) []uint32 {
	i := int(cell&^cellNode) << nodeShift
	return f.cells[i : i+nodeLen]
}

// span returns the cells that p covers, on the level where it ends, and makes the nodes on the way there; false when
// there is no room for them.
func (f *Forwarding) span(p netip.Prefix) ([]uint32, bool) {
	// Room first: making it moves the cells.
	if f.used+mostNodes > len(f.cells)>>nodeShift && !f.moreNodes() {
		return nil, false
	}
	a, bits := number(p.Addr()), p.Bits()
	cells, at, left := f.cells[:rootLen], a>>rootShift, 16-bits
	for shift := 8; left < 0; shift -= 8 {
		cell := &cells[at]
		if *cell < cellNode {
			f.split(cell)
		}
		cells, at, left = f.node(*cell), a>>shift&(nodeLen-1), left+8
	}
	return cells[at : at+1<<left], true
}

// split turns a leaf into a node that says the same.
func (f *Forwarding) split(leaf *uint32) {
	n := uint32(cellNode | f.used)
	f.used++
	cells := f.node(n)
	for i := range cells {
		cells[i] = *leaf // no reader looks here before the leaf says so
	}
	f.set(leaf, n)
}

// paint gives value to the leaves at or below cells whose prefix has a length from least to most.
func (f *Forwarding) paint(cells []uint32, least, most int, value uint32) {
	for i, c := range cells {
		if c >= cellNode {
			f.paint(f.node(c), least, most, value)
		} else if n := int(c >> cellLength); n >= least && n <= most {
			f.set(&cells[i], value)
		}
	}
}

// insert adds or replaces the route for p; false when there is no room, and then nothing that a reader can tell has
// changed.
func (f *Forwarding) insert(p netip.Prefix, h Hop) bool {
	i, ok := f.hop(h)
	if !ok {
		return false
	}
	cells, ok := f.span(p)
	if !ok {
		return false
	}
	f.paint(cells, 0, p.Bits(), leaf(p.Bits(), i))
	return true
}

// remove takes the route for p away, below which parent, the next shorter one with the hop h, comes to light; the
// zero prefix when there is none.
func (f *Forwarding) remove(p, parent netip.Prefix, h Hop) bool {
	var value uint32
	if parent.IsValid() {
		i, ok := f.hop(h)
		if !ok {
			return false
		}
		value = leaf(parent.Bits(), i)
	}
	cells, ok := f.span(p)
	if !ok {
		return false
	}
	f.paint(cells, p.Bits(), p.Bits(), value)
	return true
}

func leaf(bits int, hop uint32) uint32 { return uint32(bits)<<cellLength | hop }

// hop returns the index of h, which it adds to hops where it is new.
func (f *Forwarding) hop(h Hop) (uint32, bool) {
	if i, ok := f.index[h]; ok {
		return i, true
	}
	if f.known == len(f.hops) && !f.moreHops() {
		return 0, false
	}
	i := uint32(f.known)
	f.known++
	f.hops[i] = uint64(h) // no reader looks here before a cell says so
	f.index[h] = i
	return i, true
}

// moreNodes and moreHops make room, which is possible only as long as no reader holds the arrays.
func (f *Forwarding) moreNodes() bool {
	if f.live {
		return false
	}
	f.cells = enlarge(f.cells, f.used<<nodeShift, (f.used/2+spareNodes)<<nodeShift)
	return true
}

func (f *Forwarding) moreHops() bool {
	if f.live {
		return false
	}
	f.hops = enlarge(f.hops, f.known, f.known/2+spareHops)
	return true
}

// enlarge returns the first used numbers of s with room for so many more behind them, in memory that is not touched
// before it is used.
func enlarge[T uint32 | uint64](s []T, used, more int) []T {
	larger := make([]T, used+more)
	copy(larger, s[:used])
	return larger
}

// publish makes room for what may come, and hands the table to the readers.
func (f *Forwarding) publish(to *atomic.Pointer[Forwarding]) {
	if f.used+f.used/8+mostNodes > len(f.cells)>>nodeShift {
		f.moreNodes()
	}
	if f.known+f.known/8 >= len(f.hops) {
		f.moreHops()
	}
	f.live = true
	to.Store(f)
}

// clone returns a copy that is the writer's own.
func (f *Forwarding) clone() *Forwarding {
	c := *f
	c.live = false
	c.cells = enlarge(f.cells, f.used<<nodeShift, len(f.cells)-f.used<<nodeShift)
	c.hops = slices.Clone(f.hops)
	c.index = maps.Clone(f.index)
	return &c
}

// Bytes returns the memory that the table takes, in bytes.
func (f *Forwarding) Bytes() int {
	const perHop = 8 + 16 // the hop, and its place in index
	return f.used<<nodeShift*4 + f.known*perHop
}
