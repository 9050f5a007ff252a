package server

import (
	"fmt"
	"net/netip"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// Names in nftables: table "inet margay".
const (
	fwTable      = "margay"
	fwPodSet     = "pod_addresses"
	fwPodSet6    = "pod_addresses6"
	fwNATSet     = "nat_pools"
	fwNATSet6    = "nat_pools6"
	fwAllSet     = "pools"
	fwAllSet6    = "pools6"
	fwSpoofed    = "spoofed"
	fwIPv6       = "pod_ipv6"
	fwDiscovery  = "pod_ipv6_discovery"
	tunnelDevice = "vr0"
	hostPrefix   = "cali"
	ifNameSize   = 16
	fwFamily     = nftables.TableFamilyINet
	fwPodChain   = "from_pod"
	fwPreChain   = "prerouting"
	fwPostChain  = "postrouting"
	protocolIPv4 = 2  // NFPROTO_IPV4
	protocolIPv6 = 10 // NFPROTO_IPV6

	protocolICMPv6 = 58
)

// podKey is one element of the anti-spoofing set: this interface may send from this address.
type podKey struct {
	iface string
	addr  netip.Addr
}

// firewall owns the table. What it wants is kept in memory; the kernel is brought there by small batches, and when
// one fails (someone flushed the ruleset) by writing the whole table anew in one transaction.
type firewall struct {
	mu      sync.Mutex // held over every exchange with the kernel
	conn    *nftables.Conn
	pods    map[podKey]struct{}
	nat     []netip.Prefix
	all     []netip.Prefix
	poolsOK bool // SetPools was called: until then a restarted agent keeps the pools it finds in the kernel

	table            *nftables.Table
	families         [2]fwFamilySets // IPv4, IPv6
	spoofers         *nftables.Set
	pre, post, onPod *nftables.Chain

	wait  sync.Mutex
	batch *fwBatch // collecting, not yet sent
}

// fwFamilySets is what the table has for one address family.
type fwFamilySets struct {
	protocol       byte   // NFPROTO
	source, dest   uint32 // offsets in the header
	size           uint32 // of an address, bytes
	pods, nat, all *nftables.Set
	six            bool
}

// setsOf are the sets of an address's family.
func (f *firewall) setsOf(a netip.Addr) *fwFamilySets {
	if a.Is6() {
		return &f.families[1]
	}
	return &f.families[0]
}

// fwBatch gathers the changes of callers that arrive while another batch is on its way: a burst of pods costs a few
// transactions, not one each.
type fwBatch struct {
	add, del []podKey
	sent     bool
	err      error
}

func newFirewall() (*firewall, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	f := &firewall{conn: conn, pods: map[podKey]struct{}{}}
	f.table = &nftables.Table{Name: fwTable, Family: fwFamily}
	pods := func(name string, addr nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: f.table, Name: name, KeyType: nftables.MustConcatSetType(nftables.TypeIFName, addr)}
	}
	pools := func(name string, addr nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: f.table, Name: name, KeyType: addr, Interval: true}
	}
	four, six := nftables.TypeIPAddr, nftables.TypeIP6Addr
	f.families = [2]fwFamilySets{
		{protocolIPv4, 12, 16, 4, pods(fwPodSet, four), pools(fwNATSet, four), pools(fwAllSet, four), false},
		{protocolIPv6, 8, 24, 16, pods(fwPodSet6, six), pools(fwNATSet6, six), pools(fwAllSet6, six), true},
	}
	f.spoofers = f.spoofersSet()
	f.onPod = &nftables.Chain{Table: f.table, Name: fwPodChain}
	accept := nftables.ChainPolicyAccept
	f.pre = &nftables.Chain{Table: f.table, Name: fwPreChain, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw, Policy: &accept}
	f.post = &nftables.Chain{Table: f.table, Name: fwPostChain, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource, Policy: &accept}
	return f, nil
}

// change adds and removes pods' addresses and returns when the kernel has them.
func (f *firewall) change(add, del []podKey) error {
	f.wait.Lock()
	b := f.batch
	if b == nil {
		b = &fwBatch{}
		f.batch = b
	}
	b.add, b.del = append(b.add, add...), append(b.del, del...)
	f.wait.Unlock()

	f.mu.Lock()
	defer f.mu.Unlock()
	if b.sent {
		return b.err
	}
	f.wait.Lock()
	f.batch = nil // later callers start the next one
	f.wait.Unlock()
	b.sent, b.err = true, f.send(b)
	return b.err
}

func (f *firewall) send(b *fwBatch) error {
	add, del := map[*nftables.Set][]nftables.SetElement{}, map[*nftables.Set][]nftables.SetElement{}
	for _, k := range b.del {
		if _, ok := f.pods[k]; ok {
			delete(f.pods, k)
			set := f.setsOf(k.addr).pods
			del[set] = append(del[set], nftables.SetElement{Key: k.bytes()})
		}
	}
	for _, k := range b.add {
		if _, ok := f.pods[k]; !ok {
			f.pods[k] = struct{}{}
			set := f.setsOf(k.addr).pods
			add[set] = append(add[set], nftables.SetElement{Key: k.bytes()})
		}
	}
	if len(del)+len(add) == 0 {
		return nil
	}
	for set, elements := range del {
		if err := f.conn.SetDeleteElements(set, elements); err != nil {
			return fmt.Errorf("nftables: %w", err)
		}
	}
	for set, elements := range add {
		if err := f.conn.SetAddElements(set, elements); err != nil {
			return fmt.Errorf("nftables: %w", err)
		}
	}
	if err := f.conn.Flush(); err != nil {
		return f.rebuild()
	}
	return nil
}

// setPods replaces all pods' addresses and writes the whole table.
func (f *firewall) setPods(keys []podKey) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.pods)
	for _, k := range keys {
		f.pods[k] = struct{}{}
	}
	return f.rebuild()
}

// setPools replaces what is masqueraded (nat) and what counts as inside the cluster (all).
func (f *firewall) setPools(nat, all []netip.Prefix) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nat, f.all, f.poolsOK = nat, all, true
	return f.rebuild()
}

// ensure writes the table again when someone has removed it.
func (f *firewall) ensure() (repaired bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.conn.ListTableOfFamily(fwTable, fwFamily); err == nil {
		return false, nil
	}
	return true, f.rebuild()
}

// rebuild writes the table in one transaction: readers of packets see the old rules or the new, never none. The
// counters live on. A table of another shape, left by another release, is replaced instead.
func (f *firewall) rebuild() error {
	if f.write(false) == nil {
		return nil
	}
	if err := f.write(true); err != nil {
		return fmt.Errorf("nftables: table inet %s: %w (needs NET_ADMIN and a kernel of 5.2 or later with nf_tables and nft_masq)", fwTable, err)
	}
	return nil
}

func (f *firewall) write(replace bool) error {
	c := f.conn
	c.AddTable(f.table)
	if replace {
		c.DelTable(f.table)
		c.AddTable(f.table)
	}
	for _, ch := range []*nftables.Chain{f.onPod, f.pre, f.post} {
		c.AddChain(ch)
		c.FlushChain(ch)
	}
	for _, name := range []string{fwSpoofed, fwIPv6, fwDiscovery} {
		c.AddObj(&nftables.NamedObj{Table: f.table, Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
	}
	type content struct {
		set      *nftables.Set
		elements []nftables.SetElement
		keep     bool
	}
	var sets []content
	for i := range f.families {
		fam := &f.families[i]
		var pods []nftables.SetElement
		for k := range f.pods {
			if f.setsOf(k.addr) == fam {
				pods = append(pods, nftables.SetElement{Key: k.bytes()})
			}
		}
		sets = append(sets, content{fam.pods, pods, false}, content{fam.nat, intervals(merge(f.nat, fam.six)), !f.poolsOK},
			content{fam.all, intervals(merge(f.all, fam.six)), !f.poolsOK})
	}
	sets = append(sets, content{f.spoofers, nil, true})
	for _, s := range sets {
		if err := c.AddSet(s.set, nil); err != nil {
			return err
		}
		if s.keep {
			continue
		}
		c.FlushSet(s.set)
		if len(s.elements) == 0 {
			continue
		}
		if err := c.SetAddElements(s.set, s.elements); err != nil {
			return err
		}
	}
	f.addRules()
	return c.Flush()
}

func (k podKey) bytes() []byte {
	b := make([]byte, ifNameSize, ifNameSize+16)
	copy(b[:ifNameSize-1], k.iface)
	return append(b, k.addr.AsSlice()...)
}

// intervals encodes ranges as nftables wants them: each start, and the first address after it marked as an end. A
// range that reaches the last address has no end.
func intervals(ranges []addrRange) []nftables.SetElement {
	var out []nftables.SetElement
	for _, r := range ranges {
		out = append(out, nftables.SetElement{Key: r.first.AsSlice()})
		if end := r.last.Next(); end.IsValid() {
			out = append(out, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return out
}

// Counter is one named counter of the firewall.
type Counter struct {
	Name           string
	Packets, Bytes uint64
}

func (f *firewall) counters() ([]Counter, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	objs, err := f.conn.GetNamedObjects(f.table)
	if err != nil {
		return nil, fmt.Errorf("nftables: read counters: %w", err)
	}
	var out []Counter
	for _, o := range objs {
		n, ok := o.(*nftables.NamedObj)
		if !ok {
			continue
		}
		if c, ok := n.Obj.(*expr.Counter); ok {
			out = append(out, Counter{Name: n.Name, Packets: c.Packets, Bytes: c.Bytes})
		}
	}
	return out, nil
}

// rule fragments; the registers are the 16-byte ones, so that interface name and address lie side by side in 1 and 2.

func loadMeta(key expr.MetaKey) expr.Any { return &expr.Meta{Key: key, Register: 1} }

func compare(op expr.CmpOp, data []byte) expr.Any {
	return &expr.Cmp{Op: op, Register: 1, Data: data}
}

func loadAddr(offset, size, register uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}
}

func isProtocol(p byte) []expr.Any {
	return []expr.Any{loadMeta(expr.MetaKeyNFPROTO), compare(expr.CmpOpEq, []byte{p})}
}

func ifName(name string) []byte {
	b := make([]byte, ifNameSize)
	copy(b, name)
	return b
}

func countAndDrop(counter string) []expr.Any {
	return []expr.Any{&expr.Objref{Type: int(nftables.ObjTypeCounter), Name: counter}, &expr.Verdict{Kind: expr.VerdictDrop}}
}

// addRules queues the rules. As nft shows them:
//
//	prerouting:  iifname "cali*" jump from_pod
//	from_pod:    meta nfproto ipv4 iifname . ip saddr @pod_addresses return
//	             meta nfproto ipv6 iifname . ip6 saddr @pod_addresses6 return
//	             meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 131-133 counter name "pod_ipv6_discovery" drop
//	             … 135-136 and 143 likewise
//	             meta nfproto ipv6 counter name "pod_ipv6" drop
//	             meta nfproto ipv4 update @spoofers { iifname . ip saddr . ip daddr counter }
//	             counter name "spoofed" drop
//	postrouting: ip saddr @nat_pools ip daddr != @pools oifname != "cali*" oifname != "vr0" masquerade
//	             ip6 saddr @nat_pools6 ip6 daddr != @pools6 oifname != "cali*" oifname != "vr0" masquerade
//
// What pods send of IPv6 under another address is mostly their kernel's: group reports, router solicitations and neighbour
// discovery under link-local ones, of which nothing here needs any. That is counted apart, for who looks for drops to leave out.
func (f *firewall) addRules() {
	add := func(ch *nftables.Chain, parts ...[]expr.Any) {
		var exprs []expr.Any
		for _, p := range parts {
			exprs = append(exprs, p...)
		}
		f.conn.AddRule(&nftables.Rule{Table: f.table, Chain: ch, Exprs: exprs})
	}
	lookup := func(s *nftables.Set, invert bool) expr.Any {
		return &expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID, Invert: invert}
	}
	add(f.pre, []expr.Any{loadMeta(expr.MetaKeyIIFNAME), compare(expr.CmpOpEq, []byte(hostPrefix)),
		&expr.Verdict{Kind: expr.VerdictJump, Chain: fwPodChain}})
	for i := range f.families {
		fam := &f.families[i]
		add(f.onPod, isProtocol(fam.protocol), []expr.Any{loadMeta(expr.MetaKeyIIFNAME), loadAddr(fam.source, fam.size, 2),
			lookup(fam.pods, false), &expr.Verdict{Kind: expr.VerdictReturn}})
		add(f.post, isProtocol(fam.protocol), []expr.Any{
			loadAddr(fam.source, fam.size, 1), lookup(fam.nat, false),
			loadAddr(fam.dest, fam.size, 1), lookup(fam.all, true),
			loadMeta(expr.MetaKeyOIFNAME), compare(expr.CmpOpNeq, []byte(hostPrefix)),
			loadMeta(expr.MetaKeyOIFNAME), compare(expr.CmpOpNeq, ifName(tunnelDevice)),
			&expr.Masq{}})
	}
	for _, types := range [][2]byte{{131, 133}, {135, 136}, {143, 143}} { // RFC 4861, 2710, 3810; no advertisements of routers
		add(f.onPod, isProtocol(protocolIPv6), []expr.Any{loadMeta(expr.MetaKeyL4PROTO), compare(expr.CmpOpEq, []byte{protocolICMPv6}),
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Len: 1},
			&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: types[:1], ToData: types[1:]}}, countAndDrop(fwDiscovery))
	}
	add(f.onPod, isProtocol(protocolIPv6), countAndDrop(fwIPv6))
	add(f.onPod, isProtocol(protocolIPv4), f.noteSpoofer())
	add(f.onPod, countAndDrop(fwSpoofed))
}
