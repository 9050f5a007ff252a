package fib

import (
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"
)

// trie4 is the IPv4 table as workers read it: flat arrays of numbers, a trie of strides 16, 8 and 8. A cell is either a
// leaf, which holds the answer for all addresses below it (the index of a [Hop], and the length of the prefix that put
// it there), or leads to a node of 256 more cells. A lookup is one, two or three loads and one for the hop, and depends on no other, so that a processor
// works on several of a batch at once.
//
// What makes changes under readers' eyes safe without locks: within one trie a node and a hop stay what they are once a
// reader may have seen them, and are never put to another use. Those that nothing leads to any more are left behind
// when the trie is made anew, which it is when it runs out of room.
type trie4 struct {
	cells   []uint32 // the root's, then those of the nodes; units from used on are free
	hops    []uint64 // of type Hop. hops[0] says that there is no route; those from known on are free
	members []uint32 // the gateways of groups, one group after the other; those from joined on are free

	// The writer's own.
	used   int // in units of unitLen cells
	known  int
	joined int
	index  map[Hop]uint32     // of hops that are no group into hops[1:known]
	groups map[NextHop]uint32 // of those that are
	named  *groups            // what the numbers of groups stand for
	live   bool               // readers may see it
	// stored, where a test has set it, is called after each change that a reader may see.
	stored func()
}

// The bits of a cell: whether it is a node's number or a leaf, the prefix' length, the index of the hop. The zero cell
// is a leaf without a route.
const (
	cellNode   = 1 << 31
	cellLength = 25 // shift; 6 bits
	cellHop    = 1<<cellLength - 1

	rootBits  = 16
	rootShift = 32 - rootBits
	rootLen   = 1 << rootBits
	// A node's number says where in cells it is, in units of a node of the second level.
	unitBits = 24 - rootBits
	unitLen  = 1 << unitBits
	lowBits  = 8
	lowLen   = 1 << lowBits
	lowUnits = lowLen / unitLen
	// rootUnits: nodes have the numbers from here on.
	rootUnits = rootLen / unitLen

	// mostUnits is what one prefix may need; the spares are what a small table has room for.
	mostUnits    = 1 + lowUnits
	spareUnits   = 64 * mostUnits
	spareHops    = 64
	spareMembers = 4 * MaxGateways

	// maxRoutes is the number of routes of one family up to which cells can tell every node and every hop from the
	// others, whatever the routes are and whatever is left behind.
	maxRoutes = 1 << 22
)

// newTrie4 returns an empty trie, the writer's own until it is live.
func newTrie4(named *groups) *trie4 {
	return &trie4{
		cells:   make([]uint32, (rootUnits+spareUnits)<<unitBits),
		hops:    make([]uint64, spareHops),
		members: make([]uint32, spareMembers),
		used:    rootUnits,
		known:   1,
		index:   make(map[Hop]uint32),
		groups:  make(map[NextHop]uint32),
		named:   named,
	}
}

// lookup returns the next hop of the longest prefix that contains the address a.
func (f *trie4) lookup(a uint32) Hop {
	return Hop(atomic.LoadUint64(&f.hops[f.leaf(a)&cellHop]))
}

// leaf returns the leaf for the address a.
func (f *trie4) leaf(a uint32) uint32 {
	c := atomic.LoadUint32(&f.cells[a>>rootShift])
	if c >= cellNode {
		c = atomic.LoadUint32(&f.cells[c<<unitBits|a>>lowBits&(unitLen-1)])
		if c >= cellNode {
			c = atomic.LoadUint32(&f.cells[c<<unitBits+a&(lowLen-1)])
		}
	}
	return c
}

// stride is how many lookups a batch does at once: enough for a processor to have its hands full.
const stride = 64

// lookups looks up at most stride addresses. It is several times as fast as lookup, because it lets the processor wait
// for many cells at once: it takes all addresses one step, then all of them the next, so that what waits for memory is
// a load and a store and nothing that follows, and it does not branch on the first step, which would be guessed wrong
// too often.
func (f *trie4) lookups(dst []uint32, hops []Hop) {
	var step [stride]uint32 // the index of each address' next cell, then the cell
	// These, and the lengths they tell the compiler, spare some of the checks of indexes.
	cells, root, answers, dst := f.cells, (*[rootLen]uint32)(f.cells), f.hops, dst[:min(len(dst), stride)]
	for i, a := range dst {
		c := atomic.LoadUint32(&root[a>>rootShift])
		// A leaf's next cell is the leaf once more.
		node := uint32(int32(c) >> 31)
		step[i] = (c<<unitBits|a>>lowBits&(unitLen-1))&node | a>>rootShift&^node
	}
	for i := range dst {
		step[i] = atomic.LoadUint32(&cells[step[i]])
	}
	hops = hops[:len(dst)]
	for i, a := range dst {
		c := step[i]
		if c >= cellNode {
			// Few prefixes are longer than 24 bits. It may also be a leaf of the root that has become a node.
			c = f.leaf(a)
		}
		hops[i] = Hop(atomic.LoadUint64(&answers[c&cellHop]))
	}
}

// set writes one cell: at once, where a reader may see it.
func (f *trie4) set(cell *uint32, value uint32) {
	if !f.live {
		*cell = value
		return
	}
	atomic.StoreUint32(cell, value)
	if f.stored != nil {
		f.stored()
	}
}

// span returns the cells that p covers, on the level where it ends, and makes the nodes on the way there; false when
// there is no room for them.
func (f *trie4) span(p netip.Prefix) ([]uint32, bool) {
	// Room first: making it moves the cells.
	if f.used+mostUnits > len(f.cells)>>unitBits && !f.moreNodes() {
		return nil, false
	}
	a, bits := number(p.Addr()), p.Bits()
	cells, at, left := f.cells[:rootLen], a>>rootShift, rootBits-bits
	if left < 0 {
		cells, at, left = f.node(&cells[at], 1), a>>lowBits&(unitLen-1), left+unitBits
	}
	if left < 0 {
		cells, at, left = f.node(&cells[at], lowUnits), a&(lowLen-1), left+lowBits
	}
	return cells[at : at+1<<left], true
}

// node returns the cells of the node, of so many units, that cell leads to. A leaf becomes a node that says the same.
func (f *trie4) node(cell *uint32, units int) []uint32 {
	n := int(*cell &^ cellNode)
	isNew := *cell < cellNode
	if isNew {
		n = f.used
		f.used += units
	}
	cells := f.cells[n<<unitBits:][:units<<unitBits]
	if isNew {
		for i := range cells {
			cells[i] = *cell // no reader looks here before the cell says so
		}
		f.set(cell, uint32(cellNode|n))
	}
	return cells
}

// paint gives value to the leaves at or below cells, which are on a level (0 is the root's), whose prefix has a length
// from least to most.
func (f *trie4) paint(cells []uint32, level, least, most int, value uint32) {
	for i, c := range cells {
		if c >= cellNode {
			units := 1
			if level > 0 {
				units = lowUnits
			}
			f.paint(f.node(&cells[i], units), level+1, least, most, value)
		} else if n := int(c >> cellLength); n >= least && n <= most {
			f.set(&cells[i], value)
		}
	}
}

// levelOf returns the level on which prefixes of so many bits end.
func levelOf(bits int) int {
	switch {
	case bits <= rootBits:
		return 0
	case bits <= rootBits+unitBits:
		return 1
	}
	return 2
}

// insert adds or replaces the route for p; false when there is no room, and then nothing that a reader can tell has
// changed.
func (f *trie4) insert(p netip.Prefix, h Hop) bool {
	i, ok := f.hop(h)
	if !ok {
		return false
	}
	cells, ok := f.span(p)
	if !ok {
		return false
	}
	f.paint(cells, levelOf(p.Bits()), 0, p.Bits(), leaf(p.Bits(), i))
	return true
}

// remove takes the route for p away, below which parent, the next shorter one with the hop h, comes to light; the
// zero prefix when there is none.
func (f *trie4) remove(p, parent netip.Prefix, h Hop) bool {
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
	f.paint(cells, levelOf(p.Bits()), p.Bits(), p.Bits(), value)
	return true
}

func leaf(bits int, hop uint32) uint32 { return uint32(bits)<<cellLength | hop }

// hop returns the index of h, as the exact table has it, and adds it to hops where it is new; false when there is no
// room.
func (f *trie4) hop(h Hop) (uint32, bool) {
	if h.IsGroup() {
		return f.group(f.named.all[uint32(h)])
	}
	if i, ok := f.index[h]; ok {
		return i, true
	}
	i, ok := f.newHop(h)
	if ok {
		f.index[h] = i
	}
	return i, ok
}

// group is hop for a next hop with several gateways. It goes by what it is and not by its number, which can come to
// mean another.
func (f *trie4) group(n NextHop) (uint32, bool) {
	if i, ok := f.groups[n]; ok {
		return i, true
	}
	gateways := n.Gateways()
	if f.joined+len(gateways) > len(f.members) {
		if f.live {
			return 0, false
		}
		f.members = enlarge(f.members, f.joined, f.joined/2+spareMembers)
	}
	i, ok := f.newHop(hopFound | hopGroup | Hop(n.Kind)<<hopKindShift | Hop(len(gateways))<<hopCountShift | Hop(f.joined))
	if !ok {
		return 0, false
	}
	for _, a := range gateways {
		f.members[f.joined] = number(a) // no reader looks here before a hop says so
		f.joined++
	}
	f.groups[n] = i
	return i, true
}

func (f *trie4) newHop(h Hop) (uint32, bool) {
	if f.known == len(f.hops) {
		if f.live {
			return 0, false
		}
		f.hops = enlarge(f.hops, f.known, f.known/2+spareHops)
	}
	i := uint32(f.known)
	f.known++
	f.hops[i] = uint64(h) // no reader looks here before a cell says so
	return i, true
}

// moreNodes makes room, which is possible only as long as no reader holds the array.
func (f *trie4) moreNodes() bool {
	if f.live {
		return false
	}
	f.cells = enlarge(f.cells, f.used<<unitBits, (f.used/2+spareUnits)<<unitBits)
	return true
}

// enlarge returns the first used elements of s with room for so many more behind them, in memory that is not touched
// before it is used.
func enlarge[T any](s []T, used, more int) []T {
	larger := make([]T, used+more)
	copy(larger, s[:used])
	return larger
}

// ready makes room for what may come while readers hold the trie.
func (f *trie4) ready() {
	if f.used+(f.used-rootUnits)/8+mostUnits > len(f.cells)>>unitBits {
		f.moreNodes()
	}
	if f.known+f.known/8 >= len(f.hops) {
		f.hops = enlarge(f.hops, f.known, f.known/2+spareHops)
	}
	if f.joined+f.joined/8+MaxGateways > len(f.members) {
		f.members = enlarge(f.members, f.joined, f.joined/2+spareMembers)
	}
	f.live = true
}

// clone returns a copy that is the writer's own.
func (f *trie4) clone() *trie4 {
	c := *f
	c.live = false
	c.cells = enlarge(f.cells, f.used<<unitBits, len(f.cells)-f.used<<unitBits)
	c.hops, c.members = slices.Clone(f.hops), slices.Clone(f.members)
	c.index, c.groups = maps.Clone(f.index), maps.Clone(f.groups)
	return &c
}

// bytes returns the memory that the trie takes, in bytes.
func (f *trie4) bytes() int {
	const perHop = 8 + 16 // the hop, and its place in index
	return f.used<<unitBits*4 + f.known*perHop + f.joined*4
}

// choose returns the gateway of the group h that flow takes, as a hop of its own.
func (f *trie4) choose(h Hop, flow uint32) Hop {
	members := f.members[uint32(h):][:h.count()]
	best, most := members[0], weight(flow, uint64(members[0]))
	for _, m := range members[1:] {
		if w := weight(flow, uint64(m)); w > most {
			best, most = m, w
		}
	}
	return h&(hopFound|0xff<<hopKindShift) | Hop(best)
}
