package netfilter

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzRules: a pod that may write its own rules may write any; here even such as no kernel would take.
func FuzzRules(f *testing.F) {
	names := []string{"immediate", "lookup", "cmp", "range", "bitwise", "byteorder", "meta", "payload", "ct", "fib", "exthdr", "notrack", "objref", "dynset",
		"limit", "reject", "nat", "masq", "redir", "match", "target", "numgen", "queue"}
	compat := []string{"tcp", "udp", "icmp", "mark", "multiport", "conntrack", "addrtype", "MARK", "REJECT", "DNAT"}
	f.Add([]byte{6, 1, 1, 0, 0, 0, 1, 2, 0, 0, 0, 4}, []byte{2, 3, 8, 0, 1, 0, 1, 0, 0, 0})
	f.Add([]byte{7, 1, 0, 0, 0, 1, 2, 0, 0, 0, 1, 3, 0, 0, 0, 12}, []byte{19, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		rs := &Ruleset{chains: map[chainKey]*chain{}, sets: map[chainKey]*set{}, load: func(s *set) error { return s.add(second) }}
		c := &chain{chainKey: chainKey{unix.NFPROTO_IPV4, "t", "c"}, base: true, hook: Forward}
		rs.chains[c.chainKey] = c
		rs.sets[chainKey{unix.NFPROTO_IPV4, "t", "s"}] = &set{chainKey: chainKey{unix.NFPROTO_IPV4, "t", "s"}, keyLen: 4, fields: []int{2, 2}}
		rs.bases = []*chain{c, c}
		for range 2 {
			r := rule{}
			for _, b := range [][]byte{first, second} {
				if len(b) == 0 {
					continue
				}
				e := expression{names[int(b[0])%len(names)], attributes{}}
				switch e.name {
				case "match", "target":
					e.attrs[unix.NFTA_MATCH_NAME] = []byte(compat[len(b)%len(compat)])
					e.attrs[unix.NFTA_MATCH_REV] = binary.BigEndian.AppendUint32(nil, uint32(len(first)%4))
					e.attrs[unix.NFTA_MATCH_INFO] = b
				case "lookup":
					e.attrs[unix.NFTA_LOOKUP_SET] = []byte("s\x00")
				}
				for rest := b[1:]; len(rest) >= 5; rest = rest[5:] {
					if _, taken := e.attrs[uint16(rest[0]%8)]; !taken {
						e.attrs[uint16(rest[0]%8)] = rest[1:]
					}
				}
				r.exprs = append(r.exprs, e)
			}
			c.rules = append(c.rules, r)
		}
		out := rs.Hook(Forward, &Packet{IP: append([]byte{}, udp...), State: StateNew})
		if out.Verdict == Drop && out.Where == "" {
			t.Errorf("dropped nowhere: %+v", out)
		}
	})
}
