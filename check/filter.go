package check

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// ownTable is the table that cni/server keeps in nftables.
const ownTable = "margay"

// baseChain is a chain of somebody else's that the kernel calls, with its rules.
type baseChain struct {
	*nftables.Chain
	rules []*nftables.Rule
}

func (c baseChain) String() string {
	return fmt.Sprintf("nftables chain %s of table %s %s", c.Name, familyNames[c.Table.Family], c.Table.Name)
}

func (c baseChain) drops() bool { return c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop }

var familyNames = map[nftables.TableFamily]string{nftables.TableFamilyIPv4: "ip", nftables.TableFamilyINet: "inet", nftables.TableFamilyNetdev: "netdev"}

// baseChains lists the base chains that IPv4 packets pass, those of iptables-nft among them.
func baseChains() ([]baseChain, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	chains, err := conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	var all []baseChain
	for _, c := range chains {
		if _, v4 := familyNames[c.Table.Family]; !v4 || c.Hooknum == nil || c.Table.Name == ownTable && c.Table.Family == nftables.TableFamilyINet {
			continue
		}
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return nil, fmt.Errorf("list nftables rules: %w", err)
		}
		all = append(all, baseChain{c, rules})
	}
	return all, nil
}

// forwardPolicy looks for a FORWARD that drops what no rule accepts, as Docker and many firewalls set it.
func (n *Node) forwardPolicy() Result {
	const name = "FORWARD policy"
	const do = "accept the pods' packets there, for instance: iptables -I FORWARD -i cali+ -j ACCEPT; iptables -I FORWARD -o cali+ -j ACCEPT"
	chains, err := baseChains()
	if err != nil {
		return unknown(name, err)
	}
	for _, c := range chains {
		if c.Table.Family == nftables.TableFamilyNetdev || *c.Hooknum != *nftables.ChainHookForward || !c.drops() {
			continue
		}
		switch {
		case len(c.rules) == 0:
			return Result{name, Fail, c.String() + " drops everything", do}
		case !acceptsPods(c.rules):
			return Result{name, Warn, fmt.Sprintf("%s drops what none of its %d rules accepts, and none is about cali*", c, len(c.rules)), do}
		}
	}
	legacy, err := n.legacyForward()
	if err != nil {
		return unknown(name, err)
	}
	if legacy != "" {
		return Result{name, Warn, legacy, strings.ReplaceAll(do, "iptables ", "iptables-legacy ")}
	}
	return ok(name, "no chain drops what is forwarded")
}

// acceptsPods reports whether a rule accepts what comes from or goes to the pods' interfaces, or everything.
func acceptsPods(rules []*nftables.Rule) bool {
	for _, r := range rules {
		accepts, conditions, pods := false, 0, false
		for _, e := range r.Exprs {
			switch e := e.(type) {
			case *expr.Verdict:
				accepts = e.Kind == expr.VerdictAccept
			case *expr.Counter, *expr.Meta:
			case *expr.Cmp:
				conditions++
				pods = pods || bytes.HasPrefix(e.Data, []byte("cali"))
			default:
				conditions++
			}
		}
		if accepts && (pods || conditions == 0) {
			return true
		}
	}
	return false
}

// legacyForward says what the old iptables does to forwarded packets, if that is a drop; "" if it is not.
func (n *Node) legacyForward() (string, error) {
	b, err := os.ReadFile(n.path("/proc/thread-self/net/ip_tables_names"))
	if errors.Is(err, fs.ErrNotExist) || err == nil && !strings.Contains("\n"+string(b), "\nfilter\n") {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	out, err := exec.Command("iptables-legacy", "-S", "FORWARD").Output()
	if err != nil {
		return "", fmt.Errorf("the old iptables has a filter table, and iptables-legacy, which lists it, cannot be run: %w", err)
	}
	text := string(out)
	if !strings.Contains(text, "-P FORWARD DROP") || strings.Contains(text, " cali+ ") {
		return "", nil
	}
	return "iptables-legacy: the policy of FORWARD is DROP, and no rule is about cali+", nil
}
