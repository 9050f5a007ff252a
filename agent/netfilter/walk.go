package netfilter

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Link is an interface, as rules see it.
type Link struct {
	Name  string
	Index int
	Type  uint16 // ARPHRD
	Group uint32
}

// Packet is a packet under way through the hooks of one network namespace. What rules change of it, they change here.
type Packet struct {
	IP      []byte // IPv4, from its header on; address translation and mangling write into it
	In, Out Link   // the zero Link where there is none
	Mark    uint32
	// State is the connection tracker's, in nf_tables' bits (StateNew and its like); 0: not known.
	State uint32
	Reply bool // it goes against the direction of the connection's first packet
	// AddrType says what an address is to the node's routing table: RTN_LOCAL, RTN_UNICAST and so on.
	AddrType func(netip.Addr) (int, error)

	markUnknown, ctMarkUnknown bool
	ctMark                     uint32
	natted                     bool // its destination was rewritten
}

// The states of a connection, as `ct state` has them.
const (
	StateInvalid     = 1
	StateEstablished = 2
	StateNew         = 8
	StateUntracked   = 64
)

// Verdict is what becomes of a packet at a hook.
type Verdict int

// The verdicts. The zero verdict is that it passes, which is what a hook without chains does.
const (
	Pass Verdict = iota
	Drop
	CannotTell
)

// Outcome is a verdict with its reasons.
type Outcome struct {
	Verdict Verdict
	Where   string // the rule or policy that drops it, or might
	Fix     string // what would mend it
	Why     string // for CannotTell: what could not be told
	// Destination and Source are rewritten addresses, and Rewriter names the chain; Masqueraded says that the new source is
	// the outgoing interface's address, Redirected that the new destination is this host itself.
	Destination, Source     netip.Addr
	Masqueraded, Redirected bool
	Rewriter                string
}

// Verdicts as the kernel writes them.
const (
	verdictDrop     = 0
	verdictAccept   = 1
	verdictQueue    = 3
	verdictContinue = -1
	verdictBreak    = -2
	verdictJump     = -3
	verdictGoto     = -4
	verdictReturn   = -5
	verdictOpaque   = -100 // ours: there is a verdict, and it cannot be told which
)

// trackerPriority is where the connection tracker looks at a packet (NF_IP_PRI_CONNTRACK): chains before it see no state.
const trackerPriority = -200

// maxDepth is how deep the kernel lets chains call each other.
const maxDepth = 16

// maxSteps bounds the rules that are evaluated at one hook: chains that call chains can be written to last for ever.
const maxSteps = 1 << 20

// walk is a packet's way through one base chain.
type walk struct {
	rs      *Ruleset
	p       *Packet
	base    *chain
	out     *Outcome
	accepts bool // some rule might have accepted it: nothing that follows is certain
	steps   *int // left
}

// Hook walks the base chains of a hook in the kernel's order.
func (rs *Ruleset) Hook(h Hook, p *Packet) Outcome {
	var out Outcome
	steps := maxSteps
	for _, c := range rs.bases {
		if c.hook != h || !c.sees(h, p) {
			continue
		}
		if c.kind == "nat" && p.State != StateNew {
			continue // only the first packet of a connection is asked about
		}
		w := &walk{rs: rs, p: p, base: c, out: &out, steps: &steps}
		end := w.chain(c, 0, true)
		if end == verdictReturn && c.drop {
			fix := fmt.Sprintf("accept it in that chain, or let all pass: nft 'add chain %s %s %s { policy accept; }'", families[c.family], c.table, c.name)
			end = w.refuse(!w.accepts, c.String()+", whose policy is to drop", fix)
		}
		if end == verdictDrop {
			return out
		}
	}
	rs.doubtLegacy(h, &out)
	return out
}

// Chains counts the base chains of a hook.
func (rs *Ruleset) Chains(h Hook) (n int) {
	for _, c := range rs.bases {
		if c.hook == h {
			n++
		}
	}
	return n
}

func (c *chain) sees(h Hook, p *Packet) bool {
	switch {
	case h == Ingress:
		return slices.Contains(c.devices, p.In.Name)
	case h == Egress:
		return slices.Contains(c.devices, p.Out.Name)
	}
	return c.family != unix.NFPROTO_NETDEV
}

// legacyTables are those of the old iptables with a chain at a hook.
var legacyTables = map[Hook][]string{Prerouting: {"raw", "mangle", "nat"}, Input: {"mangle", "filter", "security"},
	Forward: {"mangle", "filter", "security"}, Output: {"raw", "mangle", "nat", "filter"}, Postrouting: {"mangle", "nat"}}

func (rs *Ruleset) doubtLegacy(h Hook, out *Outcome) {
	for _, t := range rs.legacy {
		if slices.Contains(legacyTables[h], t) && out.Verdict == Pass {
			out.Verdict, out.Where = CannotTell, "table "+t+" of the old iptables"
			out.Why = "iptables-legacy has a table " + t + ", which is not read here"
			out.Fix = "look with `iptables-legacy -t " + t + " -S`, and move its rules to iptables-nft"
		}
	}
}

// refuse notes that the packet is dropped here, or, when that is not certain, that it might be.
func (w *walk) refuse(certain bool, where, fix string) int {
	switch {
	case certain:
		*w.out = Outcome{Verdict: Drop, Where: where, Fix: fix}
		return verdictDrop
	case w.out.Verdict == Pass:
		w.out.Verdict, w.out.Where, w.out.Fix = CannotTell, where, fix
	}
	return verdictReturn
}

// chain follows a chain; here says that the packet certainly comes to it. It returns verdictAccept or verdictDrop, certain
// both, or verdictReturn for what goes on behind it.
func (w *walk) chain(c *chain, depth int, here bool) int {
	if depth > maxDepth {
		return verdictReturn // the kernel would not have taken it
	}
	for i := range c.rules {
		r := &c.rules[i]
		if *w.steps--; *w.steps < 0 {
			w.refuse(false, c.String(), "make the rules simpler")
			w.out.Why, w.accepts = "there are too many rules to follow", true
			return verdictReturn
		}
		e := &evaluation{walk: w, chain: c, sure: true, certain: here && !w.accepts}
		code, target := e.run(r.exprs)
		if code == verdictContinue || code == verdictBreak {
			continue
		}
		where := fmt.Sprintf("%s, rule with handle %d", c, r.handle)
		fix := fmt.Sprintf("nft delete rule %s %s %s handle %d, or accept the packet before it", families[c.family], c.table, c.name, r.handle)
		if !e.sure && w.out.Why == "" {
			w.out.Why = where + ": " + strings.Join(e.unknown, ", ")
		}
		certain := here && !w.accepts && e.sure
		end := verdictReturn
		switch code {
		case verdictDrop:
			end = w.refuse(certain, where, fix)
		case verdictAccept:
			if end = verdictAccept; !certain {
				end, w.accepts = verdictReturn, true
			}
		case verdictReturn:
		case verdictJump, verdictGoto:
			if to := w.rs.chains[chainKey{c.family, c.table, target}]; to != nil {
				end = w.chain(to, depth+1, here && e.sure)
			}
			if code == verdictJump && end == verdictReturn {
				continue
			}
		default: // a program decides, or nobody here knows who
			w.refuse(false, where, fix)
			w.accepts = true
		}
		// With a rule that surely matches, whoever has come here goes no further in this chain.
		if end != verdictReturn || e.sure && code != verdictOpaque {
			return end
		}
		if code == verdictReturn || code == verdictGoto {
			here = false
		}
	}
	return verdictReturn
}
