package netfilter

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// set is a set or a map.
type set struct {
	chainKey
	flags    uint32
	keyLen   int
	fields   []int // of a concatenation, bytes, not yet rounded up to words
	loaded   bool
	elements []element
	catchAll *element
}

type element struct {
	key, keyEnd []byte
	end         bool // an interval ends before it
	data        attributes
	stateful    bool // it has a limit or a quota of its own
}

const (
	setConcat         = 2  // NFTA_SET_DESC_CONCAT
	setFieldLen       = 1  // NFTA_SET_FIELD_LEN
	elementKeyEnd     = 10 // NFTA_SET_ELEM_KEY_END
	elementExprs      = 11 // NFTA_SET_ELEM_EXPRESSIONS
	elementCatchAll   = 2  // NFT_SET_ELEM_CATCHALL
	lookupInverted    = 1  // NFT_LOOKUP_F_INV
	registerOfVerdict = unix.NFT_REG_VERDICT
)

func (rs *Ruleset) addSet(family byte, a attributes) error {
	s := &set{chainKey: chainKey{family, a.text(unix.NFTA_SET_TABLE), a.text(unix.NFTA_SET_NAME)},
		flags: a.u32(unix.NFTA_SET_FLAGS), keyLen: int(a.u32(unix.NFTA_SET_KEY_LEN))}
	fields, err := parseList(a.nested(unix.NFTA_SET_DESC)[setConcat])
	if err != nil {
		return err
	}
	for _, at := range fields {
		s.fields = append(s.fields, int(at.u32(setFieldLen)))
	}
	rs.sets[s.chainKey] = s
	return nil
}

// loadSet reads the elements of a set, of the namespace that the calling thread is in.
func loadSet(s *set) error {
	messages, err := ask(unix.NFT_MSG_GETSETELEM, s.family, nl.NewRtAttr(unix.NFTA_SET_ELEM_LIST_TABLE, nl.ZeroTerminated(s.table)),
		nl.NewRtAttr(unix.NFTA_SET_ELEM_LIST_SET, nl.ZeroTerminated(s.name)))
	if err != nil {
		return fmt.Errorf("set %s: %w", s.name, err)
	}
	for _, m := range messages {
		a, err := parse(m[min(headerLen, len(m)):])
		if err != nil {
			return fmt.Errorf("set %s: %w", s.name, err)
		}
		if err := s.add(a[unix.NFTA_SET_ELEM_LIST_ELEMENTS]); err != nil {
			return fmt.Errorf("set %s: %w", s.name, err)
		}
	}
	// In order, and where one interval begins at the end of another, the end first.
	slices.SortStableFunc(s.elements, func(x, y element) int {
		if c := bytes.Compare(x.key, y.key); c != 0 || x.end == y.end {
			return c
		}
		if x.end {
			return -1
		}
		return 1
	})
	return nil
}

func (s *set) add(elements []byte) error {
	all, err := parseList(elements)
	if err != nil {
		return err
	}
	for _, a := range all {
		flags := a.u32(unix.NFTA_SET_ELEM_FLAGS)
		e := element{key: a.nested(unix.NFTA_SET_ELEM_KEY)[unix.NFTA_DATA_VALUE], keyEnd: a.nested(elementKeyEnd)[unix.NFTA_DATA_VALUE],
			end: flags&unix.NFT_SET_ELEM_INTERVAL_END != 0, data: a.nested(unix.NFTA_SET_ELEM_DATA),
			stateful: a.has(unix.NFTA_SET_ELEM_EXPR) || a.has(elementExprs)}
		if flags&elementCatchAll != 0 {
			s.catchAll = &e
			continue
		}
		s.elements = append(s.elements, e)
	}
	return nil
}

// find looks a key up as the kernel does for this kind of set; nil for none.
func (s *set) find(key []byte) *element {
	found := s.catchAll
	for i := range s.elements {
		e := &s.elements[i]
		switch {
		case len(s.fields) > 1 && e.keyEnd != nil:
			if s.between(key, e) {
				return e
			}
		case s.flags&unix.NFT_SET_INTERVAL != 0 && len(s.fields) < 2:
			if bytes.Compare(e.key, key) > 0 {
				return found
			}
			if found = e; e.end {
				found = s.catchAll
			}
		case bytes.Equal(e.key, key):
			return e
		}
	}
	return found
}

// between compares field by field: each of a concatenation's fields has a range of its own, and begins at a word.
func (s *set) between(key []byte, e *element) bool {
	at := 0
	for _, n := range s.fields {
		if at+n > len(key) || at+n > len(e.key) || at+n > len(e.keyEnd) {
			return false
		}
		if bytes.Compare(key[at:at+n], e.key[at:at+n]) < 0 || bytes.Compare(key[at:at+n], e.keyEnd[at:at+n]) > 0 {
			return false
		}
		at += (n + 3) &^ 3
	}
	return true
}

func (e *evaluation) lookup(a attributes) (code int, target string) {
	s := e.rs.sets[chainKey{e.chain.family, e.chain.table, a.text(unix.NFTA_LOOKUP_SET)}]
	isMap := a.has(unix.NFTA_LOOKUP_DREG)
	fail := func(what string) (int, string) {
		e.doubted(what)
		switch {
		case isMap && a.u32(unix.NFTA_LOOKUP_DREG) == registerOfVerdict:
			return verdictOpaque, ""
		case isMap:
			return e.puzzle(a.u32(unix.NFTA_LOOKUP_DREG), 16, what), ""
		}
		return verdictContinue, ""
	}
	if s == nil {
		return fail("the set " + a.text(unix.NFTA_LOOKUP_SET) + ", which was made meanwhile")
	}
	if !s.loaded {
		if err := e.rs.load(s); err != nil {
			return fail(err.Error())
		}
		s.loaded = true
	}
	inverted := a.u32(unix.NFTA_LOOKUP_FLAGS)&lookupInverted != 0
	if len(s.elements) == 0 && s.catchAll == nil {
		return yes(inverted && !isMap), ""
	}
	key, missing, ok := e.get(a.u32(unix.NFTA_LOOKUP_SREG), s.keyLen)
	if !ok {
		return fail(missing)
	}
	found := s.find(key)
	if found != nil && found.stateful {
		e.doubted("a meter")
	}
	switch {
	case !isMap:
		return yes((found != nil) != inverted), ""
	case found == nil:
		return verdictBreak, ""
	case a.u32(unix.NFTA_LOOKUP_DREG) == registerOfVerdict:
		if code, target = verdict(found.data); code == verdictOpaque {
			e.doubted("a program decides (queue)")
		}
		return code, target
	}
	return e.put(a.u32(unix.NFTA_LOOKUP_DREG), found.data[unix.NFTA_DATA_VALUE]), ""
}
