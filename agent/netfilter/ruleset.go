// Package netfilter says what the packet filters in force would do with a packet that nobody has sent.
//
// Load reads the nftables of a network namespace (iptables-nft's are among them) out of the kernel, and Ruleset.Hook walks the
// base chains of one hook with a packet as nf_tables does. Every test of a rule comes out as yes, no or cannot tell, and so
// does the whole: an outcome is only certain where no packet with these headers could fare otherwise. What the package does
// not know, an expression of a newer kernel say, is "cannot tell", never "does not match".
//
// ruleset.go reads and decodes, walk.go follows chains, expr.go evaluates expressions, compat.go those of iptables' own,
// sets.go looks up.
package netfilter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"margay/internal/dump"
)

// Hook is a place on a packet's way at which chains are called.
type Hook uint32

// The hooks of IPv4. Ingress and Egress are an interface's.
const (
	Prerouting  Hook = unix.NF_INET_PRE_ROUTING
	Input       Hook = unix.NF_INET_LOCAL_IN
	Forward     Hook = unix.NF_INET_FORWARD
	Output      Hook = unix.NF_INET_LOCAL_OUT
	Postrouting Hook = unix.NF_INET_POST_ROUTING
	Ingress     Hook = 100
	Egress      Hook = 101
)

var hookNames = map[Hook]string{Prerouting: "prerouting", Input: "input", Forward: "forward", Output: "output",
	Postrouting: "postrouting", Ingress: "ingress", Egress: "egress"}

// String names the hook as nft does.
func (h Hook) String() string { return hookNames[h] }

// The families whose chains see IPv4 packets, with nft's names.
var families = map[byte]string{unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_NETDEV: "netdev"}

// Ruleset is what a network namespace had in its tables when it was read. It is not safe for concurrent use, and its sets are
// read when they are needed: by a thread that is in that namespace.
type Ruleset struct {
	bases  []*chain // in the order in which the kernel calls them
	chains map[chainKey]*chain
	sets   map[chainKey]*set
	legacy []string // tables of the old iptables that hold something
	load   func(*set) error
}

type chainKey struct {
	family      byte
	table, name string
}

type chain struct {
	chainKey
	base     bool
	hook     Hook
	priority int32
	kind     string // filter, nat, route
	devices  []string
	drop     bool // the policy
	rules    []rule
}

func (c *chain) String() string {
	return fmt.Sprintf("chain %s of nftables' table %s %s", c.name, families[c.family], c.table)
}

type rule struct {
	handle uint64
	exprs  []expression
}

// expression is one step of a rule, as the kernel gives it.
type expression struct {
	name  string
	attrs attributes
}

// attributes are netlink's, by their type.
type attributes map[uint16][]byte

// split returns the attributes in b. The library reads each up to the next multiple of four, as far as the last need not go.
func split(b []byte) ([]syscall.NetlinkRouteAttr, error) {
	return nl.ParseRouteAttr(append(slices.Clip(b), make([]byte, -len(b)&3)...))
}

func parse(b []byte) (attributes, error) {
	list, err := split(b)
	if err != nil {
		return nil, err
	}
	a := make(attributes, len(list))
	for _, at := range list {
		a[at.Attr.Type&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)] = at.Value
	}
	return a, nil
}

func (a attributes) has(kind uint16) bool { _, ok := a[kind]; return ok }

// u32 reads a number in network byte order; 0 where there is none.
func (a attributes) u32(kind uint16) uint32 {
	if b := a[kind]; len(b) >= 4 {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (a attributes) text(kind uint16) string { return strings.TrimRight(string(a[kind]), "\x00") }

// nested parses an attribute that holds others.
func (a attributes) nested(kind uint16) attributes {
	n, err := parse(a[kind])
	if err != nil {
		return nil
	}
	return n
}

// list returns the elements of an attribute that is a list.
func list(b []byte) ([][]byte, error) {
	elements, err := split(b)
	if err != nil {
		return nil, err
	}
	out := make([][]byte, 0, len(elements))
	for _, e := range elements {
		out = append(out, e.Value)
	}
	return out, nil
}

// parseList is list for elements that have attributes of their own.
func parseList(b []byte) ([]attributes, error) {
	elements, err := list(b)
	if err != nil {
		return nil, err
	}
	out := make([]attributes, 0, len(elements))
	for _, e := range elements {
		a, err := parse(e)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

const headerLen = 4 // of struct nfgenmsg, bytes

// inetIngress is NF_INET_INGRESS: what table inet calls the ingress of an interface.
const inetIngress = 5

const hookDevices = 4 // NFTA_HOOK_DEVS

// ask asks nf_tables for all of something. attrs narrows it.
func ask(message int, family byte, attrs ...*nl.RtAttr) ([][]byte, error) {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|message, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: unix.NFNETLINK_V0})
	for _, a := range attrs {
		req.AddData(a)
	}
	return dump.Whole(func() ([][]byte, error) { return req.Execute(unix.NETLINK_NETFILTER, 0) })
}

// Load reads the rules of the network namespace that the calling thread is in. skip names tables ("inet margay") to leave out.
// It needs NET_ADMIN.
func Load(skip ...string) (*Ruleset, error) {
	rs := &Ruleset{chains: map[chainKey]*chain{}, sets: map[chainKey]*set{}, load: loadSet}
	for _, step := range []struct {
		what    string
		message int
		into    func(family byte, a attributes) error
	}{
		{"chains", unix.NFT_MSG_GETCHAIN, rs.addChain},
		{"rules", unix.NFT_MSG_GETRULE, rs.addRule},
		{"sets", unix.NFT_MSG_GETSET, rs.addSet},
	} {
		messages, err := ask(step.message, unix.NFPROTO_UNSPEC)
		if err != nil {
			return nil, fmt.Errorf("nftables: read the %s: %w", step.what, err)
		}
		for _, m := range messages {
			if len(m) < headerLen {
				return nil, fmt.Errorf("nftables: read the %s: %d bytes: expected a header of %d", step.what, len(m), headerLen)
			}
			a, err := parse(m[headerLen:])
			if err != nil {
				return nil, fmt.Errorf("nftables: read the %s: %w", step.what, err)
			}
			if _, ours := families[m[0]]; !ours || slices.Contains(skip, families[m[0]]+" "+a.text(unix.NFTA_RULE_TABLE)) {
				continue
			}
			if err := step.into(m[0], a); err != nil {
				return nil, fmt.Errorf("nftables: read the %s: %w", step.what, err)
			}
		}
	}
	if err := rs.dropDormant(); err != nil {
		return nil, err
	}
	slices.SortStableFunc(rs.bases, func(a, b *chain) int { return int(int64(a.priority) - int64(b.priority)) })
	return rs, rs.readLegacy()
}

// dropDormant takes out the chains of tables that are switched off.
func (rs *Ruleset) dropDormant() error {
	messages, err := ask(unix.NFT_MSG_GETTABLE, unix.NFPROTO_UNSPEC)
	if err != nil {
		return fmt.Errorf("nftables: read the tables: %w", err)
	}
	for _, m := range messages {
		a, err := parse(m[min(headerLen, len(m)):])
		if err != nil {
			return fmt.Errorf("nftables: read the tables: %w", err)
		}
		if a.u32(unix.NFTA_TABLE_FLAGS)&unix.NFT_TABLE_F_DORMANT != 0 {
			rs.bases = slices.DeleteFunc(rs.bases, func(c *chain) bool { return c.family == m[0] && c.table == a.text(unix.NFTA_TABLE_NAME) })
		}
	}
	return nil
}

func (rs *Ruleset) addChain(family byte, a attributes) error {
	c := &chain{chainKey: chainKey{family, a.text(unix.NFTA_CHAIN_TABLE), a.text(unix.NFTA_CHAIN_NAME)}, kind: a.text(unix.NFTA_CHAIN_TYPE)}
	rs.chains[c.chainKey] = c
	if !a.has(unix.NFTA_CHAIN_HOOK) {
		return nil
	}
	h := a.nested(unix.NFTA_CHAIN_HOOK)
	c.base, c.hook, c.priority = true, Hook(h.u32(unix.NFTA_HOOK_HOOKNUM)), int32(h.u32(unix.NFTA_HOOK_PRIORITY))
	switch {
	case family == unix.NFPROTO_NETDEV:
		if c.hook += Ingress; c.hook != Ingress && c.hook != Egress {
			return nil
		}
	case family == unix.NFPROTO_INET && c.hook == inetIngress:
		c.hook = Ingress
	}
	if h.has(unix.NFTA_HOOK_DEV) {
		c.devices = append(c.devices, h.text(unix.NFTA_HOOK_DEV))
	}
	devices, err := list(h[hookDevices])
	for _, d := range devices {
		c.devices = append(c.devices, strings.TrimRight(string(d), "\x00"))
	}
	c.drop = a.has(unix.NFTA_CHAIN_POLICY) && a.u32(unix.NFTA_CHAIN_POLICY) == verdictDrop
	rs.bases = append(rs.bases, c)
	return err
}

func (rs *Ruleset) addRule(family byte, a attributes) error {
	c := rs.chains[chainKey{family, a.text(unix.NFTA_RULE_TABLE), a.text(unix.NFTA_RULE_CHAIN)}]
	if c == nil { // made since the chains were read
		return nil
	}
	r := rule{}
	if b := a[unix.NFTA_RULE_HANDLE]; len(b) == 8 {
		r.handle = binary.BigEndian.Uint64(b)
	}
	elements, err := parseList(a[unix.NFTA_RULE_EXPRESSIONS])
	if err != nil {
		return err
	}
	for _, at := range elements {
		r.exprs = append(r.exprs, expression{at.text(unix.NFTA_EXPR_NAME), at.nested(unix.NFTA_EXPR_DATA)})
	}
	c.rules = append(c.rules, r)
	return nil
}

// readLegacy looks which tables of the old iptables exist in this namespace, and may refuse something. Listing makes a table
// that refuses nothing, so existence says little; only iptables-legacy's own tools know what is in one.
func (rs *Ruleset) readLegacy() error {
	b, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the old iptables' tables: %w", err)
	}
	for _, table := range strings.Fields(string(b)) {
		out, err := exec.Command("iptables-legacy-save", "-t", table).Output()
		if err != nil || mayRefuse(string(out)) {
			rs.legacy = append(rs.legacy, table)
		}
	}
	return nil
}

// mayRefuse reads what iptables-save prints: a policy or a target other than those that surely let packets pass.
func mayRefuse(saved string) bool {
	for line := range strings.Lines(saved) {
		words := strings.Fields(line)
		switch {
		case len(words) > 1 && strings.HasPrefix(words[0], ":") && words[1] == "DROP":
			return true
		case len(words) == 0 || words[0] != "-A":
			continue
		}
		at := slices.Index(words, "-j") + 1
		if at > 0 && at < len(words) && !strings.Contains(saved, "\n:"+words[at]+" ") && !slices.Contains(passing, words[at]) &&
			!slices.Contains(harmless, words[at]) {
			return true
		}
	}
	return false
}

// passing are targets of iptables that refuse nothing by themselves.
var passing = []string{"ACCEPT", "RETURN", "MARK", "CONNMARK", "CT", "NOTRACK", "MASQUERADE", "SNAT", "DNAT", "REDIRECT"}
